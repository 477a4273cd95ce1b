"""What happens to the process, the folder or the clock of a run while it works."""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import soak

import capotune
from capotune.errors import OutputError
from capotune.events import Event, StepTaken

WEIGHTS = "adapter/adapter_model.safetensors"


def train(base: Path, data: Path, out: Path, **options: Any) -> dict[str, Any]:
    given = {"data": str(data), "model": str(base), "out": out, "rank": 2, "epochs": 2, "dropout": 0.1, "cache": False}
    given |= {"batch_size": 8, "save_every": "2", "validation_fraction": 0.1}
    record: dict[str, Any] = capotune.train("lora", **given | options)
    return record


@pytest.fixture(scope="module")
def whole(bert: Path, tickets: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(bert, tickets, out)
    return (out / WEIGHTS).read_bytes()


def test_a_folder_that_is_moved_while_a_run_writes_there(
    bert: Path, tickets: Path, whole: bytes, tmp_path: Path
) -> None:
    def move(event: Event) -> None:
        if isinstance(event, StepTaken) and event.step == 10:
            (tmp_path / "run").rename(tmp_path / "moved")

    with pytest.raises(OutputError, match=r"the folder .*run is gone: .* go on there with `resume`"):
        train(bert, tickets, tmp_path / "run", report=move)
    assert not (tmp_path / "run").exists()
    capotune.resume(tmp_path / "moved")
    assert (tmp_path / "moved" / WEIGHTS).read_bytes() == whole


def test_a_second_interrupt_leaves_at_once_and_nothing_half_written(
    bert: Path, tickets: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one saves a checkpoint; the second one comes while that is written."""
    interrupts: list[str] = []
    sync = os.fsync

    def interrupt(event: Event) -> None:
        if isinstance(event, StepTaken) and event.step == 9:
            interrupts.append("first")
            raise KeyboardInterrupt

    def interrupt_again(handle: int) -> None:
        if interrupts and threading.current_thread() is threading.main_thread():
            interrupts.append("second")
            raise KeyboardInterrupt
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt_again)
        with pytest.raises(KeyboardInterrupt):
            train(bert, tickets, tmp_path / "run", report=interrupt)
    assert interrupts == ["first", "second"]
    assert not list(tmp_path.rglob("*.partial"))
    assert not list(tmp_path.glob("run/checkpoints/step-9-*"))
    capotune.resume(tmp_path / "run")
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == whole


@pytest.fixture
def clock_goes_back(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An hour at every look; the modules that looked."""
    now, looked = [time.time()], []

    def earlier() -> float:
        looked.append(sys._getframe(1).f_globals["__name__"])
        now[0] -= 3600
        return now[0]

    def earlier_ns() -> int:
        looked.append(sys._getframe(1).f_globals["__name__"])
        return int(earlier() * 1e9)

    monkeypatch.setattr(time, "time", earlier)
    monkeypatch.setattr(time, "time_ns", earlier_ns)
    return looked


def test_a_clock_that_goes_back_changes_nothing(
    bert: Path, tickets: Path, whole: bytes, tmp_path: Path, clock_goes_back: list[str]
) -> None:
    record = train(bert, tickets, tmp_path / "run", cache=True)
    assert any(name.startswith("capotune.") for name in clock_goes_back)
    assert record["result"]["train_seconds"] > 0
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == whole


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and looked at in /proc")
@pytest.mark.parametrize("command", ["merge", "quantize"])
def test_a_full_disk_leaves_nothing_of_a_model(
    command: str, bert: Path, tickets: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """At the first write, in the middle, and at the last."""
    train(bert, tickets, tmp_path / "run", epochs=1)
    given = [command, str(tmp_path / "run" / "adapter" if command == "merge" else bert), "--out", "run"]
    folder = tmp_path_factory.mktemp("full")
    counted = soak.run(folder, given, soak.moment(folder))
    assert counted.code == 0, counted.said
    changes = counted.counts["folder"]
    shutil.rmtree(folder / "run")
    for number in (1, changes // 2, changes - 2):
        ended = soak.run(folder, given, soak.moment(folder, "folder", number, "full"))
        assert ended.code == 2, (number, ended)
        (said,) = (line for line in ended.said.splitlines() if line.startswith("capo:"))
        assert re.search(r"no space left on the disk while writing run[\w./]* \(.* free\)\. Free some space", said), (
            said
        )
        assert {path.name for path in folder.iterdir()} <= {"cache", "note.json", "said.txt"}
