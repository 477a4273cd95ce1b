"""Texts with one label each: how many rows a label has, and the labels that will mislead."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from capotune.data.columns import NO_WIDTH
from capotune.data.inspect.findings import rows_found
from capotune.data.inspect.measures import Counted, Lines, lines_where
from capotune.data.inspect.texts import NOTHING_FOUND, TEXT_CHECKS, TextReport, text_facts, text_findings
from capotune.data.labelled import LabelledData
from capotune.data.split import normalised
from capotune.data.wording import count, quoted, shorten
from capotune.data_blocks import Block, Counts, Finding, Findings

__all__ = ["LabelCount", "LabelReport", "describe_labels", "inspect_data"]

IMBALANCE_WORTH_A_WORD: Final = 10.0
_MISSING: Final = frozenset(("nan", "n/a", "na", "#n/a", "<na>", "none", "null", "nil", "-", "?"))
_CHECKS: Final = (
    *TEXT_CHECKS,
    ("Labels", "missing_labels", "in train: a label such as 'nan' or 'N/A', which may say that there is none"),
)


@dataclass(frozen=True)
class LabelCount:
    """How many rows have a label."""

    name: str
    train: int
    test: int


@dataclass(frozen=True, kw_only=True)
class LabelReport(TextReport):
    """What ``inspect_data`` found, beside what is true of all labelled texts.

    Attributes:
        labels: every label with its counts, the most frequent in train first.
        imbalance: rows of the most frequent label in train, divided by those of the rarest.
        similar_labels: groups of labels that look alike: they differ only in case, space, or the form of characters.
        missing_labels: training rows whose label is how a missing value is written (``nan``, ``N/A``).
        respelled: labels that are read as another one, which is the same number or truth value.
    """

    labels: list[LabelCount]
    imbalance: float
    similar_labels: list[list[str]]
    missing_labels: Lines = field(default_factory=lambda: Lines(0, []))
    respelled: dict[str, str] = field(default_factory=dict)


def inspect_data(
    data: LabelledData[str],
    token_lengths_train: Sequence[int],
    token_lengths_test: Sequence[int],
    max_length: int,
    base_length: int | None = None,
    counted: Sequence[Counted | None] = (None, None),
) -> LabelReport:
    """Measure the data; arguments and errors are those of ``text_facts``."""
    facts = text_facts(data, token_lengths_train, token_lengths_test, max_length, base_length, counted)
    labels = count_labels(data.train.labels, data.test.labels)
    missing = {label.name for label in labels if label.name.casefold() in _MISSING}
    return LabelReport(
        **facts,
        labels=labels,
        imbalance=imbalance(labels),
        similar_labels=similar([label.name for label in labels]),
        missing_labels=lines_where(data.train, (name in missing for name in data.train.labels)),
        respelled=data.respelled,
    )


def count_labels(train: Iterable[str], test: Iterable[str]) -> list[LabelCount]:
    """How often each label stands in both, the most frequent in train first."""
    in_train, in_test = Counter(train), Counter(test)
    names = sorted(in_train | in_test, key=lambda name: (-in_train[name], name))
    return [LabelCount(name, in_train[name], in_test[name]) for name in names]


def imbalance(labels: Sequence[LabelCount]) -> float:
    """Rows of the most frequent label in train, divided by those of the rarest."""
    return labels[0].train / min(label.train for label in labels if label.train)


def similar(names: Sequence[str]) -> list[list[str]]:
    """Groups of names that look alike."""
    groups = defaultdict(list)
    for name in names:
        groups[normalised(unicodedata.normalize("NFKC", name)).translate(NO_WIDTH)].append(name)
    return [group for group in groups.values() if len(group) > 1]


def describe_labels(report: LabelReport) -> list[Block]:
    """The report in words, and every label's rows."""
    return [Findings(list(_findings(report))), label_table(report.labels)]


def label_table(labels: Sequence[LabelCount]) -> Counts:
    """Every label's rows."""
    return Counts(["Label", "Train", "Test"], [[one.name, f"{one.train:,}", f"{one.test:,}"] for one in labels])


def _findings(report: LabelReport) -> Iterable[Finding]:
    yield from text_findings(report)
    yield label_balance(report.labels)
    if report.respelled:
        same = ", ".join(f"{quoted(label)} as {quoted(name)}" for label, name in list(report.respelled.items())[:8])
        yield Finding("Labels", f"read as one label: {same}")
    yield from lonely_labels(report.labels)
    alike = list(alike_labels(report.similar_labels))
    found = rows_found(report, _CHECKS, NOTHING_FOUND)
    yield from (one for one in found if one.needs_a_look or not alike)
    yield from alike


def label_balance(labels: Sequence[LabelCount]) -> Finding:
    """How many labels there are, with how many rows."""
    rarest, most = min(label.train for label in labels if label.train), labels[0].train
    each = f"{most:,}" if rarest == most else f"{rarest:,} to {most:,}"
    return Finding(
        "Labels", f"{len(labels):,}, with {each} training rows each", imbalance(labels) >= IMBALANCE_WORTH_A_WORD
    )


def lonely_labels(labels: Sequence[LabelCount]) -> Iterable[Finding]:
    """The labels of one row, where others have more."""
    lonely = [label.name for label in labels if label.train == 1]
    if lonely and len(labels) > len(lonely):
        yield Finding("Labels", f"{count(len(lonely), 'label')} with one training row each: {shorten(lonely)}", True)


def alike_labels(groups: Iterable[Sequence[str]]) -> Iterable[Finding]:
    """Labels that only look as one."""
    for group in groups:
        yield Finding("Labels", f"{' and '.join(map(quoted, group))} count as different labels", needs_a_look=True)
