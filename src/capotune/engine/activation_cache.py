"""What frozen layers compute, computed once and stored on disk by content.

The name of an entry is a hash of everything its values depend on (base, quantization, tokens, how they are read,
layers, prompt), so an entry is never stale: other data or another base is another name. Two kinds:

- features (rows, layers·hidden) that a task's head reads;
- boundary states (tokens, hidden) entering the lowest trainable block, for everything above it. They are stored without
  padding and mapped from disk, so they may be larger than memory.

An entry that is not as it was written is computed again, and a disk that cannot be written to is done without: the
cache may make a run faster, never another one, and never stop it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from capotune import cache
from capotune.adapters.assemble import Assembled
from capotune.data.batches import TokenRows
from capotune.evaluation.boundary import boundary_bytes, compute_boundary
from capotune.evaluation.resume import BoundaryStates
from capotune.events import OnProgress, Reporter, Warned, ignore
from capotune.files import free_bytes, human_bytes
from capotune.kernels.execution import reduced_precision, reusing_memory
from capotune.models.shards import DTYPE_NAMES, HEADER_LENGTH

_FORMAT = 6
_ALIGNMENT = 64


@dataclass
class ActivationCache:
    """Entries in ``folder`` (None: nothing is stored), for one frozen model ``identity``."""

    folder: Path | None
    identity: dict[str, Any]
    """All that the values depend on besides the tokens: base fingerprint, quantization, prompt."""
    made_of: dict[str, str] = field(default_factory=dict)
    """The names of ``base`` and ``data``, for people who look at the entries."""
    report: Reporter = ignore
    """Told once when something is too large to be stored, cannot be written, or was damaged."""
    stores: bool | None = None
    """Whether the run has boundary states stored so far; None: it begins, and whether there is room decides."""
    forward_rows: int = 0
    """TokenRows that had to go through the model."""
    reused_seconds: float = 0.0
    """What the entries that were found had cost."""
    _used: set[Path] = field(default_factory=set)
    """Entries that this run has found or made: none of them leaves for another."""
    _said: set[str] = field(default_factory=set)
    _is_writable: bool = True

    def boundary(
        self,
        assembled: Assembled,
        block: int,
        rows: TokenRows,
        progress: OnProgress | None = None,
        *,
        outputs: int = 0,
    ) -> BoundaryStates | None:
        """States that enter ``block``, for every row, computed in reduced precision where training is; ``outputs`` as
        ``BoundaryStates`` has it. None where they would be more than the cache may hold."""

        def compute() -> torch.Tensor:
            with reusing_memory(), reduced_precision():
                return compute_boundary(assembled, block, rows, progress)

        name = self._name("boundary", rows, block=block)
        values = self._found(name)
        if values is None:
            if not self._fits(boundary_bytes(assembled, rows), "the frozen layers are computed anew in every epoch"):
                return None
            values = self._computed("boundary", name, rows, compute)
            if stored := self._read(name, check=False):  # mapped from disk from now on
                values = stored[0]
        return BoundaryStates(values, rows.starts, outputs)

    def features(self, rows: TokenRows, compute: Callable[[], torch.Tensor], **parts: Any) -> torch.Tensor:
        """A task's features of ``rows``, from disk or by ``compute``; ``parts`` is all that they depend on beside base
        and tokens (JSON values)."""
        name = self._name("features", rows, **parts)
        values = self._found(name)
        return self._computed("features", name, rows, compute) if values is None else values

    def _found(self, name: str) -> torch.Tensor | None:
        found = self._read(name)
        if found is None:
            return None
        values, seconds = found
        self.reused_seconds += seconds
        self._use(name)
        return values

    def _computed(self, kind: str, name: str, rows: TokenRows, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        started = time.perf_counter()
        values = compute()
        self.forward_rows += len(rows.sequences)
        seconds = f"{time.perf_counter() - started:.3f}"
        if self._is_writable and self._fits(values.nbytes, "the next run computes it again"):
            self._write(name, values.contiguous(), {**self.made_of, "kind": kind, "seconds": seconds})
        return values

    def _fits(self, nbytes: int, otherwise: str) -> bool:
        """Whether so many bytes may be stored, for which older entries leave; else says once what happens."""
        if self.folder is None or cache.make_room(nbytes, self._used):
            return True
        sizes = f"{human_bytes(nbytes)}, more than the cache has room for (at most {human_bytes(cache.limit())})"
        self._say("large", f"what the frozen layers compute takes {sizes}: {otherwise}.")
        return False

    def _say(self, what: str, text: str) -> None:
        if what not in self._said:
            self.report(Warned(text=text))
        self._said.add(what)

    def _use(self, name: str) -> None:
        if self.folder:
            self._used.add(self.folder / f"{name}.safetensors")
            cache.hold(self.folder / f"{name}.safetensors")

    def _name(self, kind: str, rows: TokenRows, **parts: Any) -> str:
        text = json.dumps([_FORMAT, kind, self.identity, parts, rows.digest()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _read(self, name: str, *, check: bool = True) -> tuple[torch.Tensor, float] | None:
        """An entry's values and the seconds they cost; None when there is no whole one. ``check``: that they are what
        was written."""
        path = self.folder / f"{name}.safetensors" if self.folder else None
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                values, facts = file.get_tensor("values"), file.metadata()
            if check and facts.pop("crc32") != _checksum(values, facts):
                raise ValueError("another checksum")
            return values, float(facts["seconds"])
        except (OSError, SafetensorError, ValueError, KeyError, AttributeError):
            if path.is_file():  # else someone took it away a moment ago
                self._say("damaged", f"what was cached in {path} is damaged on the disk, and is computed again.")
            return None

    def _write(self, name: str, values: torch.Tensor, facts: dict[str, str]) -> None:
        if self.folder is None:
            return
        temporary = self.folder / f".{name}.{uuid4().hex}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            cache.tidy(self.folder)
            facts = facts | {"padding": _padding(values, facts)}
            save_file({"values": values}, temporary, metadata=facts | {"crc32": _checksum(values, facts)})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(self.folder / f"{name}.safetensors")
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            self._is_writable = False
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            sizes = f"{human_bytes(values.nbytes)} to write, {human_bytes(free_bytes(self.folder))} free"
            text = f"the cache in {self.folder} cannot be written ({reason}; {sizes}): the run goes on without it."
            self._say("unwritable", text)
        else:
            self._use(name)


def _checksum(values: torch.Tensor, facts: dict[str, str]) -> str:
    """CRC-32 of all that an entry holds: a bit that is another one is found, at 4 GB in a second of one core, twice as
    fast as by SHA-256. It is against accidents; who can write into the cache can write a checksum too."""
    described = json.dumps([sorted(facts.items()), str(values.dtype), list(values.shape)])
    content: Any = values.reshape(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(content, zlib.crc32(described.encode())):08x}"


def _padding(values: torch.Tensor, facts: dict[str, str]) -> str:
    """Spaces that make the file's header end where numbers are read fastest in place. Which numbers stand there decides
    how they are added up, and so the last bits of what is computed with them: names in the header must not."""
    described = {"dtype": DTYPE_NAMES[values.dtype], "shape": list(values.shape), "data_offsets": [0, values.nbytes]}
    header = {"__metadata__": {**facts, "padding": "", "crc32": "0" * 8}, "values": described}
    size = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode(errors="replace"))
    return " " * (-(HEADER_LENGTH + size) % _ALIGNMENT)
