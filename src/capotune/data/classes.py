"""One label a text: its class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from capotune.data.label_columns import find_label_columns
from capotune.data.label_values import label_text, one_spelling, refuse_no_classes, why_no_label
from capotune.data.labelled import LabelledText, LabelReading
from capotune.data.table import Table
from capotune.data.wording import quoted
from capotune.errors import DataError

__all__ = ["CLASSES", "class_names", "with_known_labels"]


class Classes(LabelReading[str]):
    """A text or number in one column. ``1.0`` becomes ``"1"`` and ``true`` ``"true"``; space around it is removed.

    Labels that differ only in how a number or a truth value is written are one.
    """

    def find(
        self, table: Table, text_column: str | None, label_columns: Sequence[str], named_by: str | None
    ) -> tuple[str, tuple[str, ...]]:
        """Two columns."""
        text, label = find_label_columns(table, text_column, next(iter(label_columns), None), named_by)
        return text, (label,)

    def labels(self, table: Table, columns: Sequence[str], form: str) -> list[str | None]:  # noqa: ARG002
        """Each label as text; that of values which are the same text is worked out once."""
        known: dict[str, str | None] = {}
        found: list[str | None] = []
        for value in table.column(columns[0]):
            if not isinstance(value, str):
                found.append(label_text(value) or None)
            elif value in known:
                found.append(known[value])
            else:
                found.append(known.setdefault(value, label_text(value) or None))
        return found

    def why_none(self, values: Sequence[Any], columns: Sequence[str]) -> str:
        """An empty value, or one that is no label."""
        if label_text(values[0]) is None:
            return why_no_label(values[0], columns[0])
        return f"missing label ({columns[0]})"

    def settled(
        self, rows: LabelledText[str], test: LabelledText[str] | None
    ) -> tuple[LabelledText[str], LabelledText[str] | None, dict[str, str]]:
        """One spelling of each; what is not a class is refused."""
        spelling = one_spelling({*rows.labels, *(test.labels if test else ())})
        rows = respelled(rows, spelling)
        refuse_no_classes(rows.labels, rows.text_column, rows.label_column, str(rows.source))
        return rows, test and respelled(test, spelling), spelling

    def names(self, label: str) -> Sequence[str]:
        """The label."""
        return (label,)

    def strata(self, labels: Sequence[str]) -> list[int]:
        """The labels, numbered."""
        codes = {name: code for code, name in enumerate(sorted(set(labels)))}
        return [codes[label] for label in labels]

    def check_train(self, rows: LabelledText[str]) -> None:
        """Two labels are needed."""
        if len(set(rows.labels)) == 1:
            raise DataError(
                f"all {len(rows):,} training rows have one label, {quoted(rows.labels[0])} (column "
                f"{quoted(rows.label_column)}); at least two are needed.",
                where=str(rows.source),
                advice="Add rows, or choose another `label_column`.",
            )


CLASSES = Classes()


def class_names(labels: Iterable[str]) -> list[str]:
    """The labels, each once: by number when all are whole numbers, else by letter."""
    names = sorted(set(labels))
    return sorted(names, key=int) if all(map(_is_whole_number, names)) else names


def respelled(rows: LabelledText[str], spelling: Mapping[str, str]) -> LabelledText[str]:
    """The same rows with other names for some labels."""
    return replace(rows, labels=[spelling.get(label, label) for label in rows.labels]) if spelling else rows


def with_known_labels(rows: LabelledText[str], known: Sequence[str]) -> LabelledText[str]:
    """The rows with each label as ``known`` spells it; one that it does not hold stays as it is."""
    return respelled(rows, one_spelling(set(rows.labels), known))


def _is_whole_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal() and len(name) < 20
