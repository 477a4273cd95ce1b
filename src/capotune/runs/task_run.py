"""What a task does in a run: the part between the data and the adapter that differs between labels and text."""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from capotune.adapters.assemble import Assembled
from capotune.engine.activation_cache import ActivationCache
from capotune.engine.checkpoint import save_checkpoint
from capotune.engine.loop import Examples, TrainingState, finished, train
from capotune.errors import SettingError
from capotune.evaluation.pairs import RowCounts
from capotune.files import write_atomic
from capotune.models.load import Source
from capotune.settings import MethodSettings, TrainSettings
from capotune.tasks.base import Task

_CHECKPOINT_SECONDS = 300.0
MOST_HELD_OUT = 500

Event = dict[str, Any]
"""``kind`` and its values: stage(text), data(report), start(trainable, total), step(step, total, loss),
epoch(epoch, loss, score, metric), result(…)."""
Reporter = Callable[[Event], None]


@dataclass(frozen=True)
class Fitted:
    """What training reports about itself."""

    epochs: float
    best_epoch: int
    held_out_score: float | None
    """In the task's metric."""
    also: dict[str, Any] = field(default_factory=dict)
    """What only this task has to say."""


@dataclass(frozen=True)
class Tested:
    """How a model did on the test rows."""

    metric: str
    score: float | None
    """In ``metric``; None without test rows."""
    scores: dict[str, float]
    """Every metric by name."""
    intervals: dict[str, tuple[float, float]]
    """95 % interval of each metric that has one."""
    rows: int
    predictions: list[dict[str, Any]]
    """One for each row, as predictions.jsonl holds them."""
    counts: RowCounts | None = None
    """What each row adds to ``score``; None without test rows."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the score."""
        return self.intervals.get(self.metric)


class TaskRun(ABC):
    """Data and task, ready to train, and the steps of a run that are the task's own."""

    source: Source
    task: Task
    train: Examples
    """Training rows."""
    fit_rows: torch.Tensor
    """Those of them that weights are fitted to."""
    held_rows: torch.Tensor
    """Those held out to choose the regularisation and when to stop."""
    train_rows: int
    """Rows of the data that are trained on, the held-out ones included."""
    data_sha256: str

    @abstractmethod
    def __init__(self, settings: TrainSettings, method: MethodSettings, report: Reporter) -> None:
        """Read and check the data, tokenise it for the base, hold rows out, and report what was found."""

    def settle(self, assembled: Assembled, report: Reporter) -> Assembled:  # noqa: ARG002
        """Choose what only the loaded base can tell; the method is not attached yet."""
        return assembled

    @abstractmethod
    def start_tokens(self, method: MethodSettings) -> list[int]:
        """Tokens whose embeddings a soft prompt starts from."""

    @abstractmethod
    def score_base(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> Tested:
        """How the base does on the test rows before anything is trained."""

    @abstractmethod
    def before_attach(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> None:
        """Work that is the same with the method and without."""

    @abstractmethod
    def fit(
        self,
        settings: TrainSettings,
        assembled: Assembled,
        cache: ActivationCache,
        report: Reporter,
        state: TrainingState | None,
    ) -> Fitted:
        """Train the attached method; the model holds the best weights afterwards."""

    @abstractmethod
    def test(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> Tested:
        """Score the test rows."""


def train_in_steps(
    out: Path,
    assembled: Assembled,
    fit: Examples,
    held: Examples,
    *,
    seed: int,
    state: TrainingState,
    report: Reporter,
) -> TrainingState:
    """Run the loop to its end with a log, a checkpoint after each epoch and every few minutes, and progress events."""
    report({"kind": "stage", "text": "training"})
    checkpoints, saved = out / "checkpoints", time.monotonic()
    log = _open_log(out / "metrics.jsonl", state)
    metric = assembled.task.metric

    def on_step(state: TrainingState, total: int, loss: float) -> bool:
        report({"kind": "step", "step": state.step, "total": total, "loss": loss})
        log.write(json.dumps({"step": state.step, "loss": loss}) + "\n")
        if not math.isfinite(loss):
            raise SettingError(f"the loss is {loss} at step {state.step}: training diverged. Lower --learning-rate.")
        return time.monotonic() - saved > _CHECKPOINT_SECONDS

    def on_epoch(state: TrainingState, loss: float, score: float) -> None:
        report({"kind": "epoch", "epoch": state.epoch, "loss": loss, "score": score, "metric": metric})
        log.write(json.dumps({"epoch": state.epoch, "loss": loss, "held_out_score": score}) + "\n")
        log.flush()  # the log is never behind the checkpoint
        save_checkpoint(checkpoints, state)

    method = assembled.method.settings
    with log:
        while True:
            state = train(assembled, fit, held, method, seed=seed, state=state, on_step=on_step, on_epoch=on_epoch)
            if finished(state, method):
                return state
            log.flush()
            save_checkpoint(checkpoints, state)  # the loop stopped in the middle of an epoch to be saved
            saved = time.monotonic()


def with_boundary(examples: Examples, assembled: Assembled, cache: ActivationCache, report: Reporter) -> Examples:
    """Compute once what is below the lowest trainable block, when something is."""
    block = assembled.method.first_trainable_block()
    if block == 0:
        return examples
    report({"kind": "stage", "text": "computing the frozen layers once"})
    states = cache.boundary(assembled, block, examples.rows, counter(report))
    return Examples(examples.rows, examples.targets, states)


def counter(report: Reporter) -> Callable[[int, int], None]:
    """Progress as events."""

    def progress(done: int, total: int) -> None:
        report({"kind": "step", "step": done, "total": total, "loss": None})

    return progress


def _open_log(path: Path, state: TrainingState) -> TextIO:
    """The log to add to; of a run that was stopped, only what the checkpoint has seen stays in it."""
    kept: list[str] = []
    if state.step and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            entry = json.loads(line) if line.endswith("\n") else {"step": math.inf}
            if entry.get("step", 0) > state.step or entry.get("epoch", 0) > state.epoch:
                break
            kept.append(line)
    write_atomic(path, "".join(kept))
    return path.open("a", encoding="utf-8")
