"""A base model's identity by content: the same for a copy, a rename, another sharding; another for one changed bit."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from threading import Event

from capotune.events import nothing
from capotune.models.base import Base
from capotune.models.content import remembered
from capotune.models.shards import Shards, StoredTensor, Tensors

_ALIVE_SECONDS = 0.1
_NAMES_IN_CONFIG = ("_name_or_path", "transformers_version")


def earlier_fingerprint(base: Base, alive: Callable[[], object] = nothing) -> str:
    """The fingerprint as it was before second copies in a model's folder were left out: over all its weight files."""
    paths = sorted(base.folder.glob("*.safetensors"))
    return remembered("tensors", paths, lambda: _computed(Shards(paths), alive))


def fingerprint(base: Base, alive: Callable[[], object] = nothing) -> str:
    """sha256 over every stored tensor's name, dtype, shape and bytes, in the order of names.

    It reads all weights, on every core, and is remembered for as long as the files stay as they are
    (``models.content``); ``alive`` is called again and again meanwhile. A GGUF file's tensors count as they are
    converted. Raises ``ModelError`` for a file that is not complete.
    """
    return remembered("tensors", base.tensor_files, lambda: _computed(base.tensors, alive))


def config_hash(base: Base) -> str:
    """sha256 over what ``config.json`` says about computing (not over names and versions) and, where its own code may
    run, over the folder's Python files: two bases of the same weights may compute differently."""
    values = {name: value for name, value in base.config_values.items() if name not in _NAMES_IN_CONFIG}
    total = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for path in sorted(base.folder.glob("*.py")) if base.trust_remote_code else ():
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


def _computed(tensors: Tensors, alive: Callable[[], object]) -> str:
    """A thread for each core, the largest tensors first: hashing and reading both let other threads run."""
    stopped, cores = Event(), os.cpu_count() or 1
    waiting = sorted(tensors, key=lambda stored: stored.nbytes)
    digests: dict[str, bytes] = {}
    running: dict[Future[bytes], str] = {}
    with ThreadPoolExecutor(cores, thread_name_prefix="capotune-hash") as pool:
        try:
            while waiting or running:
                alive()
                while waiting and len(running) < cores:
                    stored = waiting.pop()
                    running[pool.submit(_digest, tensors, stored, stopped)] = stored.name
                for one in wait(running, _ALIVE_SECONDS, FIRST_COMPLETED).done:
                    digests[running.pop(one)] = one.result()
        finally:
            stopped.set()
    total = hashlib.sha256()
    for name in sorted(digests):
        total.update(digests[name])
    return total.hexdigest()


def _digest(tensors: Tensors, stored: StoredTensor, stopped: Event) -> bytes:
    """Of one tensor; of a part of it where nobody waits for it any more."""
    digest = hashlib.sha256(json.dumps([stored.name, stored.dtype, list(stored.shape)]).encode())
    for part in tensors.chunks(stored.name):
        digest.update(part)
        if stopped.is_set():
            break
    return digest.digest()
