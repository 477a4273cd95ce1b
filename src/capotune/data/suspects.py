"""What was found by looking for wrong labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["LabelCheck", "Suspect"]


@dataclass(frozen=True)
class Suspect:
    """A row whose label is likely to be another one."""

    row: int
    """Its position among all rows, from 0."""
    line: int
    """Where it stands in its file (``Table.lines``)."""
    text: Any
    label: str
    suggestion: str
    """The label that is most probable."""
    probability: float
    """Of the suggestion, from 0 to 1, by a head that has not seen the row."""
    label_probability: float
    """Of the label that the row has."""


@dataclass(frozen=True)
class LabelCheck:
    """Labels that are likely to be wrong. ``dataclasses.asdict`` gives plain JSON."""

    source: str
    unit: str
    """What the rows are counted in: ``line`` or ``row``."""
    rows: int
    """Rows whose label was checked."""
    suspects: list[Suspect]
    """Every row for which another label is more probable, first the one whose own label is least probable."""
    estimated: int
    """How many labels are taken to be wrong (confident learning)."""
    unchecked: list[str] = field(default_factory=list)
    """Labels of one text alone, of which nothing can be said."""
