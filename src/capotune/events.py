"""What a running command reports, as small typed events, and how it is stopped from outside.

Every function that takes time takes one ``report: Reporter`` and calls it with the events below. A face draws them;
the worker process of ``compare`` sends them as JSON (``to_json``) and its parent reads them back (``from_json``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

__all__ = [
    "CancelToken",
    "DataInspected",
    "EpochEnded",
    "Event",
    "Failed",
    "Finished",
    "Heartbeat",
    "OnProgress",
    "Progress",
    "Reporter",
    "Stage",
    "StepTaken",
    "TrainingStarted",
    "Warned",
    "alive",
    "bytes_as_progress",
    "counter",
    "from_json",
    "ignore",
    "nothing",
    "to_json",
]


@dataclass(frozen=True)
class Event:
    """Something that happened. ``method`` names the technique in a comparison, and is None in a run of one."""

    method: str | None = None


@dataclass(frozen=True)
class Stage(Event):
    """The run begins another kind of work."""

    text: str = ""


@dataclass(frozen=True)
class Warned(Event):
    """Something the user should know, which does not stop the run."""

    text: str = ""


@dataclass(frozen=True)
class DataInspected(Event):
    """The data was read and checked."""

    task: str = ""
    report: dict[str, Any] | None = None
    """The task's data report as plain JSON."""


@dataclass(frozen=True)
class TrainingStarted(Event):
    """The method is attached."""

    trainable: int = 0
    """Weights that will train."""
    total: int = 0
    """Weights of the base."""


@dataclass(frozen=True)
class Progress(Event):
    """``done`` of ``total`` units of the current stage (batches, bytes, rows) are finished."""

    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class Heartbeat(Event):
    """The current stage goes on, with nothing to show: long stages report it so that a run can be stopped in them."""


@dataclass(frozen=True)
class StepTaken(Event):
    """An optimizer step was taken."""

    step: int = 0
    total: int = 0
    loss: float = 0.0
    learning_rate: float = 0.0
    """Of the method's weights, as it was in this step."""


@dataclass(frozen=True)
class EpochEnded(Event):
    """An epoch ended, and its weights were scored on the held-out rows."""

    epoch: int = 0
    loss: float = 0.0
    """Mean training loss of the epoch."""
    score: float = 0.0
    """Held-out score, in the sense of ``metric``."""
    metric: str = ""


@dataclass(frozen=True)
class Finished(Event):
    """The run is complete; ``result`` is the ``result`` of its ``run.json``."""

    result: dict[str, Any] | None = None


@dataclass(frozen=True)
class Failed(Event):
    """A technique of a comparison crashed; the others go on."""

    text: str = ""


Reporter = Callable[[Event], None]
"""Called with each event, in the thread that runs the command."""

_EVENTS: dict[str, type[Event]] = {
    event.__name__: event
    for event in (
        Stage, Warned, DataInspected, TrainingStarted, Progress, Heartbeat, StepTaken, EpochEnded, Finished, Failed,
    )
}  # fmt: skip


def ignore(_event: Event) -> None:
    """The reporter for callers that want none."""


def nothing() -> None:
    """The callback of long work for callers that need not know that it goes on (``alive``)."""


def to_json(event: Event) -> dict[str, Any]:
    """The event as plain values; ``event`` names its class."""
    return {"event": type(event).__name__, **asdict(event)}


def from_json(values: dict[str, Any]) -> Event:
    """The event that ``to_json`` wrote. ``KeyError`` for an unknown one."""
    values = dict(values)
    return _EVENTS[values.pop("event")](**values)


OnProgress = Callable[[int, int], None]
"""Is called with (done, total)."""


def counter(report: Reporter) -> OnProgress:
    """A ``(done, total)`` callback that reports ``Progress``."""
    return lambda done, total: report(Progress(done=done, total=total))


def alive(report: Reporter) -> Callable[..., None]:
    """A callback that reports a ``Heartbeat``, whatever it is called with."""
    return lambda *_: report(Heartbeat())


def bytes_as_progress(report: Reporter) -> OnProgress:
    """A ``(done, total)`` callback in bytes: at most a hundred ``Progress`` events, with a ``Heartbeat`` in between."""
    last = -1

    def progress(done: int, total: int) -> None:
        nonlocal last
        if total and 100 * done // total > last:
            last = 100 * done // total
            report(Progress(done=done, total=total))
        else:
            report(Heartbeat())

    return progress


class CancelToken:
    """Stops a run from another thread: ``cancel()``, and the run raises ``KeyboardInterrupt`` before its next step.

    The run ends as by Ctrl-C: what was saved stays, nothing is half-written, ``capotune.resume`` goes on from there.
    """

    def __init__(self) -> None:
        self._cancelled = threading.Event()
        self._actions: list[Callable[[], object]] = []

    @property
    def cancelled(self) -> bool:
        """Whether ``cancel`` was called."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Ask the run to stop; returns at once."""
        self._cancelled.set()
        for action in tuple(self._actions):
            action()

    @contextmanager
    def calling(self, action: Callable[[], object]) -> Iterator[None]:
        """Inside, ``cancel`` also calls ``action``, in the thread that cancels: to end a process that is waited for."""
        self._actions.append(action)
        try:
            if self.cancelled:
                action()
            yield
        finally:
            self._actions.remove(action)

    def check(self) -> None:
        """Raise ``KeyboardInterrupt`` when ``cancel`` was called."""
        if self._cancelled.is_set():
            raise KeyboardInterrupt

    def watching(self, report: Reporter) -> Reporter:
        """``report`` that raises ``KeyboardInterrupt`` once ``cancel`` was called; runs report before every step."""

        def checked(event: Event) -> None:
            self.check()
            report(event)

        return checked
