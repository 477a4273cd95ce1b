"""Rows as a reader gives them, and where each of them stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Origin", "Table"]


@dataclass(frozen=True)
class Origin:
    """Where rows are from, as messages name it; ``str`` gives the name.

    Attributes:
        name: the file or hub id as it was given, or ``data in memory (list of 120 rows)``.
        row: what a row in memory is called before its position (``row``, ``test row``); None: the rows are a file's,
            and are named by their line.
    """

    name: str
    row: str | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def unit(self) -> str:
        """What the rows are counted in: ``line`` or ``row``."""
        return "row" if self.row else "line"

    def at(self, line: int) -> str:
        """Where a row stands: ``tickets.csv:3``, or ``row 3``."""
        return f"{self.row} {line}" if self.row else f"{self.name}:{line}"


@dataclass(frozen=True)
class Table:
    """The rows of one source.

    Attributes:
        columns: column names in the order of the source; for JSON every key that any row has.
        rows: one dict a row. Values are ``str`` in csv and tsv, else what the format holds. A JSON row has only the
            keys it was written with.
        lines: for each row the line it starts on, counted from 1; in parquet and on the hub the row's number, counted
            from 1; in memory its position, counted from 0.
        source: where they are from.
        nulls_are_absent: every row has every column, so that None may mean that a row was written without it.
    """

    columns: list[str]
    rows: list[dict[str, Any]]
    lines: list[int]
    source: Origin
    nulls_are_absent: bool = False
