"""The cache is the user's own: made so that nobody else reads it, refused where somebody else may write into it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from capotune.errors import OutputError
from capotune.files import cache_folder
from capotune.kernels import native

grp, pwd = pytest.importorskip("grp"), pytest.importorskip("pwd")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs owners and permissions of files")


def compiled(_: object = None) -> Path:
    """The cache's other user: kernels are compiled into it and loaded from it."""
    return native._compiled(Path(native.__file__).with_name("nf4_cpu.c"))


@pytest.fixture(params=[cache_folder, compiled], ids=["activations", "compiled kernels"])
def reach(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], object]:
    """Asks for something in the cache, which is ``tmp_path/capotune`` for both."""
    monkeypatch.delenv("CAPOTUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_compile", lambda _compiler, _flags, _source, target: target.write_bytes(b"made here"))
    monkeypatch.setattr(native.shutil, "which", lambda name: name)
    reached: Callable[[], object] = request.param
    return reached


def test_cache_is_made_for_its_user_alone(reach: Callable[[], object], tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        reach()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "capotune").stat().st_mode) == 0o700


def in_group(monkeypatch: pytest.MonkeyPatch, *others: str) -> None:
    """The user's group has the user's name, with ``others`` in it."""
    user = pwd.getpwuid(os.getuid()).pw_name
    group = grp.struct_group((user, "x", os.getgid(), [user, *others]))
    monkeypatch.setattr(grp, "getgrgid", lambda _: group)


def test_cache_that_a_group_of_the_user_alone_may_write_into_is_taken(
    reach: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where umask is 002."""
    in_group(monkeypatch)
    (tmp_path / "capotune").mkdir()
    (tmp_path / "capotune").chmod(0o775)
    reach()
    monkeypatch.setattr(pwd, "getpwuid", lambda _: pwd.struct_passwd(("anna", "x", 0, 0, "", "", "")))
    with pytest.raises(OutputError, match="others may write"):
        reach()


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_cache_that_others_may_write_into_is_refused(
    reach: Callable[[], object], mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_group(monkeypatch, "somebody")
    (tmp_path / "capotune").mkdir()
    (tmp_path / "capotune").chmod(mode)
    with pytest.raises(OutputError, match=r"others may write into the cache folder .*chmod go-w"):
        reach()


def test_cache_of_another_user_is_refused(
    reach: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a folder that somebody made first on a shared /tmp."""
    (tmp_path / "capotune").mkdir(mode=0o700)
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(OutputError, match="belongs to another user"):
        reach()


def test_folder_of_the_users_that_others_may_read_is_taken(reach: Callable[[], object], tmp_path: Path) -> None:
    (tmp_path / "capotune").mkdir(mode=0o755)
    reach()


def test_planted_kernel_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library by the right name, checksum included, in a folder that others may write into."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_compile", lambda _compiler, _flags, _source, target: target.write_bytes(b"planted"))
    monkeypatch.setattr(native.shutil, "which", lambda name: name)
    planted = compiled()
    assert compiled() == planted, "the name is that which is looked for"
    planted.parent.chmod(0o777)
    with pytest.raises(OutputError, match="others may write"):
        compiled()
