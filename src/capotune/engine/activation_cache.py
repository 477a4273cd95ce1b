"""What frozen layers compute, computed once and kept on disk by content.

The name of an entry is a hash of everything its values depend on (base, packing, tokens, how they are read, pooling,
layers, prompt), so an entry is never stale: other data or another base is another name. Two kinds:

- pooled features (rows, layers·hidden), for a head alone;
- boundary states (tokens, hidden) entering the lowest trainable block, for everything above it. They are stored without
  padding and mapped from disk, so they may be larger than memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from capotune.adapters.assemble import Assembled
from capotune.data.batches import TokenRows, sorted_order, tokens_at_once
from capotune.device import reusing_memory
from capotune.errors import OutputError
from capotune.kernels.linear import reduced_precision
from capotune.models.architecture import swap

_FORMAT = 4
_ABANDONED_SECONDS = 2 * 24 * 3600
Progress = Callable[[int, int], None]
"""Called with (batches done, batches in all)."""


def default_folder() -> Path:
    """``$CAPOTUNE_CACHE``, else capotune under ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("CAPOTUNE_CACHE") or Path(base) / "capotune")


@dataclass
class ActivationCache:
    """Entries in ``folder`` (None: nothing is kept), for one frozen model ``identity``."""

    folder: Path | None
    identity: dict[str, Any]
    """All that the values depend on besides the tokens: base fingerprint, packing, prompt."""
    forward_rows: int = 0
    """Rows that had to go through the model."""
    reused_seconds: float = 0.0
    """What the entries that were found had cost."""

    def pooled(
        self, assembled: Assembled, layers: tuple[int, ...], rows: TokenRows, progress: Progress | None = None
    ) -> torch.Tensor:
        """Features (rows, len(layers)·hidden) fp32 on the CPU, from disk or by one forward pass."""
        name = self._name("pooled", rows, pooling=assembled.model.pooling, layers=layers)
        return self._once(name, rows, lambda: compute_pooled(assembled, layers, rows, progress))

    def boundary(
        self, assembled: Assembled, block: int, rows: TokenRows, progress: Progress | None = None
    ) -> BoundaryStates:
        """States that enter ``block``, for every row."""
        name = self._name("boundary", rows, block=block)
        values = self._once(name, rows, lambda: compute_boundary(assembled, block, rows, progress))
        if kept := self._read(name):  # mapped from disk from now on
            values = kept[0]
        return BoundaryStates(values, np.concatenate([[0], np.cumsum(rows.lengths)]))

    def _once(self, name: str, rows: TokenRows, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        if found := self._read(name):
            values, seconds = found
            self.reused_seconds += seconds
            return values
        started = time.perf_counter()
        values = compute()
        self.forward_rows += len(rows.sequences)
        self._write(name, values, time.perf_counter() - started)
        return values

    def _name(self, kind: str, rows: TokenRows, **parts: Any) -> str:
        text = json.dumps([_FORMAT, kind, self.identity, parts, rows.digest()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _read(self, name: str) -> tuple[torch.Tensor, float] | None:
        """An entry's values and the seconds they cost; None when there is no whole one."""
        path = self.folder / f"{name}.safetensors" if self.folder else None
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor("values"), float(file.metadata()["seconds"])
        except (OSError, SafetensorError):  # damaged, or taken away by someone a moment ago
            return None

    def _write(self, name: str, values: torch.Tensor, seconds: float) -> None:
        if self.folder is None:
            return
        temporary = self.folder / f".{name}.{uuid4().hex}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(self.folder)
            save_file({"values": values.contiguous()}, temporary, metadata={"seconds": f"{seconds:.3f}"})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(self.folder / f"{name}.safetensors")
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise OutputError(
                f"the cache {self.folder} cannot be written: {error} ({values.nbytes:,} bytes). "
                "Free space, set CAPOTUNE_CACHE to another folder, or give --no-cache."
            ) from None


def _remove_abandoned(folder: Path) -> None:
    """Entries that a killed process left half-written, days ago."""
    for path in folder.glob(".*"):
        with suppress(OSError):  # someone else removed it
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()


@dataclass(frozen=True)
class BoundaryStates:
    """States (all tokens, hidden) of all rows one after the other; row r is ``values[starts[r]:starts[r+1]]``."""

    values: torch.Tensor
    starts: np.ndarray

    def flat(self, rows: Sequence[int] | np.ndarray) -> torch.Tensor:
        """(tokens, hidden) of these rows, one after the other."""
        return torch.cat([self.values[self.starts[row] : self.starts[row + 1]] for row in rows])


@torch.no_grad()
def compute_pooled(
    assembled: Assembled, layers: tuple[int, ...], rows: TokenRows, progress: Progress | None = None
) -> torch.Tensor:
    """One forward pass over all rows: features (rows, len(layers)·hidden) in the order of the rows."""
    model = assembled.model
    features = torch.empty(len(rows.sequences), len(layers) * model.hidden_size)
    order = sorted_order(rows.lengths, tokens_at_once(model.device))
    with reusing_memory(), reduced_precision(), assembled.reading():
        for done, chosen in enumerate(order):
            batch = rows.batch(chosen, first_position=assembled.packing.first_position).to(model.device)
            features[torch.as_tensor(chosen)] = model.features(batch, layers).float().cpu()
            if progress:
                progress(done + 1, len(order))
    return features


@torch.no_grad()
def compute_boundary(
    assembled: Assembled, block: int, rows: TokenRows, progress: Progress | None = None
) -> torch.Tensor:
    """One forward pass up to ``block``: the states that enter it, (all tokens, hidden), without padding."""
    backbone, architecture = assembled.backbone, assembled.architecture
    starts = np.concatenate([[0], np.cumsum(rows.lengths)])
    values = torch.empty(int(starts[-1]), architecture.hidden_size, dtype=next(backbone.parameters()).dtype)
    order = sorted_order(rows.lengths, tokens_at_once(assembled.model.device))
    with (
        reusing_memory(),
        reduced_precision(),
        assembled.reading(),
        _stop_at(assembled.model, architecture.blocks[block]) as caught,
    ):
        for done, chosen in enumerate(order):
            batch = rows.batch(chosen, first_position=assembled.packing.first_position).to(assembled.model.device)
            with suppress(_BoundaryReachedError):
                backbone(**batch.inputs)
            states = batch.flat(caught.pop()).cpu()
            for row, of_row in zip(chosen, batch.split(states), strict=True):
                values[starts[row] : starts[row + 1]] = of_row
            if progress:
                progress(done + 1, len(order))
    return values


@contextmanager
def resume_from(assembled: Assembled, block: int) -> Iterator[Callable[[torch.Tensor], None]]:
    """Inside, the model starts at ``block``: the blocks below pass through, and its input is what the yielded function
    was last given, laid out as the batch is. Token ids still go in; attention mask and positions come from them."""
    model, architecture = assembled.model, assembled.architecture
    frozen = {path: model.get_submodule(path) for path in architecture.blocks[:block]}
    for path in frozen:
        swap(model, path, _PassThrough())
    current: list[torch.Tensor] = []

    def replace(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": current[0]}
        return (current[0], *args[1:]), kwargs

    def give(states: torch.Tensor) -> None:
        current[:] = [states]

    entered = model.get_submodule(architecture.blocks[block])
    hook = entered.register_forward_pre_hook(replace, with_kwargs=True, prepend=True)  # a method's own come after it
    try:
        yield give
    finally:
        hook.remove()
        for path, module in frozen.items():
            swap(model, path, module)


class _PassThrough(nn.Module):
    """Stands for a block whose work is already done."""

    def forward(self, hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return hidden_states


class _BoundaryReachedError(Exception):
    """The forward pass arrived at the boundary; nothing above it is needed."""


@contextmanager
def _stop_at(model: nn.Module, path: str) -> Iterator[list[torch.Tensor]]:
    caught: list[torch.Tensor] = []

    def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        raise _BoundaryReachedError

    hook = model.get_submodule(path).register_forward_pre_hook(catch, with_kwargs=True)
    try:
        yield caught
    finally:
        hook.remove()
