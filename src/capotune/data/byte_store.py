"""Bytes that are appended and read again by their place: few of them in memory, many in a file without a name.

Nothing is left of it when the process ends, however it ends. What is in it is what was read, whatever becomes of the
file it is from.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

from capotune.errors import OutputError
from capotune.files import cache_folder, full_disk_is_said

__all__ = ["ByteStore"]

IN_MEMORY: Final = 2**24
"""Bytes up to which no file is made."""
_AT_ONCE: Final = 2**17
"""Bytes written or read at once."""


class ByteStore:
    """Bytes one after the other."""

    def __init__(self) -> None:
        self._file: IO[bytes] = io.BytesIO()
        self._folder: Path | None = None
        self._hash = hashlib.sha256()
        self._waiting = bytearray()
        self.size = 0

    @property
    def sha256(self) -> str:
        """Of all that is in it."""
        self._write()
        return self._hash.hexdigest()

    def append(self, content: bytes) -> None:
        """Add at the end. Raises ``OutputError`` where no folder can be written to, or its disk is full."""
        self._waiting += content
        self.size += len(content)
        if len(self._waiting) >= _AT_ONCE:
            self._write()

    def read(self, start: int, end: int) -> bytes:
        """What stands between two places."""
        self._write()
        self._file.seek(start)
        return self._file.read(end - start)

    def _write(self) -> None:
        """What waits to be written."""
        if not self._waiting:
            return
        if self._folder is None and self.size > IN_MEMORY:
            self._to_disk()
        self._file.seek(0, os.SEEK_END)
        if self._folder is None:
            self._file.write(self._waiting)
        else:
            with full_disk_is_said(self._folder):
                self._file.write(self._waiting)
                self._file.flush()
        self._hash.update(self._waiting)
        self._waiting.clear()

    def _to_disk(self) -> None:
        """Into the cache's folder, whose disk is chosen for much data; where that cannot be written, the system's own
        for what is temporary."""
        folders = [Path(tempfile.gettempdir())]
        with suppress(OutputError):
            folders.insert(0, cache_folder())
        for folder in folders:
            with suppress(OSError):
                file = tempfile.TemporaryFile(dir=folder, buffering=_AT_ONCE)  # noqa: SIM115 - open as long as we live
                break
        else:
            named = " and ".join(map(str, folders))
            advice = "Name a folder of your own with CAPOTUNE_CACHE."
            raise OutputError(f"what is read is too much for memory, and {named} cannot be written to.", advice=advice)
        weakref.finalize(self, _close, file)
        with full_disk_is_said(folder):
            self._file.seek(0)
            file.write(self._file.read())
        self._file, self._folder = file, folder


def _close(file: IO[bytes]) -> None:
    with suppress(OSError):  # what a full disk did not take
        file.close()
