"""What is said where something cannot be written."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from capotune.errors import OutputError

__all__ = ["DISK_FULL", "as_output_error", "free_bytes", "full_disk_is_said", "human_bytes", "output_error"]

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def full_disk_is_said(path: Path) -> Iterator[None]:
    """Around a block that writes into ``path``: ``OutputError`` when the disk fills up."""
    with as_output_error(path, any_reason=False):
        yield


def human_bytes(n: int) -> str:
    """A size for people, in powers of 1000: ``512 B``, ``4.6 MB``, ``461 MB``, ``1.2 GB``."""
    size = float(n)
    for unit in ("B", "kB", "MB", "GB"):
        if round(size) < 1000:
            return _three_digits(size, unit)
        size /= 1000
    return _three_digits(size, "TB")


def _three_digits(size: float, unit: str) -> str:
    whole = unit == "B" or round(size, 1) >= 100
    return f"{size:,.0f} {unit}" if whole else f"{size:.1f} {unit}"


@contextmanager
def as_output_error(path: Path, *, any_reason: bool) -> Iterator[None]:
    """Turn an ``OSError`` into an ``OutputError``; code that also reads files passes a full disk only."""
    try:
        yield
    except OSError as error:
        if any_reason or error.errno in DISK_FULL:
            raise output_error(path, error) from error
        raise


def output_error(path: Path, error: OSError, nbytes: int | None = None) -> OutputError:
    """An ``OSError`` in words; ``nbytes``: what was to be written, where it is known."""
    if error.errno in DISK_FULL:
        needed = f"{human_bytes(nbytes)} to write, " if nbytes is not None else ""
        sizes = f"{needed}{human_bytes(free_bytes(path))} free"
        return OutputError(
            f"no space left on the disk while writing {path} ({sizes}).", advice="Free some space and run again."
        )
    if error.errno in _FORBIDDEN:
        return OutputError(f"not allowed to write {path}.", advice="Choose a folder that you can write to.")
    return OutputError(f"cannot write {path}: {error.strerror or error}")


def free_bytes(path: Path) -> int:
    """Free on the disk of ``path``, which need not exist."""
    return shutil.disk_usage(next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())).free
