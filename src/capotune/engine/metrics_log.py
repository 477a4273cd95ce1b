"""``metrics.jsonl``: a line for each step and each epoch, to be read while training goes on.

    {"step": 7, "steps": 51, "loss": 0.9213, "learning_rate": 0.00093}
    {"epoch": 1, "loss": 1.0134, "held_out_score": 0.8125}

``loss`` of a step is that of its rows before it was taken, of an epoch their mean; null where it is not finite, and the
line of a step that was skipped for that has ``"skipped": true``. No line holds a time: a run that was stopped and
resumed has the lines of one that was not.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from capotune.engine.state import TrainingState

__all__ = ["METRICS", "MetricsLog", "read_metrics"]

METRICS = "metrics.jsonl"


class MetricsLog:
    """Appends lines to ``folder/metrics.jsonl``, each in one write: whoever reads the file meanwhile sees no half line.

    It begins with the lines that ``state`` has seen; later ones are of steps that will be taken again.
    """

    def __init__(self, folder: Path, state: TrainingState) -> None:
        path = folder / METRICS
        end = _end_of_seen(path, state) if state.step and path.exists() else 0
        self._file = path.open("ab", buffering=0)
        self._file.truncate(end)

    def write(self, **values: Any) -> None:
        """Add a line. Raises ``OSError``, and leaves the file as it was, where the disk is full."""
        finite = {name: None if _is_infinite(value) else value for name, value in values.items()}
        line = (json.dumps(finite) + "\n").encode()
        end = self._file.seek(0, os.SEEK_END)
        written = self._file.write(line) or 0
        if written < len(line):
            self._file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)

    def flush(self) -> None:
        """Push the lines to the disk: a checkpoint must not survive a power cut that they do not."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines that a run has written so far; none where it has not trained in steps."""
    path = folder / METRICS
    return [line for line, _ in _lines(path)] if path.is_file() else []


def _end_of_seen(path: Path, state: TrainingState) -> int:
    """Bytes of the file that hold what was written up to ``state``."""
    end = 0
    for line, after in _lines(path):
        if line.get("step", 0) > state.step or line.get("epoch", 0) > state.epoch:
            break
        end = after
    return end


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each line and where it ends, up to the first one that is not whole: a power cut may leave one."""
    end = 0
    with path.open("rb") as file:
        for raw in file:
            end += len(raw)
            try:
                line = json.loads(raw) if raw.endswith(b"\n") else None
            except ValueError:
                return
            if not isinstance(line, dict):
                return
            yield line, end


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
