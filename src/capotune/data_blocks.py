"""What a task says of its data, as blocks of four kinds: plain data, which each face draws in its own way.

A task makes them from its data report (``Task.describe_data``); whoever draws them knows no task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from capotune.sections import Part

__all__ = ["Bar", "Bars", "Block", "Counts", "Finding", "Findings", "MarkedRow", "MarkedRows"]

SHOWN_ENDS: Final = 5


@dataclass(frozen=True)
class Finding:
    """A fact about the data in a sentence or less."""

    name: str
    """One word or two that it begins with: ``Rows``."""
    text: str
    needs_a_look: bool = False
    """Whether something is likely to be wrong."""


@dataclass(frozen=True)
class Findings:
    """Facts under each other."""

    findings: list[Finding]


@dataclass(frozen=True)
class Counts:
    """A table of names, and numbers of each. Of a long one only the first and the last rows are shown."""

    columns: list[str]
    """Headings, that of the names first."""
    rows: list[list[str]]

    @property
    def hidden(self) -> int:
        """How many rows between the first and the last are left out: none, or at least two."""
        beyond = len(self.rows) - 2 * SHOWN_ENDS
        return beyond if beyond > 1 else 0

    @property
    def ends(self) -> tuple[list[list[str]], list[list[str]]]:
        """The rows before those left out and the rows after them."""
        if not self.hidden:
            return self.rows, []
        return self.rows[:SHOWN_ENDS], self.rows[-SHOWN_ENDS:]


@dataclass(frozen=True)
class Bar:
    """How often one range of values occurs."""

    name: str
    count: int
    needs_a_look: bool = False


@dataclass(frozen=True)
class Bars:
    """A histogram."""

    columns: tuple[str, str]
    """Headings of the ranges and of the counts."""
    bars: list[Bar]


@dataclass(frozen=True)
class MarkedRow:
    """A row as the model gets it; a part with a ``mark`` stands out."""

    title: str
    parts: list[Part]


@dataclass(frozen=True)
class MarkedRows:
    """Some rows, with what is marked in them."""

    title: str
    marked: str
    """What the marked parts are: ``what is in the loss``."""
    unmarked: str
    """What the others are."""
    rows: list[MarkedRow]


Block = Findings | Counts | Bars | MarkedRows
