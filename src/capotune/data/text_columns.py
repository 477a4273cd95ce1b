"""Which two columns hold texts that are read together: those that are given, or by usual names of such pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from capotune.data.columns import find_column, given_column
from capotune.data.table import Table
from capotune.data.wording import quoted
from capotune.errors import DataError, SettingError

__all__ = ["Text", "find_pair", "without_column"]

Text = str | tuple[str, str]
"""What is read of a row: one text, or two that are read together."""

_PAIRS: Final = (
    *(("text_a", "text_b"), ("premise", "hypothesis"), ("sentence1", "sentence2"), ("sentence_1", "sentence_2")),
    *(("sentence_a", "sentence_b"), ("question1", "question2"), ("question_1", "question_2"), ("text1", "text2")),
    *(("text_1", "text_2"), ("text", "text_pair"), ("question", "sentence"), ("question", "context")),
    *(("question", "passage"), ("question", "answer"), ("query", "document"), ("query", "passage")),
)


def find_pair(
    table: Table, text_column: str | None, pair_columns: Sequence[str] | None, named_by: str | None = None
) -> tuple[str, str] | None:
    """The columns of the first and the second text; None where one text is read.

    They are found by their names where no ``text_column`` is given; ``named_by`` names the source that the given ones
    are from.

    Raises:
        DataError: a given column does not exist, or both are one.
        SettingError: columns of one text and of two are given.
    """
    if pair_columns is not None:
        if text_column is not None:
            raise SettingError(
                "names the column of one text; `pair_columns` names those of two.",
                setting="text_column",
                given=text_column,
                advice="Give one of the two settings.",
            )
        first, second = (given_column(table, name, named_by or "`pair_columns`") for name in pair_columns)
        if first == second:
            raise DataError(
                f"{quoted(first)} is given as the first text and as the second.",
                where=str(table.source),
                advice="Give two columns as `pair_columns`.",
            )
        return first, second
    if text_column is not None:
        return None
    for names in _PAIRS:
        one, other = (find_column(table.columns, (name,)) for name in names)
        if one is not None and other is not None:
            return one, other
    return None


def without_column(table: Table, name: str) -> Table:
    """The table as if it had no such column."""
    return replace(table, columns=[column for column in table.columns if column != name])
