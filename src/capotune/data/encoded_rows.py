"""What many rows became, in four arrays: 5 bytes a token, where lists of Python's integers take 70. They are in memory,
or mapped from files, and then only what is looked at is.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, overload

import numpy as np
from numpy.typing import NDArray

from capotune.data.batches import IGNORE_INDEX, Encoded, LabelLists, TokenLists

__all__ = ["EncodedRows", "write_encoded"]

_SEQUENCE: Final = np.dtype(
    [
        ("end", np.int64),  # of its tokens among those of all
        ("in_loss", np.int64),  # how many of them
        ("tokens", np.int64),  # as in ``Encoded``, and so are those below
        ("answer_cut", np.bool_),
        ("end_cut", np.bool_),
        ("straddles", np.bool_),
    ]
)
ARRAYS: Final[dict[str, np.dtype[Any]]] = {
    "ids": np.dtype(np.int32), "in_loss": np.dtype(np.bool_), "sequences": _SEQUENCE, "rows": np.dtype(np.int64),
}  # fmt: skip
"""``ids`` and ``in_loss`` of each token; the sequences; of each row the number of sequences up to its end."""


def write_encoded(rows: Iterable[Iterable[Encoded]], files: Mapping[str, IO[bytes]]) -> None:
    """Write ``ARRAYS`` into files of their names; neither the rows nor the sequences of one are held."""
    end = sequences = 0
    for of_row in rows:
        for one in of_row:
            end, sequences = end + len(one.ids), sequences + 1
            in_loss = np.not_equal(one.labels, IGNORE_INDEX)
            facts = (end, int(in_loss.sum()), one.tokens, one.answer_cut, one.end_cut, one.straddles)
            files["ids"].write(np.asarray(one.ids, dtype=np.int32).tobytes())
            files["in_loss"].write(in_loss.tobytes())
            files["sequences"].write(np.array([facts], dtype=_SEQUENCE).tobytes())
        files["rows"].write(np.int64(sequences).tobytes())


class EncodedRows(Sequence[list[Encoded]]):
    """Of each row its sequences, made when they are asked for."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]], start: int = 0) -> None:
        """``start``: the first sequence of the first row."""
        self._ids, self._in_loss, self._sequences = arrays["ids"], arrays["in_loss"], arrays["sequences"]
        self._starts = np.concatenate([[0], self._sequences["end"]])
        self.bounds = np.concatenate([[start], arrays["rows"]])
        """Row r has the sequences from ``bounds[r]`` up to ``bounds[r + 1]``, (rows + 1,) int64."""

    @classmethod
    def of(cls, rows: Iterable[Iterable[Encoded]]) -> EncodedRows:
        """In memory."""
        files = {name: io.BytesIO() for name in ARRAYS}
        write_encoded(rows, files)
        return cls({name: np.frombuffer(files[name].getbuffer(), dtype) for name, dtype in ARRAYS.items()})

    @classmethod
    def mapped(cls, folder: Path) -> EncodedRows:
        """From the files that ``write_encoded`` wrote."""
        return cls({name: _mapped(folder / name, dtype) for name, dtype in ARRAYS.items()})

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @overload
    def __getitem__(self, row: int) -> list[Encoded]: ...

    @overload
    def __getitem__(self, row: slice) -> list[list[Encoded]]: ...

    def __getitem__(self, row: int | slice) -> list[Encoded] | list[list[Encoded]]:
        if isinstance(row, slice):
            return [self[at] for at in range(*row.indices(len(self)))]
        at = range(len(self))[row]
        return [self.one(number) for number in range(self.bounds[at], self.bounds[at + 1])]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def divided(self, count: int) -> tuple[EncodedRows, EncodedRows]:
        """Of rows that are one: its first ``count`` sequences, and as another row those after them."""
        arrays = {"ids": self._ids, "in_loss": self._in_loss, "sequences": self._sequences}
        start, end = self.bounds.tolist()
        rest = np.array([end] if start + count < end else [], dtype=np.int64)
        return EncodedRows(arrays | {"rows": np.array([start + count])}, start), EncodedRows(
            arrays | {"rows": rest}, start + count
        )

    # ------------------------------------------------------------------------------------------- what is in the loss

    @property
    def with_loss(self) -> NDArray[np.int64]:
        """The numbers of the sequences with a token in the loss, rising."""
        return np.flatnonzero(self.of_each("in_loss")) + int(self.bounds[0])

    def rows_of(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row of each of these."""
        return np.searchsorted(self.bounds, sequences, side="right") - 1

    def ids_of(self, sequences: NDArray[np.int64]) -> TokenLists:
        """Their tokens."""
        return TokenLists(self._ids, self._starts, sequences)

    def labels_of(self, sequences: NDArray[np.int64]) -> LabelLists:
        """Their labels."""
        return LabelLists(self._ids, self._starts, sequences, self._in_loss)

    # -------------------------------------------------------------------------------------------------- sums by row

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence of all rows."""
        return np.diff(self._starts)[self.bounds[0] : self.bounds[-1]]

    def of_each(self, name: str) -> NDArray[Any]:
        """A fact of each sequence of all rows: ``in_loss``, or one that ``Encoded`` names."""
        found: NDArray[Any] = self._sequences[name][self.bounds[0] : self.bounds[-1]]
        return found

    def summed(self, values: NDArray[Any]) -> NDArray[np.int64]:
        """The sum over each row's sequences of a value that each sequence has."""
        total = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        places = self.bounds - self.bounds[0]
        sums: NDArray[np.int64] = total[places[1:]] - total[places[:-1]]
        return sums

    def largest(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """The largest of each row's sequences; 0 where it has none."""
        found = np.zeros(len(self), dtype=np.int64)
        filled = np.flatnonzero(np.diff(self.bounds))
        found[filled] = np.maximum.reduceat(values, (self.bounds - self.bounds[0])[filled]) if len(filled) else 0
        return found

    def one(self, number: int) -> Encoded:
        """A sequence."""
        place = slice(self._starts[number], self._starts[number + 1])
        ids = self._ids[place]
        labels = np.where(self._in_loss[place], ids, IGNORE_INDEX)
        _, _, tokens, *flags = self._sequences[number].item()
        return Encoded(ids.tolist(), labels.tolist(), tokens, *flags)


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.asarray(np.memmap(path, dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype)
