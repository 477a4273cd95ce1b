"""``metrics.jsonl`` is readable while it grows, and has no line of a step twice."""

from __future__ import annotations

import errno
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from capotune.engine.metrics_log import METRICS, MetricsLog, read_metrics
from capotune.engine.state import TrainingState

STEP = {"step": 1, "steps": 2, "loss": 0.5, "learning_rate": 0.1}


def test_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, TrainingState()) as log:
        for number in range(3):
            log.write(**{**STEP, "step": number})
            lines = (tmp_path / METRICS).read_text().splitlines(keepends=True)
            assert len(lines) == number + 1
            assert json.loads(lines[-1])["step"] == number
            assert lines[-1].endswith("\n")
    assert read_metrics(tmp_path) == [{**STEP, "step": number} for number in range(3)]


def test_loss_that_is_not_finite_is_null(tmp_path: Path) -> None:
    """NaN is no JSON, and readers of the file need not be Python."""
    with MetricsLog(tmp_path, TrainingState()) as log:
        log.write(step=1, loss=math.nan)
    assert (tmp_path / METRICS).read_text() == '{"step": 1, "loss": null}\n'


@pytest.mark.parametrize(
    ("step", "epoch", "seen"),
    [(2, 1, 3), (2, 0, 2), (1, 0, 1), (3, 1, 4), (4, 2, 6), (0, 0, 0)],
    ids=["epoch scored", "epoch not scored", "in the first epoch", "in the second", "at the end", "not begun"],
)
def test_resumed_log_holds_what_its_checkpoint_has_seen(tmp_path: Path, step: int, epoch: int, seen: int) -> None:
    lines: list[dict[str, Any]] = [{"step": 1}, {"step": 2}, {"epoch": 1}, {"step": 3}, {"step": 4}, {"epoch": 2}]
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with MetricsLog(tmp_path, TrainingState(step=step, epoch=epoch)) as log:
        log.write(step=99)
    assert read_metrics(tmp_path) == [*lines[:seen], {"step": 99}]


@pytest.mark.parametrize("left", [b'{"step": 2, "lo', b"\0\0\0\0\n", b"[]\n", b"\xff\n"])
def test_what_a_power_cut_left_is_overwritten(tmp_path: Path, left: bytes) -> None:
    (tmp_path / METRICS).write_bytes(b'{"step": 1}\n' + left)
    assert read_metrics(tmp_path) == [{"step": 1}]
    with MetricsLog(tmp_path, TrainingState(step=5)) as log:
        log.write(step=2)
    assert (tmp_path / METRICS).read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(bytes(data)[:5])

    with MetricsLog(tmp_path, TrainingState()) as log:
        log.write(step=1)
        log._file.close()
        log._file = Full(tmp_path / METRICS, "ab")
        with pytest.raises(OSError, match="No space left") as caught:
            log.write(step=2)
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / METRICS).read_text() == '{"step": 1}\n'
