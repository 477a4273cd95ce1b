"""One number a text, or several: a column each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from capotune.data.columns import LABEL_NAMES, find_column
from capotune.data.label_columns import find_label_columns, given_label_columns, label_sample
from capotune.data.label_values import are_amounts, label_text
from capotune.data.labelled import LabelledText, LabelReading
from capotune.data.table import Table
from capotune.data.wording import kind_of, quoted
from capotune.errors import DataError

__all__ = ["NUMBERS", "looks_like_numbers"]

NUMBER_NAMES: Final = (
    *LABEL_NAMES,
    *("score", "scores", "value", "number", "similarity", "valence", "intensity", "mean", "price", "points", "grade"),
)
"""What a column of numbers is called. Classes that stand beside numbers come first."""

Row = tuple[float, ...]
"""A number for each column."""


class Numbers(LabelReading[Row]):
    """Finite numbers, also where they are written as text: ``3.5``, ``-1e-3``."""

    def find(
        self, table: Table, text_column: str | None, label_columns: Sequence[str], named_by: str | None
    ) -> tuple[str, tuple[str, ...]]:
        """The columns that are given, else one that is called as numbers are, or the only one that holds some."""
        if len(label_columns) > 1:
            return given_label_columns(table, text_column, label_columns, named_by)
        label = next(iter(label_columns), None)
        text, label = find_label_columns(table, text_column, label, named_by, NUMBER_NAMES, _hold_numbers)
        return text, (label,)

    def labels(self, table: Table, columns: Sequence[str], form: str) -> list[Row | None]:  # noqa: ARG002
        """The numbers of each row."""
        by_column = [[_number(value) for value in table.column(column)] for column in columns]
        return [None if None in row else row for row in zip(*by_column, strict=True)]

    def why_none(self, values: Sequence[Any], columns: Sequence[str]) -> str:
        """The first value that is no number."""
        value, column = next(one for one in zip(values, columns, strict=True) if _number(one[0]) is None)
        text = label_text(value)
        if text == "":
            return f"missing number ({column})"
        return f"number ({column}) is {kind_of(value) if text is None else quoted(text)}, not a finite number"

    def check_train(self, rows: LabelledText[Row]) -> None:
        """Each column needs two numbers."""
        for column, values in zip(rows.label_columns, zip(*rows.labels, strict=True), strict=True):
            if len(set(values)) == 1:
                raise DataError(
                    f"all {len(rows):,} training rows have one number, {values[0]:g} (column {quoted(column)}); at "
                    "least two are needed.",
                    where=str(rows.source),
                    advice="Add rows, or choose another `label_column`.",
                )


NUMBERS = Numbers()


def looks_like_numbers(table: Table, text_column: str | None, label_columns: Sequence[str]) -> bool:
    """Whether rows are texts with numbers that are no classes: with fractions, or many different ones."""
    try:
        text, columns = NUMBERS.find(table, text_column, label_columns, None)
    except DataError:
        return False
    if len(columns) > 1:
        return all(_hold_numbers(label_sample(table, column)) for column in columns)
    if not label_columns:
        labels = find_column([column for column in table.columns if column != text], LABEL_NAMES)
        if labels not in (None, columns[0]) or find_column(columns, NUMBER_NAMES) is None:
            return False  # classes with a number beside, or a number by content alone, which may be anything
    return _are_amounts(label_sample(table, columns[0]))


def _are_amounts(values: Sequence[Any]) -> bool:
    names = [text for text in map(label_text, values) if text]
    return _hold_numbers(list(values)) and are_amounts(set(names), len(names))


def _hold_numbers(values: list[Any]) -> bool:
    """Whether all but a few are numbers; a few may be missing or mistaken, which is said of the rows later."""
    found = [value for value in values if label_text(value) != ""]
    return bool(found) and sum(_number(value) is not None for value in found) > 0.9 * len(found)


def _number(value: object) -> float | None:
    """None for what is no finite number, or a truth value."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
