"""Checkpoints: whole or found out, the last two and the best, written beside training, one process a folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from commands import tree
from helpers import assert_same_bits

from capotune.engine import checkpoint, saving
from capotune.engine.checkpoint import load_checkpoint, save_checkpoint
from capotune.engine.saving import CheckpointSaver
from capotune.engine.state import TrainingState
from capotune.errors import OutputError
from capotune.events import Event, Warned
from capotune.folder_lock import holder, locked
from capotune.interval import Interval, interval
from capotune.run_folder import checkpoints, is_requested, request_checkpoint

FILES = ["SHA256SUMS", "state.json", "state.safetensors"]


def state_at(step: int, epoch: int = 0, **counters: Any) -> TrainingState:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(2, 3, generator=generator)
    moments = {"exp_avg": weight.square(), "exp_avg_sq": weight.abs(), "step": torch.tensor(float(step))}
    return TrainingState(
        step=step, epoch=epoch, rng=generator.get_state(), weights={"a.weight": weight},
        optimizer={"a.weight": moments}, best_weights={"a.weight": weight.neg()}, best_score=(0.5, -0.25), **counters,
    )  # fmt: skip


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


# What is on disk


def test_a_checkpoint_holds_the_whole_state(tmp_path: Path) -> None:
    counters = {
        "batch": 3,
        "best_epoch": 1,
        "trained_score": (0.1,),
        "waited": 1,
        "loss_sum": 0.1 + 0.2,
        "seconds": 1.5,
        "mixed_lengths": True,
    }
    state = state_at(7, 2, **counters)
    save_checkpoint(tmp_path, state)
    back = load_checkpoint(tmp_path)
    assert back is not None
    for name in TrainingState.__dataclass_fields__:
        one, other = getattr(state, name), getattr(back, name)
        if name in ("weights", "best_weights"):
            assert_same_bits(one, other)
        elif name == "optimizer":
            assert_same_bits(one["a.weight"], other["a.weight"])
        else:
            assert torch.equal(one, other) if name == "rng" else one == other, name


def test_a_checkpoint_of_an_earlier_version_goes_on_with_rows_of_like_length(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state_at(1, mixed_lengths=True))
    values = json.loads((path / "state.json").read_text())
    del values["mixed_lengths"]
    (path / "state.json").write_text(json.dumps(values))
    (path / "SHA256SUMS").unlink()
    state = load_checkpoint(tmp_path)
    assert state is not None
    assert not state.mixed_lengths


def test_the_last_two_and_the_best_epochs_stay(tmp_path: Path) -> None:
    for step, epoch, best in ((2, 0, 0), (4, 1, 1), (6, 1, 1), (8, 2, 1), (10, 2, 1), (12, 3, 1)):
        save_checkpoint(tmp_path, state_at(step, epoch, best_epoch=best))
    assert names(tmp_path) == ["step-4-epoch-1", "step-10-epoch-2", "step-12-epoch-3"]
    save_checkpoint(tmp_path, state_at(14, 4, best_epoch=4))
    assert names(tmp_path) == ["step-12-epoch-3", "step-14-epoch-4"]


def test_an_epochs_score_makes_it_newer(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, TrainingState(step=4, batch=4))
    save_checkpoint(tmp_path, TrainingState(step=4, epoch=1))
    state = load_checkpoint(tmp_path)
    assert state is not None
    assert state.epoch == 1


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found(name: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state_at(1)) / name
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 8 * len(whole) // 200):
        flip(path, bit)
        assert checkpoint._whole(path.parent) is None, bit
        path.write_bytes(whole)
    assert checkpoint._whole(path.parent) is not None


@pytest.mark.parametrize("damage", ["missing", "half"])
@pytest.mark.parametrize("name", FILES[1:])
def test_the_one_before_a_damaged_checkpoint_is_taken_and_said(name: str, damage: str, tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path / "checkpoints", state_at(step))
    path = tmp_path / "checkpoints" / "step-2-epoch-0" / name
    whole = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(whole[: len(whole) // 2])
    said: list[Event] = []
    state = load_checkpoint(tmp_path / "checkpoints", said.append)
    assert state is not None
    assert state.step == 1
    (event,) = said
    assert isinstance(event, Warned)
    assert event.text == f"the checkpoint {path.parent} is damaged; the one before it is taken."
    save_checkpoint(tmp_path / "checkpoints", state_at(2))  # training gets there again
    again = load_checkpoint(tmp_path / "checkpoints")
    assert again is not None
    assert again.step == 2


def test_nothing_but_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, state_at(1))
    flip(tmp_path / "step-1-epoch-0" / "state.safetensors", 5000)
    with pytest.raises(OutputError, match=r"every checkpoint in .* is damaged"):
        load_checkpoint(tmp_path)


def test_a_checkpoint_without_checksums_is_read_and_said(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_at(3))
    (tmp_path / "step-3-epoch-0" / "SHA256SUMS").unlink()
    said: list[Event] = []
    state = load_checkpoint(tmp_path, said.append)
    assert state is not None
    assert state.step == 3
    assert [event.text for event in said if isinstance(event, Warned)] == [
        f"the checkpoint {tmp_path / 'step-3-epoch-0'} is of an earlier version, without checksums."
    ]


@pytest.mark.parametrize("text", ["null", "{}", '{"step": 1, "best_score": [0], "trained_score": [0], "other": 1}'])
def test_a_checkpoint_of_other_values_is_damaged(text: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_at(2))
    (tmp_path / "step-2-epoch-0" / "state.json").write_text(text)
    (tmp_path / "step-2-epoch-0" / "SHA256SUMS").unlink()
    with pytest.raises(OutputError, match="damaged"):
        load_checkpoint(tmp_path)


def test_stopped_anywhere_while_an_old_checkpoint_is_removed(tmp_path: Path) -> None:
    """Between any two of its instructions: nothing is half there, and the next save tidies up."""
    for step in (1, 2, 3):
        (tmp_path / str(step) / f"step-{step}-epoch-0").mkdir(parents=True)
        (tmp_path / str(step) / f"step-{step}-epoch-0" / "state.json").write_text("{}")

    def attempt(folder: Path, stop_at: int) -> int:
        """How many instructions ran."""
        for step in (1, 2, 3):
            name = f"step-{step}-epoch-0"
            shutil.copytree(tmp_path / str(step) / name, folder / name)
        ran = 0

        def count(frame: FrameType, event: str, _: object) -> Any:
            nonlocal ran
            frame.f_trace_opcodes = frame.f_code.co_filename == checkpoint.__file__
            if event == "opcode":
                ran += 1
                if ran == stop_at:
                    raise KeyboardInterrupt
            return count

        before = sys.gettrace()
        sys.settrace(count)
        try:
            checkpoint._prune(folder, folder / "step-3-epoch-0", 0)
        except KeyboardInterrupt:
            assert ran == stop_at
        finally:
            sys.settrace(before)
        return ran

    instructions = attempt(tmp_path / "whole", 0)
    assert names(tmp_path / "whole") == ["step-2-epoch-0", "step-3-epoch-0"]
    for number in range(1, instructions + 1):
        folder = tmp_path / f"stopped {number}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # of the list of a folder, which is closed at once
            attempt(folder, number)
        assert all((path / "state.json").exists() for path in checkpoints(folder))
        checkpoint._prune(folder, folder / "step-3-epoch-0", 0)
        assert tree(folder) == tree(tmp_path / "whole")


# When it is saved


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Checkpoints are written once the event is set."""
    goes_on = threading.Event()

    def save(folder: Path, state: TrainingState) -> Path:
        goes_on.wait()
        return save_checkpoint(folder, state)

    monkeypatch.setattr(saving, "save_checkpoint", save)
    return goes_on


@contextmanager
def saver(out: Path, every: str) -> Iterator[CheckpointSaver]:
    with CheckpointSaver(out, interval(every)) as made:
        yield made


def train(made: CheckpointSaver, steps: range) -> list[int]:
    """The steps after which a checkpoint was taken."""
    taken = []
    for step in steps:
        if made.due(state_at(step)):
            made.save(state_at(step))
            taken.append(step)
    return taken


def test_checkpoints_are_due_every_so_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckpointSaver, "_is_writing", lambda _: False)
    with saver(tmp_path, "3") as made:
        assert train(made, range(1, 11)) == [3, 6, 9]


def test_checkpoints_are_due_after_so_much_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckpointSaver, "_is_writing", lambda _: False)
    now = iter(range(0, 1000, 25))
    monkeypatch.setattr(saving.time, "monotonic", lambda: next(now))
    with saver(tmp_path, "1min") as made:
        assert train(made, range(1, 9)) == [3, 6]  # the clock is also read when one is taken


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, slow_disk: threading.Event) -> None:
    with saver(tmp_path, "2") as made:
        assert train(made, range(1, 8)) == [2]
        assert names(tmp_path / "checkpoints") == []
        slow_disk.set()
        assert made._written is not None
        made._written.result()
        assert train(made, range(8, 9)) == [8]  # what fell due meanwhile
    assert names(tmp_path / "checkpoints") == ["step-2-epoch-0", "step-8-epoch-0"]


def test_an_epochs_end_waits_for_nothing_but_the_last(tmp_path: Path, slow_disk: threading.Event) -> None:
    with saver(tmp_path, "1h") as made:
        for epoch, last in ((1, False), (2, False), (3, True)):
            made.end_epoch(state_at(5 * epoch, epoch), last=last)
        slow_disk.set()
    assert names(tmp_path / "checkpoints") == ["step-5-epoch-1", "step-15-epoch-3"]


def test_a_failed_write_is_raised_at_the_next_step(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    made = CheckpointSaver(tmp_path, interval("1"))
    made.save(state_at(1))
    made._thread.shutdown()
    with pytest.raises(OutputError, match="cannot write"):
        made.due(state_at(2))


def test_a_failed_last_write_is_raised_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write"), saver(tmp_path, "1") as made:
        made.end_epoch(state_at(1), last=True)


def test_a_checkpoint_that_is_asked_for_is_taken_after_the_next_step(tmp_path: Path) -> None:
    with saver(tmp_path, "1h") as made:
        assert train(made, range(1, 3)) == []
        request_checkpoint(tmp_path)
        assert train(made, range(3, 4)) == [3]
    assert not is_requested(tmp_path)
    assert names(tmp_path / "checkpoints") == ["step-3-epoch-0"]


def test_what_is_asked_for_while_one_is_written_is_taken_next(tmp_path: Path, slow_disk: threading.Event) -> None:
    with saver(tmp_path, "1h") as made:
        request_checkpoint(tmp_path)
        assert train(made, range(1, 2)) == [1]
        before = (tmp_path / ".checkpoint-request").stat()
        request_checkpoint(tmp_path)
        os.utime(tmp_path / ".checkpoint-request", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        slow_disk.set()
        assert made._written is not None
        made._written.result()
        assert is_requested(tmp_path)
        assert train(made, range(2, 3)) == [2]
    assert not is_requested(tmp_path)


def test_what_training_is_stopped_in_is_saved_at_once(tmp_path: Path) -> None:
    with saver(tmp_path, "1h") as made:
        made.save_now(state_at(0))
        made.save_now(state_at(4))
        assert names(tmp_path / "checkpoints") == ["step-4-epoch-0"]


@pytest.mark.parametrize(
    ("text", "every"),
    [("500", Interval(steps=500)), ("30s", Interval(seconds=30)), (" 10 min", Interval(seconds=600)),
     ("2h", Interval(seconds=7200))],
)  # fmt: skip
def test_an_interval_is_steps_or_time(text: str, every: Interval) -> None:
    assert interval(text) == every


# Who writes


def test_a_second_process_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\nfrom capotune.folder_lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n    print('locked', flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        assert (holder(tmp_path) or "").startswith(f"process {other.pid} on ")
        with pytest.raises(OutputError, match=rf"process {other.pid} on .* works in "), locked(tmp_path):
            pass
        other.kill()
        other.wait()
        assert holder(tmp_path) is None  # the kernel has given the lock back
        with locked(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert tree(tmp_path) == {}


def test_a_lock_file_that_was_replaced_locks_nothing(tmp_path: Path) -> None:
    """Between opening and locking it, the process that had the lock may have removed the file."""
    from capotune import folder_lock

    with locked(tmp_path), (tmp_path / ".lock").open("a+b") as old:
        (tmp_path / ".lock").unlink()
        (tmp_path / ".lock").touch()
        assert not folder_lock._is_still(tmp_path / ".lock", old)
