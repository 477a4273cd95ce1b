"""Rows that the caller holds in memory: a list of dicts, a pandas DataFrame, or a dataset of the datasets library.

pandas and datasets are recognised by the names of their types and never imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from capotune.data.columns import refuse_duplicates
from capotune.data.readers.hub import join_splits
from capotune.data.table import Origin, Table
from capotune.data.wording import bad_rows, count, quoted, shorten
from capotune.errors import DataError
from capotune.memory_table import MemoryTable, Unreadable

__all__ = ["as_source", "table_of"]

ALLOWED: Final = (
    "a path, a dataset id on the hub, a list of dicts, a pandas DataFrame, or a Dataset or DatasetDict of the datasets "
    "library"
)
_MISSING: Final = ("NAType", "NaTType")  # pandas' marks beside NaN


def as_source(value: object, role: str = "data") -> str | MemoryTable:
    """What settings hold for what a caller gave as ``role`` (``data`` or ``test``).

    NaN and pandas' other marks of missing values become None. A ``DatasetDict`` becomes one table with a column
    ``split``; a ``ClassLabel`` column holds its names.

    Raises:
        DataError: it is of another type, empty, or has rows or columns that do not fit.
    """
    if isinstance(value, str | MemoryTable):
        return value
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    if isinstance(value, list | tuple):
        return _from_list(value, role)
    if _is_a(value, "pandas", "DataFrame"):
        return _from_frame(value, role)
    if _is_a(value, "datasets", "Dataset") or _is_a(value, "datasets", "DatasetDict"):
        return _from_datasets(value, role)
    raise DataError(
        f"`{role}` of the type {type(value).__name__} is not read.",
        allowed=ALLOWED,
        advice="Make a list of dicts of it, one for each row.",
    )


def table_of(memory: MemoryTable, limit: int | None = None) -> Table:
    """The table of rows in memory; a row's line is its position, counted from 0."""
    rows = memory.rows[:limit]
    origin = Origin(str(memory), memory.row)
    return Table(memory.columns, rows, list(range(len(rows))), origin, memory.nulls_are_absent)


def _is_a(value: object, library: str, name: str) -> bool:
    """Whether the value's type, or one it inherits from, is ``library``'s ``name``."""
    return any(cls.__name__ == name and cls.__module__.split(".")[0] == library for cls in type(value).__mro__)


def _from_list(rows: list[Any] | tuple[Any, ...], role: str) -> MemoryTable:
    memory = MemoryTable("list", role, [], [_plain(row) if isinstance(row, Mapping) else row for row in rows])
    bad = {at: why for at, row in enumerate(rows) if (why := _why_no_row(row))}
    if bad:
        summary = f"{count(len(bad), 'row')} cannot be read as a dict of columns"
        advice = 'Allowed: one dict for each row, like {"text": "…", "label": "…"}.'
        raise bad_rows(Origin(str(memory), memory.row), summary, bad, advice)
    memory.columns.extend(dict.fromkeys(name for row in rows for name in row))
    return _checked(memory)


def _why_no_row(row: object) -> str | None:
    if not isinstance(row, Mapping):
        return f"not a dict but {type(row).__name__}"
    other = next((name for name in row if not isinstance(name, str)), None)
    return None if other is None else f"a column is named {quoted(other)}, which is no text"


def _from_frame(frame: Any, role: str) -> MemoryTable:
    named = MemoryTable("DataFrame", role, [], [{}] * len(frame))
    columns = list(frame.columns)
    if other := [name for name in columns if not isinstance(name, str)]:
        raise DataError(
            f"a column is named {quoted(other[0])}, which is no text.",
            where=str(named),
            advice="Name the columns, as in: frame.columns = ['text', 'label']",
        )
    refuse_duplicates(columns, str(named))
    rows = [_plain(row) for row in frame.to_dict("records")]
    return _checked(MemoryTable("DataFrame", role, columns, rows, nulls_are_absent=True))


def _from_datasets(dataset: Any, role: str) -> MemoryTable:
    is_one = _is_a(dataset, "datasets", "Dataset")
    kind = "Dataset" if is_one else "DatasetDict"
    columns, rows = join_splits({"": dataset} if is_one else dict(dataset), f"`{role}` in memory", None)
    return _checked(MemoryTable(kind, role, columns, [_plain(row) for row in rows], nulls_are_absent=True))


def _checked(memory: MemoryTable) -> MemoryTable:
    """The same rows; ``DataError`` when there are none, or when text has half of a two-part character."""
    if not memory.rows:
        held = f", only the columns {shorten(memory.columns)}" if memory.columns else ""
        raise DataError(f"holds no rows{held}.", where=str(memory), advice="Add rows, or give other data.")
    bad = {at: "text that is not UTF-8" for at, row in enumerate(memory.rows) if not _is_utf8(row)}
    if bad:
        summary = f"{count(len(bad), 'row')} cannot be read as text"
        raise bad_rows(Origin(str(memory), memory.row), summary, bad, "Decode them anew, from the right encoding.")
    return memory


def _is_utf8(value: Any) -> bool:
    if isinstance(value, str):
        return value.isascii() or not any("\ud800" <= char <= "\udfff" for char in value)
    if isinstance(value, dict):
        return all(_is_utf8(inner) for item in value.items() for inner in item)
    return all(map(_is_utf8, value)) if isinstance(value, list) else True


def _plain(value: Any) -> Any:
    """The value as JSON would give it back; ``Unreadable`` for what JSON has no form for."""
    if value is None or type(value) in (str, bool, int):
        return value
    if isinstance(value, float):
        return None if np.isnan(value) else float(value)
    if isinstance(value, Mapping):
        return {name if isinstance(name, str) else str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufUO":
        return _plain(value.tolist())
    if isinstance(value, str | int):  # of a type that inherits from these
        return str(value) if isinstance(value, str) else int(value)
    return None if type(value).__name__ in _MISSING else Unreadable(type(value).__name__)
