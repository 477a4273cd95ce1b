"""Texts with a label each: find the two columns, check every row, and set rows aside for the test.

A row that cannot be used is an error and not a warning: training on an empty text or on the label ``nan`` would give a
number that looks like a result. Nothing is dropped or filled in here; the message names the rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from capotune.data.columns import part_of_each_row, unused_columns
from capotune.data.label_columns import find_label_columns
from capotune.data.label_values import label_text, one_spelling, refuse_no_classes, why_no_label
from capotune.data.readers import as_source, read_table
from capotune.data.split import hold_out, refuse_same_source, rows_to_score, split_as_marked, text_numbers
from capotune.data.table import Origin, Table
from capotune.data.wording import bad_rows, did_you_mean, quoted, shorten, type_name
from capotune.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["LabelledData", "LabelledText", "load_labelled", "read_labelled", "read_to_score", "with_known_labels"]


@dataclass(frozen=True)
class LabelledText:
    """Rows of one source; ``texts[i]`` has the label ``labels[i]`` and stands on line ``lines[i]`` of ``source``."""

    texts: list[str]
    labels: list[str]
    lines: list[int]
    source: Origin
    text_column: str
    label_column: str
    unused: tuple[str, ...] = ()
    """Columns that are not read."""

    def __len__(self) -> int:
        return len(self.texts)

    def where(self, row: int) -> str:
        """Where a row stands, as messages name it."""
        return self.source.at(self.lines[row])

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> LabelledText:
        """The rows at ``indices``, in that order."""
        indices = indices if isinstance(indices, list) else np.asarray(indices, dtype=np.int64).tolist()
        return replace(
            self,
            texts=[self.texts[index] for index in indices],
            labels=[self.labels[index] for index in indices],
            lines=[self.lines[index] for index in indices],
        )

    def respelled(self, spelling: Mapping[str, str]) -> LabelledText:
        """The same rows with other names for some labels."""
        return replace(self, labels=[spelling.get(label, label) for label in self.labels]) if spelling else self


@dataclass(frozen=True)
class LabelledData:
    """What to train on and what to test on. ``test_from`` says in words where the test rows are from."""

    train: LabelledText
    test: LabelledText
    test_from: str = "given"
    respelled: dict[str, str] = field(default_factory=dict)
    """Labels that were read as another one, which is the same in another spelling (``label_values.one_spelling``)."""

    @property
    def label_names(self) -> list[str]:
        """The labels of the training rows, each once: by number when all are whole numbers, else by letter."""
        names = sorted(set(self.train.labels))
        return sorted(names, key=int) if all(map(_is_whole_number, names)) else names


def load_labelled(
    data: object,
    *,
    test: object = None,
    text_column: str | None = None,
    label_column: str | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> LabelledData:
    """Read labelled texts to train on and to test on.

    The test rows are those of ``test``; without it those that a column ``split`` marks as test (``validation`` counts
    as train); without that column a part of ``data``, held out by ``hold_out`` so that equal texts stay together.

    Args:
        data: a file, a hub dataset or rows in memory, as ``read_table`` takes it.
        test: a second one with the same columns, to test on.
        text_column: the column to read, found by its name or content when not given.
        label_column: the column to predict, found likewise.
        test_fraction: the part to hold out when the data has no test rows; 0 holds none out.
        seed: decides which rows are held out; the same seed and data give the same rows.

    Labels that differ only in how a number or a truth value is written are one (``respelled``).

    Raises:
        DataError: a source cannot be read, a row has no text or no label, there is one label only, the labels are
            several in one, numbers with fractions or texts, a label is in the test rows alone, ``test`` is the same
            file as ``data``, or no row can be held out.
        SettingError: ``test_fraction`` is out of range.
    """
    data, test = as_source(data), None if test is None else as_source(test, "test")
    if test is not None:
        refuse_same_source(data, test)
    rows, parts = _read(data, text_column, label_column)
    second = None if test is None else _read(test, rows.text_column, rows.label_column, named_by=str(rows.source))
    spelling = one_spelling({*rows.labels, *(second[0].labels if second else ())})
    rows = rows.respelled(spelling)
    refuse_no_classes(rows.labels, rows.text_column, rows.label_column, str(rows.source))
    if second is not None:
        second = second[0].respelled(spelling), second[1]
    if marked := split_as_marked(rows, parts, second):
        split = LabelledData(*marked)
    elif test_fraction == 0:
        split = LabelledData(rows, rows.take([]), "none asked for")
    else:
        split = _split_by_seed(rows, test_fraction, seed)
    _check_labels(split)
    return replace(split, respelled=spelling)


def read_labelled(source: object, *, text_column: str | None = None, label_column: str | None = None) -> LabelledText:
    """Read one source and check every row.

    A column is found by its name (``text``, ``sentence``, ``message`` …; ``label``, ``category``, ``intent`` …; as it
    is written, then in any case), else by its content where only one column can be meant. Labels are text or numbers:
    ``1.0`` becomes ``"1"`` and ``true`` ``"true"``; space around a text label is removed. Texts are kept as they are.

    Raises:
        DataError: the source cannot be read, the columns are not found, or a row has no text or no label.
    """
    return _read(source, text_column, label_column)[0]


def read_to_score(source: object, *, text_column: str | None = None, label_column: str | None = None) -> LabelledText:
    """Rows to score a trained adapter on: those that a column ``split`` marks as test, else all of them.

    Raises:
        DataError: as ``read_labelled``.
    """
    return rows_to_score(*_read(source, text_column, label_column))


def with_known_labels(rows: LabelledText, known: Sequence[str]) -> LabelledText:
    """The rows with each label as ``known`` spells it; one that it does not hold stays as it is."""
    return rows.respelled(one_spelling(set(rows.labels), known))


def _read(
    source: object, text_column: str | None, label_column: str | None, named_by: str | None = None
) -> tuple[LabelledText, list[str]]:
    """The rows, and for each one ``train`` or ``test`` as the column ``split`` says (empty without that column)."""
    table = read_table(source)
    text, label = find_label_columns(table, text_column, label_column, named_by)
    rows = replace(_check_rows(table, text, label), unused=unused_columns(table, (text, label)))
    return rows, part_of_each_row(table, (text, label))


# Rows


def _check_rows(table: Table, text_column: str, label_column: str) -> LabelledText:
    texts, values = table.column(text_column), table.column(label_column)
    labels = _label_texts(values)
    bad = {
        line: problem
        for line, text, value, label in zip(table.lines, texts, values, labels, strict=True)
        if (problem := _problem(text, value, label, text_column, label_column))
    }
    if bad:
        rows = "1 row" if len(bad) == 1 else f"{len(bad):,} of {len(texts):,} rows"
        advice = "Fill these in or delete the rows."
        if len(bad) > len(texts) / 2:
            advice += f" Or is another column meant? {shorten(table.columns)} (`text_column`, `label_column`)"
        raise bad_rows(table.source, f"{rows} cannot be used", bad, advice)
    return LabelledText(texts, [label or "" for label in labels], table.lines, table.source, text_column, label_column)


def _label_texts(values: list[Any]) -> list[str | None]:
    """Each label as text; that of values which are the same text is worked out once."""
    known: dict[str, str | None] = {}
    found = []
    for value in values:
        if not isinstance(value, str):
            found.append(label_text(value))
        elif value in known:
            found.append(known[value])
        else:
            found.append(known.setdefault(value, label_text(value)))
    return found


def _problem(text: Any, value: Any, label: str | None, text_column: str, label_column: str) -> str | None:
    if label and isinstance(text, str) and text.strip():
        return None
    problems = []
    if text is None or (isinstance(text, str) and not text.strip()):
        problems.append(f"empty text ({text_column})")
    elif not isinstance(text, str):
        problems.append(f"text ({text_column}) is {type_name(text)}, not a string")
    if label is None:
        problems.append(why_no_label(value, label_column))
    elif not label:
        problems.append(f"missing label ({label_column})")
    return " and ".join(problems) or None


# Train and test


def _split_by_seed(rows: LabelledText, fraction: float, seed: int) -> LabelledData:
    codes = {name: code for code, name in enumerate(sorted(set(rows.labels)))}
    _refuse_one_label(rows)
    try:
        train, test = hold_out([codes[label] for label in rows.labels], fraction, seed, text_numbers(rows.texts))
    except DataError as error:
        advice = f"{error.advice} Or give rows to test on (`test`)."
        raise DataError(error.problem, where=str(rows.source), advice=advice) from error
    return LabelledData(rows.take(train), rows.take(test), f"{fraction:.0%} of the rows, stratified, seed {seed}")


def _check_labels(data: LabelledData) -> None:
    _refuse_one_label(data.train)
    known = set(data.train.labels)
    unknown = {
        line: quoted(label) for line, label in zip(data.test.lines, data.test.labels, strict=True) if label not in known
    }
    if unknown:
        names = list(Counter(label for label in data.test.labels if label not in known))
        near = "".join(did_you_mean(name, sorted(known)) for name in names[:1])
        summary = f"test rows have labels that no training row has ({len(names)} of them)"
        advice = f"{near}Add training rows with the label {shorten(names)}, or correct these rows."
        raise bad_rows(data.test.source, summary, unknown, advice)


def _refuse_one_label(rows: LabelledText) -> None:
    if len(set(rows.labels)) == 1:
        raise DataError(
            f"all {len(rows):,} training rows have one label, {quoted(rows.labels[0])} (column "
            f"{quoted(rows.label_column)}); at least two are needed.",
            where=str(rows.source),
            advice="Add rows, or choose another `label_column`.",
        )


def _is_whole_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal() and len(name) < 20
