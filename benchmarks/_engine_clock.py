"""Time and memory of one run, noted by whoever trains."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from capotune.device import peak_memory_bytes


class Clock:
    """When training began, when each step ended, its loss, and what the process held before."""

    def __init__(self) -> None:
        self.losses: list[Any] = []
        """Numbers, or tensors that nobody had to wait for."""
        self.ends: list[float] = []
        self.accuracy: float | None = None
        self.epochs: int | None = None
        self._paused = 0.0

    def begin(self) -> None:
        """Model and data are ready."""
        self.before_bytes, self.loading_peak_bytes = held_bytes(), peak_memory_bytes()
        self._began = self._now()

    def step(self) -> None:
        """A step has ended."""
        self.ends.append(self._now())

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens inside does not count."""
        since = self._now()
        yield
        self._paused += self._now() - since

    def record(self, whole: bool) -> dict[str, Any]:
        """Seconds of all steps (``whole``) or of all but the first, losses, bytes."""
        peak = peak_memory_bytes()
        return {
            "seconds": self.ends[-1] - (self._began if whole else self.ends[0]),
            "first_step_seconds": self.ends[0] - self._began,
            "losses": [float(loss) for loss in self.losses],
            "accuracy": self.accuracy,
            "epochs": self.epochs,
            "peak_bytes": peak,
            "before_bytes": self.before_bytes,
            "loading_peak_bytes": self.loading_peak_bytes,
        }

    def _now(self) -> float:
        """Seconds that count, up to now."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - self._paused


def held_bytes() -> int:
    """What this process holds now: on a GPU there, else its resident set."""
    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    return int(psutil.Process().memory_info().rss)
