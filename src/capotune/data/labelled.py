"""Texts with a label each: find the columns, check every row, and set rows aside for the test.

What a label is (a class, several labels, numbers) is a ``LabelReading``'s; each kind has a module of its own.

A row that cannot be used is an error and not a warning: training on an empty text or on the label ``nan`` would give a
number that looks like a result. Nothing is dropped or filled in here; the message names the rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from capotune.data.columns import part_of_each_row, unused_columns
from capotune.data.readers import as_source, read_table
from capotune.data.split import hold_out, refuse_same_source, rows_to_score, split_as_marked, text_numbers
from capotune.data.table import Origin, Table
from capotune.data.text_columns import Text, find_pair, without_column
from capotune.data.wording import bad_rows, did_you_mean, quoted, shorten, type_name
from capotune.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["LabelReading", "LabelledData", "LabelledText"]

Label = TypeVar("Label")
"""What a row is labelled with: a class's name, several names, numbers."""


@dataclass(frozen=True)
class LabelledText(Generic[Label]):
    """Rows of one source; ``texts[i]`` has the label ``labels[i]`` and stands on line ``lines[i]`` of ``source``."""

    texts: list[Text]
    """Of each row one text, or of each two that are read together."""
    labels: list[Label]
    lines: Sequence[int]
    source: Origin
    text_column: str
    label_columns: tuple[str, ...]
    unused: tuple[str, ...] = ()
    """Columns that are not read."""
    second_column: str | None = None
    """Where texts are pairs, the column of the second ones; ``text_column`` is that of the first."""
    form: str = ""
    """How a label is written, where its kind knows several ways (``LabelReading.form``)."""

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def pair_columns(self) -> tuple[str, str] | None:
        """The columns of first and second texts; None where a row has one text."""
        return None if self.second_column is None else (self.text_column, self.second_column)

    @property
    def label_column(self) -> str:
        """The column of the label; of several their names."""
        return ", ".join(self.label_columns)

    def where(self, row: int) -> str:
        """Where a row stands, as messages name it."""
        return self.source.at(self.lines[row])

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> LabelledText[Label]:
        """The rows at ``indices``, in that order."""
        indices = indices if isinstance(indices, list) else np.asarray(indices, dtype=np.int64).tolist()
        return replace(
            self,
            texts=[self.texts[index] for index in indices],
            labels=[self.labels[index] for index in indices],
            lines=[self.lines[index] for index in indices],
        )


@dataclass(frozen=True)
class LabelledData(Generic[Label]):
    """What to train on and what to test on. ``test_from`` says in words where the test rows are from."""

    train: LabelledText[Label]
    test: LabelledText[Label]
    test_from: str = "given"
    respelled: dict[str, str] = field(default_factory=dict)
    """Labels that were read as another one, which is the same in another spelling (``label_values.one_spelling``)."""


class LabelReading(ABC, Generic[Label]):
    """How labels of one kind are read, and what rows with them must be."""

    # ------------------------------------------------------------------------------------------- what each kind says

    @abstractmethod
    def find(
        self, table: Table, text_column: str | None, label_columns: Sequence[str], named_by: str | None
    ) -> tuple[str, tuple[str, ...]]:
        """The columns of text and label. Those that are not given are found by their names (``text``, ``sentence``,
        ``message`` …; ``label``, ``category``, ``intent`` …; as it is written, then in any case), else by content where
        one alone can be meant; ``named_by`` names the source that the given ones are from. Raises ``DataError``."""

    def form(self, table: Table, columns: Sequence[str]) -> str:  # noqa: ARG002
        """How labels are written, as the first source shows; a second one is read in the same way."""
        return ""

    @abstractmethod
    def labels(self, table: Table, columns: Sequence[str], form: str) -> list[Label | None]:
        """Of each row its label; None where it has none that can be used."""

    @abstractmethod
    def why_none(self, values: Sequence[Any], columns: Sequence[str]) -> str:
        """Why a row with these values in ``columns`` has no label, in a few words."""

    def settled(
        self, rows: LabelledText[Label], test: LabelledText[Label] | None
    ) -> tuple[LabelledText[Label], LabelledText[Label] | None, dict[str, str]]:
        """All rows, and those of a second source, with each label in one spelling; and what was respelled.

        Raises ``DataError`` for labels that are of another kind.
        """
        return rows, test, {}

    def names(self, label: Label) -> Sequence[str]:  # noqa: ARG002
        """What a label consists of that must be known from training; by default nothing."""
        return ()

    def strata(self, labels: Sequence[Label]) -> list[int]:
        """A number for each label; of rows with each the same part is held out."""
        return [0] * len(labels)

    def check_train(self, rows: LabelledText[Label]) -> None:
        """``DataError`` for rows to train on that nothing can be learned from."""

    # ------------------------------------------------------------------------------------------------ what all share

    def load(
        self,
        data: object,
        *,
        test: object = None,
        text_column: str | None = None,
        label_column: str | None = None,
        label_columns: Sequence[str] | None = None,
        pair_columns: tuple[str, str] | None = None,
        test_fraction: float = 0.2,
        seed: int = 0,
    ) -> LabelledData[Label]:
        """Read labelled texts to train on and to test on.

        The test rows are those of ``test``; without it those that a column ``split`` marks as test (``validation``
        counts as train); without that column a part of ``data``, held out by ``hold_out`` so that equal texts stay
        together.

        Args:
            data: a file, a hub dataset or rows in memory, as ``read_table`` takes it.
            test: a second one with the same columns, to test on.
            text_column: the column to read, found by its name or content when not given.
            label_column: the column to predict, found likewise.
            label_columns: several of them.
            pair_columns: two columns of texts that are read together, found by their names when no text column is
                given.
            test_fraction: the part to hold out when the data has no test rows; 0 holds none out.
            seed: decides which rows are held out; the same seed and data give the same rows.

        Raises:
            DataError: a source cannot be read, a row has no text or no label, there is one label only, the labels are
                of another kind, a label is in the test rows alone, ``test`` is the same file as ``data``, or no row can
                be held out.
            SettingError: ``test_fraction`` is out of range.
        """
        data, test = as_source(data), None if test is None else as_source(test, "test")
        if test is not None:
            refuse_same_source(data, test)
        rows, parts = self._read(data, (text_column, pair_columns), label_columns or given(label_column))
        second = None
        if test is not None:
            columns = (None, rows.pair_columns) if rows.pair_columns else (rows.text_column, None)
            second = self._read(test, columns, rows.label_columns, rows.form, named_by=str(rows.source))
        rows, test_rows, respelled = self.settled(rows, second[0] if second else None)
        if second is not None and test_rows is not None:
            second = test_rows, second[1]
        if marked := split_as_marked(rows, parts, second):
            split = LabelledData(*marked)
        elif test_fraction == 0:
            split = LabelledData(rows, rows.take([]), "none asked for")
        else:
            split = self._split_by_seed(rows, test_fraction, seed)
        self.check_train(split.train)
        self._check_known(split.train, split.test)
        return replace(split, respelled=respelled)

    def read(
        self,
        source: object,
        *,
        text_column: str | None = None,
        label_column: str | None = None,
        label_columns: Sequence[str] | None = None,
        pair_columns: tuple[str, str] | None = None,
    ) -> LabelledText[Label]:
        """Read one source and check every row; texts stay as they are.

        Raises:
            DataError: the source cannot be read, the columns are not found, or a row has no text or no label.
        """
        return self._read(source, (text_column, pair_columns), label_columns or given(label_column))[0]

    def read_to_score(
        self,
        source: object,
        *,
        text_column: str | None = None,
        label_column: str | None = None,
        label_columns: Sequence[str] | None = None,
        pair_columns: tuple[str, str] | None = None,
        form: str | None = None,
    ) -> LabelledText[Label]:
        """Rows to score a trained adapter on: those that a column ``split`` marks as test, else all of them. ``form``
        is that of the training rows; None: as the rows show.

        Raises:
            DataError: as ``read``.
        """
        columns = text_column, pair_columns
        return rows_to_score(*self._read(source, columns, label_columns or given(label_column), form))

    def _read(
        self,
        source: object,
        text_columns: tuple[str | None, tuple[str, str] | None],
        label_columns: Sequence[str],
        form: str | None = None,
        named_by: str | None = None,
    ) -> tuple[LabelledText[Label], list[str]]:
        """The rows, and for each one ``train`` or ``test`` as the column ``split`` says (empty without that column).

        ``text_columns`` are the column of the text and those of two texts, as far as they are given; ``form`` is None
        where the table itself shows it.
        """
        table = read_table(source)
        pair = find_pair(table, *text_columns, named_by)
        if pair is None:
            text, labels = self.find(table, text_columns[0], label_columns, named_by)
            texts: tuple[str, ...] = (text,)
        else:
            _, labels = self.find(without_column(table, pair[1]), pair[0], label_columns, named_by)
            texts = pair
        form = self.form(table, labels) if form is None else form
        rows, read = self._checked(table, texts, labels, form), (*texts, *labels)
        return replace(rows, unused=unused_columns(table, read), form=form), part_of_each_row(table, read)

    def _checked(
        self, table: Table, text_columns: tuple[str, ...], columns: tuple[str, ...], form: str
    ) -> LabelledText[Label]:
        each, found = [table.column(name) for name in text_columns], self.labels(table, columns, form)
        unusable = {row for row, label in enumerate(found) if label is None}
        for of_column in each:
            unusable |= {row for row, text in enumerate(of_column) if not isinstance(text, str) or not text.strip()}
        if unusable:
            bad = {
                table.lines[row]: self._problem(table, row, text_columns, columns, found[row])
                for row in sorted(unusable)
            }
            rows = "1 row" if len(bad) == 1 else f"{len(bad):,} of {len(found):,} rows"
            advice = "Fill these in or delete the rows."
            if len(bad) > len(found) / 2:
                advice += f" Or is another column meant? {shorten(table.columns)} (`text_column`, `label_column`)"
            raise bad_rows(table.source, f"{rows} cannot be used", bad, advice)
        labels = [label for label in found if label is not None]
        texts: list[Text] = each[0] if len(each) == 1 else list(zip(*each, strict=True))
        second = text_columns[1] if len(text_columns) > 1 else None
        return LabelledText(texts, labels, table.lines, table.source, text_columns[0], columns, second_column=second)

    def _problem(
        self, table: Table, row: int, text_columns: tuple[str, ...], columns: tuple[str, ...], label: Label | None
    ) -> str:
        values = table.rows[row]
        problems = []
        for name in text_columns:
            text = values.get(name)
            if text is None or (isinstance(text, str) and not text.strip()):
                problems.append(f"empty text ({name})")
            elif not isinstance(text, str):
                problems.append(f"text ({name}) is {type_name(text)}, not a string")
        if label is None:
            problems.append(self.why_none([values.get(column) for column in columns], columns))
        return " and ".join(problems)

    def _check_known(self, train: LabelledText[Label], test: LabelledText[Label]) -> None:
        known = {name for label in train.labels for name in self.names(label)}
        unknown: dict[int, str] = {}
        names: list[str] = []
        for line, label in zip(test.lines, test.labels, strict=True):
            new = [name for name in self.names(label) if name not in known]
            if new:
                unknown[line] = ", ".join(map(quoted, new))
                names += new
        if unknown:
            names = list(dict.fromkeys(names))
            summary = f"test rows have labels that no training row has ({len(names)} of them)"
            near = did_you_mean(names[0], sorted(known))
            advice = f"{near}Add training rows with the label {shorten(names)}, or correct these rows."
            raise bad_rows(test.source, summary, unknown, advice)

    def _split_by_seed(self, rows: LabelledText[Label], fraction: float, seed: int) -> LabelledData[Label]:
        self.check_train(rows)
        try:
            train, test = hold_out(self.strata(rows.labels), fraction, seed, text_numbers(rows.texts))
        except DataError as error:
            advice = f"{error.advice} Or give rows to test on (`test`)."
            raise DataError(error.problem, where=str(rows.source), advice=advice) from error
        return LabelledData(rows.take(train), rows.take(test), f"{fraction:.0%} of the rows, stratified, seed {seed}")


def given(label_column: str | None) -> tuple[str, ...]:
    """The one column that is given, or none."""
    return () if label_column is None else (label_column,)
