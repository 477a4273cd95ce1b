"""Several labels a text, or none: as a list, as text with a separator, or as columns of 0 and 1, one a label."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, compress
from typing import Any, Final

from capotune.data.label_columns import (
    find_label_columns,
    given_label_columns,
    label_sample,
    refuse_one_hot,
    yes_or_no,
    yes_or_no_columns,
)
from capotune.data.label_values import SEPARATORS, are_joined, label_text, one_spelling
from capotune.data.labelled import LabelledText, LabelReading
from capotune.data.table import Table
from capotune.data.wording import kind_of, quoted
from capotune.errors import DataError

__all__ = ["COLUMNS", "LIST", "SEVERAL_LABELS", "form_in_words", "looks_like_several"]

COLUMNS, LIST = "columns", "list"
"""Forms beside separators."""
_LONGEST_LIST: Final = 10_000  # characters of a list that is written as text

Row = tuple[str, ...]
"""The labels of a text, sorted, each once."""


class SeveralLabels(LabelReading[Row]):
    """Names in lists (``["late", "broken"]``), in text (``late; broken``), or columns of 0 and 1 that are the names.

    A row without any is one that has none of the labels. Labels are written as classes are (``classes.Classes``).
    """

    def find(
        self, table: Table, text_column: str | None, label_columns: Sequence[str], named_by: str | None
    ) -> tuple[str, tuple[str, ...]]:
        """One column, or those that hold 0 and 1."""
        if len(label_columns) > 1:
            return given_label_columns(table, text_column, label_columns, named_by)
        columns = yes_or_no_columns(table)
        if not label_columns and len(columns) > 1:
            return given_label_columns(table, text_column, columns, named_by)
        label = next(iter(label_columns), None)
        text, label = find_label_columns(table, text_column, label, named_by, are_labels=_hold_several)
        return text, (label,)

    def form(self, table: Table, columns: Sequence[str]) -> str:
        """``columns``, ``list``, or the character between labels; empty where no row has two."""
        if len(columns) > 1:
            return COLUMNS
        values = [value for value in table.column(columns[0]) if label_text(value) != ""]
        if any(isinstance(value, list | tuple) for value in values) or (values and all(map(_is_list, values))):
            return LIST
        return _separator(values)

    def labels(self, table: Table, columns: Sequence[str], form: str) -> list[Row | None]:
        """Of each row its labels, none of which may be empty."""
        if form == COLUMNS:
            marks = zip(*(map(yes_or_no, table.column(column)) for column in columns), strict=True)
            return [None if None in row else tuple(compress(columns, row)) for row in marks]
        return [_row(_parts(value, form)) for value in table.column(columns[0])]

    def why_none(self, values: Sequence[Any], columns: Sequence[str]) -> str:
        """What is no label."""
        if len(columns) == 1:
            return f"labels ({columns[0]}) are {_shown(values[0])}, of which not every one is text or a number"
        value, column = next(one for one in zip(values, columns, strict=True) if yes_or_no(one[0]) is None)
        return f"{column} is {_shown(value)}, neither 0 nor 1"

    def settled(
        self, rows: LabelledText[Row], test: LabelledText[Row] | None
    ) -> tuple[LabelledText[Row], LabelledText[Row] | None, dict[str, str]]:
        """One spelling of each."""
        every = chain.from_iterable([*rows.labels, *(test.labels if test else ())])
        spelling = one_spelling(set(every))
        return respelled(rows, spelling), test and respelled(test, spelling), spelling

    def names(self, label: Row) -> Row:
        """The labels."""
        return label

    def strata(self, labels: Sequence[Row]) -> list[int]:
        """The rarest label of each row, so that it stands on both sides."""
        rows_of = Counter(chain.from_iterable(labels))
        codes: dict[str, int] = {}
        rarest = (min(row, key=lambda name: (rows_of[name], name), default="") for row in labels)
        return [codes.setdefault(name, len(codes)) for name in rarest]

    def check_train(self, rows: LabelledText[Row]) -> None:
        """Some row needs a label that another has not."""
        if len(set(rows.labels)) == 1:
            found = ", ".join(map(quoted, rows.labels[0])) or "none"
            raise DataError(
                f"all {len(rows):,} training rows have the same labels, {found} (column {quoted(rows.label_column)}).",
                where=str(rows.source),
                advice="Add rows, or choose another `label_column`.",
            )


SEVERAL_LABELS = SeveralLabels()


def looks_like_several(table: Table, text_column: str | None, label_columns: Sequence[str]) -> bool:
    """Whether some rows have two labels. Raises ``DataError`` for columns of 0 and 1 of which each row has one 1."""
    try:
        _, columns = SEVERAL_LABELS.find(table, text_column, label_columns, None)
    except DataError:
        return False
    if len(columns) > 1:
        if any(yes_or_no(value) is None for column in columns for value in label_sample(table, column)):
            return False
        if not label_columns:
            refuse_one_hot(table, columns)
        return True
    return _hold_several(label_sample(table, columns[0]))


def form_in_words(form: str) -> str:
    """How the labels of a row are written."""
    known = {COLUMNS: "a column of 0 and 1 each", LIST: "several a row, as a list", "": "one a row, or none"}
    return known.get(form) or f"several a row, separated by {form!r}"


def respelled(rows: LabelledText[Row], spelling: Mapping[str, str]) -> LabelledText[Row]:
    """The same rows with other names for some labels."""
    if not spelling:
        return rows
    return replace(rows, labels=[_row(spelling.get(name, name) for name in row) or () for row in rows.labels])


def _hold_several(values: Sequence[Any]) -> bool:
    """Whether some are two labels: a list, or text with a separator between names that stand in others too."""
    found = [value for value in values if label_text(value) != ""]
    if any(isinstance(value, list | tuple) for value in found):
        return all(_row(_parts(value, LIST)) is not None for value in found)
    if found and all(map(_is_list, found)):
        return True
    return bool(_separator(found))


def _separator(values: Iterable[Any]) -> str:
    names = {text for value in values if (text := label_text(value))}
    return next((one for one in SEPARATORS if are_joined(names, one)), "")


def _parts(value: object, form: str) -> Iterable[object]:
    """What a value consists of."""
    if isinstance(value, list | tuple):
        return value
    if form == LIST and isinstance(value, str) and _is_list(value):
        return _read_list(value)
    text = label_text(value)
    if text is None:
        return (value,)
    return [part for part in text.split(form) if part.strip()] if form and form != LIST else [text] * bool(text)


def _row(parts: Iterable[object]) -> Row | None:
    names = [label_text(part) for part in parts]
    return None if not all(names) else tuple(sorted(set(names)))  # type: ignore[arg-type]


def _is_list(value: object) -> bool:
    return isinstance(value, str) and value.startswith("[") and value.endswith("]") and len(value) < _LONGEST_LIST


def _read_list(text: str) -> Sequence[object]:
    """A list that is written as JSON or Python writes it; else what it holds between commas."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return [part for part in text[1:-1].split(",") if part.strip()]
    return found if isinstance(found, list) else [text]


def _shown(value: object) -> str:
    return kind_of(value) if label_text(value) is None and not isinstance(value, list | tuple) else quoted(value)
