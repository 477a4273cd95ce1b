"""A data set with a label suggested for some rows, as a csv file to correct and read in again."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from typing import Any, Final

from capotune.data.columns import value_as_text
from capotune.data.table import Table

__all__ = ["SUGGESTION_COLUMNS", "with_suggestions"]

SUGGESTION_COLUMNS: Final = ("suggestion", "suggestion_probability", "label_probability")


def with_suggestions(table: Table, suggestions: Mapping[int, tuple[str, float, float]]) -> str:
    """The rows and columns of ``table`` as csv, and behind them ``SUGGESTION_COLUMNS``: of the rows that have some, by
    position, else empty. Columns of these names that the table has already are replaced. What is neither text nor a
    number is written as JSON."""
    columns = [column for column in table.columns if column not in SUGGESTION_COLUMNS]
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow([*columns, *SUGGESTION_COLUMNS])
    for at, row in enumerate(table.rows):
        own = [_as_field(row.get(column)) for column in columns]
        suggestion, *probabilities = suggestions.get(at, ("", None, None))
        writer.writerow([*own, suggestion, *("" if p is None else f"{p:.4f}" for p in probabilities)])
    return written.getvalue()


def _as_field(value: Any) -> str:
    """A text as it is, others as they would be read again."""
    if isinstance(value, str):
        return value
    text = value_as_text(value)
    return json.dumps(value, ensure_ascii=False, default=str) if text is None else text
