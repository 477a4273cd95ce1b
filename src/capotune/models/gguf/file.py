"""A GGUF file's metadata and tensors. Nothing in it is believed: each count and offset is checked before it is used.

    4 bytes      "GGUF"
    uint32       version, 2 or 3; all numbers are little-endian
    uint64 (2)   tensors, metadata entries
    metadata     key, type, value
    tensors      name, sizes (fastest first), type, offset from the start of the data
    data         each tensor at a multiple of general.alignment

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from capotune.errors import ModelError, needs_extra

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_DIMENSIONS = 4
CHUNK = 1 << 18
"""Values that are dequantised at a time, or a row of them."""

_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
"""NumPy's name of each type of metadata that has a fixed size."""
_STRING, _ARRAY = 8, 9
_WHOLE = {"F32": (torch.float32, "F32"), "F16": (torch.float16, "F16"), "BF16": (torch.bfloat16, "BF16")}
"""Types that are no quantisation: what they are in PyTorch and in safetensors."""
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor is, and how it is stored."""

    name: str
    shape: tuple[int, ...]
    """In PyTorch's order."""
    quantization: str
    """The type as ggml calls it: Q4_1, F16 …"""
    begin: int
    """First byte in the file."""
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        """What it is read as: itself for F32, F16 and BF16, fp32 for a quantisation, whose values it holds exactly."""
        return _WHOLE.get(self.quantization, _WHOLE["F32"])[0]

    @property
    def dtype_name(self) -> str:
        """``dtype`` as safetensors calls it."""
        return _WHOLE.get(self.quantization, _WHOLE["F32"])[1]


@dataclass(frozen=True)
class GgufFile:
    """What a file says. Made by ``open_gguf``."""

    path: Path
    metadata: dict[str, Any]
    """Strings, numbers, truth values, lists of strings, and arrays of numbers, by key."""
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """``general.architecture``, such as llama or qwen2."""
        return str(self.metadata.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """The architecture's own entry: ``get("block_count")`` is ``llama.block_count`` of a Llama."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The tensor's values in order, flat, some whole rows at a time, in its ``dtype``."""
        tensor = self.tensors[name]
        block, size = _sizes(tensor.quantization)
        row = tensor.shape[-1] // block * size
        rows = max(1, CHUNK // max(1, tensor.shape[-1]))
        left = tensor.nbytes
        with self.path.open("rb") as file:
            file.seek(tensor.begin)
            while left:
                raw = file.read(min(left, rows * row))
                if not raw or len(raw) % row:
                    raise damaged(self.path, f"it ends inside the tensor {name}")
                left -= len(raw)
                yield _values(np.frombuffer(bytearray(raw), dtype=np.uint8), tensor)

    def read(self, name: str, buffer: Tensor | None = None) -> Tensor:
        """The whole tensor, in new memory, or in the bytes of ``buffer`` until that is used again."""
        tensor = self.tensors[name]
        count = prod(tensor.shape)
        if buffer is None:
            whole = torch.empty(count, dtype=tensor.dtype)
        else:
            whole = buffer[: count * tensor.dtype.itemsize].view(tensor.dtype)
        at = 0
        for part in self.chunks(name):
            whole[at : at + part.numel()] = part
            at += part.numel()
        return whole.view(tensor.shape)

    def error(self, problem: str, advice: str | None = None) -> ModelError:
        """A ``ModelError`` about this file."""
        return refused(self.path, problem, advice)


def open_gguf(path: Path, kind: str = "model") -> GgufFile:
    """Read a file's metadata and where its tensors are. ``kind`` is what it must hold, by its ``general.type``.

    Raises ``ModelError`` for a file that is no GGUF, cut short, contradicts itself, or is one part of several, and
    ``MissingLibraryError`` without the extra ``gguf``.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        cursor = _Cursor(path, file, size)
        tensors, entries = _read_start(cursor)
        metadata = dict(_entry(cursor) for _ in range(entries))
        _check_kind(path, metadata, kind)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise damaged(path, f"its general.alignment is {alignment}")
        infos = [_info(cursor) for _ in range(tensors)]
        data = cursor.at + -cursor.at % alignment
    found = [_placed(path, info, data, alignment, size) for info in infos]
    _check_places(path, found)
    return GgufFile(path, metadata, {tensor.name: tensor for tensor in found})


def is_gguf(path: Path) -> bool:
    """Whether a file begins as one, whatever its name."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def split_number(path: Path) -> int | None:
    """Of how many parts a file is one, by its name; None for a whole file."""
    match = _SPLIT.search(path.name)
    return int(match[2]) if match else None


def damaged(path: Path, how: str) -> ModelError:
    """The error for a file that is not what its header says; ``how`` completes "…: "."""
    return refused(path, f"not a complete GGUF file: {how}.", "Download it again.")


def refused(path: Path, problem: str, advice: str | None = None) -> ModelError:
    """The error for a file that is not read."""
    return ModelError(problem, where=str(path), advice=advice)


class _Cursor:
    """Reads a header's parts in order; ``ModelError`` before anything is read that the file cannot hold."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.at = 0

    def take(self, count: int) -> bytes:
        self.check(count, 1)
        self.at += count
        return self.file.read(count)

    def number(self, kind: str) -> int:
        return int(np.frombuffer(self.take(np.dtype(kind).itemsize), dtype=kind)[0])

    def text(self) -> str:
        return self.take(self.number("<u8")).decode("utf-8", errors="replace")

    def check(self, count: int, width: int) -> None:
        """``ModelError`` unless ``count`` parts of at least ``width`` bytes may follow."""
        if count * width > self.size - self.at:
            raise damaged(self.path, "its header says more than the file holds")


def _read_start(cursor: _Cursor) -> tuple[int, int]:
    path = cursor.path
    if cursor.size < 24 or cursor.take(4) != MAGIC:
        raise refused(path, "not a GGUF file: it does not begin with the letters GGUF.")
    version = cursor.number("<u4")
    if version not in VERSIONS:
        if struct.unpack("<I", struct.pack(">I", version))[0] in VERSIONS:
            raise refused(path, "a big-endian GGUF file, and only little-endian ones are read.")
        raise refused(
            path,
            f"GGUF version {version}; versions {' and '.join(map(str, VERSIONS))} are read.",
            advice="Convert the model again with a current llama.cpp.",
        )
    tensors, entries = cursor.number("<u8"), cursor.number("<u8")
    cursor.check(tensors, 32)
    cursor.check(entries, 13)
    return tensors, entries


def _entry(cursor: _Cursor) -> tuple[str, Any]:
    key = cursor.text()
    kind = cursor.number("<u4")
    if kind == _STRING:
        return key, cursor.text()
    if kind in _NUMBERS:
        return key, np.frombuffer(cursor.take(np.dtype(_NUMBERS[kind]).itemsize), dtype=_NUMBERS[kind])[0].item()
    if kind != _ARRAY:
        raise damaged(cursor.path, f"{key} has the unknown type {kind}")
    kind, count = cursor.number("<u4"), cursor.number("<u8")
    if kind == _STRING:
        cursor.check(count, 8)
        return key, [cursor.text() for _ in range(count)]
    if kind not in _NUMBERS:
        raise damaged(cursor.path, f"{key} is a list of the type {kind}, which is not read here")
    return key, np.frombuffer(cursor.take(count * np.dtype(_NUMBERS[kind]).itemsize), dtype=_NUMBERS[kind])


def _check_kind(path: Path, metadata: dict[str, Any], wanted: str) -> None:
    """Refuse what is not whole, and what is not ``wanted``."""
    kind, architecture = str(metadata.get("general.type", "model")), metadata.get("general.architecture")
    stated = metadata.get("split.count")
    parts = (stated if isinstance(stated, int) else None) or split_number(path) or 1
    if not isinstance(architecture, str):
        architecture = ""
    if kind == wanted == "adapter":
        return
    if kind == "adapter":
        raise refused(
            path,
            "an adapter in GGUF, and no model.",
            advice="Give the base model that it belongs to.",
        )
    if kind == "mmproj" or architecture == "clip":
        raise refused(
            path,
            "the part of a model that reads images or sound (mmproj), and no language model.",
            advice="Give the language model's own GGUF file.",
        )
    if kind != "model":
        raise refused(path, f"it holds a {kind}, and no model.")
    if parts > 1:
        raise refused(
            path,
            f"one of {parts} parts of a model, and one whole file is needed.",
            advice="Join them with llama.cpp: llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf",
        )
    if not architecture:
        raise damaged(path, "it names no general.architecture")


def _info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of a tensor, as the header gives them."""
    name = cursor.text()
    dimensions = cursor.number("<u4")
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise damaged(cursor.path, f"the tensor {name} has {dimensions} dimensions")
    sizes = tuple(cursor.number("<u8") for _ in range(dimensions))
    return name, sizes[::-1], cursor.number("<u4"), cursor.number("<u8")


def _placed(
    path: Path, info: tuple[str, tuple[int, ...], int, int], data: int, alignment: int, size: int
) -> GgufTensor:
    name, shape, kind, offset = info
    quantization = _type_name(path, name, kind)
    block, nbytes = _sizes(quantization)
    if shape[-1] % block or offset % alignment:
        raise damaged(path, f"the tensor {name} is {shape} at {offset}, which {quantization} cannot be")
    nbytes *= prod(shape) // block
    if data + offset + nbytes > size:
        raise damaged(path, f"it ends inside the tensor {name}")
    return GgufTensor(name, shape, quantization, data + offset, nbytes)


def _check_places(path: Path, tensors: list[GgufTensor]) -> None:
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise damaged(path, "two tensors have the same name")
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.nbytes)):
        if tensor.begin < end:
            raise damaged(path, f"the tensor {tensor.name} begins inside another")
        end = tensor.begin + tensor.nbytes


def _type_name(path: Path, name: str, kind: int) -> str:
    """ggml's name of a type that the package gguf knows and can dequantise."""
    called, is_read = _known_type(kind)
    if not is_read:
        raise refused(
            path,
            f"the tensor {name} is stored as {called}, which the package gguf does not dequantise.",
            advice="Give the model in another quantisation, or run: pip install --upgrade gguf",
        )
    return called


@cache
def _known_type(kind: int) -> tuple[str, bool]:
    """Its name, and whether it can be read."""
    with needs_extra("gguf"):
        import gguf
    try:
        known = gguf.GGMLQuantizationType(kind)
    except ValueError:
        return f"the type {kind}", False
    try:
        if known.name not in _WHOLE:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[known][1]), dtype=np.uint8), known)
    except NotImplementedError:
        return str(known.name), False
    return str(known.name), True


def _sizes(quantization: str) -> tuple[int, int]:
    """Values and bytes of a block."""
    import gguf

    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[quantization]]
    return int(block), int(nbytes)


def _values(raw: np.ndarray[Any, Any], tensor: GgufTensor) -> Tensor:
    """The bytes of whole blocks as values, flat."""
    if tensor.quantization in _WHOLE:
        return torch.from_numpy(raw).view(tensor.dtype)
    import gguf

    one_row = raw.reshape(1, -1)  # the package goes over rows sixteen at a time, and these are short
    with np.errstate(invalid="ignore", over="ignore"):  # a scale that is no number: so are its values
        values = gguf.dequantize(one_row, gguf.GGMLQuantizationType[tensor.quantization])
    return torch.from_numpy(values).view(-1)
