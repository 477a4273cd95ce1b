"""Which column holds what, by the name that is given or by usual names; what a value is as text."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Final

from capotune.data.table import Table
from capotune.data.wording import bad_rows, did_you_mean, quoted, shorten
from capotune.errors import DataError

__all__ = [
    "COMPLETION_NAMES",
    "CONTEXT_NAMES",
    "LABEL_NAMES",
    "NO_WIDTH",
    "TEXT_NAMES",
    "find_column",
    "given_column",
    "part_of_each_row",
    "plain_name",
    "refuse_duplicates",
    "unused_columns",
    "value_as_text",
]

# In order of preference: of two columns with a known name the one that stands first here is taken.
TEXT_NAMES: Final = (
    *("text", "sentence", "message", "utterance", "query", "question", "content", "body", "review", "review_text"),
    *("review_body", "comment", "comment_text", "tweet", "sms", "email", "post", "description", "abstract", "document"),
    *("question_content", "prompt", "input", "headline", "title", "question_title", "subject"),
)
LABEL_NAMES: Final = (
    *("label", "labels", "category", "intent", "class", "target", "topic", "sentiment", "tag", "label_text"),
    *("emotion", "stars", "star_rating", "rating", "y", "gold_label", "is_duplicate", "entailment_judgment"),
)
COMPLETION_NAMES: Final = (
    *("completion", "answer", "answers", "output", "response", "target", "label", "labels", "reply", "summary"),
    *("translation", "solution", "tgt", "target_text", "highlights", "reference", "human_reference", "ref", "sql"),
    *("code", "best_answer"),
)
CONTEXT_NAMES: Final = ("context", "passage", "document", "paragraph")

NO_WIDTH: Final = dict.fromkeys(map(ord, "\ufeff\u200b\u200c\u200d\u2060\u00ad"))
"""Characters that nobody sees, such as a byte-order mark inside a text, for ``str.translate``."""

PARTS: Final = {
    **dict.fromkeys(("train", "training", "validation", "valid", "val", "dev"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def refuse_duplicates(names: Sequence[str], where: str) -> None:
    """Raise a ``DataError`` when two columns have one name."""
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise DataError(
            f"more than one column is named {shorten(twice)}.", where=where, advice="Give each its own name."
        )


def plain_name(column: str) -> str:
    """A column's name as it is compared: in lower case, without marks that nobody sees and space around it, and with
    ``_`` for spaces and hyphens in it."""
    return re.sub(r"[\s_-]+", "_", unicodedata.normalize("NFKC", column).translate(NO_WIDTH).strip()).casefold()


def find_column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The column that has one of ``names``, the first of them first; as it is written before one that is written in
    another way (``Review Text``)."""
    for name in names:
        if name in columns:
            return name
        if alike := [column for column in columns if plain_name(column) == name]:
            return alike[0]
    return None


def unused_columns(table: Table, read: Sequence[str]) -> tuple[str, ...]:
    """The columns that are not ``read``; a column ``split`` is."""
    return tuple(column for column in table.columns if column not in read and plain_name(column) != "split")


def given_column(table: Table, name: str, named_by: str) -> str:
    """The column of that name, as it is written or nearly so (``plain_name``); ``named_by``: the setting or file that
    names it.

    Raises:
        DataError: there is no such column.
    """
    if name in table.columns:
        return name
    same = [column for column in table.columns if plain_name(column) == plain_name(name)]
    if len(same) == 1:
        return same[0]
    raise DataError(
        f"no column {quoted(name)}, which {named_by} names. {did_you_mean(name, table.columns)}"
        f"The columns are {shorten(table.columns)}; rename one or choose another.",
        where=str(table.source),
    )


def value_as_text(value: object) -> str | None:
    """A label or another short value as text, ``""`` when it is missing, None when it is neither text nor a number."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    return str(value).strip() if isinstance(value, str | int) else None


# The column ``split``


def part_of_each_row(table: Table, read: Sequence[str]) -> list[str]:
    """For each row ``train`` or ``test``, as a column ``split`` says (validation counts as train); empty without one.

    ``read`` are the columns that are read as something else.

    Raises:
        DataError: the column holds something else; names the rows.
    """
    column = next((name for name in table.columns if plain_name(name) == "split" and name not in read), None)
    if column is None:
        return []
    parts = [PARTS.get(str(row.get(column)).strip().lower(), "") for row in table.rows]
    if "" in parts:
        bad = {
            line: f"{column} is {quoted(row.get(column))}"
            for line, row, part in zip(table.lines, table.rows, parts, strict=True)
            if not part
        }
        raise bad_rows(
            table.source,
            "the column 'split' is not clear",
            bad,
            f"Allowed: train, validation, test. If {quoted(column)} means something else, give the column another "
            "name; of a dataset with other splits choose one for each, as in `data=owner/name:train` and "
            "`test=owner/name:test`.",
        )
    return parts
