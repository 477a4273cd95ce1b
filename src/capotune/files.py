"""A file or folder is complete or absent: write beside, fsync, rename.

``os.replace`` is atomic within one file system, so everything is first built under a temporary name in the same
folder. A ``kill -9`` or a power cut can leave such a ``.….partial`` behind, never a half-written result.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from capotune.errors import OutputError
from capotune.folder_lock import locked
from capotune.writing import DISK_FULL, as_output_error, free_bytes, full_disk_is_said, human_bytes, output_error

__all__ = [
    "cache_folder",
    "check_own",
    "check_there",
    "checksum",
    "free_bytes",
    "full_disk_is_said",
    "growing_folder",
    "human_bytes",
    "output_folder",
    "own_folder",
    "remove_folder",
    "remove_partial",
    "write_atomic",
]

_LOST = DISK_FULL | {errno.EIO}


def cache_folder() -> Path:
    """``$CAPOTUNE_CACHE``, else capotune under ``$XDG_CACHE_HOME`` or ``~/.cache``: the user's own (``own_folder``)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return own_folder(Path(os.environ.get("CAPOTUNE_CACHE") or Path(base) / "capotune"), "CAPOTUNE_CACHE")


def own_folder(folder: Path, variable: str) -> Path:
    """The same folder, made where it is missing so that nobody else reads it. ``variable`` of the environment names it.

    Raises ``OutputError`` for one that belongs to another user or that others may write into: what is found there, the
    compiled kernels too, would be theirs. A folder that cannot be made is an error for whoever writes into it.
    """
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True)
    try:
        found = folder.stat()
    except OSError:
        return folder
    other = f"Name a folder of your own with {variable}"
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        raise OutputError(f"the cache folder {folder} belongs to another user.", advice=f"{other}.")
    if os.name == "posix" and _others_may_write(found):
        raise OutputError(
            f"others may write into the cache folder {folder}.", advice=f"{other}, or run: chmod go-w {folder}"
        )
    return folder


def _others_may_write(found: os.stat_result) -> bool:
    """Whether somebody besides its owner may. Where each user has a group of the same name with nobody else in it, new
    folders may be written by that group (umask 002)."""
    import grp
    import pwd

    if found.st_mode & stat.S_IWOTH or not found.st_mode & stat.S_IWGRP:
        return bool(found.st_mode & stat.S_IWOTH)
    try:
        group, user = grp.getgrgid(found.st_gid), pwd.getpwuid(found.st_uid).pw_name
    except KeyError:
        return True
    return group.gr_name != user or any(member != user for member in group.gr_mem)


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Write ``content`` (text as UTF-8) to ``path``, replacing what is there only once the new file is on disk.

    Raises ``OutputError`` when it cannot be written; then ``path`` is as it was and nothing is left beside it.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    partial = _partial_name(path)
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise output_error(path, error, len(data)) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def check_free(path: Path) -> None:
    """``OutputError`` if ``path`` exists: to be said before long work."""
    if os.path.lexists(path):
        raise OutputError(
            f"the output folder {path} exists already.", advice="Choose another `out`, or remove it first."
        )


@contextmanager
def output_folder(path: str | Path) -> Iterator[Path]:
    """Build a new folder under a temporary name and rename it to ``path`` when the block ends well.

    Yields the temporary folder. On any failure or interruption it is removed, and so are the parents made for it.
    Raises ``OutputError`` if ``path`` exists, cannot be made, or the disk fills up while the block runs.
    """
    path = Path(path)
    check_free(path)
    partial = _partial_name(path)
    made = [parent for parent in path.parents if not os.path.lexists(parent)]
    try:
        with as_output_error(path, any_reason=True):
            partial.mkdir(parents=True)
        with as_output_error(path, any_reason=False):
            yield partial
        with as_output_error(path, any_reason=True):
            _sync_tree(partial)
            partial.rename(path)
            _sync(path.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_if_empty(made)
        if isinstance(error, OutputError):
            raise _under_its_name(error, partial, path) from error.__cause__
        raise


@contextmanager
def growing_folder(path: Path, first: Mapping[str, str], *, keep: Callable[[], bool]) -> Iterator[None]:
    """Make the folder ``path`` with the files ``first`` (name: text) in it and its lock held, all at once, for a block
    that fills it in place and may be gone on with later.

    When the block fails or is interrupted and ``keep()`` is false, the folder and the parents made for it are removed,
    before the lock is given back: who waits for it finds either no folder or one to go on in.
    Raises ``OutputError`` if ``path`` exists, cannot be made, or the disk fills up while the block runs.
    """
    made = [parent for parent in path.parents if not os.path.lexists(parent)]
    ours: os.stat_result | None = None
    with ExitStack() as lock:
        try:
            with output_folder(path) as new:
                for name, text in first.items():
                    (new / name).write_text(text, encoding="utf-8")
                ours = new.stat()
                lock.enter_context(locked(new, becomes=path))
            with full_disk_is_said(path):
                yield
        except BaseException:
            if ours and path.exists() and os.path.samestat(path.stat(), ours) and not keep():
                remove_folder(path)
                _remove_if_empty(made)
            raise


def checksum(path: Path) -> str:
    """CRC-32 of a file's content: against accidents, in which a bit becomes another one or the end is missing."""
    total = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            total = zlib.crc32(part, total)
    return f"{total:08x}"


def check_own(folder: Path) -> None:
    """``OutputError`` where a link, a pipe or a device lies below a folder that will be written and tidied up: a
    stranger's link would have other files of the user's changed or removed."""
    for parent, folders, names in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *names)):
            kind = path.lstat().st_mode
            if not (stat.S_ISDIR(kind) or stat.S_ISREG(kind)):
                what = "a link" if stat.S_ISLNK(kind) else "no file"
                raise OutputError(
                    f"{path} is {what}, and {folder} is written to.",
                    advice="Remove it, or put what it leads to in its place.",
                )


def check_there(folder: Path) -> None:
    """``OutputError`` where a folder that is being filled is gone."""
    if not folder.is_dir():
        raise OutputError(
            f"the folder {folder} is gone: it was moved or removed while the run wrote there.",
            advice="Where it was moved, go on there with `resume`.",
        )


def remove_folder(path: Path) -> None:
    """Remove a folder and all in it, as far as that is allowed. A process that is killed meanwhile does not leave half
    of it under its name."""
    hidden = _partial_name(path)
    with suppress(OSError):
        path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """What a killed process left half-written in ``folder``. Raises ``OutputError`` where that is not allowed."""
    with as_output_error(folder, any_reason=True):
        for left in folder.glob(".*.partial"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _partial_name(path: Path) -> Path:
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.partial")


def _under_its_name(error: OutputError, partial: Path, path: Path) -> OutputError:
    """The error as if the folder had been written in its own place."""
    parts = {
        name: part.replace(str(partial), str(path)) if isinstance(part, str) else part
        for name, part in error.parts().items()
    }
    return OutputError(parts.pop("problem"), **parts)


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync(Path(parent, name))
        _sync(Path(parent))


def _sync(path: Path) -> None:
    """Push a closed file or a folder's entries to the disk, where the system can (Windows and some mounts cannot)."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno in _LOST:
            raise


def _remove_if_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
