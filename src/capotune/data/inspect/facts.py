"""A data report in words: what every face shows of it, a line each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from capotune.data.inspect.measures import Lengths, Lines

__all__ = ["Check", "Fact", "rows_found", "tokens_fact"]

Fact = tuple[str, str, bool]
"""Name, text, and whether it deserves a look."""
Check = tuple[str, str, str]
"""Name of a fact, the report's field that holds rows (``Lines``), and what is true of them; ``{limit}``: in tokens."""


def tokens_fact(lengths: Lengths, max_length: int) -> Fact:
    """How long the training texts are."""
    low, median, p95, high = lengths.min, lengths.median, lengths.p95, lengths.max
    spread = f"{high:,} a text" if low == high else (
        f"{low:,} to {high:,} a text, half at most {median:,}, 95 % at most {p95:,}"
    )  # fmt: skip
    return "Tokens", f"{spread}; the model reads {max_length:,}", False


def rows_found(report: Any, checks: Sequence[Check], nothing: str) -> Iterable[Fact]:
    """The checks that found rows in ``report``; where none did, that ``nothing`` was found."""
    found = False
    limit = f"{report.max_length:,} tokens"
    for name, field, what in checks:
        lines: Lines = getattr(report, field)
        if lines.count:
            found = True
            yield name, f"{lines.count:,} {what.format(limit=limit)} ({_first(lines)})", True
    if not found:
        yield "Checked", nothing, False


def _first(lines: Lines) -> str:
    noun = lines.unit if lines.count == 1 else f"{lines.unit}s"
    return f"{noun} {', '.join(map(str, lines.first))}{', …' if lines.count > len(lines.first) else ''}"
