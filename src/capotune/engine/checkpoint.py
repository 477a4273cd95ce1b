"""A training state on disk: tensors in safetensors, counters in JSON, complete or absent."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from capotune.engine.state import TrainingState
from capotune.errors import OutputError
from capotune.files import output_folder, write_atomic

_COUNTERS = (
    "epoch", "batch", "step", "best_score", "best_epoch", "trained_score", "waited", "loss_sum",
    "skipped", "skipped_in_epoch", "skipped_in_a_row", "micro_batch_tokens",
)  # fmt: skip


def save_checkpoint(folder: Path, state: TrainingState) -> None:
    """Write ``folder/step-N-epoch-E``; then remove the older ones.

    E tells a state at the end of an epoch's last batch from the one that has the epoch's score too.
    """
    target = folder / f"step-{state.step}-epoch-{state.epoch}"
    if not target.exists():
        with output_folder(target) as new:
            write_atomic(new / "state.safetensors", save(_tensors(state)))
            write_atomic(new / "state.json", json.dumps({name: getattr(state, name) for name in _COUNTERS}))
    for old in _all(folder):
        if old != target:
            for path in old.iterdir():  # by rmtree, a signal may become an OSError
                path.unlink()
            old.rmdir()


def load_checkpoint(folder: Path) -> TrainingState:
    """The newest state under ``folder``. ``OutputError`` when there is none or it is damaged."""
    found = _all(folder)
    if not found:
        raise OutputError(f"no checkpoint in {folder}.", setting="resume", advice="Start the run without `resume`.")
    try:
        counters: dict[str, Any] = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
        for name in ("best_score", "trained_score"):
            counters[name] = tuple(counters[name])
        return _state(counters, load_file(found[-1] / "state.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise OutputError(
            f"the checkpoint {found[-1]} is damaged ({error!r}).", setting="resume", advice="Start without `resume`."
        ) from None


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])


def _tensors(state: TrainingState) -> dict[str, torch.Tensor]:
    """Flat names: ``rng``, ``weights/KEY``, ``best/KEY``, ``optimizer/KEY/NAME``."""
    flat = {"rng": state.rng}
    flat |= {f"weights/{key}": value for key, value in state.weights.items()}
    flat |= {f"best/{key}": value for key, value in state.best_weights.items()}
    for key, moments in state.optimizer.items():
        flat |= {f"optimizer/{key}/{name}": value for name, value in moments.items()}
    return {name: value.contiguous() for name, value in flat.items()}


def _state(counters: dict[str, Any], tensors: dict[str, torch.Tensor]) -> TrainingState:
    state = TrainingState(rng=tensors["rng"], **counters)
    for flat, value in tensors.items():
        kind, _, key = flat.partition("/")
        if kind == "weights":
            state.weights[key] = value
        elif kind == "best":
            state.best_weights[key] = value
        elif kind == "optimizer":
            key, _, name = key.rpartition("/")
            state.optimizer.setdefault(key, {})[name] = value
    return state
