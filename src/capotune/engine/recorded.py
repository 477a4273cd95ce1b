"""Training as a run does it: with a log, checkpoints, and progress events."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TextIO

from capotune.adapters.assemble import Assembled
from capotune.engine.activation_cache import ActivationCache
from capotune.engine.checkpoint import save_checkpoint
from capotune.engine.loop import finished, train
from capotune.engine.state import TrainingState
from capotune.errors import SettingError
from capotune.evaluation.boundary import resumes_with
from capotune.evaluation.forward import Examples, held_out_score
from capotune.events import EpochEnded, Reporter, Stage, StepTaken, alive, counter
from capotune.files import write_atomic

_CHECKPOINT_SECONDS = 300.0


def train_recorded(
    out: Path,
    assembled: Assembled,
    fit: Examples,
    held: Examples,
    *,
    seed: int,
    state: TrainingState,
    report: Reporter,
) -> TrainingState:
    """Run the loop to its end: ``out/metrics.jsonl``, a checkpoint after each epoch and every few minutes, events.

    Args:
        out: the run's folder.
        assembled: the model with the method attached.
        fit: rows to train on.
        held: rows to score the weights on after every epoch.
        seed: decides the order of the rows and dropout.
        state: where to begin or to go on.
        report: called with the events.

    Raises ``SettingError`` when the loss is no longer finite.
    """
    report(Stage(text="training"))
    checkpoints, saved = out / "checkpoints", time.monotonic()
    log = _open_log(out / "metrics.jsonl", state)
    metric = assembled.task.objective.metric

    def on_step(state: TrainingState, total: int, loss: float) -> bool:
        report(StepTaken(step=state.step, total=total, loss=loss))
        log.write(json.dumps({"step": state.step, "loss": loss}) + "\n")
        if not math.isfinite(loss):
            raise SettingError(
                f"the loss is {loss} at step {state.step}: training diverged.", advice="Lower `learning_rate`."
            )
        return time.monotonic() - saved > _CHECKPOINT_SECONDS

    def on_epoch(state: TrainingState, loss: float, score: float) -> None:
        report(EpochEnded(epoch=state.epoch, loss=loss, score=score, metric=metric))
        log.write(json.dumps({"epoch": state.epoch, "loss": loss, "held_out_score": score}) + "\n")
        log.flush()  # the log is never behind the checkpoint
        save_checkpoint(checkpoints, state)

    def evaluate() -> tuple[float, ...]:
        return held_out_score(assembled, held, alive(report))

    settings = assembled.method.settings
    with log:
        while True:
            state = train(
                assembled, fit, settings, seed=seed, evaluate=evaluate, state=state, on_step=on_step, on_epoch=on_epoch
            )
            if finished(state, settings):
                return state
            log.flush()
            save_checkpoint(checkpoints, state)  # the loop stopped in the middle of an epoch to be saved
            saved = time.monotonic()


def with_boundary(examples: Examples, assembled: Assembled, cache: ActivationCache, report: Reporter) -> Examples:
    """Compute once what is below the lowest trainable block, when something is, the model can go on from there, and the
    cache has room for it."""
    block = assembled.method.first_trainable_block()
    outputs = resumes_with(assembled, block) if block else None
    if outputs is None:
        return examples
    report(Stage(text="computing the frozen layers once"))
    states = cache.boundary(assembled, block, examples.rows, counter(report), outputs=outputs)
    return examples if states is None else Examples(examples.rows, examples.targets, states)


def _open_log(path: Path, state: TrainingState) -> TextIO:
    """The log to append to; of a run that was stopped, only what the checkpoint has seen stays in it."""
    seen: list[str] = []
    if state.step and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            entry = json.loads(line) if line.endswith("\n") else {"step": math.inf}
            if entry.get("step", 0) > state.step or entry.get("epoch", 0) > state.epoch:
                break
            seen.append(line)
    write_atomic(path, "".join(seen))
    return path.open("a", encoding="utf-8")
