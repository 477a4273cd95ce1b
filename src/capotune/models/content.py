"""Hashes of files by content, which are remembered in the cache: hashing a large model takes long, and every command
asks for it.

A hash is remembered with each file's path, size, device, inode, and times of change (of content and of inode, in ns).
It is believed when all of these are as they were. It is not remembered when a file was changed less than
``_RACY_SECONDS`` before it was hashed, since a later change might leave the same times (git's index has the same rule),
nor when a file changed meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from capotune.cache import hold
from capotune.errors import OutputError
from capotune.files import cache_folder, write_atomic

_RACY_SECONDS = 2
_Stamps = list[list[str | int]]
_known: dict[str, tuple[_Stamps, str]] = {}


def remembered(kind: str, paths: Sequence[Path], compute: Callable[[], str]) -> str:
    """``compute()``, a sha256 in hexadecimal over the files at ``paths``, or what it was for the same files.

    ``kind`` names what is computed: another kind of the same files is remembered apart.
    """
    name = hashlib.sha256(json.dumps([kind, *(str(path.absolute()) for path in paths)]).encode()).hexdigest()
    stamps, started = _stamps(paths), time.time_ns()
    found = _known.get(name) or _stored(_file(name))
    if found is not None and found[0] == stamps:
        _known[name] = found
        return found[1]
    value = compute()
    newest = max((max(int(mtime), int(ctime)) for *_, mtime, ctime in stamps), default=0)
    if newest < started - _RACY_SECONDS * 10**9 and _stamps(paths) == stamps:
        _known[name] = stamps, value
        with suppress(OutputError, OSError):  # without a cache it is computed again next time
            _file(name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(_file(name), json.dumps({"files": stamps, "sha256": value}) + "\n")
    return value


def sha256_of(path: Path) -> str:
    """Of a file's content, remembered."""
    return remembered("sha256", [path], lambda: hashed(path))


def hashed(path: Path) -> str:
    """Of a file's content, read now."""
    with path.open("rb") as file:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()  # Python 3.10
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


def _stamps(paths: Sequence[Path]) -> _Stamps:
    """What tells whether a file is the one that it was: of a link, what it leads to."""
    found = [(path, path.stat()) for path in paths]
    return [
        [str(path.absolute()), one.st_size, one.st_dev, one.st_ino, one.st_mtime_ns, one.st_ctime_ns]
        for path, one in found
    ]


def _file(name: str) -> Path:
    return cache_folder() / "hashes" / f"{name}.json"


def _stored(path: Path) -> tuple[_Stamps, str] | None:
    """None for an entry that is not there or not as it was written."""
    try:
        entry = json.loads(path.read_bytes())
        stamps, value = entry["files"], entry["sha256"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    is_hash = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
    return (stamps, value) if is_hash and hold(path) else None
