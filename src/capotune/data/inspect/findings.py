"""Findings that data reports have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from capotune.data.columns import COMPLETION_NAMES, CONTEXT_NAMES, TEXT_NAMES, find_column
from capotune.data.inspect.measures import Lengths, Lines
from capotune.data.wording import shorten
from capotune.data_blocks import Finding

__all__ = ["Check", "columns_not_used", "rows_found", "rows_lost", "token_lengths"]

_CONTENT: Final = (*TEXT_NAMES, *CONTEXT_NAMES, *COMPLETION_NAMES, "instruction", "system", "system_prompt")

Check = tuple[str, str, str]
"""Name of a finding, the report's field that holds rows (``Lines``), what is true of them; ``{limit}``: in tokens."""


def token_lengths(lengths: Lengths, max_length: int, base_length: int) -> Finding:
    """How long the training texts are, how much of one is read, and how much the base takes."""
    low, median, p95, high = lengths.min, lengths.median, lengths.p95, lengths.max
    spread = f"{high:,} a text" if low == high else (
        f"{low:,} to {high:,} a text, half at most {median:,}, 95 % at most {p95:,}"
    )  # fmt: skip
    more = f" (max_length) of the {base_length:,} that the base takes" if base_length > max_length else ""
    return Finding("Tokens", f"{spread}; the model reads {max_length:,}{more}")


def columns_not_used(names: Sequence[str]) -> Iterable[Finding]:
    """The columns that are not read; one whose name says that it holds text needs a look."""
    if names:
        holds_text = any(find_column([name], _CONTENT) for name in names)
        yield Finding("Not used", f"the column{'s' * (len(names) > 1)} {shorten(names)}", holds_text)


def rows_found(report: Any, checks: Sequence[Check], nothing: str) -> Iterable[Finding]:
    """The checks that found rows in ``report``; where none did, that ``nothing`` was found."""
    found = False
    limit = f"{report.max_length:,} tokens"
    for name, field, what in checks:
        lines: Lines = getattr(report, field)
        if lines.count:
            found = True
            yield Finding(name, f"{lines.count:,} {what.format(limit=limit)} ({_first(lines)})", needs_a_look=True)
    if not found:
        yield Finding("Checked", nothing)


def rows_lost(found: Iterable[tuple[Lines, str]], rows: int) -> list[str]:
    """A sentence for each kind of rows to be scored, of ``rows`` in all, that are there; what is true of them follows
    their number."""
    return [f"{lines.count:,} of {rows:,} rows {what} ({_first(lines)})." for lines, what in found if lines.count]


def _first(lines: Lines) -> str:
    noun = lines.unit if lines.count == 1 else f"{lines.unit}s"
    return f"{noun} {', '.join(map(str, lines.first))}{', …' if lines.count > len(lines.first) else ''}"
