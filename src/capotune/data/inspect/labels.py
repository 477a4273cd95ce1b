"""Labelled text: counts, lengths, and the rows that will mislead.

``inspect_data`` only measures; nothing is changed or refused. Texts are compared without regard to case and space.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Final

import numpy as np
from numpy.typing import NDArray

from capotune.data.columns import NO_WIDTH
from capotune.data.inspect.findings import columns_not_used, rows_found, rows_lost, token_lengths
from capotune.data.inspect.measures import Counted, Lengths, Lines, lengths_of, lines_where
from capotune.data.labelled import LabelledData, LabelledText
from capotune.data.split import normalised, text_numbers
from capotune.data.wording import count, quoted, shorten
from capotune.data_blocks import Block, Counts, Finding, Findings

__all__ = ["LabelCount", "LabelReport", "describe_labels", "inspect_data", "lost_texts"]

_IMBALANCE_WORTH_A_WORD: Final = 10.0
_MISSING: Final = frozenset(("nan", "n/a", "na", "#n/a", "<na>", "none", "null", "nil", "-", "?"))
_CHECKS: Final = (
    ("Cut", "train_truncated", "in train: longer than {limit}, the end is lost"),
    ("Cut", "test_truncated", "in test: longer than {limit}, the end is lost"),
    ("Empty", "train_empty", "in train: no text"),
    ("Empty", "test_empty", "in test: no text"),
    ("Twice", "duplicates", "in train: the repeat of an earlier row"),
    ("Conflict", "conflicts", "in train: the same text stands under another label too"),
    ("Leak", "leaked", "in test: the text is in train too, so the score will be too good"),
    ("Labels", "missing_labels", "in train: a label such as 'nan' or 'N/A', which may say that there is none"),
)


@dataclass(frozen=True)
class LabelCount:
    """How many rows have a label."""

    name: str
    train: int
    test: int


@dataclass(frozen=True)
class LabelReport:
    """What ``inspect_data`` found. ``dataclasses.asdict`` gives plain JSON.

    Attributes:
        source, test_source: where the rows are from.
        test_from: how the test rows were chosen, in words.
        text_column, label_column: the columns that were read.
        train_rows, test_rows: number of rows.
        labels: every label with its counts, the most frequent in train first.
        imbalance: rows of the most frequent label in train, divided by those of the rarest.
        max_length: tokens of a text that the model gets to see.
        base_length: tokens that the base takes.
        train_tokens, test_tokens: lengths in tokens before anything is cut.
        train_truncated, test_truncated: texts longer than ``max_length``.
        train_empty, test_empty: texts without a token or without a visible character.
        duplicates: training rows that repeat an earlier one, text and label.
        conflicts: training rows whose text also stands in train with another label.
        leaked: test rows whose text also stands in train.
        similar_labels: groups of labels that look alike: they differ only in case, space, or the form of characters.
        missing_labels: training rows whose label is how a missing value is written (``nan``, ``N/A``).
        respelled: labels that are read as another one, which is the same number or truth value.
        unused: columns that are not read.
        counted: training rows whose tokens were counted, where not all were: the longest, and some at random. The
            rows that are cut or without a token are those among them, and likewise in test.
    """

    source: str
    test_source: str
    test_from: str
    text_column: str
    label_column: str
    train_rows: int
    test_rows: int
    labels: list[LabelCount]
    imbalance: float
    max_length: int
    base_length: int
    train_tokens: Lengths
    test_tokens: Lengths | None
    train_truncated: Lines
    test_truncated: Lines
    train_empty: Lines
    test_empty: Lines
    duplicates: Lines
    conflicts: Lines
    leaked: Lines
    similar_labels: list[list[str]]
    missing_labels: Lines = field(default_factory=lambda: Lines(0, []))
    respelled: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    counted: int | None = None


def inspect_data(
    data: LabelledData,
    token_lengths_train: Sequence[int],
    token_lengths_test: Sequence[int],
    max_length: int,
    base_length: int | None = None,
    counted: Sequence[Counted | None] = (None, None),
) -> LabelReport:
    """Measure the data.

    Args:
        data: the rows, at least one to train on and one to test on.
        token_lengths_train: tokens of each training text, uncut, in the order of the rows.
        token_lengths_test: the same for the test texts.
        max_length: the most tokens a text may keep.
        base_length: tokens that the base takes; None: as many.
        counted: the training and the test rows whose lengths are given, where they are not given of all.

    Raises:
        ValueError: the number of lengths is not the number of rows.
    """
    train, test = data.train, data.test
    same = text_numbers(chain(train.texts, test.texts))
    same_train, same_test = same[: len(train)], same[len(train) :]
    labels = _count_labels(train, test)
    number = {label.name: at for at, label in enumerate(labels)}
    label = np.fromiter(map(number.__getitem__, train.labels), dtype=np.int64, count=len(train))
    train_counted, test_counted = (
        rows if some is None else rows.take(some.rows) for rows, some in zip((train, test), counted, strict=True)
    )
    drawn = [None if some is None else some.drawn for some in counted]
    missing = {name for name in number if name.casefold() in _MISSING}
    return LabelReport(
        source=str(train.source),
        test_source=str(test.source),
        test_from=data.test_from,
        text_column=train.text_column,
        label_column=train.label_column,
        train_rows=len(train),
        test_rows=len(test),
        labels=labels,
        imbalance=labels[0].train / min(label.train for label in labels if label.train),
        max_length=max_length,
        base_length=base_length or max_length,
        train_tokens=lengths_of(token_lengths_train, drawn[0]),
        test_tokens=lengths_of(token_lengths_test, drawn[1]) if len(test) else None,
        train_truncated=lines_where(train_counted, (length > max_length for length in token_lengths_train)),
        test_truncated=lines_where(test_counted, (length > max_length for length in token_lengths_test)),
        train_empty=_empty(train_counted, token_lengths_train),
        test_empty=_empty(test_counted, token_lengths_test),
        duplicates=lines_where(train, _repeats(same_train * len(labels) + label)),
        conflicts=lines_where(train, _differ(same_train, label)),
        leaked=lines_where(test, same_test <= same_train.max()),
        similar_labels=_similar([label.name for label in labels]),
        missing_labels=lines_where(train, (name in missing for name in train.labels)),
        respelled=data.respelled,
        unused=list(train.unused),
        counted=None if counted[0] is None else len(token_lengths_train),
    )


def lost_texts(rows: LabelledText, lengths: Sequence[int], max_length: int) -> list[str]:
    """How many texts that are to be scored are too long, in words; ``lengths``: their tokens, uncut."""
    too_long = lines_where(rows, (length > max_length for length in lengths))
    return rows_lost([(too_long, f"are longer than {max_length:,} tokens: what is beyond is not read")], len(rows))


def _count_labels(train: LabelledText, test: LabelledText) -> list[LabelCount]:
    in_train, in_test = Counter(train.labels), Counter(test.labels)
    names = sorted(in_train | in_test, key=lambda name: (-in_train[name], name))
    return [LabelCount(name, in_train[name], in_test[name]) for name in names]


def _empty(rows: LabelledText, tokens: Sequence[int]) -> Lines:
    return lines_where(rows, (length == 0 or not text.strip() for text, length in zip(rows.texts, tokens, strict=True)))


def _repeats(rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each is equal to an earlier one."""
    repeats = np.ones(len(rows), dtype=bool)
    repeats[np.unique(rows, return_index=True)[1]] = False
    return repeats


def _differ(group: NDArray[np.int64], label: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether some row of each one's group has another label; ``group`` as ``text_numbers`` gives them."""
    _, first = np.unique(group, return_index=True)
    differ = np.zeros(len(first), dtype=bool)
    differ[group[label != label[first][group]]] = True
    return differ[group]


def _similar(names: Sequence[str]) -> list[list[str]]:
    groups = defaultdict(list)
    for name in names:
        groups[normalised(unicodedata.normalize("NFKC", name)).translate(NO_WIDTH)].append(name)
    return [group for group in groups.values() if len(group) > 1]


def describe_labels(report: LabelReport) -> list[Block]:
    """The report in words, and every label's rows."""
    counts = [[label.name, f"{label.train:,}", f"{label.test:,}"] for label in report.labels]
    return [Findings(list(_findings(report))), Counts(["Label", "Train", "Test"], counts)]


def _columns_read(report: LabelReport) -> str:
    return f"text in {quoted(report.text_column)}, label in {quoted(report.label_column)}"


def _findings(report: LabelReport) -> Iterable[Finding]:
    yield Finding("Data", f"{report.source}, {_columns_read(report)}")
    yield from columns_not_used(report.unused)
    yield Finding("Rows", f"{report.train_rows:,} to train, {report.test_rows:,} to test ({report.test_from})")
    yield token_lengths(report.train_tokens, report.max_length, report.base_length)
    if report.counted:
        yield Finding("Counted", f"the tokens of {report.counted:,} training texts: the longest, and others at random")
    rarest = min(label.train for label in report.labels if label.train)
    most = report.labels[0].train
    each = f"{most:,}" if rarest == most else f"{rarest:,} to {most:,}"
    balance = f"{len(report.labels):,}, with {each} training rows each"
    yield Finding("Labels", balance, report.imbalance >= _IMBALANCE_WORTH_A_WORD)
    if report.respelled:
        same = ", ".join(f"{quoted(label)} as {quoted(name)}" for label, name in list(report.respelled.items())[:8])
        yield Finding("Labels", f"read as one label: {same}")
    lonely = [label.name for label in report.labels if label.train == 1]
    if lonely and len(report.labels) > len(lonely):
        yield Finding("Labels", f"{count(len(lonely), 'label')} with one training row each: {shorten(lonely)}", True)
    alike = [
        Finding("Labels", f"{' and '.join(map(quoted, group))} count as different labels", needs_a_look=True)
        for group in report.similar_labels
    ]
    found = rows_found(report, _CHECKS, "no text is cut, empty, repeated, labelled twice, or in both train and test")
    yield from (one for one in found if one.needs_a_look or not alike)
    yield from alike
