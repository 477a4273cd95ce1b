"""Rows that a caller holds in memory, as settings hold them where they otherwise hold a path.

``data.readers.memory`` makes one of a list of dicts, a DataFrame or a ``datasets`` dataset. A record of the settings
names it and its content's sha256; the rows themselves go along only in the request to a worker process.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator

__all__ = ["DataSource", "MemoryTable", "Unreadable", "as_unreadable", "from_json"]

_PACKED = "memory_table"
_UNREADABLE = "\0unreadable"  # no column is called so


@dataclass(frozen=True)
class Unreadable:
    """Stands in the place of a value that is neither text, number, truth value, list nor dict; ``kind``: its type."""

    kind: str

    def __repr__(self) -> str:
        return f"<{self.kind}>"


@dataclass(frozen=True)
class MemoryTable:
    """Rows in memory; ``str`` gives the name that messages and records use.

    Attributes:
        kind: what they were: ``list``, ``DataFrame``, ``Dataset`` or ``DatasetDict``.
        role: the setting that holds them, ``data`` or ``test``.
        columns: column names in their order.
        rows: one dict a row, of JSON's values and ``Unreadable``.
        nulls_are_absent: every row has every column, so that None may mean that a row was written without it.
    """

    kind: str
    role: str
    columns: list[str] = field(repr=False)
    rows: list[dict[str, Any]] = field(repr=False)
    nulls_are_absent: bool = False

    def __str__(self) -> str:
        data = "data" if self.role == "data" else f"{self.role} data"
        return f"{data} in memory ({self.kind} of {len(self.rows):,} {'row' if len(self.rows) == 1 else 'rows'})"

    @property
    def row(self) -> str:
        """What messages call a row of it before its position."""
        return "row" if self.role == "data" else f"{self.role} row"

    @cached_property
    def sha256(self) -> str:
        """Hash of columns and rows."""
        return hashlib.sha256(_dumps([self.columns, self.rows]).encode()).hexdigest()

    def record(self) -> dict[str, str]:
        """What a record of the settings holds of it."""
        return {"name": str(self), "sha256": self.sha256}

    def packed(self) -> dict[str, str]:
        """All of it, for another process; ``DataSource`` takes it."""
        return {_PACKED: _dumps({name: value for name, value in vars(self).items() if name != "sha256"})}


def as_unreadable(value: object) -> dict[str, str]:
    """What stands in JSON for a value that it has no form for."""
    return {_UNREADABLE: value.kind if isinstance(value, Unreadable) else type(value).__name__}


def from_json(text: str) -> Any:
    """The value of a JSON text, with ``Unreadable`` where ``as_unreadable`` stood in."""
    return json.loads(text, object_hook=_hook)


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), default=as_unreadable)


def _hook(value: dict[str, Any]) -> Any:
    return Unreadable(value[_UNREADABLE]) if _UNREADABLE in value else value


def _validated(value: object) -> str | MemoryTable:
    if isinstance(value, str | MemoryTable):
        return value
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    if isinstance(value, dict) and value.keys() == {_PACKED}:
        return MemoryTable(**from_json(value[_PACKED]))
    raise ValueError(f"a path, a hub id or rows in memory are needed, but {type(value).__name__} was given.")


def _recorded(value: str | MemoryTable | None) -> str | dict[str, str] | None:
    return value.record() if isinstance(value, MemoryTable) else value


DataSource = Annotated[
    str | MemoryTable, PlainValidator(_validated), PlainSerializer(_recorded, when_used="json", return_type=Any)
]
"""A setting that holds a path, a hub id, or rows in memory."""
