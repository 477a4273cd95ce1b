"""A training state on disk: tensors in safetensors, counters in JSON, their checksums; complete or absent.

step-51-epoch-3/state.safetensors    weights, AdamW's moments, the best weights, the random numbers' state
step-51-epoch-3/state.json           the counters
step-51-epoch-3/SHA256SUMS           as ``sha256sum -c`` reads it
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from capotune.engine.state import TrainingState
from capotune.errors import OutputError
from capotune.events import Reporter, Warned, ignore
from capotune.files import output_folder, write_atomic
from capotune.run_folder import checkpoints, step_and_epoch

_COUNTERS = (
    "epoch", "batch", "step", "best_score", "best_epoch", "trained_score", "waited", "loss_sum",
    "skipped", "skipped_in_epoch", "skipped_in_a_row", "micro_batch_tokens", "stored_states", "mixed_lengths",
    "seconds",
)  # fmt: skip
_TENSORS, _VALUES, _SUMS = "state.safetensors", "state.json", "SHA256SUMS"


def save_checkpoint(folder: Path, state: TrainingState) -> Path:
    """Write ``folder/step-N-epoch-E``, which is returned, and remove all others but the one before and the one at the
    end of the best epoch.

    E tells a state at the end of an epoch's last batch from the one that has the epoch's score too.
    """
    target = folder / f"step-{state.step}-epoch-{state.epoch}"
    if target.exists() and _whole(target) is None:  # damaged since, and trained up to once more
        _remove(target)
    if not target.exists():
        values = json.dumps({name: getattr(state, name) for name in _COUNTERS})
        files = {_TENSORS: save(_tensors(state)), _VALUES: values.encode()}
        with output_folder(target) as new:
            for name, content in files.items():
                write_atomic(new / name, content)
            write_atomic(new / _SUMS, _sums(files))
    _prune(folder, target, state.best_epoch)
    return target


def load_checkpoint(folder: Path, report: Reporter = ignore) -> TrainingState | None:
    """The newest state under ``folder``; None where there is none.

    One that is damaged is passed over for the one before it, and ``Warned`` says so, as it does of one without
    checksums, which earlier versions wrote. Raises ``OutputError`` when all are damaged.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        state = _whole(path, report)
        if state is not None:
            return state
        report(Warned(text=f"the checkpoint {path} is damaged; the one before it is taken."))
    if found:
        raise OutputError(
            f"every checkpoint in {folder} is damaged.", advice=f"Remove {folder.parent} and start the run again."
        )
    return None


def _whole(path: Path, report: Reporter = ignore) -> TrainingState | None:
    """What the checkpoint holds; None for a damaged one."""
    try:
        if path.is_symlink() or any(not _is_plain(path / name) for name in (_TENSORS, _VALUES)):
            return None
        files = {name: (path / name).read_bytes() for name in (_TENSORS, _VALUES)}
        if (path / _SUMS).exists():
            if not _is_plain(path / _SUMS) or (path / _SUMS).read_bytes() != _sums(files):
                return None
        else:
            report(Warned(text=f"the checkpoint {path} is of an earlier version, without checksums."))
        counters: dict[str, Any] = json.loads(files[_VALUES])
        for name in ("best_score", "trained_score"):
            counters[name] = tuple(counters[name])
        return _state(counters, load(files[_TENSORS]))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def _is_plain(path: Path) -> bool:
    """Whether it is a file, and no link to one."""
    return path.is_file() and not path.is_symlink()


def _prune(folder: Path, newest: Path, best_epoch: int) -> None:
    """Leave ``newest``, the one before it, and the first that has the score of the best epoch (0: the start, of which
    there is none). What is beyond ``newest`` was passed over as damaged."""
    every = checkpoints(folder)
    at = every.index(newest)
    best = [path for path in every if best_epoch and step_and_epoch(path)[1] == best_epoch]
    for path in every:
        if path not in (*every[max(0, at - 1) : at + 1], *best[:1]):
            _remove(path)
    for left in folder.glob(".*.partial"):  # by a process that was killed
        _remove(left)


def _remove(path: Path) -> None:
    """Not to be seen half-removed."""
    hidden = path if path.name.startswith(".") else path.rename(path.with_name(f".{path.name}.partial"))
    if hidden.is_symlink():  # what it leads to is somebody else's
        hidden.unlink()
        return
    for file in hidden.iterdir():  # by rmtree, a signal may become an OSError
        file.unlink()
    hidden.rmdir()


def _sums(files: dict[str, bytes]) -> bytes:
    lines = (f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items())
    return "".join(lines).encode()


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
