"""Texts with a label each: find the two columns, check every row, and set rows aside for the test.

A row that cannot be used is an error and not a warning: training on an empty text or on the label ``nan`` would give a
number that looks like a result. Nothing is dropped or filled in here; the message names the lines.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from capotune.data.records import Records, describe_bad_lines, did_you_mean, is_hub_id, read_records, shorten
from capotune.errors import DataError, SettingError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "LabelledData",
    "LabelledText",
    "find_column",
    "given_column",
    "has_label_column",
    "hold_out",
    "load_labelled",
    "normalised",
    "read_labelled",
    "read_parts",
    "read_to_score",
    "refuse_same_source",
    "rows_of_part",
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


@dataclass(frozen=True)
class LabelledText:
    """Rows of one source; ``texts[i]`` has the label ``labels[i]`` and stands on line ``lines[i]`` of ``source``."""

    texts: list[str]
    labels: list[str]
    lines: list[int]
    source: str
    text_column: str
    label_column: str

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> LabelledText:
        """The rows at ``indices``, in that order."""
        return LabelledText(
            [self.texts[index] for index in indices],
            [self.labels[index] for index in indices],
            [self.lines[index] for index in indices],
            self.source,
            self.text_column,
            self.label_column,
        )


@dataclass(frozen=True)
class LabelledData:
    """What to train on and what to test on. ``test_from`` says in words where the test rows are from."""

    train: LabelledText
    test: LabelledText
    test_from: str = "given"

    @property
    def label_names(self) -> list[str]:
        """The labels of the training rows, each once: by number when all are whole numbers, else by letter."""
        names = sorted(set(self.train.labels))
        return sorted(names, key=int) if all(map(_is_whole_number, names)) else names


def load_labelled(
    data: str,
    *,
    test: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> LabelledData:
    """Read labelled texts to train on and to test on.

    The test rows are those of ``test``; without it those that a column ``split`` marks as test (``validation`` counts
    as train); without that column a part of ``data``, held out by ``hold_out`` so that equal texts stay together.

    Args:
        data: a file or hub dataset, as ``read_records`` takes it.
        test: a second one with the same columns, to test on.
        text_column: the column to read, found by its name or content when not given.
        label_column: the column to predict, found likewise.
        test_fraction: the part to hold out when the data has no test rows; 0 holds none out.
        seed: decides which rows are held out; the same seed and data give the same rows.

    Raises:
        DataError: a source cannot be read, a row has no text or no label, there is one label only, a label is in the
            test rows alone, ``test`` is the same file as ``data``, or no row can be held out.
        SettingError: ``test_fraction`` is out of range.
    """
    if test is not None:
        refuse_same_source(data, test)
    rows, parts = _read(data, text_column, label_column)
    if test is not None:
        test_rows, test_parts = _read(test, rows.text_column, rows.label_column, named_by=data)
        split = LabelledData(_part(rows, parts, "train"), _part(test_rows, test_parts, "test"), test)
    elif "test" in parts:
        split = LabelledData(_part(rows, parts, "train"), _part(rows, parts, "test"), "the column 'split'")
    elif test_fraction == 0:
        split = LabelledData(rows, rows.take([]), "none asked for")
    else:
        split = _split_by_seed(rows, test_fraction, seed)
    _check_labels(split)
    return split


def read_labelled(source: str, *, text_column: str | None = None, label_column: str | None = None) -> LabelledText:
    """Read one source and check every row.

    A column is found by its name (``text``, ``sentence``, ``message`` …; ``label``, ``category``, ``intent`` …; as it
    is written, then in any case), else by its content where only one column can be meant. Labels are text or numbers:
    ``1.0`` becomes ``"1"`` and ``true`` ``"true"``; space around a text label is removed. Texts are kept as they are.

    Raises:
        DataError: the source cannot be read, the columns are not found, or a row has no text or no label.
    """
    return _read(source, text_column, label_column)[0]


def read_to_score(source: str, *, text_column: str | None = None, label_column: str | None = None) -> LabelledText:
    """Rows to score a trained adapter on: those that a column ``split`` marks as test, else all of them.

    Raises:
        DataError: as ``read_labelled``.
    """
    rows, parts = _read(source, text_column, label_column)
    return _part(rows, parts, "test") if "test" in parts else rows


def _read(
    source: str, text_column: str | None, label_column: str | None, named_by: str | None = None
) -> tuple[LabelledText, list[str]]:
    """The rows, and for each one ``train`` or ``test`` as the column ``split`` says (empty without that column)."""
    records = read_records(source)
    text, label = _find_columns(records, text_column, label_column, named_by)
    split = next((name for name in records.columns if name.lower() == "split" and name not in (text, label)), None)
    return _check_rows(records, text, label), read_parts(records, split) if split is not None else []


# Columns


def has_label_column(records: Records) -> bool:
    """Whether ``load_labelled`` would find a text and a label in these rows by itself."""
    try:
        _find_columns(records, None, None, None)
    except DataError:
        return False
    return True


def _find_columns(
    records: Records, text_column: str | None, label_column: str | None, named_by: str | None
) -> tuple[str, str]:
    text = None if text_column is None else given_column(records, text_column, named_by or "--text-column")
    label = None if label_column is None else given_column(records, label_column, named_by or "--label-column")
    label = label or _by_name(records, LABEL_NAMES, but=text)
    text = text or _by_name(records, TEXT_NAMES, but=label)
    if text is None or label is None:
        text, label = _by_content(records, text, label)
    if text == label:
        raise DataError(f"{records.source}: {text!r} is given as text and as label. Choose another --label-column.")
    return text, label


def given_column(records: Records, name: str, named_by: str) -> str:
    """The column of that name, as it is written or in another case; ``named_by`` is the flag or file that names it.

    Raises:
        DataError: there is no such column.
    """
    if name in records.columns:
        return name
    same = [column for column in records.columns if column.lower() == name.strip().lower()]
    if len(same) == 1:
        return same[0]
    near = did_you_mean(name, records.columns)
    raise DataError(
        f"{records.source}: no column {name!r}, which {named_by} names. {near}"
        f"The columns are {shorten(records.columns)}; rename one or choose another."
    )


def _by_name(records: Records, names: Sequence[str], but: str | None) -> str | None:
    return find_column([column for column in records.columns if column != but], names)


def find_column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The column that has one of ``names``, the first of them first; one in another case comes after those."""
    exact = [name for name in names if name in columns]
    in_any_case = [column for name in names for column in columns if column.lower() == name]
    return next(iter(exact + in_any_case), None)


def _by_content(records: Records, text: str | None, label: str | None) -> tuple[str, str]:
    step = max(1, len(records.rows) // 1000)
    sample = {column: [row.get(column) for row in records.rows[::step]] for column in records.columns}
    free = [column for column in records.columns if column not in (text, label) and column.lower() != "split"]
    texts = [text] if text else [column for column in free if _looks_like_text(sample[column])]
    labels = [label] if label else [column for column in free if _looks_like_labels(sample[column])]
    if len(texts) != 1 or len(labels) != 1:
        raise DataError(_cannot_tell(records, texts, labels))
    if _looks_like_a_row(texts[0]) or labels[0] in map(value_as_text, sample[labels[0]]):
        raise DataError(
            f"{records.source}:1: the first line looks like data, not like column names: {shorten(records.columns)}. "
            "Write the line text,label above it; if these are names, give --text-column and --label-column."
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


def _cannot_tell(records: Records, texts: Sequence[str], labels: Sequence[str]) -> str:
    asked = [("text", "--text-column", texts, TEXT_NAMES), ("label", "--label-column", labels, LABEL_NAMES)]
    unknown = [(what, flag, found or _near(records, names)) for what, flag, found, names in asked if len(found) != 1]
    which = " and ".join(f"the {what}{f' ({_either(found)}?)' if found else ''}" for what, _, found in unknown)
    flags = " and ".join(flag for _, flag, _ in unknown)
    return (
        f"{records.source}: it is not clear which column holds {which}. The columns are {shorten(records.columns)}. "
        f"Give {flags}. A file without column names needs the line text,label at its top."
    )


def _near(records: Records, names: Sequence[str]) -> list[str]:
    return [column for column in records.columns if did_you_mean(column, names)]


def _either(names: Sequence[str]) -> str:
    return " or ".join(map(repr, names[:3]))


# Rows


def _check_rows(records: Records, text_column: str, label_column: str) -> LabelledText:
    texts: list[Any] = [row.get(text_column) for row in records.rows]
    labels = [value_as_text(row.get(label_column)) for row in records.rows]
    bad = {
        line: problem
        for line, text, label in zip(records.lines, texts, labels, strict=True)
        if (problem := _problem(text, label, text_column, label_column))
    }
    if bad:
        rows = "1 row" if len(bad) == 1 else f"{len(bad):,} of {len(texts):,} rows"
        advice = "Fill these in or delete the lines."
        if len(bad) > len(texts) / 2:
            advice += f" Or is another column meant? {shorten(records.columns)} (--text-column, --label-column)"
        raise DataError(describe_bad_lines(records.source, f"{rows} cannot be used", bad, advice))
    return LabelledText(
        texts, [label or "" for label in labels], records.lines, records.source, text_column, label_column
    )


def _problem(text: object, label: str | None, text_column: str, label_column: str) -> str | None:
    problems = []
    if text is None or (isinstance(text, str) and not text.strip()):
        problems.append(f"empty text ({text_column})")
    elif not isinstance(text, str):
        problems.append(f"text ({text_column}) is {type(text).__name__}, not a string")
    if label is None:
        problems.append(f"label ({label_column}) is neither text nor a number")
    elif not label:
        problems.append(f"missing label ({label_column})")
    return " and ".join(problems) or None


def value_as_text(value: object) -> str | None:
    """A label or another short value as text, ``""`` when it is missing, None when it is neither text nor a number."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    return str(value).strip() if isinstance(value, str | int) else None


def read_parts(records: Records, column: str) -> list[str]:
    """For each row ``train`` or ``test``, as a column ``split`` says; validation counts as train.

    Raises:
        DataError: the column holds something else; names the lines.
    """
    parts = [PARTS.get(str(row.get(column)).strip().lower(), "") for row in records.rows]
    bad = {
        line: f"{column} is {row.get(column)!r}"
        for line, row, part in zip(records.lines, records.rows, parts, strict=True)
        if not part
    }
    if bad:
        advice = f"Allowed: train, validation, test. If {column!r} means something else, give the column another name."
        if is_hub_id(records.source):
            advice = "Choose one split for each: owner/name:train, and --test owner/name:test."
        raise DataError(describe_bad_lines(records.source, "the column 'split' is not clear", bad, advice))
    return parts


# Train and test


def _part(rows: LabelledText, parts: list[str], wanted: str) -> LabelledText:
    return rows.take(rows_of_part(rows.source, parts, wanted)) if parts else rows


def rows_of_part(source: str, parts: Sequence[str], wanted: str) -> list[int]:
    """The rows whose part is ``wanted``.

    Raises:
        DataError: there is none.
    """
    chosen = [index for index, part in enumerate(parts) if part == wanted]
    if not chosen:
        raise DataError(f"{source}: the column 'split' marks no row as {wanted}. Mark some, or remove the column.")
    return chosen


def refuse_same_source(data: str, test: str) -> None:
    """Raise a ``DataError`` when both are one file, under whatever name."""
    paths = os.path.expanduser(data), os.path.expanduser(test)  # noqa: PTH111
    if data == test or (all(map(os.path.exists, paths)) and os.path.samefile(*paths)):  # noqa: PTH121
        raise DataError(
            f"{test}: is given as test data (--test) and as training data (--data), so the score would mean nothing. "
            "Give another file, or leave --test out: a part of the data is then held out."
        )


def _split_by_seed(rows: LabelledText, fraction: float, seed: int) -> LabelledData:
    codes = {name: code for code, name in enumerate(sorted(set(rows.labels)))}
    _refuse_one_label(rows)
    try:
        train, test = hold_out(
            [codes[label] for label in rows.labels], fraction, seed, groups=[normalised(text) for text in rows.texts]
        )
    except DataError as error:
        raise DataError(f"{rows.source}: {error} Or give a file to test on (--test).") from error
    return LabelledData(rows.take(train), rows.take(test), f"{fraction:.0%} of the rows, stratified, seed {seed}")


def hold_out(
    labels: Sequence[int], fraction: float, seed: int, groups: Sequence[Hashable] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose rows to hold out, of each label the same part as near as whole rows allow.

    Each label keeps at least one row to train on, so a label with a single row is never held out. Rows of one group
    (say, equal texts) stay together; a group whose rows differ in label is trained on, as no answer to it is right.

    Args:
        labels: a number for each row.
        fraction: the part to hold out, between 0 and 1.
        seed: the same labels, groups and seed give the same rows.
        groups: for each row the group it belongs to; without it each row is its own.

    Returns:
        The row numbers to train on and those held out, both ascending.

    Raises:
        DataError: no label has two groups, so nothing can be held out.
        SettingError: ``fraction`` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise SettingError(
            f"The fraction to hold out is {fraction}. Allowed: more than 0 and less than 1, such as 0.2."
        )
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(range(len(labels)) if groups is None else groups):
        members.setdefault(group, []).append(row)
    units: dict[int, list[list[int]]] = {}
    for rows in members.values():
        if len({labels[row] for row in rows}) == 1:
            units.setdefault(labels[rows[0]], []).append(rows)
    if all(len(of_label) < 2 for of_label in units.values()):
        raise DataError("nothing can be held out, as no label has two different texts. Add rows.")
    rng = np.random.default_rng(seed)
    quotas = _quotas([len(of_label) for of_label in units.values()], fraction, rng)
    held = [
        row
        for of_label, quota in zip(units.values(), quotas, strict=True)
        for chosen in rng.permutation(len(of_label))[:quota]
        for row in of_label[chosen]
    ]
    is_held = np.zeros(len(labels), dtype=bool)
    is_held[held] = True
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def _quotas(sizes: Sequence[int], fraction: float, rng: np.random.Generator) -> list[int]:
    """How many of each size to take: rounded down, then one more where most was lost, until the sum is right."""
    exact = [size * fraction for size in sizes]
    quotas = [int(share) for share in exact]
    missing = max(1, round(sum(exact))) - sum(quotas)
    lost = rng.permutation(len(sizes)).tolist()
    lost.sort(key=lambda index: quotas[index] - exact[index])
    for index in [index for index in lost if quotas[index] + 1 < sizes[index]][: max(0, missing)]:
        quotas[index] += 1
    return quotas


def normalised(text: str) -> str:
    """``text`` as it is compared: without regard to case and to the amount of space."""
    return " ".join(text.casefold().split())


def _check_labels(data: LabelledData) -> None:
    _refuse_one_label(data.train)
    known = set(data.train.labels)
    unknown = {
        line: f"{label!r}" for line, label in zip(data.test.lines, data.test.labels, strict=True) if label not in known
    }
    if unknown:
        names = list(Counter(label for label in data.test.labels if label not in known))
        near = "".join(did_you_mean(name, sorted(known)) for name in names[:1])
        summary = f"test rows have labels that no training row has ({len(names)} of them)"
        advice = f"{near}Add training rows with the label {shorten(names)}, or correct these lines."
        raise DataError(describe_bad_lines(data.test.source, summary, unknown, advice))


def _refuse_one_label(rows: LabelledText) -> None:
    if len(set(rows.labels)) == 1:
        raise DataError(
            f"{rows.source}: all {len(rows):,} training rows have one label, {rows.labels[0]!r} (column "
            f"{rows.label_column!r}); at least two are needed. Add rows, or choose another --label-column."
        )


def _is_whole_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal() and len(name) < 20
