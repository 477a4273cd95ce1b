"""The cache on disk: what it holds, how large it may be, what leaves, and who uses an entry.

An entry is a file or a folder, complete or absent, that can be made again. Its time of change says when it was last
used (``hold`` sets it; times of access are not kept everywhere). When a new one would be too much, the least recently
used ones leave. A file that leaves stays readable for whoever has it open or mapped; a folder is held by those who use
it and does not leave meanwhile.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from capotune.errors import SHOWN, SettingError, cut
from capotune.files import cache_folder, checksum, free_bytes

__all__ = [
    "KINDS", "LIMIT_VARIABLE", "Entry", "clear", "discard", "entries", "hold", "is_whole", "limit", "make_room", "sign",
    "tidy",
]  # fmt: skip

LIMIT_VARIABLE = "CAPOTUNE_CACHE_LIMIT"
KINDS = ("features", "boundary", "tokens", "models", "hashes")
"""What a task's head reads; states that enter the lowest trainable block; tokens of large data; GGUF files converted;
hashes of files."""

_MOST_BYTES = 50 * 10**9
_SHARE = 0.5
_ABANDONED_SECONDS = 2 * 24 * 3600
_FACTS, _SUMS = ".cached.json", "crc32"
_MOST_HEADER = 10**6
_ROOMS = {"activations": "*.safetensors", "tokens": "*", "models": "*", "hashes": "*.json"}
"""The cache's folders and what an entry of each is called: nothing else is touched."""
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


@dataclass(frozen=True)
class Entry:
    """Something complete in the cache."""

    path: Path
    nbytes: int
    used: float
    """When it was last used, in seconds since 1970."""

    @cached_property
    def facts(self) -> dict[str, str]:
        """``kind``, one of ``KINDS``, and where they are known ``base`` and ``data``: what it was made of."""
        if self.path.parent.name == "activations":
            return {"kind": "features", **_texts(_header(self.path))}
        return {**_texts(_json(self.path / _FACTS)), "kind": self.path.parent.name}


def tidy(room: Path) -> None:
    """Remove what killed processes left half-written in a folder of the cache, days ago."""
    for path in room.glob(".*"):
        with suppress(OSError):  # another process was faster, or has just completed it
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True) if _is_folder(path) else path.unlink()


def entries() -> list[Entry]:
    """All that the cache holds, the least recently used first."""
    found = []
    for room, pattern in _ROOMS.items():
        for path in (cache_folder() / room).glob(pattern):
            if not path.name.startswith("."):
                with suppress(OSError):  # it has just left
                    found.append(Entry(path, _nbytes(path), path.stat().st_mtime))
    return sorted(found, key=lambda entry: entry.used)


def limit() -> int:
    """Bytes that all entries together may take: ``$CAPOTUNE_CACHE_LIMIT``, else half of what the disk has for them, at
    most 50 GB. Raises ``SettingError`` for a variable that is no size."""
    return _limit(_bytes_there())


def make_room(nbytes: int, spared: Collection[Path] = ()) -> bool:
    """Whether so many bytes more may be written: entries leave for them, the least recently used first, but none of
    ``spared`` and none that a process holds. Where they would be too much even then, nothing leaves."""
    there = _bytes_there()
    over = max(there + nbytes - _limit(there), nbytes - _free())
    every = entries() if over > 0 else []
    leaving = [entry for entry in every if entry.path not in spared and not _is_held(entry.path)]
    if sum(entry.nbytes for entry in leaving) < over:
        return False
    for entry in leaving:
        if over > 0 and _remove(entry.path):
            over -= entry.nbytes
    return over <= 0


def clear(kinds: Collection[str] = KINDS) -> list[Entry]:
    """Remove every entry of these kinds that no process holds; returns what was removed."""
    return [entry for entry in entries() if entry.facts["kind"] in kinds and _remove(entry.path)]


def sign(folder: Path, **facts: str) -> None:
    """Write into a folder that becomes an entry what it was made of (``Entry.facts``) and its files' checksums."""
    (folder / _FACTS).write_text(json.dumps({**facts, _SUMS: _checksums(folder)}) + "\n", encoding="utf-8")


def is_whole(folder: Path) -> bool:
    """Whether the files of a folder are as they were when it was signed; looked at once in a process."""
    if folder not in _whole:
        signed = (_json(folder / _FACTS) or {}).get(_SUMS)
        try:
            if signed is not None and _checksums(folder) != signed:  # it is None in those that earlier versions made
                return False
        except OSError:
            return False
        _whole.add(folder)
    return True


def discard(folder: Path) -> None:
    """Take a damaged folder away, also from those who hold it; what they have open or mapped stays readable."""
    _close(_handles.pop(folder, None))
    _take_away(folder)


def _checksums(folder: Path) -> dict[str, str]:
    """Of every file below ``folder`` but its facts, at once in some threads."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _FACTS)
    with ThreadPoolExecutor(4) as pool:
        return {str(path.relative_to(folder)): one for path, one in zip(paths, pool.map(checksum, paths), strict=True)}


_whole: set[Path] = set()
_handles: dict[Path, int] = {}


def hold(path: Path) -> bool:
    """Note that an entry is used now, and keep a folder from leaving while this process lives; False where there is
    none."""
    if path.is_dir() and not _held_open(path):
        return False
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError:  # not ours to change: it can be used all the same
        return path.exists()
    return True


def _held_open(folder: Path) -> bool:
    """Share the folder's lock until this process ends; False where it leaves just now."""
    handle = _locked(folder, alone=False)
    if handle is None:
        return False
    _close(_handles.pop(folder, None))
    _handles[folder] = handle
    return True


def _is_held(path: Path) -> bool:
    """Whether a process works with a folder."""
    handle = _locked(path, alone=True) if _is_folder(path) else -1
    _close(handle)
    return handle is None


def _remove(path: Path) -> bool:
    """Take an entry away at once; False where a process holds it."""
    try:
        if not _is_folder(path):
            path.unlink()
            return True
        handle = _locked(path, alone=True)
        if handle is None:
            return False
        try:
            return _take_away(path)
        finally:
            _close(handle)
    except OSError:  # not ours, open on Windows, or another process was faster
        return False


def _take_away(folder: Path) -> bool:
    leaving = folder.with_name(f".{folder.name[:40]}.{secrets.token_hex(4)}.partial")
    try:
        folder.rename(leaving)
    except OSError:
        return False
    shutil.rmtree(leaving, ignore_errors=True)
    return True


def _locked(folder: Path, *, alone: bool) -> int | None:
    """A handle of the folder with its lock, shared by those who use it, alone for who removes it; None where that is
    not to be had. Where the system has no such locks everyone gets it."""
    if sys.platform == "win32":  # what is open there cannot be removed
        return -1
    import fcntl

    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
    except BlockingIOError:
        _close(handle)
        return None
    except OSError:  # a file system without locks
        return handle
    with suppress(OSError):
        if os.path.samestat(os.fstat(handle), folder.stat()):
            return handle
    _close(handle)  # it left before it was locked
    return None


def _close(handle: int | None) -> None:
    if handle is not None and handle >= 0:
        os.close(handle)


def _limit(held: int) -> int:
    given = os.environ.get(LIMIT_VARIABLE)
    if not given:
        return min(_MOST_BYTES, int(_SHARE * (held + _free())))
    read = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([a-zA-Z]{0,2})\s*", given)
    if read is None or read[2].lower() not in _UNITS:
        allowed = "a size, as 20 GB or 500 MB; 0 to store nothing"
        raise SettingError("this is no size.", allowed=allowed, where=f"{LIMIT_VARIABLE}={cut(given, SHOWN)}")
    return int(float(read[1]) * _UNITS[read[2].lower()])


def _bytes_there() -> int:
    """Bytes of all entries, and of those that are being written."""
    writing = (path for room in _ROOMS for path in (cache_folder() / room).glob(".*"))
    return sum(entry.nbytes for entry in entries()) + sum(map(_nbytes, writing))


def _free() -> int:
    """Bytes free on the cache's disk."""
    return free_bytes(cache_folder())


def _nbytes(path: Path) -> int:
    """Of a file, or of all files in a folder; what leaves meanwhile is 0."""
    total = 0
    for one in path.rglob("*") if _is_folder(path) else [path]:
        with suppress(OSError):
            total += one.lstat().st_size
    return total


def _is_folder(path: Path) -> bool:
    """And no link to one: what it leads to is not the cache's."""
    return path.is_dir() and not path.is_symlink()


def _header(path: Path) -> Any:
    """The texts in the header of a safetensors file; None where there are none."""
    with suppress(OSError, ValueError, AttributeError, RecursionError), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)).get("__metadata__") if length <= _MOST_HEADER else None
    return None


def _json(path: Path) -> Any:
    with suppress(OSError, ValueError, RecursionError):
        return json.loads(path.read_bytes()[:_MOST_HEADER])
    return None


def _texts(found: Any) -> dict[str, str]:
    """The facts among what was found."""
    values = found if isinstance(found, dict) else {}
    return {name: values[name] for name in ("kind", "base", "data") if isinstance(values.get(name), str)}
