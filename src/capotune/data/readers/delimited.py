"""Csv and tsv files, read with the standard library so that a row's line is the one that an editor shows."""

from __future__ import annotations

import csv
import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from capotune.data.columns import refuse_duplicates
from capotune.data.table import Origin, Table
from capotune.data.wording import SHOWN, bad_rows, count, excerpt

__all__ = ["read_delimited"]

_FIELD_LIMIT_LOCK: Final = threading.Lock()


@dataclass(frozen=True)
class _Broken:
    """Stands in the place of a row's fields when its line could not be read."""

    why: str


def read_delimited(text: str, source: str, delimiter: str | None, limit: int | None) -> Table:
    """The rows of a csv or tsv file's text; without a ``delimiter`` it is read off the header line.

    Raises:
        DataError: lines have other numbers of fields than the header, or broken quotes.
    """
    columns: list[str] = []
    rows: list[dict[str, Any]] = []
    starts: list[int] = []
    bad: dict[int, str] = {}
    origin = Origin(source)
    lines = list(io.StringIO(text, newline=""))
    with _fields_up_to(len(text)):
        first, delimiter = _header(lines, delimiter)
        for line, fields in _split_fields(lines, delimiter, first):
            if isinstance(fields, _Broken):
                bad[line] = f"{fields.why}: {excerpt(lines[line - 1])}"
            elif not any(map(str.strip, fields)):
                continue
            elif not columns:
                columns = _column_names(fields, origin.at(line))
            elif len(fields) != len(columns):
                found = count(len(fields), "field")
                bad[line] = f"{found}, where the header has {len(columns)}: {excerpt(lines[line - 1])}"
            else:
                rows.append(dict(zip(columns, fields, strict=True)))
                starts.append(line)
            if len(bad) == SHOWN or (bad and not columns) or len(rows) == limit:
                break
    if bad:
        at_least = f"{len(bad)} lines or more" if len(bad) == SHOWN else count(len(bad), "line")
        advice = (
            f'Double quotes go around a field that holds {delimiter!r} or a line break; a quote in it is written "".'
        )
        raise bad_rows(origin, f"{at_least} cannot be read as fields separated by {delimiter!r}", bad, advice)
    return Table(columns, rows, starts, origin)


@contextmanager
def _fields_up_to(size: int) -> Iterator[None]:
    """Let csv read fields of ``size`` characters. Its limit is one number a process: it is lent, and put back."""
    with _FIELD_LIMIT_LOCK:
        before = csv.field_size_limit()
        csv.field_size_limit(max(before, min(size, 2**31 - 1)))
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _header(lines: list[str], delimiter: str | None) -> tuple[int, str]:
    """Where the header line stands, and the delimiter that gives it the most fields (a comma when none does)."""
    first = next(index for index, line in enumerate(lines) if line.strip())
    if excel := re.fullmatch(r"sep=(.)\s*", lines[first]):
        return first + 1, excel[1]
    candidates = delimiter or ",;\t|"
    return first, max(candidates, key=lambda candidate: len(next(csv.reader([lines[first]], delimiter=candidate))))


def _split_fields(lines: list[str], delimiter: str, first: int) -> Iterator[tuple[int, list[str] | _Broken]]:
    """Yield each row's line and fields; after a broken row go on with the line below it."""
    start = first
    while start < len(lines):
        offset = start
        reader = csv.reader((lines[index] for index in range(offset, len(lines))), delimiter=delimiter, strict=True)
        try:
            for fields in reader:
                yield start + 1, fields
                start = offset + reader.line_num
            return
        except csv.Error as error:
            yield start + 1, _Broken(_csv_problem(error))
            start += 1


def _csv_problem(error: csv.Error) -> str:
    if "unexpected end of data" in str(error):
        return "a double quote opens a field here and is never closed"
    if "expected after" in str(error):
        return "its double quotes do not pair up (text follows a closing one)"
    return str(error)


def _column_names(fields: list[str], where: str) -> list[str]:
    names = [field.strip() or f"column {number}" for number, field in enumerate(fields, start=1)]
    refuse_duplicates(names, where)
    return names
