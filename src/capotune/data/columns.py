"""Which column holds what: by the name that is given, by usual names, or by content where only one can be meant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from capotune.data.table import Table
from capotune.data.wording import bad_rows, did_you_mean, shorten
from capotune.errors import DataError

__all__ = [
    "LABEL_NAMES",
    "TEXT_NAMES",
    "find_column",
    "find_label_columns",
    "given_column",
    "has_label_column",
    "part_of_each_row",
    "refuse_duplicates",
    "value_as_text",
]

# In order of preference: of two columns with a known name the one that stands first here is taken.
TEXT_NAMES: Final = (
    *("text", "sentence", "message", "utterance", "query", "question", "content", "body", "review", "comment"),
    *("tweet", "description", "document", "prompt", "input", "title", "subject"),
)
LABEL_NAMES: Final = ("label", "labels", "category", "intent", "class", "target", "topic", "sentiment", "tag")

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


def find_column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The column that has one of ``names``, the first of them first; one in another case comes after those."""
    exact = [name for name in names if name in columns]
    in_any_case = [column for name in names for column in columns if column.lower() == name]
    return next(iter(exact + in_any_case), None)


def given_column(table: Table, name: str, named_by: str) -> str:
    """The column of that name, as it is written or in another case; ``named_by``: the setting or file that names it.

    Raises:
        DataError: there is no such column.
    """
    if name in table.columns:
        return name
    same = [column for column in table.columns if column.lower() == name.strip().lower()]
    if len(same) == 1:
        return same[0]
    raise DataError(
        f"no column {name!r}, which {named_by} names. {did_you_mean(name, table.columns)}"
        f"The columns are {shorten(table.columns)}; rename one or choose another.",
        where=str(table.source),
    )


# Text and label


def has_label_column(table: Table) -> bool:
    """Whether ``find_label_columns`` finds a text and a label by itself."""
    try:
        find_label_columns(table)
    except DataError:
        return False
    return True


def find_label_columns(
    table: Table, text_column: str | None = None, label_column: str | None = None, named_by: str | None = None
) -> tuple[str, str]:
    """The columns that hold text and label; ``named_by`` names the source that the given ones are from.

    Raises:
        DataError: a given column does not exist, or it is not clear which one is meant.
    """
    text = None if text_column is None else given_column(table, text_column, named_by or "`text_column`")
    label = None if label_column is None else given_column(table, label_column, named_by or "`label_column`")
    label = label or find_column([column for column in table.columns if column != text], LABEL_NAMES)
    text = text or find_column([column for column in table.columns if column != label], TEXT_NAMES)
    if text is None or label is None:
        text, label = _by_content(table, text, label)
    if text == label:
        raise DataError(
            f"{text!r} is given as text and as label.", where=str(table.source), advice="Choose another `label_column`."
        )
    return text, label


def _by_content(table: Table, text: str | None, label: str | None) -> tuple[str, str]:
    step = max(1, len(table.rows) // 1000)
    sample = {column: [row.get(column) for row in table.rows[::step]] for column in table.columns}
    free = [column for column in table.columns if column not in (text, label) and column.lower() != "split"]
    texts = [text] if text else [column for column in free if _looks_like_text(sample[column])]
    labels = [label] if label else [column for column in free if _looks_like_labels(sample[column])]
    if len(texts) != 1 or len(labels) != 1:
        raise _cannot_tell(table, texts, labels)
    if _looks_like_a_row(texts[0]) or labels[0] in map(value_as_text, sample[labels[0]]):
        raise DataError(
            f"the column names look like data: {shorten(table.columns)}.",
            where=str(table.source),
            advice="The first line of a file holds the names, as in text,label; if these are names, give `text_column` "
            "and `label_column`.",
        )
    return texts[0], labels[0]


def _looks_like_text(values: list[Any]) -> bool:
    """Mostly different, and mostly of several words."""
    strings = [value for value in values if isinstance(value, str) and value.strip()]
    if len(strings) < len(values) / 2:
        return False
    several_words = sum(" " in value.strip() for value in strings)
    return len(set(strings)) > len(strings) / 2 and several_words > len(strings) / 2


def _looks_like_labels(values: list[Any]) -> bool:
    """At least two, short, and each one twice on average."""
    names = [name for name in map(value_as_text, values) if name]
    return 2 <= len(set(names)) <= len(names) / 2 and max(map(len, names)) <= 60


def _looks_like_a_row(column: str) -> bool:
    return len(column) > 60 or column.count(" ") >= 3 or column.endswith((".", "!", "?"))


def _cannot_tell(table: Table, texts: Sequence[str], labels: Sequence[str]) -> DataError:
    asked = [("text", "`text_column`", texts, TEXT_NAMES), ("label", "`label_column`", labels, LABEL_NAMES)]
    unknown = [(what, name, found or _near(table, names)) for what, name, found, names in asked if len(found) != 1]
    which = " and ".join(f"the {what}{f' ({_either(found)}?)' if found else ''}" for what, _, found in unknown)
    settings = " and ".join(name for _, name, _ in unknown)
    return DataError(
        f"it is not clear which column holds {which}. The columns are {shorten(table.columns)}.",
        where=str(table.source),
        advice=f"Give {settings}. A file without column names needs the line text,label at its top.",
    )


def _near(table: Table, names: Sequence[str]) -> list[str]:
    return [column for column in table.columns if did_you_mean(column, names)]


def _either(names: Sequence[str]) -> str:
    return " or ".join(map(repr, names[:3]))


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
    column = next((name for name in table.columns if name.lower() == "split" and name not in read), None)
    if column is None:
        return []
    parts = [PARTS.get(str(row.get(column)).strip().lower(), "") for row in table.rows]
    bad = {
        line: f"{column} is {row.get(column)!r}"
        for line, row, part in zip(table.lines, table.rows, parts, strict=True)
        if not part
    }
    if bad:
        raise bad_rows(
            table.source,
            "the column 'split' is not clear",
            bad,
            f"Allowed: train, validation, test. If {column!r} means something else, give the column another name; of a "
            "dataset with other splits choose one for each, as in `data=owner/name:train` and `test=owner/name:test`.",
        )
    return parts
