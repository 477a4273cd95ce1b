"""A data file to a table, by the ending of its name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from capotune.data.readers.delimited import read_delimited
from capotune.data.readers.endings import ALLOWED, DELIMITERS, ENDINGS, JSON_ENDINGS, OTHER_ENDINGS
from capotune.data.readers.json_rows import read_json
from capotune.data.readers.lines import ANY, LINE_FEED, Lines, NoTextError
from capotune.data.readers.parquet import read_parquet
from capotune.data.readers.text import decode, is_utf16, read_bytes, refuse_bytes, unchanged
from capotune.data.table import Table, TakesRows
from capotune.data.wording import did_you_mean, shorten
from capotune.errors import DataError

__all__ = ["no_such_file", "read_file"]

Place = Callable[[], TakesRows]
"""Makes where the rows go; a file may be begun twice."""

HEAD: Final = 2**20
"""Bytes of a large file that are read for its first rows."""


def read_file(path: Path, source: str, limit: int | None, place: Place) -> Table:
    """The rows of the file at ``path``, which was given as ``source``; at most ``limit``.

    Raises:
        DataError: it is a folder, of another kind, cannot be read, or has lines that do not fit.
    """
    ending = path.suffix.lower()
    if path.is_dir():
        raise DataError("is a folder; one file is needed.", where=source, advice=_data_files_in(path))
    if not path.is_file():
        raise DataError(
            "is a pipe or a device; a file is needed.", where=source, advice="Write its content into a file."
        )
    if ending not in ENDINGS:
        advice = OTHER_ENDINGS.get(ending, "Rename or convert it.")
        raise DataError(f"files ending in {ending!r} are not read.", where=source, allowed=ALLOWED, advice=advice)
    with unchanged(path, source):
        return _read_parquet(path, source, limit, place) if ending == ".parquet" else _read(path, source, limit, place)


def _read_parquet(path: Path, source: str, limit: int | None, place: Place) -> Table:
    read_bytes(path, source, HEAD)  # which refuses an empty file as such
    return read_parquet(path, source, limit, place())


def _read(path: Path, source: str, limit: int | None, place: Place) -> Table:
    """The rows of a text file."""
    if limit is not None and path.stat().st_size > HEAD:
        # where these rows do not end in its first lines, or are broken, the whole file tells which
        with suppress(DataError):
            head = _parse(_text_lines(read_bytes(path, source, HEAD), path, source), path, source, limit, place())
            if len(head.rows) == limit:
                return head
    if not is_utf16(path):
        with suppress(OSError, UnicodeDecodeError, NoTextError):
            lines = Lines.of_file(path, _line_end(path))
            if any(map(str.strip, lines.since(0))):
                return _parse(lines, path, source, limit, place())
        with suppress(OSError), path.open("rb") as raw:
            refuse_bytes(raw, path, source)
    return _parse(_text_lines(read_bytes(path, source), path, source), path, source, limit, place())


def _text_lines(raw: bytes, path: Path, source: str) -> Lines:
    return Lines.of_text(decode(raw, path, source), _line_end(path))


def _line_end(path: Path) -> str:
    return LINE_FEED if path.suffix.lower() in JSON_ENDINGS else ANY


def _parse(lines: Lines, path: Path, source: str, limit: int | None, rows: TakesRows) -> Table:
    ending = path.suffix.lower()
    if ending in JSON_ENDINGS:
        return read_json(lines, source, limit, rows)
    return read_delimited(lines, source, DELIMITERS[ending], limit, rows)


def no_such_file(source: str, path: Path) -> DataError:
    """The error for a path where nothing is, with what is near it."""
    if not path.parent.is_dir():
        return DataError(f"no such file, and no such folder: {path.parent}.", where=source, allowed=ALLOWED)
    near = did_you_mean(path.name, _names_in(path.parent)).rstrip()
    return DataError(f"no such file. {near or _data_files_in(path.parent)}", where=source, allowed=ALLOWED)


def _names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def _data_files_in(folder: Path) -> str:
    found = [name for name in _names_in(folder) if Path(name).suffix.lower() in ENDINGS]
    return f"Data files there: {shorten(found)}." if found else "The folder holds no data file."
