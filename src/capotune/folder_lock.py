"""One process at a time works in a run's folder.

The lock is the kernel's (flock) on a file in the folder, so it ends with its process, however that ends; what the file
says of the process is for people only. Windows has no flock: there nothing is locked.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from capotune.errors import OutputError
from capotune.writing import as_output_error

__all__ = ["holder", "locked", "wait_for_its_end"]

_NAME = ".lock"
_POLL_SECONDS = 0.05
_PATIENCE = 1.0
"""Seconds: who looks whether a folder is locked has the lock for a moment."""


@contextmanager
def locked(folder: Path, *, becomes: Path | None = None) -> Iterator[None]:
    """Hold the lock of ``folder``, which exists, while the block runs; the block may rename the folder to ``becomes``,
    or remove it.

    Raises ``OutputError`` that names the process when another one has it.
    """
    if sys.platform == "win32":  # an open file would not let the folder be renamed
        yield
        return
    end = time.monotonic() + _PATIENCE
    while (file := _acquired(folder / _NAME)) is None:
        if time.monotonic() >= end:
            raise OutputError(
                f"{holder(folder) or 'another process'} works in {folder}.",
                advice="Wait until it has ended, or end it, or choose another `out`.",
            )
        time.sleep(_POLL_SECONDS)
    with file:
        try:
            yield
        finally:
            with suppress(OSError):
                ((becomes or folder) / _NAME).unlink()


def holder(folder: Path) -> str | None:
    """The process that has the lock of ``folder``, in words; None where none has it."""
    path = folder / _NAME
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            if _lock(file):
                return None
            content = json.loads(file.read() or b"{}")
    except (OSError, ValueError):
        return None
    return f"process {content.get('pid', '?')} on {content.get('host', '?')}"


def wait_for_its_end(folder: Path, seconds: float) -> None:
    """Return once no process has the lock of ``folder``, which may be removed meanwhile, or after ``seconds``."""
    end = time.monotonic() + seconds
    while holder(folder) is not None and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)


def _acquired(path: Path) -> IO[bytes] | None:
    """The open lock file; None while another process has it."""
    with as_output_error(path, any_reason=True), ExitStack() as on_failure:
        file = on_failure.enter_context(open(path, "a+b", opener=_no_link))
        if not _lock(file) or not _is_still(path, file):
            return None
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": platform.node()}).encode())
        file.flush()
        on_failure.pop_all()
        return file


def _no_link(path: str, flags: int) -> int:
    """Opens a file, which is emptied then: not another one that somebody's link leads to."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _lock(file: IO[bytes]) -> bool:
    """Whether nobody else has it; where the system or the file system knows no locks, nobody has."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _is_still(path: Path, file: IO[bytes]) -> bool:
    """Whether the path leads to the open file: the process that had the lock may have removed it meanwhile."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
