"""Training as a run does it: with a log, checkpoints, and progress events."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from capotune.adapters.assemble import Assembled
from capotune.engine.activation_cache import ActivationCache
from capotune.engine.checkpoint import save_checkpoint
from capotune.engine.loop import finished, train
from capotune.engine.metrics_log import MetricsLog
from capotune.engine.optimizer import learning_rate_factor
from capotune.engine.skipped import are_too_many, stopped
from capotune.engine.state import TrainingState
from capotune.errors import DataError
from capotune.evaluation.boundary import resumes_with
from capotune.evaluation.forward import Examples, held_out_score
from capotune.events import EpochEnded, Reporter, Stage, StepTaken, Warned, alive, counter

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

    Raises ``SettingError`` or ``DataError`` when too many steps were skipped (``engine.skipped``); where single rows
    are at fault, the state is saved.
    """
    report(Stage(text="training"))
    checkpoints, saved = out / "checkpoints", time.monotonic()
    metric, settings = assembled.task.objective.metric, assembled.method.settings
    assert settings.learning_rate is not None
    say, last = _Notices(report, state), math.nan

    def on_step(state: TrainingState, total: int, loss: float) -> bool:
        nonlocal last
        last = loss
        rate = settings.learning_rate * learning_rate_factor(state.step - 1, total, settings)
        skipped = {"skipped": True} if state.skipped_in_a_row else {}
        log.write(step=state.step, steps=total, loss=loss, learning_rate=rate, **skipped)
        report(StepTaken(step=state.step, total=total, loss=loss, learning_rate=rate))
        say.of_step(state)
        return are_too_many(state) or time.monotonic() - saved > _CHECKPOINT_SECONDS

    def on_epoch(state: TrainingState, loss: float, score: float) -> None:
        log.write(epoch=state.epoch, loss=loss, held_out_score=score)
        report(EpochEnded(epoch=state.epoch, loss=loss, score=score, metric=metric))
        log.flush()  # the log is never behind the checkpoint
        if not are_too_many(state, finished(state, settings)):
            save_checkpoint(checkpoints, state)

    def evaluate() -> tuple[float, ...]:
        return held_out_score(assembled, held, alive(report))

    with MetricsLog(out, state) as log:
        while True:
            state = train(
                assembled, fit, settings, seed=seed, evaluate=evaluate, state=state, on_step=on_step, on_epoch=on_epoch
            )
            is_over = finished(state, settings)
            log.flush()
            if are_too_many(state, is_over):
                error = stopped(assembled, fit, state, seed, last, is_over)
                if isinstance(error, DataError) and not is_over:  # the weights are good: one may go on after these rows
                    save_checkpoint(checkpoints, state)
                raise error
            if is_over:
                say.of_all(state)
                return state
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
    return examples if states is None else replace(examples, boundary=states)


def incidents(state: TrainingState) -> dict[str, Any]:
    """What a run's record says of steps that did not go as the settings ask; nothing where all did."""
    found = {"skipped_steps": state.skipped, "micro_batch_tokens": state.micro_batch_tokens}
    return {name: value for name, value in found.items() if value}


class _Notices:
    """What did not go as the settings ask, each said once."""

    def __init__(self, report: Reporter, state: TrainingState) -> None:
        self._report, self._skipped, self._tokens = report, state.skipped, state.micro_batch_tokens

    def of_step(self, state: TrainingState) -> None:
        if state.skipped and not self._skipped:
            text = f"step {state.step} is skipped: its loss or gradient is not finite. The weights stay as they were."
            self._report(Warned(text=text))
        if state.micro_batch_tokens != self._tokens:
            tokens = f"{state.micro_batch_tokens:,} tokens at a time"
            text = f"memory ran out at step {state.step}: from there on {tokens}, at the same batch and gradient."
            self._report(Warned(text=text))
        self._skipped, self._tokens = state.skipped, state.micro_batch_tokens

    def of_all(self, state: TrainingState) -> None:
        if state.skipped > 1:
            self._report(Warned(text=f"{state.skipped:,} of {state.step:,} steps were skipped."))
