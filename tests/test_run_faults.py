"""What happens to the process, the folder or the clock of a run while it works."""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soak

import capotune
from capotune.errors import OutputError
from capotune.events import Event, StepTaken

WEIGHTS = "adapter/adapter_model.safetensors"
BY_THE_CLOCK = {
    "cache.py": "what a killed process left days ago; an entry's last use is read from its file",
    "models/content.py": "whether a file was changed just before it was hashed: what is in doubt is hashed again",
    "api/trackers.py": "when a step was taken, for a tracker",
    "runs/circumstances.py": "when a run was started, for its record",
    "tasks/generation/sandbox.py": "a chat template may ask for the date",
}
"""Where the clock on the wall is asked, and why nothing is lost when it is wrong."""


def train(base: Path, data: Path, out: Path, **options: Any) -> dict[str, Any]:
    given = {"data": str(data), "model": str(base), "out": out, "rank": 2, "epochs": 2, "dropout": 0.1, "cache": False}
    record: dict[str, Any] = capotune.train("lora", batch_size=8, save_every="2", **given | options)
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
def clock_goes_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An hour at every look."""
    now = [time.time()]

    def earlier() -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", earlier)
    monkeypatch.setattr(time, "time_ns", lambda: int(earlier() * 1e9))
    yield
    assert earlier() < time.monotonic() + 1e12


@pytest.mark.usefixtures("clock_goes_back")
def test_a_clock_that_goes_back_changes_nothing(bert: Path, tickets: Path, whole: bytes, tmp_path: Path) -> None:
    record = train(bert, tickets, tmp_path / "run", cache=True)
    assert record["result"]["train_seconds"] > 0
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == whole


def test_the_clock_on_the_wall_decides_nothing() -> None:
    source = Path(capotune.__file__).parent
    asked = {
        str(path.relative_to(source).as_posix())
        for path in source.rglob("*.py")
        if re.search(r"\btime\.time\b|\btime_ns\(|datetime\.(now|utcnow|today)", path.read_text(encoding="utf-8"))
    }
    assert asked == BY_THE_CLOCK.keys()


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
