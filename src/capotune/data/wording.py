"""What messages about data are made of: bad rows with their places, near names, short lists, excerpts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Final

from capotune.data.table import Origin
from capotune.errors import SHOWN as LONGEST
from capotune.errors import DataError, cut, quoted
from capotune.memory_table import Unreadable

__all__ = [
    "SHOWN",
    "bad_rows",
    "count",
    "did_you_mean",
    "excerpt",
    "first_line",
    "kind_of",
    "quoted",
    "shorten",
    "type_name",
]

SHOWN: Final = 5
"""How many bad rows one message names."""

_KINDS: Final = {
    str: "text", list: "a list", dict: "an object", bool: "true or false", int: "a number", float: "a number",
}  # fmt: skip


def bad_rows(source: Origin, summary: str, bad: Mapping[int, str], advice: str, number: int | None = None) -> DataError:
    """The error for rows that cannot be used: ``summary``, the first of ``bad`` (line → why) with their places, and
    ``advice``. ``number``: how many there are, where ``bad`` has the first alone."""
    shown = [f"  {source.at(line)}: {cut(why, LONGEST)}" for line, why in list(bad.items())[:SHOWN]]
    number = len(bad) if number is None else number
    more = [f"  … and {number - SHOWN:,} more"] if number > SHOWN else []
    return DataError("\n".join([f"{summary}:", *shown, *more]), where=str(source), advice=advice)


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """``Did you mean 'tickets.csv'? `` when something in ``known`` is spelled nearly like ``name``, else nothing."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.7)
    return f"Did you mean {' or '.join(quoted(by_lower[match]) for match in near)}? " if near else ""


def shorten(names: Sequence[str] | Mapping[str, Any], limit: int = 8) -> str:
    """Names in quotes, separated by commas; of a long list the first ones and how many more there are."""
    shown = ", ".join(map(quoted, list(names)[:limit]))
    return shown + (f" … and {len(names) - limit:,} more" if len(names) > limit else "")


def count(number: int, noun: str) -> str:
    """``1 line``, ``2 lines``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def kind_of(value: object) -> str:
    """What a value is, in words that a reader of JSON knows."""
    return "missing" if value is None else _KINDS.get(type(value), type_name(value))


def type_name(value: object) -> str:
    """The name of a value's type; of one in memory that could not be read, of the type it had there."""
    return value.kind if isinstance(value, Unreadable) else type(value).__name__


def excerpt(text: str, limit: int = 60) -> str:
    """The start of a line, with control characters spelled out so that they neither vanish nor reach a terminal."""
    text = text.rstrip("\r\n")
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:limit])
    return f"«{shown}{'…' if len(text) > limit else ''}»"


def first_line(error: Exception) -> str:
    """The first line of an error's text that is not blank."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
