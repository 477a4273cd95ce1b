"""Training as a run does it: with a log, checkpoints, and progress events."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from capotune.adapters.assemble import Assembled
from capotune.adapters.task_model import Score
from capotune.engine.activation_cache import ActivationCache
from capotune.engine.loop import finished, train
from capotune.engine.metrics_log import MetricsLog
from capotune.engine.optimizer import learning_rate_factor
from capotune.engine.saving import CheckpointSaver
from capotune.engine.skipped import are_too_many, stopped
from capotune.engine.state import TrainingState, mean_loss
from capotune.errors import DataError
from capotune.evaluation.boundary import resumes_with
from capotune.evaluation.forward import Examples, held_out_score
from capotune.events import EpochEnded, Reporter, Stage, StepTaken, Warned, alive, counter
from capotune.interval import Interval

MAY_DIFFER = "the result may differ in the last bits from that of a run that was never stopped."
STORED_STATES = "stored_states"


class Clock:
    """Seconds that a run's training has taken, in all the processes that worked on it. What the cache gave counts as
    much as it once took."""

    def __init__(self, cache: ActivationCache) -> None:
        self._cache, self._offset = cache, 0.0
        self._offset = -self.seconds()

    def seconds(self) -> float:
        """So far."""
        return time.perf_counter() + self._cache.reused_seconds + self._offset

    def go_on_from(self, seconds: float) -> None:
        """Of what went before, these count."""
        self._offset += seconds - self.seconds()


@dataclass(frozen=True)
class Recording:
    """Where a run trains, and from where it goes on."""

    out: Path
    """The run's folder."""
    clock: Clock
    save_every: Interval = field(default_factory=Interval)
    """Between checkpoints; one is also made after every epoch."""
    state: TrainingState | None = None
    """A checkpoint's, of a run that was stopped."""


def train_recorded(
    recording: Recording,
    assembled: Assembled,
    fit: Examples,
    held: Examples | None,
    *,
    seed: int,
    state: TrainingState,
    report: Reporter,
) -> TrainingState:
    """Run the loop to its end: ``metrics.jsonl``, checkpoints, events.

    Args:
        recording: where it is recorded.
        assembled: the model with the method attached.
        fit: rows to train on.
        held: rows to score the weights on after every epoch; None: their score is the epoch's mean loss, negated.
        seed: decides the order of the rows and dropout.
        state: where to begin: ``recording.state``, or what ``start`` made.
        report: called with the events.

    Raises ``SettingError`` or ``DataError`` when too many steps were skipped (``engine.skipped``), with the state saved
    where single rows are at fault; ``OutputError`` when a checkpoint cannot be written.
    """
    report(Stage(text="training"))
    clock, metric, settings = recording.clock, assembled.task.objective.metric, assembled.method.settings
    assert settings.learning_rate is not None
    if state.seconds:
        clock.go_on_from(state.seconds)
    state.stored_states = fit.boundary is not None
    say, last = _Notices(report, state), math.nan

    def on_step(state: TrainingState, total: int, loss: float) -> bool:
        nonlocal last
        last = loss
        rate = settings.learning_rate * learning_rate_factor(state.step - 1, total, settings)
        skipped = {"skipped": True} if state.skipped_in_a_row else {}
        log.write(step=state.step, steps=total, loss=loss, learning_rate=rate, **skipped)
        report(StepTaken(step=state.step, total=total, loss=loss, learning_rate=rate))
        say.of_step(state)
        return are_too_many(state)

    def on_epoch(state: TrainingState, loss: float, score: float) -> None:
        log.write(epoch=state.epoch, loss=loss, held_out_score=score)
        report(EpochEnded(epoch=state.epoch, loss=loss, score=score, metric=metric))
        is_over = finished(state, settings)
        if not are_too_many(state, is_over):
            saver.end_epoch(state, last=is_over)

    def evaluate() -> Score:
        if held is None:
            return (-mean_loss(state),)
        return held_out_score(assembled, held, alive(report))

    with (
        MetricsLog(recording.out, state) as log,
        CheckpointSaver(recording.out, recording.save_every, clock.seconds, before_writing=log.flush) as saver,
    ):
        state = train(
            assembled, fit, settings, seed=seed, evaluate=evaluate, state=state, on_step=on_step, on_epoch=on_epoch,
            saver=saver,
        )  # fmt: skip
        is_over = finished(state, settings)
        if are_too_many(state, is_over):
            error = stopped(assembled, fit, state, seed, last, is_over)
            if isinstance(error, DataError) and not is_over:  # the weights are good: one may go on after these rows
                saver.save_now(state)
            raise error
        say.of_all(state)
        return state


def with_boundary(
    parts: Sequence[Examples], assembled: Assembled, cache: ActivationCache, report: Reporter
) -> list[Examples]:
    """Compute once what is below the lowest trainable block, when something is, the model can go on from there, and the
    cache has room for it: of all ``parts`` or of none.

    A run that computed it anew (``cache.stores``) does so when it is gone on with or reproduced: where states come from
    decides about the last bits.
    """
    block = 0 if cache.stores is False else assembled.method.first_trainable_block()
    outputs = resumes_with(assembled, block) if block else None
    if outputs is None:
        return list(parts)
    report(Stage(text="computing the frozen layers once"))
    above = []
    for part in parts:
        states = cache.boundary(assembled, block, part.rows, counter(report), outputs=outputs)
        if states is None:
            if cache.stores:
                report(Warned(text=f"what the frozen layers compute was stored before: {MAY_DIFFER}"))
            return list(parts)
        above.append(replace(part, boundary=states))
    return above


def how_it_went(state: TrainingState) -> dict[str, Any]:
    """What a run's record says of its steps beside the settings: incidents, where there were any, and whether they
    began above the frozen layers."""
    incidents = {"skipped_steps": state.skipped, "micro_batch_tokens": state.micro_batch_tokens}
    return {name: value for name, value in incidents.items() if value} | {STORED_STATES: state.stored_states}


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
