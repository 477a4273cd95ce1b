"""Texts with several labels each, or none: how many rows have each, and how many labels a row has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from capotune.data.inspect.findings import rows_found
from capotune.data.inspect.labels import (
    LabelCount,
    alike_labels,
    count_labels,
    label_balance,
    label_table,
    lonely_labels,
    similar,
)
from capotune.data.inspect.measures import Counted
from capotune.data.inspect.texts import NOTHING_FOUND, TEXT_CHECKS, TextReport, text_facts, text_findings
from capotune.data.labelled import LabelledData
from capotune.data.several_labels import form_in_words
from capotune.data.wording import count, shorten
from capotune.data_blocks import Block, Finding, Findings

__all__ = ["SeveralReport", "describe_several", "inspect_several"]


@dataclass(frozen=True, kw_only=True)
class SeveralReport(TextReport):
    """What was found, beside what is true of all labelled texts.

    Attributes:
        form: how the labels of a row are written (``several_labels``).
        labels: every label with its counts, the most frequent in train first.
        labels_a_row: labels that training rows have on average.
        without: training rows that have none.
        everywhere: labels that every training row has.
        similar_labels: groups of labels that look alike.
        respelled: labels that are read as another one.
    """

    form: str
    labels: list[LabelCount]
    labels_a_row: float
    without: int
    everywhere: list[str]
    similar_labels: list[list[str]]
    respelled: dict[str, str] = field(default_factory=dict)


def inspect_several(
    data: LabelledData[tuple[str, ...]],
    token_lengths_train: Sequence[int],
    token_lengths_test: Sequence[int],
    max_length: int,
    base_length: int | None = None,
    counted: Sequence[Counted | None] = (None, None),
) -> SeveralReport:
    """Measure the data; arguments and errors are those of ``text_facts``."""
    rows = data.train.labels
    labels = count_labels(chain.from_iterable(rows), chain.from_iterable(data.test.labels))
    return SeveralReport(
        **text_facts(data, token_lengths_train, token_lengths_test, max_length, base_length, counted),
        form=data.train.form,
        labels=labels,
        labels_a_row=sum(map(len, rows)) / len(rows),
        without=sum(not row for row in rows),
        everywhere=[label.name for label in labels if label.train == len(rows)],
        similar_labels=similar([label.name for label in labels]),
        respelled=data.respelled,
    )


def describe_several(report: SeveralReport) -> list[Block]:
    """The report in words, and every label's rows."""
    return [Findings(list(_findings(report))), label_table(report.labels)]


def _findings(report: SeveralReport) -> Iterable[Finding]:
    yield from text_findings(report)
    without = f"; {count(report.without, 'row')} without any" if report.without else ""
    yield Finding("Labels", f"{form_in_words(report.form)}: {report.labels_a_row:.1f} a row{without}")
    yield label_balance(report.labels)
    yield from lonely_labels(report.labels)
    if report.everywhere:
        yield Finding("Labels", f"every training row has {shorten(report.everywhere)}", needs_a_look=True)
    alike = list(alike_labels(report.similar_labels))
    found = rows_found(report, TEXT_CHECKS, NOTHING_FOUND)
    yield from (one for one in found if one.needs_a_look or not alike)
    yield from alike
