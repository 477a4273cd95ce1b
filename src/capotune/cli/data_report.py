"""A task's words on its data, drawn on the terminal: what needs a look in yellow, tables, bars, and marked rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import singledispatch
from typing import Final

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from capotune.data_blocks import Bars, Block, Counts, Findings, MarkedRows
from capotune.sections import Part

__all__ = ["bar", "draw"]

BAR: Final = 30  # columns of the longest bar


def draw(blocks: Iterable[Block]) -> RenderableType:
    """The blocks under each other, to be given to a rich ``Console``."""
    parts: list[RenderableType] = []
    for block in blocks:
        parts += ["", _drawn(block)] if parts else [_drawn(block)]
    return Group(*parts)


@singledispatch
def _drawn(block: Block) -> RenderableType:
    raise TypeError(f"no block to draw: {block!r}")


@_drawn.register
def _findings(block: Findings) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for one in block.findings:
        table.add_row(Text(one.name), Text(one.text, style="yellow" if one.needs_a_look else ""))
    return table


@_drawn.register
def _counts(block: Counts) -> RenderableType:
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    name, *numbers = block.columns
    table.add_column(name, overflow="ellipsis", no_wrap=True, max_width=50)
    for number in numbers:
        table.add_column(number, justify="right")
    first, last = block.ends
    for row in first:
        table.add_row(*map(Text, row))
    if block.hidden:
        table.add_row(Text(f"… and {block.hidden:,} more", style="dim"), *[""] * len(numbers))
    for row in last:
        table.add_row(*map(Text, row))
    return table


@_drawn.register
def _bars(block: Bars) -> RenderableType:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for heading in block.columns:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    most = max((one.count for one in block.bars), default=1)
    for one in block.bars:
        drawn = Text(bar(one.count / most), style="yellow" if one.needs_a_look else "cyan")
        table.add_row(one.name, f"{one.count:,}", drawn)
    return table


def bar(share: float) -> str:
    """A bar in eighths of a column; what is not nothing shows."""
    eighths = max(round(8 * BAR * share), share > 0)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


@_drawn.register
def _marked_rows(block: MarkedRows) -> RenderableType:
    """The marks stand there in colour too, so that nothing hangs on it."""
    legend = Text.assemble((f"⟦{block.marked}⟧", "green"), ", ", (block.unmarked, "dim"), ", ↵ a line break")
    lines: list[RenderableType] = [Text.assemble((f"{block.title}: ", "bold"), legend)]
    for row in block.rows:
        lines += [Text(row.title), Padding(_in_colour(row.parts), (0, 0, 0, 2))]
    return Group(*lines)


def _in_colour(parts: Sequence[Part]) -> Text:
    text = Text(overflow="fold")
    for part in parts:
        shown = _visible(part.text)
        text.append(f"⟦{shown}⟧" if part.mark else shown, "green" if part.mark else "dim")
    return text


def _visible(text: str) -> str:
    """Line breaks and what else would vanish or reach the terminal, spelled out."""
    signs = {"\n": "↵", "\t": "⇥"}
    return "".join(signs.get(char) or (char if char.isprintable() else ascii(char)[1:-1]) for char in text)
