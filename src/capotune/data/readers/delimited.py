"""Csv and tsv files, read with the standard library so that a row's line is the one that an editor shows."""

from __future__ import annotations

import csv
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from capotune.data.columns import refuse_duplicates
from capotune.data.readers.lines import LONGEST, TOO_LONG, Lines
from capotune.data.table import Origin, Table, TakesRows
from capotune.data.wording import SHOWN, bad_rows, count, excerpt
from capotune.errors import DataError

__all__ = ["read_delimited"]

_MOST_COLUMNS: Final = 10_000
_FIELD_LIMIT_LOCK: Final = threading.Lock()


@dataclass(frozen=True)
class _Broken:
    """Stands in the place of a row's fields when its line could not be read."""

    why: str


def read_delimited(lines: Lines, source: str, delimiter: str | None, limit: int | None, rows: TakesRows) -> Table:
    """The rows of a csv or tsv file's lines, put into ``rows``; without a ``delimiter`` it is read off the header line.

    Raises:
        DataError: lines have other numbers of fields than the header, or broken quotes.
    """
    columns: list[str] = []
    bad: dict[int, str] = {}
    origin = Origin(source)
    with _fields_up_to(lines.size):
        first, delimiter = _header(lines, delimiter)
        for line, fields in _split_fields(lines, delimiter, first):
            if isinstance(fields, _Broken):
                bad[line] = f"{fields.why}: {excerpt(lines.at(line - 1))}"
            elif not any(map(str.strip, fields)):
                continue
            elif not columns:
                columns = _column_names(fields, origin.at(line))
            elif len(fields) != len(columns):
                found = count(len(fields), "field")
                bad[line] = f"{found}, where the header has {len(columns)}: {excerpt(lines.at(line - 1))}"
            else:
                rows.add(line, columns, fields)
            if len(bad) == SHOWN or (bad and not columns) or (limit is not None and len(rows) == limit):
                break
    if bad:
        at_least = f"{len(bad)} lines or more" if len(bad) == SHOWN else count(len(bad), "line")
        advice = (
            f'Double quotes go around a field that holds {delimiter!r} or a line break; a quote in it is written "".'
        )
        raise bad_rows(origin, f"{at_least} cannot be read as fields separated by {delimiter!r}", bad, advice)
    return Table(columns, rows.rows(), rows.lines, origin)


@contextmanager
def _fields_up_to(size: int) -> Iterator[None]:
    """Let csv read fields of ``size`` characters, up to the longest allowed. Its limit is one number a process: it is
    lent, and put back."""
    with _FIELD_LIMIT_LOCK:
        before = csv.field_size_limit()
        csv.field_size_limit(max(before, min(size, LONGEST)))
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _header(lines: Lines, delimiter: str | None) -> tuple[int, str]:
    """Where the header line stands, and the delimiter that gives it the most fields (a comma when none does)."""
    first, header = next((at, line) for at, line in enumerate(lines.since(0)) if line.strip())
    if excel := re.fullmatch(r"sep=(.)\s*", header):
        return first + 1, excel[1]
    candidates = delimiter or ",;\t|"
    return first, max(candidates, key=lambda candidate: len(next(csv.reader([header[:LONGEST]], delimiter=candidate))))


def _split_fields(lines: Lines, delimiter: str, first: int) -> Iterator[tuple[int, list[str] | _Broken]]:
    """Yield each row's line and fields; after a broken row go on with the line below it."""
    start: int | None = first
    while start is not None:
        offset, start = start, None
        reader = csv.reader(lines.since(offset), delimiter=delimiter, strict=True)
        line = offset
        try:
            for fields in reader:
                yield line + 1, fields
                line = offset + reader.line_num
        except csv.Error as error:
            yield line + 1, _Broken(_csv_problem(error))
            start = line + 1


def _csv_problem(error: csv.Error) -> str:
    if "unexpected end of data" in str(error):
        return "a double quote opens a field here and is never closed"
    if "expected after" in str(error):
        return "its double quotes do not pair up (text follows a closing one)"
    return TOO_LONG if "field larger than field limit" in str(error) else str(error)


def _column_names(fields: list[str], where: str) -> list[str]:
    if len(fields) > _MOST_COLUMNS:
        raise DataError(
            f"the header has {len(fields):,} columns; at most {_MOST_COLUMNS:,} are read.",
            where=where,
            advice="Write the columns that are needed into a file of their own.",
        )
    names = [field.strip() or f"column {number}" for number, field in enumerate(fields, start=1)]
    refuse_duplicates(names, where)
    return names
