"""A base model's identity by content: the same for a copy, a rename, another sharding; another for one changed bit."""

from __future__ import annotations

import hashlib
import json
import mmap
from functools import lru_cache
from pathlib import Path
from typing import Any

from capotune.errors import ModelError
from capotune.models.load import Source


def fingerprint(source: Source) -> str:
    """sha256 over every stored tensor's name, dtype, shape and bytes, in the order of names.

    Raises ``ModelError`` for a file that is not a complete safetensors file.
    """
    files = tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in source.weight_files)
    return _fingerprint(files)


@lru_cache(maxsize=8)
def _fingerprint(files: tuple[tuple[Path, int, int], ...]) -> str:
    digests: dict[str, bytes] = {}
    for path, _, _ in files:
        digests.update(_tensor_digests(path))
    total = hashlib.sha256()
    for name in sorted(digests):
        total.update(digests[name])
    return total.hexdigest()


def _tensor_digests(path: Path) -> dict[str, bytes]:
    """sha256 of each tensor in one shard. Format: 8-byte header length, JSON header, raw bytes."""
    damaged = ModelError(f"{path}: not a complete safetensors file. Download or save the model again.")
    with path.open("rb") as file:
        size = path.stat().st_size
        if size < 8:
            raise damaged
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            start = 8 + int.from_bytes(content[:8], "little")
            if start > size:
                raise damaged
            try:
                header: dict[str, Any] = json.loads(content[8:start])
            except ValueError:
                raise damaged from None
            header.pop("__metadata__", None)
            return {name: _digest(content, start, name, entry, size, damaged) for name, entry in header.items()}


def _digest(content: mmap.mmap, start: int, name: str, entry: dict[str, Any], size: int, damaged: ModelError) -> bytes:
    begin, end = (start + offset for offset in entry["data_offsets"])
    if end > size:
        raise damaged
    digest = hashlib.sha256(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
    with memoryview(content) as view, view[begin:end] as part:
        digest.update(part)
    return digest.digest()
