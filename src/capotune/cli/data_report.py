"""A data report on the terminal: facts, what needs a look in yellow, and labels, or lengths and some rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

__all__ = ["draw"]

Report = Mapping[str, Any]
"""A report of ``capotune.data.inspect`` as plain JSON."""
Fact = tuple[str, str, bool]
"""Name, value, and whether it deserves a look."""

SHOWN_LABELS: Final = 5  # biggest, and as many smallest
BAR: Final = 30  # columns of the longest bar


def draw(report: Report, facts: Iterable[Fact]) -> RenderableType:
    """The report, to be given to a rich ``Console``: its ``facts``, counts of names, lengths, and some rows."""
    parts: list[RenderableType] = [_table(facts)]
    for name, values in report.items():
        if isinstance(values, list) and values and set(values[0]) == {"name", "train", "test"}:
            parts += ["", _counts(name, values)]
    if len(report.get("bins", [])) > 1:
        parts += ["", _histogram(report)]
    return Group(*parts, *(["", *_sample_rows(report)] if "samples" in report else []))


def _table(facts: Iterable[Fact]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value, needs_a_look in facts:
        table.add_row(Text(name), Text(value, style="yellow" if needs_a_look else ""))
    return table


# Names and how often they occur


def _counts(what: str, labels: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    table.add_column(what.removesuffix("s").capitalize(), overflow="ellipsis", no_wrap=True, max_width=50)
    table.add_column("Train", justify="right")
    table.add_column("Test", justify="right")
    hidden = len(labels) - 2 * SHOWN_LABELS
    for position, label in enumerate(labels):
        if hidden <= 1 or position < SHOWN_LABELS or position >= len(labels) - SHOWN_LABELS:
            table.add_row(Text(label["name"]), f"{label['train']:,}", f"{label['test']:,}")
        elif position == SHOWN_LABELS:
            table.add_row(Text(f"… and {hidden:,} more", style="dim"), "", "")
    return table


# Lengths, and rows as the model gets them


def _histogram(report: Report) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("Tokens", justify="right", no_wrap=True)
    table.add_column("Rows", justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    most = max(one["rows"] for one in report["bins"])
    something_is_cut = report["train_without_loss"]["count"] + report["train_answers_cut"]["count"]
    for one in report["bins"]:
        style = "yellow" if something_is_cut and one["low"] >= report["max_length"] else "cyan"
        bar = Text(_bar(one["rows"] / most), style=style)
        table.add_row(f"{one['low']:,}–{one['high']:,}", f"{one['rows']:,}", bar)
    return table


def _bar(share: float) -> str:
    """A bar in eighths of a column; what is not nothing shows."""
    eighths = max(round(8 * BAR * share), share > 0)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _sample_rows(report: Report) -> Iterable[RenderableType]:
    """Some rows. The marks stand there in colour too, so that nothing hangs on it."""
    legend = Text.assemble(("⟦what is in the loss⟧", "green"), ", ", ("what is only read", "dim"), ", ↵ a line break")
    yield Text.assemble(("Rows as the model gets them: ", "bold"), legend)
    for row in report["samples"]:
        part = ""
        if row["tokens"] > report["max_length"]:
            cut = f", cut to {report['max_length']:,}"
            part = f", the first of {row['windows']:,} windows" if row["windows"] > 1 else cut
        yield Text(f"{row['unit'].capitalize()} {row['line']}, {row['tokens']:,} tokens{part}")
        yield Padding(_in_colour(row["spans"]), (0, 0, 0, 2))


def _in_colour(spans: Sequence[Mapping[str, Any]]) -> Text:
    text = Text(overflow="fold")
    for span in spans:
        shown = _visible(span["text"])
        text.append(f"⟦{shown}⟧" if span["in_loss"] else shown, "green" if span["in_loss"] else "dim")
    return text


def _visible(text: str) -> str:
    """Line breaks and what else would vanish or reach the terminal, spelled out."""
    signs = {"\n": "↵", "\t": "⇥"}
    return "".join(signs.get(char) or (char if char.isprintable() else ascii(char)[1:-1]) for char in text)
