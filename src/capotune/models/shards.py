"""A model's stored tensors, by name, and those in safetensors files, read one at a time into memory of their own.

A safetensors file is 8 bytes with the header's length, a header in JSON (name → dtype, shape, first and last byte),
the bytes.
Mapping a file into memory, as the safetensors library does, counts every page that was touched as this process's
memory for as long as the file is open; a model larger than memory is read here with no more than one tensor at a time.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capotune.errors import ModelError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LENGTH = 8
MOST_HEADER = 100_000_000  # the format's own limit
CHUNK = 1 << 20  # stays in the processor's cache


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is."""

    name: str
    path: Path
    dtype: str
    """As the format calls it: F32, BF16, U8 …"""
    shape: tuple[int, ...]
    begin: int
    """First byte in the file."""
    nbytes: int
    """Of its values."""


class Tensors(ABC):
    """A model's stored tensors, by name."""

    def __init__(self, stored: Iterable[StoredTensor]) -> None:
        self._stored = {one.name: one for one in stored}

    def __iter__(self) -> Iterator[StoredTensor]:
        """Every tensor, in the order in which they are best read."""
        return iter(self._stored.values())

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def __getitem__(self, name: str) -> StoredTensor:
        return self._stored[name]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(stored.nbytes for stored in self)

    def buffer_for(self, names: Iterable[str]) -> Tensor:
        """Bytes that any one of the tensors ``names`` fits into, for ``read``."""
        return torch.empty(max((self._stored[name].nbytes for name in names), default=0), dtype=torch.uint8)

    @abstractmethod
    def read(self, name: str, buffer: Tensor | None = None) -> Tensor:
        """The tensor, in new memory, or in ``buffer`` until that is used again.

        ``ModelError`` for a dtype that PyTorch or this reader has not, and for a file that was cut short meanwhile.
        """

    @abstractmethod
    def chunks(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes in order, a part at a time, each valid until the next is asked for."""


class Shards(Tensors):
    """The tensors of a model's safetensors files, in the order of the files and of their bytes."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Read the headers. ``ModelError`` names a file that is damaged or cut short, and the tensor where it can."""
        super().__init__(stored for path in paths for stored in _read_header(path))

    def read(self, name: str, buffer: Tensor | None = None) -> Tensor:
        stored = self._stored[name]
        if stored.dtype not in DTYPES:
            raise ModelError(f"{stored.path}: the tensor {name} has the dtype {stored.dtype}, which is not read here.")
        data = torch.empty(stored.nbytes, dtype=torch.uint8) if buffer is None else buffer[: stored.nbytes]
        with stored.path.open("rb") as file:
            file.seek(stored.begin)
            if stored.nbytes and file.readinto(data.numpy().data) != stored.nbytes:
                raise _cut_short(stored.path, name)
        return data.view(DTYPES[stored.dtype]).view(stored.shape)

    def chunks(self, name: str) -> Iterator[memoryview]:
        stored = self._stored[name]
        buffer = memoryview(bytearray(min(CHUNK, stored.nbytes)))
        left = stored.nbytes
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.begin)
            while left:
                count = file.readinto(buffer[: min(CHUNK, left)])
                if not count:
                    raise _cut_short(stored.path, name)
                left -= count
                yield buffer[:count]


def check_dtypes(shards: Tensors) -> None:
    """``ModelError`` for a tensor in 8 bits or fewer with scales elsewhere, or of a dtype that is not known here."""
    for stored in shards:
        if stored.dtype not in DTYPES or stored.dtype.startswith("F8"):
            raise ModelError(
                f"{stored.path}: the tensor {stored.name} has the dtype {stored.dtype}, which is not read here.",
                advice="Give the model in F32, BF16 or F16, or in bitsandbytes' 4 bits.",
            )


def _read_header(path: Path) -> list[StoredTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(HEADER_LENGTH), "little")
        if size < HEADER_LENGTH or length > min(MOST_HEADER, size - HEADER_LENGTH):
            raise _damaged(path)
        try:
            entries: dict[str, Any] = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            start = HEADER_LENGTH + length
            found = [_stored(path, name, entry, start) for name, entry in entries.items()]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise _damaged(path) from None
    end = start
    for one in sorted(found, key=lambda one: (one.begin, one.nbytes)):
        if one.begin + one.nbytes > size:
            raise _cut_short(path, one.name)
        if one.begin < end:  # each would take memory of its own
            raise _damaged(path)
        end = one.begin + one.nbytes
    return sorted(found, key=lambda one: one.begin)


def _stored(path: Path, name: str, entry: dict[str, Any], start: int) -> StoredTensor:
    """``ValueError`` when the header contradicts itself."""
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    sizes = [begin, end, *shape]
    if not all(type(size) is int and size >= 0 for size in sizes) or end < begin:
        raise ValueError(name)
    dtype = entry["dtype"]
    if dtype in DTYPES and prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise ValueError(name)
    return StoredTensor(name, path, str(dtype), shape, start + begin, end - begin)


def _damaged(path: Path) -> ModelError:
    return ModelError(f"{path}: not a complete safetensors file. Download or save the model again.")


def _cut_short(path: Path, name: str) -> ModelError:
    return ModelError(
        f"{path}: not a complete safetensors file: it ends inside the tensor {name}. Download or save the model again."
    )
