"""Safetensors files written tensor by tensor, never more than one of them in memory.

What is written is planned first, by name, dtype and shape, so that every tensor's place is known before its bytes are.
Only texts (bytes whose number depends on their content) are not: they stand at the end of a file, and the header, which
is written last, is padded with spaces to the bytes that were reserved for it, as the format allows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from torch import Tensor

from capotune.errors import OutputError
from capotune.files import human_bytes, write_atomic
from capotune.models.shards import DTYPE_NAMES, DTYPES, HEADER_LENGTH, StoredTensor

SHARD_BYTES = 2_000_000_000
"""Largest file, unless a single tensor is larger."""
MOST_TEXT = 1024
"""Bytes of a text, at most."""
ALIGNMENT = 8  # PyTorch reads a tensor in place only where its numbers may stand


@dataclass(frozen=True)
class Plan:
    """A tensor to be written."""

    name: str
    dtype: str
    """As the format calls it."""
    shape: tuple[int, ...]
    nbytes: int
    text: bool = False
    """Whether its size is known only when it is written; ``nbytes`` is then the most it can be."""

    @classmethod
    def of(cls, name: str, dtype: str, shape: tuple[int, ...]) -> Plan:
        """A tensor of a known dtype."""
        return cls(name, dtype, shape, prod(shape) * DTYPES[dtype].itemsize)

    @classmethod
    def of_text(cls, name: str) -> Plan:
        """Bytes, at most ``MOST_TEXT`` of them."""
        return cls(name, "U8", (MOST_TEXT,), MOST_TEXT, text=True)


def whole_plan(stored: StoredTensor) -> list[Plan]:
    """A tensor that is written as it is stored."""
    return [Plan(stored.name, stored.dtype, stored.shape, stored.nbytes)]


class ShardWriter:
    """Writes the planned tensors into ``folder``: one file, or several with their index.

    Tensors of one group stand in one file. Write every tensor of a file before the next file's, in any order.

    Raises ``OutputError`` before anything is written where there is no room for all.
    """

    def __init__(self, folder: Path, groups: Iterable[Sequence[Plan]], shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        files = _fill(groups, shard_bytes)
        _check_room(folder, sum(plan.nbytes for plans in files for plan in plans))
        names = [f"model-{number + 1:05}-of-{len(files):05}.safetensors" for number in range(len(files))]
        self._names = names if len(names) > 1 else ["model.safetensors"]
        self._plans = files
        self._file_of = {plan.name: number for number, plans in enumerate(files) for plan in plans}
        self._nbytes = 0
        self._open: _Shard | None = None
        self._number = -1

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._open is not None and kind is not None:
            self._open.file.close()
        elif kind is None:
            self._close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one planned tensor."""
        planned = self._shard(name).plans[name]
        assert DTYPE_NAMES[tensor.dtype] == planned.dtype, (name, tensor.dtype)
        assert planned.text or tuple(tensor.shape) == planned.shape, (name, tensor.shape)
        flat = tensor.detach().cpu().contiguous().view(-1)
        self.copy(name, [flat.view(DTYPES["U8"]).numpy().data] if flat.numel() else [])

    def copy(self, name: str, parts: Iterable[memoryview]) -> None:
        """Write one planned tensor from its bytes."""
        self._nbytes += self._shard(name).put(name, parts)

    def _shard(self, name: str) -> _Shard:
        number = self._file_of[name]
        if number != self._number:
            assert number == self._number + 1, name
            self._close()
            self._open, self._number = _Shard(self.folder / self._names[number], self._plans[number]), number
        assert self._open is not None
        return self._open

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
        if self._number == len(self._names) - 1 and len(self._names) > 1:
            files = {name: self._names[number] for name, number in self._file_of.items()}
            index = {"metadata": {"total_size": self._nbytes}, "weight_map": dict(sorted(files.items()))}
            write_atomic(self.folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


class _Shard:
    """One file: wide numbers first, so that each stands where it can be read in place; texts last."""

    def __init__(self, path: Path, plans: Sequence[Plan]) -> None:
        ordered = sorted(plans, key=lambda plan: (plan.text, -_width(plan)))
        self.plans = {plan.name: plan for plan in ordered}
        self._entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        at = 0
        for plan in ordered:
            self._entries[plan.name] = (plan.shape, at, at + plan.nbytes)
            at += plan.nbytes
        self._texts_at = sum(plan.nbytes for plan in ordered if not plan.text)
        room = len(self._header())
        self._room = room + -(room + HEADER_LENGTH) % ALIGNMENT
        self._waiting = set(self.plans)
        self.file: BinaryIO = path.open("wb")

    def put(self, name: str, parts: Iterable[memoryview]) -> int:
        plan = self.plans[name]
        self._waiting.remove(name)
        begin = self._texts_at if plan.text else self._entries[name][1]
        self.file.seek(HEADER_LENGTH + self._room + begin)
        size = sum(self.file.write(part) for part in parts)
        assert size <= plan.nbytes if plan.text else size == plan.nbytes, name
        if plan.text:
            self._entries[name] = ((size,), begin, begin + size)
            self._texts_at += size
        return size

    def close(self) -> None:
        assert not self._waiting, self._waiting
        header = self._header().ljust(self._room)
        assert len(header) == self._room
        self.file.seek(0)
        self.file.write(len(header).to_bytes(HEADER_LENGTH, "little") + header)
        self.file.close()

    def _header(self) -> bytes:
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for name, (shape, begin, end) in sorted(self._entries.items(), key=lambda entry: entry[1][1]):
            entries[name] = {"dtype": self.plans[name].dtype, "shape": list(shape), "data_offsets": [begin, end]}
        return json.dumps(entries, separators=(",", ":")).encode()


def _width(plan: Plan) -> int:
    return DTYPES[plan.dtype].itemsize if plan.dtype in DTYPES else 1


def _fill(groups: Iterable[Sequence[Plan]], shard_bytes: int) -> list[list[Plan]]:
    """Groups in order into files, a new one when the next would make it too large."""
    files: list[list[Plan]] = [[]]
    size = 0
    for group in groups:
        needs = sum(plan.nbytes for plan in group)
        if files[-1] and size + needs > shard_bytes:
            files.append([])
            size = 0
        files[-1] += group
        size += needs
    return files


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OutputError(
            f"the model's weights take {human_bytes(size)}, and {human_bytes(free)} are free in {folder.parent}.",
            advice="Free some space, or use another disk: by `out`, or for the cache by CAPOTUNE_CACHE.",
        )
