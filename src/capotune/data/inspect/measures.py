"""How many rows something is true of, and how long texts are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from capotune.data.table import Origin

__all__ = ["Lengths", "Lines", "lengths_of", "lines_where"]

SHOWN_LINES: Final = 5


class PlacedRows(Protocol):
    """Rows that know where they stand."""

    @property
    def lines(self) -> list[int]:
        """The line of each row."""

    @property
    def source(self) -> Origin:
        """Where they are from."""


@dataclass(frozen=True)
class Lines:
    """Rows that something is true of: how many, and the lines of the first of them (``unit``: line or row)."""

    count: int
    first: list[int]
    unit: str = "line"


@dataclass(frozen=True)
class Lengths:
    """Texts in tokens; ``p95``: 95 % of the texts are at most this long."""

    min: int
    median: int
    p95: int
    max: int


def lengths_of(tokens: Sequence[int]) -> Lengths:
    """How lengths spread. Each of the four is a length that occurs."""
    low, median, p95, high = np.percentile(tokens, [0, 50, 95, 100], method="inverted_cdf")
    return Lengths(int(low), int(median), int(p95), int(high))


def lines_where(rows: PlacedRows, chosen: Iterable[bool]) -> Lines:
    """Those of the rows that are ``chosen``."""
    found = [line for line, is_chosen in zip(rows.lines, chosen, strict=True) if is_chosen]
    return Lines(len(found), found[:SHOWN_LINES], rows.source.unit)
