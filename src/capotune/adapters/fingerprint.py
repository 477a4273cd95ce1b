"""A base model's identity by content: the same for a copy, a rename, another sharding; another for one changed bit."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from capotune.models.base import Base
from capotune.models.shards import Shards, StoredTensor

_NAMES_IN_CONFIG = ("_name_or_path", "transformers_version")


def fingerprint(base: Base) -> str:
    """sha256 over every stored tensor's name, dtype, shape and bytes, in the order of names.

    Raises ``ModelError`` for a file that is not a complete safetensors file.
    """
    files = tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in base.weight_files)
    return _fingerprint(files)


@lru_cache(maxsize=8)
def _fingerprint(files: tuple[tuple[Path, int, int], ...]) -> str:
    shards = Shards([path for path, _, _ in files])
    digests = {stored.name: _digest(shards, stored) for stored in shards}
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


def _digest(shards: Shards, stored: StoredTensor) -> bytes:
    digest = hashlib.sha256(json.dumps([stored.name, stored.dtype, list(stored.shape)]).encode())
    for part in shards.chunks(stored.name):
        digest.update(part)
    return digest.digest()
