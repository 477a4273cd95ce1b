"""Which columns hold a text and its label: by the names that are given, by usual names, or by content where only one
can be meant. Data of other kinds that has labels too is known by its columns and refused in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from capotune.data.columns import LABEL_NAMES, TEXT_NAMES, find_column, given_column, plain_name, value_as_text
from capotune.data.suggest import suggested_template, template_for
from capotune.data.table import Table
from capotune.data.wording import did_you_mean, quoted, shorten
from capotune.errors import DataError

__all__ = [
    "find_label_columns",
    "given_label_columns",
    "has_label_column",
    "label_sample",
    "refuse_one_hot",
    "refuse_preferences",
    "yes_or_no",
    "yes_or_no_columns",
]

_YES: Final = ("1", "true")
_NO: Final = ("0", "false", "")
"""How a column of a label says that a row has it or not, in lower case."""


def has_label_column(table: Table) -> bool:
    """Whether ``find_label_columns`` finds a text and a label by itself."""
    try:
        find_label_columns(table)
    except DataError:
        return False
    return True


def find_label_columns(
    table: Table,
    text_column: str | None = None,
    label_column: str | None = None,
    named_by: str | None = None,
    names: Sequence[str] = LABEL_NAMES,
    are_labels: Callable[[list[Any]], bool] | None = None,
) -> tuple[str, str]:
    """The columns that hold text and label.

    Args:
        table: the rows.
        text_column, label_column: those that are given.
        named_by: the source that they are from, for messages.
        names: what a column of labels is called, the likeliest first.
        are_labels: tells by a column's values whether they may be labels; None: any may be that have such a name, and
            short ones that stand twice on average where none has.

    Raises:
        DataError: a given column does not exist, it is not clear which one is meant, or the columns are those of
            preferences.
    """
    text = None if text_column is None else given_column(table, text_column, named_by or "`text_column`")
    label = None if label_column is None else given_column(table, label_column, named_by or "`label_column`")
    if text is None:
        refuse_preferences(table)
        _refuse_lists_as_text(table)
    if label is None:
        free = [column for column in table.columns if column != text]
        if are_labels is not None:
            sample = _sample(table)
            free = [column for column in free if are_labels(sample[column])]
        label = find_column(free, names)
    text = text or find_column([column for column in table.columns if column != label], TEXT_NAMES)
    if text is None or label is None:
        text, label = _by_content(table, text, label, are_labels or _looks_like_labels)
    _refuse_same(table, text, [label])
    return text, label


def given_label_columns(
    table: Table, text_column: str | None, label_columns: Sequence[str], named_by: str | None
) -> tuple[str, tuple[str, ...]]:
    """The column of the text, and the several that are given for labels. Raises as ``find_label_columns``."""
    labels = tuple(given_column(table, column, named_by or "`label_columns`") for column in label_columns)
    if text_column is None:
        rest = [column for column in table.columns if column not in labels and plain_name(column) != "split"]
        text = find_column(rest, TEXT_NAMES)
        sample = _sample(table)
        looks = [text] if text else [column for column in rest if _looks_like_text(sample[column])]
        if len(looks) != 1:
            raise _cannot_tell(table, looks, labels[:1])
        text = looks[0]
    else:
        text = given_column(table, text_column, named_by or "`text_column`")
    _refuse_same(table, text, labels)
    return text, labels


def _refuse_same(table: Table, text: str, labels: Sequence[str]) -> None:
    if text in labels:
        raise DataError(
            f"{quoted(text)} is given as text and as label.",
            where=str(table.source),
            advice="Choose another `label_column`.",
        )


# Data of other kinds


def refuse_preferences(table: Table) -> None:
    """Raise a ``DataError`` for rows of a chosen and a rejected answer."""
    chosen, rejected = _columns_of(table, ("chosen", "rejected"))
    if chosen is None or rejected is None:
        _refuse_judged_answers(table)
        return
    prompt = find_column(table.columns, ("prompt", "question", "instruction", "input"))
    instead = f"rename {quoted(chosen)} to 'messages' and leave {quoted(rejected)} out"
    if not isinstance(table.rows[0].get(chosen), list):
        instead = template_for([prompt], chosen) if prompt else ""
        instead = f"give {instead}" if instead else "give a `prompt_template` and `completion_column`"
    raise DataError(
        f"preferences, a chosen and a rejected answer in each row ({quoted(chosen)}, {quoted(rejected)}), are not "
        "supported.",
        where=str(table.source),
        advice=f"To train on the chosen answers alone, {instead}.",
    )


def _refuse_judged_answers(table: Table) -> None:
    """The same for rows of an answer and whether it is a good one."""
    prompt, answer, good = _columns_of(table, ("prompt", "completion", "label"))
    if prompt and answer and good and isinstance(table.rows[0].get(good), bool):
        raise DataError(
            f"preferences, an answer and whether it is good ({quoted(answer)}, {quoted(good)}), are not supported.",
            where=str(table.source),
            advice=f"To train on the good ones, keep the rows whose {quoted(good)} is true, and leave the column out.",
        )


def _refuse_lists_as_text(table: Table) -> None:
    """Raise a ``DataError`` for words and tags in a file that holds no lists, such as csv."""
    words = find_column(table.columns, ("tokens", "words"))
    value = table.rows[0].get(words) if words else None
    if isinstance(value, str) and value.lstrip().startswith("["):
        raise DataError(
            f"the column {quoted(words)} holds lists written as text, such as {quoted(value)}.",
            where=str(table.source),
            advice="Save words and tags as .jsonl or .parquet, which hold lists, or as CoNLL text.",
        )


def _columns_of(table: Table, names: Sequence[str]) -> tuple[str | None, ...]:
    return tuple(find_column(table.columns, (name,)) for name in names)


# By content


def _sample(table: Table) -> dict[str, list[Any]]:
    """Of each column the values of some thousand rows."""
    rows = table.rows[:: max(1, len(table.rows) // 1000)]
    return {column: [row.get(column) for row in rows] for column in table.columns}


def label_sample(table: Table, column: str) -> list[Any]:
    """A column's values of some thousand rows."""
    return [row.get(column) for row in table.rows[:: max(1, len(table.rows) // 1000)]]


def _by_content(
    table: Table, text: str | None, label: str | None, are_labels: Callable[[list[Any]], bool]
) -> tuple[str, str]:
    sample = _sample(table)
    free = [column for column in table.columns if column not in (text, label) and plain_name(column) != "split"]
    texts = [text] if text else [column for column in free if _looks_like_text(sample[column])]
    labels = [label] if label else [column for column in free if are_labels(sample[column])]
    if len(labels) != 1:
        _refuse_one_column_a_label(table)
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


def yes_or_no_columns(table: Table) -> tuple[str, ...]:
    """The columns that hold 0 and 1 alone."""
    return tuple(column for column, values in _sample(table).items() if _is_yes_or_no(values))


def yes_or_no(value: object) -> bool | None:
    """Whether a value says that a row has its column's label; None for what is neither 0 nor 1."""
    text = value_as_text(value)
    text = None if text is None else text.casefold()
    return True if text in _YES else False if text in _NO else None


def refuse_one_hot(table: Table, columns: Sequence[str]) -> None:
    """Raise a ``DataError`` where each row has a 1 in one of the ``columns``."""
    marks = zip(*(map(yes_or_no, table.column(column)) for column in columns), strict=True)
    if all(sum(map(bool, row)) == 1 for row in marks):
        raise DataError(
            f"the columns {shorten(columns)} hold 0 or 1 each: each row has a 1 in one of them (one-hot). One column "
            "that names the label is read.",
            where=str(table.source),
            advice=f"Make one, in pandas: frame['label'] = frame[[{shorten(columns)}]].idxmax(axis=1). To read each as "
            "a label of its own, give `task=multi-label`; to learn to write the text, `task=generation`.",
        )


def _refuse_one_column_a_label(table: Table) -> None:
    columns = yes_or_no_columns(table)
    if len(columns) > 1:
        refuse_one_hot(table, columns)
        raise DataError(
            f"the columns {shorten(columns)} hold 0 or 1 each: rows may have several labels or none.",
            where=str(table.source),
            advice="To learn all of them, give `task=multi-label`; to train on one of them, `label_column`, such as "
            f"{quoted(columns[0])}.",
        )


def _is_yes_or_no(values: list[Any]) -> bool:
    marks = {yes_or_no(value) for value in values}
    return None not in marks and any(value_as_text(value) for value in values)


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
    if (turns := _conversations(table)) is not None:
        return DataError(
            f"the column {quoted(turns)} holds conversations, and no column a label.",
            where=str(table.source),
            advice="To learn to write the answers, name it 'messages' and give no other task.",
        )
    if not table.columns:
        return DataError("its first row is empty.", where=str(table.source), advice="Give rows with a text.")
    asked = [("text", "`text_column`", texts, TEXT_NAMES), ("label", "`label_column`", labels, LABEL_NAMES)]
    unknown = [(what, name, found or _near(table, names)) for what, name, found, names in asked if len(found) != 1]
    which = " and ".join(f"the {what}{f' ({_either(found)}?)' if found else ''}" for what, _, found in unknown)
    settings = " and ".join(name for _, name, _ in unknown)
    to_write = suggested_template(table)
    return DataError(
        f"it is not clear which column holds {which}. The columns are {shorten(table.columns)}.",
        where=str(table.source),
        advice=f"If this is text to write, give {to_write}; for labels give {settings}."
        if to_write
        else f"Give {settings}. A file without column names needs the line text,label at its top.",
    )


def _conversations(table: Table) -> str | None:
    """The column whose first value is a list of turns."""
    turns = {name: value[0] for name, value in table.rows[0].items() if isinstance(value, list) and value}
    found = (name for name, turn in turns.items() if isinstance(turn, dict) and turn.keys() & {"role", "from"})
    return next(found, None)


def _near(table: Table, names: Sequence[str]) -> list[str]:
    return [column for column in table.columns if did_you_mean(column, names)]


def _either(names: Sequence[str]) -> str:
    return " or ".join(map(quoted, names[:3]))
