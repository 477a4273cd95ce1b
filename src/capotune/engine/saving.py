"""When a run saves a checkpoint, and how: beside training, one at a time.

A checkpoint is due after so many steps or so much time, at the end of an epoch, and when one is asked for by a file in
the run's folder (``run_folder.request_checkpoint``). It is taken at the end of a step, as a copy of the trained weights
and their moments; a thread then writes and renames it while training goes on. What falls due while one is being written
is taken at the end of the first step after that, so training never waits for the disk and memory holds one copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from capotune.engine.checkpoint import save_checkpoint
from capotune.engine.state import TrainingState
from capotune.errors import OutputError
from capotune.files import check_there
from capotune.interval import Interval
from capotune.run_folder import CHECKPOINTS, is_requested, withdraw_request

__all__ = ["CheckpointSaver"]


class CheckpointSaver:
    """Saves the checkpoints of the run in ``out``. Inside ``with``; the end of the block waits for what is being
    written, and raises what went wrong with it.

    Args:
        out: the run's folder.
        every: how often.
        seconds: how long the run has taken when a state is taken.
        before_writing: called before each write, in the thread that writes.
    """

    def __init__(
        self,
        out: Path,
        every: Interval,
        seconds: Callable[[], float] = lambda: 0.0,
        before_writing: Callable[[], None] = lambda: None,
    ) -> None:
        self._out, self._every, self._seconds, self._before_writing = out, every, seconds, before_writing
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._written: Future[None] | None = None
        self._overdue = False
        self._last_step, self._last_time = -1, time.monotonic()

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._thread.shutdown()
        if self._written and kind is None:
            self._written.result()

    def due(self, state: TrainingState) -> bool:
        """Whether to save now. Raises ``OutputError`` when the last one could not be written."""
        if self._last_step < 0:
            self._last_step = state.step - 1
        self._overdue |= (
            state.step - self._last_step >= self._every.steps
            or time.monotonic() - self._last_time >= self._every.seconds
            or is_requested(self._out) is not None
        )
        return not self._is_writing() and self._overdue

    def save(self, state: TrainingState) -> None:
        """Write the state beside training."""
        self._take(state)
        self._written = self._thread.submit(self._write, replace(state), is_requested(self._out))

    def end_epoch(self, state: TrainingState, last: bool) -> None:
        """Save the state after an epoch, the ``last`` one in any case; others later, while one is being written."""
        if self._is_writing() and not last:
            self._overdue = True
        else:
            self.save(state)

    def save_now(self, state: TrainingState) -> None:
        """Save the state in which training is stopped, unless it is the start, before this returns."""
        self._thread.shutdown()
        if state.step:
            self._take(state)
            self._write(state, is_requested(self._out))

    def _is_writing(self) -> bool:
        if self._written is None or not self._written.done():
            return self._written is not None
        self._written.result()
        return False

    def _take(self, state: TrainingState) -> None:
        state.seconds = self._seconds()
        self._overdue, self._last_step, self._last_time = False, state.step, time.monotonic()

    def _write(self, state: TrainingState, request: int | None) -> None:
        self._before_writing()
        check_there(self._out)
        try:
            save_checkpoint(self._out / CHECKPOINTS, state)
        except OutputError:
            check_there(self._out)  # that it is gone says more
            raise
        if request == is_requested(self._out):  # else it was asked for once more meanwhile
            withdraw_request(self._out)
