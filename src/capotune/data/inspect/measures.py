"""How many rows something is true of, and how long texts are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from capotune.data.table import Origin
from capotune.data.text_columns import Text

__all__ = ["Counted", "Lengths", "Lines", "lengths_of", "lines_where", "rows_to_count"]

MOST_COUNTED: Final = 50_000
LONGEST_COUNTED: Final = 5_000

SHOWN_LINES: Final = 5


class PlacedRows(Protocol):
    """Rows that know where they stand."""

    @property
    def lines(self) -> Sequence[int]:
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


@dataclass(frozen=True)
class Counted:
    """Tokens of some of many texts: of ``drawn`` of them taken at random, and then of the longest others."""

    rows: NDArray[np.int64]
    drawn: int


def rows_to_count(texts: Sequence[Text], seed: int) -> Counted | None:
    """Texts whose tokens say enough of all: none are chosen (None) where there are few."""
    if len(texts) <= MOST_COUNTED:
        return None
    sizes: Iterable[int] = map(len, texts)
    if not isinstance(texts[0], str):
        sizes = (sum(map(len, pair)) for pair in texts)
    size = np.fromiter(sizes, dtype=np.int64, count=len(texts))
    drawn = np.random.default_rng(seed).choice(len(texts), MOST_COUNTED - LONGEST_COUNTED, replace=False)
    longest = np.argpartition(size, -LONGEST_COUNTED)[-LONGEST_COUNTED:]
    return Counted(np.concatenate([drawn, np.setdiff1d(longest, drawn)]), len(drawn))


def lengths_of(tokens: Sequence[int] | NDArray[np.int64], drawn: int | None = None) -> Lengths:
    """How lengths spread. Each of the four is a length that occurs; the middle ones among the first ``drawn`` where not
    all were drawn at random."""
    median, p95 = np.percentile(tokens[:drawn], [50, 95], method="inverted_cdf")
    return Lengths(int(np.min(tokens)), int(median), int(p95), int(np.max(tokens)))


def lines_where(rows: PlacedRows, chosen: Iterable[bool] | NDArray[np.bool_]) -> Lines:
    """Those of the rows that are ``chosen``, of which there are as many; else a ``ValueError``."""
    mask = chosen if isinstance(chosen, np.ndarray) else np.fromiter(chosen, dtype=bool)
    if len(mask) != len(rows.lines):
        raise ValueError(f"{len(mask)} values for {len(rows.lines)} rows")
    found = np.flatnonzero(mask)
    return Lines(len(found), [rows.lines[row] for row in found[:SHOWN_LINES].tolist()], rows.source.unit)
