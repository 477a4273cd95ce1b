"""A run's folder has one process at a time, from its first moment to its last."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from commands import PATIENCE

from capotune import files, folder_lock
from capotune.errors import OutputError
from capotune.events import ignore
from capotune.files import growing_folder
from capotune.folder_lock import holder, locked
from capotune.runs import __main__ as technique
from capotune.settings import TrainSettings, build

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there nothing is locked")


class StoppedError(Exception):
    """Stands for a crash."""


def test_a_folder_is_locked_while_it_is_made_and_while_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, held, rename = tmp_path / "run", [], Path.rename

    def renamed(path: Path, to: Path) -> Path:
        held.append(holder(path))
        return rename(path, to)

    def removed(path: Path) -> None:
        held.append(holder(path))
        shutil.rmtree(path)

    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(files, "remove_folder", removed)
    with pytest.raises(StoppedError), growing_folder(out, {}, keep=lambda: False):
        raise StoppedError
    assert len(held) == 2
    assert all(held)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_kept_is_free_again(tmp_path: Path) -> None:
    with pytest.raises(StoppedError), growing_folder(tmp_path / "run", {"a": ""}, keep=lambda: True):  # noqa: PT012
        assert holder(tmp_path / "run")
        raise StoppedError
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["a"]


@pytest.mark.parametrize("moment", ["opened", "written"])
def test_a_lock_on_a_full_disk_says_what_to_do(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((folder_lock, "_no_link") if moment == "opened" else (folder_lock.os, "getpid")), full)
    with pytest.raises(OutputError, match=r"no space left .* writing .*\.lock .*Free some space"), locked(tmp_path):
        raise StoppedError
    monkeypatch.undo()
    with locked(tmp_path):
        assert holder(tmp_path)


def test_who_looks_at_a_lock_makes_nobody_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking takes it for a moment."""
    with (tmp_path / ".lock").open("a+b") as looks:
        assert folder_lock._lock(looks)
        monkeypatch.setattr(folder_lock.time, "sleep", lambda _: looks.close())
        with locked(tmp_path):
            assert looks.closed


def test_a_technique_begins_anew_where_the_process_before_it_removes_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As right after kill -9 of a comparison whose technique had no checkpoint yet."""
    out, holds, waits, begun = tmp_path / "run", threading.Event(), threading.Event(), []

    def orphan() -> None:
        record = json.dumps({"settings": {}, "method": "lora"})
        with suppress(StoppedError), growing_folder(out, {"run.json": record}, keep=lambda: False):
            holds.set()
            waits.wait(PATIENCE)
            raise StoppedError

    monkeypatch.setattr(folder_lock.time, "sleep", lambda _: waits.set())
    monkeypatch.setattr(technique, "run", lambda settings, *_, **__: begun.append(settings.out.exists()))
    ending = threading.Thread(target=orphan)
    ending.start()
    holds.wait(PATIENCE)
    request = {"method": "lora", "method_settings": {}, "base_score": False, "given": {}, "patience": PATIENCE}
    technique._run_or_resume(build(TrainSettings, {"data": "rows.csv", "out": out}), request, ignore)
    ending.join()
    assert begun == [False]
