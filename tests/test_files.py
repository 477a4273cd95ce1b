"""A file or folder is complete or absent, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from capotune.errors import OutputError
from capotune.files import human_bytes, output_folder, write_atomic


def fail_with(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(("content", "written"), [("schön\n", "schön\n".encode()), (b"\x00\xff", b"\x00\xff")])
def test_write_replaces_and_leaves_nothing_beside(content: str | bytes, written: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    write_atomic(path, content)
    assert path.read_bytes() == written
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "no space left on the disk while writing"),
        (errno.EDQUOT, "no space left on the disk while writing"),
        (errno.EACCES, "not allowed to write"),
        (errno.EIO, "cannot write"),
    ],
)
def test_failed_write_keeps_the_old_file(
    code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    fail_with(code, monkeypatch)
    with pytest.raises(OutputError, match=message):
        write_atomic(path, "new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_below_a_missing_folder_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "missing" / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="cannot write"):
            write_atomic(path, "new")


def test_folder_appears_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "first"
    with output_folder(path) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("x", encoding="utf-8")
        assert not path.exists()
    assert (path / "sub" / "file").read_text(encoding="utf-8") == "x"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, FileNotFoundError])
def test_folder_is_gone_after_a_failure(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), output_folder(tmp_path / "runs" / "first") as partial:  # noqa: PT012
        (partial / "file").write_text("x", encoding="utf-8")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_folder_must_not_exist(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    {"folder": path.mkdir, "file": path.touch, "dangling link": lambda: path.symlink_to("nowhere")}[kind]()
    with pytest.raises(OutputError, match=r"exists already\. Choose another `out`, or remove it"), output_folder(path):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == [path]


def test_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(OutputError, match="cannot write"), output_folder(path):  # noqa: PT012
        path.mkdir()
        (path / "theirs").touch()
    assert [found.name for found in tmp_path.rglob("*")] == ["out", "theirs"]


def test_disk_full_inside_the_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no space left"), output_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_disk_full_at_the_last_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="no space left"), output_folder(tmp_path / "out") as partial:  # noqa: PT012
        (partial / "file").write_text("x", encoding="utf-8")
        fail_with(errno.ENOSPC, monkeypatch)
    assert list(tmp_path.iterdir()) == []


def test_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"), output_folder(tmp_path / "file" / "out"):
        pytest.fail("the block must not run")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_960, "100 kB"),
        (999_600, "1.0 MB"),
        (4_600_000, "4.6 MB"),
        (461_000_000, "461 MB"),
        (1_234_000_000, "1.2 GB"),
        (1_500_000_000_000_000, "1,500 TB"),
    ],
)
def test_human_bytes(size: int, text: str) -> None:
    assert human_bytes(size) == text
