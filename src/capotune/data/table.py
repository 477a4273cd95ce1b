"""Rows as a reader gives them, and where each of them stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload

__all__ = ["ColumnRows", "Origin", "Row", "RowsBuilder", "Table", "TakesRows"]

Row = dict[str, Any]
_SHARED = 100_000
"""Different values of a column up to which equal ones are one object: there are few labels."""


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


class ColumnRows(Sequence[Row]):
    """Rows that all have the same columns, held column by column: a dict is made of one when it is asked for. A
    million rows of two columns take 300 MB less than as dicts."""

    def __init__(self, columns: Mapping[str, list[Any]]) -> None:
        self._columns = columns

    def column(self, name: str) -> list[Any] | None:
        """The values of a column; None: no row has it."""
        return self._columns.get(name)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()), []))

    @overload
    def __getitem__(self, at: int) -> Row: ...

    @overload
    def __getitem__(self, at: slice) -> list[Row]: ...

    def __getitem__(self, at: int | slice) -> Row | list[Row]:
        if isinstance(at, slice):
            return [self[place] for place in range(*at.indices(len(self)))]
        return {name: values[at] for name, values in self._columns.items()}

    def __iter__(self) -> Iterator[Row]:
        names = list(self._columns)
        return (dict(zip(names, values, strict=True)) for values in zip(*self._columns.values(), strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class TakesRows(Protocol):
    """Where a reader puts the rows that it reads, one after the other."""

    @property
    def lines(self) -> Sequence[int]:
        """The line of each."""

    def __len__(self) -> int: ...

    def add(self, line: int, names: Sequence[str], values: Sequence[Any]) -> None:
        """Take one more row, with its line, column names and values."""

    def rows(self) -> Sequence[Row]:
        """All that were taken."""


class RowsBuilder:
    """Takes rows one after the other: ``ColumnRows`` comes of them where all have the columns of the first."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._columns: list[list[Any]] = []
        self._known: list[dict[Any, Any]] = []
        self._dicts: list[Row] | None = None
        self.lines: list[int] = []
        """The line of each."""

    def __len__(self) -> int:
        return len(self.lines)

    def add(self, line: int, names: Sequence[str], values: Sequence[Any]) -> None:
        """Take one more row."""
        names = tuple(names)
        if not self.lines:
            self._names = names
            self._columns, self._known = [[] for _ in names], [{} for _ in names]
        self.lines.append(line)
        if self._dicts is None and (names != self._names or not names):
            self._dicts = list(ColumnRows(dict(zip(self._names, self._columns, strict=True))))
            self._dicts += [{} for _ in range(len(self) - 1 - len(self._dicts))]
        if self._dicts is not None:
            self._dicts.append(dict(zip(names, values, strict=True)))
            return
        for column, known, value in zip(self._columns, self._known, values, strict=True):
            shared = value
            if isinstance(value, str) and len(known) < _SHARED:
                shared = known.setdefault(value, value)
            column.append(shared)

    def rows(self) -> Sequence[Row]:
        """All that were taken."""
        return ColumnRows(dict(zip(self._names, self._columns, strict=True))) if self._dicts is None else self._dicts


@dataclass(frozen=True)
class Table:
    """The rows of one source.

    Attributes:
        columns: column names in the order of the source; for JSON every key that any row has.
        rows: one dict a row, made when it is asked for where all have the same columns (``ColumnRows``). Values are
            ``str`` in csv and tsv, else what the format holds. A JSON row has only the keys it was written with.
        lines: for each row the line it starts on, counted from 1; in parquet and on the hub the row's number, counted
            from 1; in memory its position, counted from 0.
        source: where they are from.
        nulls_are_absent: every row has every column, so that None may mean that a row was written without it.
    """

    columns: list[str]
    rows: Sequence[Row]
    lines: Sequence[int]
    source: Origin
    nulls_are_absent: bool = False

    def column(self, name: str) -> list[Any]:
        """Each row's value of a column; None where a row lacks it."""
        values = self.rows.column(name) if isinstance(self.rows, ColumnRows) else None
        return [row.get(name) for row in self.rows] if values is None else values
