"""Bytes of a text file to text: UTF-8, or UTF-16 with a byte-order mark. Anything else is refused with its line."""

from __future__ import annotations

import codecs
import io
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from capotune.data.readers.endings import ENDINGS, OTHER_ENDINGS
from capotune.data.wording import excerpt
from capotune.errors import DataError

__all__ = [
    "decode",
    "is_plain_text",
    "is_utf16",
    "read_bytes",
    "read_text",
    "read_text_parts",
    "refuse_bytes",
    "unchanged",
]

_PART = 2**20  # characters
_ALLOWED = "UTF-8, or UTF-16 with a byte-order mark"


def is_plain_text(source: object) -> bool:
    """Whether ``source`` is a file that holds no rows, by its ending."""
    if not isinstance(source, str | os.PathLike):
        return False
    path = Path(source).expanduser()
    return os.path.isfile(path) and path.suffix.lower() not in ENDINGS  # noqa: PTH113 - as in read_table


def read_text(source: str | os.PathLike[str]) -> str:
    """The whole text of a file; every line ends in a line feed.

    Raises:
        DataError: the file cannot be read, is empty, or is no text.
    """
    source = os.fspath(source)
    path = Path(source).expanduser()
    if advice := OTHER_ENDINGS.get(path.suffix.lower()):
        raise DataError("is not a text file.", where=source, advice=advice)
    text = decode(read_bytes(path, source), path, source)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text_parts(source: str | os.PathLike[str]) -> Iterator[str]:
    """``read_text``, part by part: what is wrong shows where it stands. Of UTF-16 all is one part.

    Raises:
        DataError: as ``read_text``, or the file was changed while it was read.
    """
    source = os.fspath(source)
    path = Path(source).expanduser()
    if path.suffix.lower() in OTHER_ENDINGS or is_utf16(path):
        yield read_text(source)
        return
    is_whole, is_blank = False, True
    with unchanged(path, source):
        with suppress(OSError, UnicodeDecodeError), path.open(encoding="utf-8-sig") as file:
            while (part := file.read(_PART)) and "\0" not in part:
                is_blank = is_blank and not part.strip()
                yield part
            is_whole = not part and not is_blank
        if not is_whole:
            with suppress(OSError), path.open("rb") as raw:
                refuse_bytes(raw, path, source)
            read_text(source)  # it is empty, or cannot be read


@contextmanager
def unchanged(path: Path, source: str) -> Iterator[None]:
    """Around a block that reads a file: ``DataError`` when somebody writes to it meanwhile."""
    before = _stamp(path)
    yield
    if _stamp(path) != before:
        raise DataError(
            "it was changed while it was read.", where=source, advice="Run again once nothing writes to it any more."
        )


def _stamp(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def is_utf16(path: Path) -> bool:
    """Whether a file starts as UTF-16 does."""
    with suppress(OSError), path.open("rb") as file:
        return file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return False


def read_bytes(path: Path, source: str, at_most: int | None = None) -> bytes:
    """The bytes of a file, or of its first lines in ``at_most`` bytes. ``DataError`` when it is blank or unreadable."""
    try:
        if at_most is None:
            raw = path.read_bytes()
        else:
            with path.open("rb") as file:
                raw = file.read(at_most)
            raw = raw[: raw.rfind(b"\n") + 1] or raw
    except OSError as error:
        advice = f"Check it with: ls -l {_quote(path)}"
        raise DataError(f"cannot be read: {error.strerror}.", where=source, advice=advice) from error
    if not raw.strip():
        raise _is_empty(path, source)
    return raw


def decode(raw: bytes, path: Path, source: str) -> str:
    """The text of ``raw``. ``DataError`` for other encodings, with the line, and for blank text."""
    text = _decode(raw, path, source)
    if not text.strip():
        raise _is_empty(path, source)
    return text


def _is_empty(path: Path, source: str) -> DataError:
    needed = "column names and rows" if path.suffix.lower() in ENDINGS else "text"
    return DataError("is empty.", where=source, advice=f"Give a file with {needed}.")


def _decode(raw: bytes, path: Path, source: str) -> str:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return _decode_utf16(raw, source)
    refuse_bytes(io.BytesIO(raw), path, source)
    return raw.decode("utf-8-sig")


def refuse_bytes(file: BinaryIO, path: Path, source: str) -> None:
    """Raise a ``DataError`` for a zero byte anywhere in the content of a file, or for the first byte that is not UTF-8.
    One line at a time is in memory."""
    zeros = sum(line.count(0) for line in file)
    size = file.tell()
    file.seek(0)
    for number, line in enumerate(file, start=1):
        if 0 in line:
            raise DataError(
                "a zero byte, which no text has. This is a binary file (a sheet under another name?), a damaged one or "
                "UTF-16 without its byte-order mark.",
                where=f"{source}:{number}",
                allowed=_ALLOWED,
                advice=f"Export it as UTF-8, or {_without_zeros(zeros, size, path)}",
            )
        if not zeros:
            _refuse_line(line, number, path, source)


def _refuse_line(line: bytes, number: int, path: Path, source: str) -> None:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        near = line[max(0, error.start - 30) : error.start + 30].rstrip(b"\n")
        raise DataError(
            f"the byte 0x{line[error.start]:02x} is not UTF-8. Windows-1252 (Excel's plain CSV) is likely; in it the "
            f"place reads {excerpt(near.decode('cp1252', errors='replace'))}.",
            where=f"{source}:{number}",
            allowed=_ALLOWED,
            advice=f"Save it as 'CSV UTF-8', or convert it: {_iconv('WINDOWS-1252', path)}",
        ) from error


def _decode_utf16(raw: bytes, source: str) -> str:
    text = raw.decode("utf-16", errors="replace")
    broken = min((at for at in (text.find("\ufffd"), text.find("\0")) if at >= 0), default=None)
    if broken is not None:
        where = f"{source}:{text.count(chr(10), 0, broken) + 1}"
        raise DataError(
            "starts as UTF-16 and is not UTF-16 here.", where=where, advice="Export the file again, as UTF-8."
        )
    return text


def _without_zeros(zeros: int, size: int, path: Path) -> str:
    """UTF-16 of European text is half zeros; where there are few, they are strays."""
    if zeros * 4 > size:
        return f"convert it: {_iconv('UTF-16LE', path)}"
    target = path.with_name(f"{path.stem}-clean{path.suffix}")
    return f"take them out, if there is text around them: tr -d '\\000' < {_quote(path)} > {_quote(target)}"


def _iconv(encoding: str, path: Path) -> str:
    target = path.with_name(f"{path.stem}-utf8{path.suffix}")
    return f"iconv -f {encoding} -t UTF-8 {_quote(path)} > {_quote(target)}"


def _quote(path: Path) -> str:
    return shlex.quote(str(path))
