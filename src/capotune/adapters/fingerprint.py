"""A base model's identity by content: the same for a copy, a rename, another sharding; another for one changed bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from capotune.events import nothing
from capotune.models.base import Base
from capotune.models.shards import Shards, StoredTensor

_Files = tuple[tuple[Path, int, int], ...]
"""Path, bytes and time of change of each."""
_known: dict[_Files, str] = {}
_NAMES_IN_CONFIG = ("_name_or_path", "transformers_version")


def earlier_fingerprint(base: Base, alive: Callable[[], object] = nothing) -> str:
    """The fingerprint as it was before second copies in a model's folder were left out: over all its weight files."""
    return _of_files(sorted(base.folder.glob("*.safetensors")), alive)


def fingerprint(base: Base, alive: Callable[[], object] = nothing) -> str:
    """sha256 over every stored tensor's name, dtype, shape and bytes, in the order of names.

    It reads all weights, once in a process; ``alive`` is called after each part. Raises ``ModelError`` for a file that
    is not a complete safetensors file.
    """
    return _of_files(base.weight_files, alive)


def _of_files(paths: Iterable[Path], alive: Callable[[], object]) -> str:
    files = tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    if files not in _known:
        _known[files] = _computed(files, alive)
    return _known[files]


def _computed(files: _Files, alive: Callable[[], object]) -> str:
    shards = Shards([path for path, _, _ in files])
    digests = {stored.name: _digest(shards, stored, alive) for stored in shards}
    total = hashlib.sha256()
    for name in sorted(digests):
        total.update(digests[name])
    return total.hexdigest()


def config_hash(base: Base) -> str:
    """sha256 over what ``config.json`` says about computing (not over names and versions) and, where its own code may
    run, over the folder's Python files: two bases of the same weights may compute differently."""
    values = {name: value for name, value in base.config_values.items() if name not in _NAMES_IN_CONFIG}
    total = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for path in sorted(base.folder.glob("*.py")) if base.trust_remote_code else ():
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


def _digest(shards: Shards, stored: StoredTensor, alive: Callable[[], object]) -> bytes:
    digest = hashlib.sha256(json.dumps([stored.name, stored.dtype, list(stored.shape)]).encode())
    for part in shards.chunks(stored.name):
        digest.update(part)
        alive()
    return digest.digest()
