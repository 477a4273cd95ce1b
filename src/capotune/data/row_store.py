"""The rows of a table that may be larger than memory, each made when it is asked for."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Sequence
from typing import Any, Final, overload

from capotune.data.byte_store import ByteStore
from capotune.data.table import Row
from capotune.memory_table import as_unreadable, from_json

__all__ = ["RowStore", "TooDeepError"]

DEEPEST: Final = 100
"""Lists and objects in each other. Python reads and writes JSON up to some depth, which depends on what called it."""


class TooDeepError(ValueError):
    """A row holds lists and objects deeper in each other than ``DEEPEST``."""


class RowStore(Sequence[Row]):
    """Takes rows one after the other and gives them by position. What JSON has no form for comes back as
    ``Unreadable``."""

    def __init__(self) -> None:
        self._bytes, self._ends = ByteStore(), array("q", [0])
        self._encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=self._stand_in).encode
        self._decode: Callable[[str], Any] = json.loads
        self.lines = array("q")
        """The line of each."""

    @property
    def sha256(self) -> str:
        """Of all rows."""
        return self._bytes.sha256

    def add(self, line: int, names: Sequence[str], values: Sequence[Any]) -> None:
        """Take one more row. Raises ``TooDeepError``."""
        row = dict(zip(names, values, strict=True))
        try:
            text = self._encode(row)
        except RecursionError:
            raise TooDeepError from None
        if text.count("{") + text.count("[") > DEEPEST and _depth(row) > DEEPEST:
            raise TooDeepError
        self._bytes.append(text.encode())
        self._ends.append(self._bytes.size)
        self.lines.append(line)

    def rows(self) -> RowStore:
        """All that were taken."""
        return self

    def __len__(self) -> int:
        return len(self.lines)

    @overload
    def __getitem__(self, at: int) -> Row: ...

    @overload
    def __getitem__(self, at: slice) -> list[Row]: ...

    def __getitem__(self, at: int | slice) -> Row | list[Row]:
        if isinstance(at, slice):
            return [self[place] for place in range(*at.indices(len(self)))]
        place = range(len(self))[at]
        found: Row = self._decode(self._bytes.read(self._ends[place], self._ends[place + 1]).decode())
        return found

    def _stand_in(self, value: object) -> dict[str, str]:
        self._decode = from_json
        return as_unreadable(value)


def _depth(value: Any) -> int:
    """How many lists and objects stand in each other."""
    depth, found = 0, [value]
    while found:
        depth += 1
        inner = [one.values() if isinstance(one, dict) else one for one in found]
        found = [one for several in inner for one in several if isinstance(one, dict | list)]
    return depth
