"""What the data looks like before a minute is spent on training: counts, lengths, and the rows that will mislead.

``inspect_data`` only measures; nothing is changed or refused. Texts are compared without regard to case and space.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from capotune.data.labelled import LabelledData, LabelledText, normalised

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = [
    "DataReport",
    "LabelCount",
    "Lengths",
    "Lines",
    "facts_table",
    "findings",
    "inspect_data",
    "lengths_in_words",
    "lengths_of",
    "lines_where",
    "render",
]

SHOWN_LINES: Final = 5
SHOWN_LABELS: Final = 5  # biggest, and as many smallest
IMBALANCE_WORTH_A_WORD: Final = 10.0


@dataclass(frozen=True)
class Lines:
    """Rows that something is true of: how many, and the lines of the first of them."""

    count: int
    first: list[int]


@dataclass(frozen=True)
class Lengths:
    """Texts in tokens; ``p95``: 95 % of the texts are at most this long."""

    min: int
    median: int
    p95: int
    max: int


@dataclass(frozen=True)
class LabelCount:
    """How many rows have a label."""

    name: str
    train: int
    test: int


@dataclass(frozen=True)
class DataReport:
    """What ``inspect_data`` found. ``dataclasses.asdict`` gives plain JSON.

    Attributes:
        source, test_source: where the rows are from.
        test_from: how the test rows were chosen, in words.
        text_column, label_column: the columns that were read.
        train_rows, test_rows: number of rows.
        labels: every label with its counts, the most frequent in train first.
        imbalance: rows of the most frequent label in train, divided by those of the rarest.
        max_length: tokens of a text that the model gets to see.
        train_tokens, test_tokens: lengths in tokens before anything is cut.
        train_truncated, test_truncated: texts longer than ``max_length``.
        train_empty, test_empty: texts without a token or without a visible character.
        duplicates: training rows that repeat an earlier one, text and label.
        conflicts: training rows whose text also stands in train with another label.
        leaked: test rows whose text also stands in train.
        similar_labels: groups of labels that differ only in case or space.
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


def inspect_data(
    data: LabelledData, token_lengths_train: Sequence[int], token_lengths_test: Sequence[int], max_length: int
) -> DataReport:
    """Measure the data.

    Args:
        data: the rows, at least one to train on and one to test on.
        token_lengths_train: tokens of each training text, uncut, in the order of the rows.
        token_lengths_test: the same for the test texts.
        max_length: the most tokens a text may keep.

    Raises:
        ValueError: the number of lengths is not the number of rows.
    """
    train, test = data.train, data.test
    labels_of = defaultdict(set)
    for text, label in zip(map(normalised, train.texts), train.labels, strict=True):
        labels_of[text].add(label)
    labels = _count_labels(train, test)
    return DataReport(
        source=train.source,
        test_source=test.source,
        test_from=data.test_from,
        text_column=train.text_column,
        label_column=train.label_column,
        train_rows=len(train),
        test_rows=len(test),
        labels=labels,
        imbalance=labels[0].train / min(label.train for label in labels if label.train),
        max_length=max_length,
        train_tokens=lengths_of(token_lengths_train),
        test_tokens=lengths_of(token_lengths_test) if token_lengths_test else None,
        train_truncated=lines_where(train.lines, (length > max_length for length in token_lengths_train)),
        test_truncated=lines_where(test.lines, (length > max_length for length in token_lengths_test)),
        train_empty=_empty(train, token_lengths_train),
        test_empty=_empty(test, token_lengths_test),
        duplicates=lines_where(train.lines, _repeats(train)),
        conflicts=lines_where(train.lines, (len(labels_of[normalised(text)]) > 1 for text in train.texts)),
        leaked=lines_where(test.lines, (normalised(text) in labels_of for text in test.texts)),
        similar_labels=_similar([label.name for label in labels]),
    )


def _count_labels(train: LabelledText, test: LabelledText) -> list[LabelCount]:
    in_train, in_test = Counter(train.labels), Counter(test.labels)
    names = sorted(in_train | in_test, key=lambda name: (-in_train[name], name))
    return [LabelCount(name, in_train[name], in_test[name]) for name in names]


def lengths_of(tokens: Sequence[int]) -> Lengths:
    """How lengths spread. Each of the four is a length that occurs."""
    low, median, p95, high = np.percentile(tokens, [0, 50, 95, 100], method="inverted_cdf")
    return Lengths(int(low), int(median), int(p95), int(high))


def lines_where(lines: Sequence[int], chosen: Iterable[bool]) -> Lines:
    """Of rows on ``lines``, those that are ``chosen``."""
    found = [line for line, is_chosen in zip(lines, chosen, strict=True) if is_chosen]
    return Lines(len(found), found[:SHOWN_LINES])


def _empty(rows: LabelledText, tokens: Sequence[int]) -> Lines:
    return lines_where(
        rows.lines, (length == 0 or not text.strip() for text, length in zip(rows.texts, tokens, strict=True))
    )


def _repeats(rows: LabelledText) -> Iterable[bool]:
    seen: set[tuple[str, str]] = set()
    for text, label in zip(rows.texts, rows.labels, strict=True):
        row = (normalised(text), label)
        yield row in seen
        seen.add(row)


def _similar(names: Sequence[str]) -> list[list[str]]:
    groups = defaultdict(list)
    for name in names:
        groups[normalised(name)].append(name)
    return [group for group in groups.values() if len(group) > 1]


# How it is shown


def render(report: DataReport) -> RenderableType:
    """A compact table for the terminal, to be given to a rich ``Console``; what needs a look is yellow."""
    from rich.console import Group

    return Group(facts_table(_facts_in_words(report)), "", _label_table(report))


def facts_table(facts: Iterable[tuple[str, str, bool]]) -> Table:
    """Facts as name, value, and whether it deserves a look; such a one is yellow."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value, is_warning in facts:
        table.add_row(Text(name), Text(value, style="yellow" if is_warning else ""))
    return table


def _facts_in_words(report: DataReport) -> Iterable[tuple[str, str, bool]]:
    """Name, value, and whether it deserves a look. What was looked for and not found is said in one line."""
    yield "Data", f"{report.source}, text in {report.text_column!r}, label in {report.label_column!r}", False
    yield "Rows", f"{report.train_rows:,} to train, {report.test_rows:,} to test ({report.test_from})", False
    yield "Tokens", f"{lengths_in_words(report.train_tokens)}; the model reads {report.max_length:,}", False
    biggest, rarest = report.labels[0].train, min(label.train for label in report.labels if label.train)
    balance = f"{len(report.labels):,}, with {rarest:,} to {biggest:,} training rows each"
    yield "Labels", balance, report.imbalance >= IMBALANCE_WORTH_A_WORD
    found = [
        ("Cut", report.train_truncated, f"in train: longer than {report.max_length:,} tokens, the end is lost"),
        ("Cut", report.test_truncated, f"in test: longer than {report.max_length:,} tokens, the end is lost"),
        ("Empty", report.train_empty, "in train: no text"),
        ("Empty", report.test_empty, "in test: no text"),
        ("Twice", report.duplicates, "in train: the repeat of an earlier row"),
        ("Conflict", report.conflicts, "in train: the same text stands under another label too"),
        ("Leak", report.leaked, "in test: the text is in train too, so the score will be too good"),
    ]
    yield from findings(found)
    for group in report.similar_labels:
        yield "Labels", f"{' and '.join(map(repr, group))} count as different labels", True
    if not any(lines.count for _, lines, _ in found) and not report.similar_labels:
        yield "Checked", "no text is cut, empty, repeated, labelled twice, or in both train and test", False


def findings(found: Iterable[tuple[str, Lines, str]]) -> Iterable[tuple[str, str, bool]]:
    """Facts about rows that deserve a look, of those kinds that were found at all."""
    for name, lines, what in found:
        if lines.count:
            yield name, f"{lines.count:,} {what} ({_first_lines(lines)})", True


def lengths_in_words(lengths: Lengths) -> str:
    """How lengths spread, in a sentence."""
    if lengths.min == lengths.max:
        return f"{lengths.max:,} a text"
    return f"{lengths.min:,} to {lengths.max:,} a text, half at most {lengths.median:,}, 95 % at most {lengths.p95:,}"


def _first_lines(lines: Lines) -> str:
    noun = "line" if lines.count == 1 else "lines"
    return f"{noun} {', '.join(map(str, lines.first))}{', …' if lines.count > len(lines.first) else ''}"


def _label_table(report: DataReport) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2), pad_edge=False)
    table.add_column("Label", overflow="ellipsis", no_wrap=True, max_width=50)
    table.add_column("Train", justify="right")
    table.add_column("Test", justify="right")
    hidden = len(report.labels) - 2 * SHOWN_LABELS
    for position, label in enumerate(report.labels):
        if hidden <= 1 or position < SHOWN_LABELS or position >= len(report.labels) - SHOWN_LABELS:
            table.add_row(Text(label.name), f"{label.train:,}", f"{label.test:,}")
        elif position == SHOWN_LABELS:
            table.add_row(Text(f"… and {hidden:,} more", style="dim"), "", "")
    return table
