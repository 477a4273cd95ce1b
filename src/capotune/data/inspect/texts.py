"""Labelled texts, whatever a label is: lengths, and the rows that will mislead.

``text_facts`` only measures; nothing is changed or refused. Texts are compared without regard to case and space.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from capotune.data.inspect.findings import Check, columns_not_used, rows_lost, token_lengths
from capotune.data.inspect.measures import Counted, Lengths, Lines, lengths_of, lines_where
from capotune.data.labelled import LabelledData, LabelledText
from capotune.data.split import text_numbers
from capotune.data.text_columns import Text
from capotune.data.wording import quoted
from capotune.data_blocks import Finding

__all__ = ["NOTHING_FOUND", "TEXT_CHECKS", "TextReport", "columns_read", "lost_texts", "text_facts", "text_findings"]

TEXT_CHECKS: Final[tuple[Check, ...]] = (
    ("Cut", "train_truncated", "in train: longer than {limit}, the end is lost"),
    ("Cut", "test_truncated", "in test: longer than {limit}, the end is lost"),
    ("Empty", "train_empty", "in train: no text"),
    ("Empty", "test_empty", "in test: no text"),
    ("Twice", "duplicates", "in train: the repeat of an earlier row"),
    ("Conflict", "conflicts", "in train: the same text stands under another label too"),
    ("Leak", "leaked", "in test: the text is in train too, so the score will be too good"),
)
NOTHING_FOUND: Final = "no text is cut, empty, repeated, labelled twice, or in both train and test"


@dataclass(frozen=True, kw_only=True)
class TextReport:
    """What was found. ``dataclasses.asdict`` gives plain JSON.

    Attributes:
        source, test_source: where the rows are from.
        test_from: how the test rows were chosen, in words.
        text_column, label_column: the columns that were read; ``second_column``: that of the second of two texts.
        train_rows, test_rows: number of rows.
        max_length: tokens of a text that the model gets to see.
        base_length: tokens that the base takes.
        train_tokens, test_tokens: lengths in tokens before anything is cut.
        train_truncated, test_truncated: texts longer than ``max_length``.
        train_empty, test_empty: texts without a token or without a visible character.
        duplicates: training rows that repeat an earlier one, text and label.
        conflicts: training rows whose text also stands in train with another label.
        leaked: test rows whose text also stands in train.
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
    unused: list[str] = field(default_factory=list)
    counted: int | None = None
    second_column: str | None = None


def text_facts(
    data: LabelledData[Any],
    token_lengths_train: Sequence[int],
    token_lengths_test: Sequence[int],
    max_length: int,
    base_length: int | None = None,
    counted: Sequence[Counted | None] = (None, None),
) -> dict[str, Any]:
    """The values of a ``TextReport``, by name.

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
    label, labels = _numbered(train.labels)
    train_counted, test_counted = (
        rows if some is None else rows.take(some.rows) for rows, some in zip((train, test), counted, strict=True)
    )
    drawn = [None if some is None else some.drawn for some in counted]
    return {
        "source": str(train.source),
        "test_source": str(test.source),
        "test_from": data.test_from,
        "text_column": train.text_column,
        "label_column": train.label_column,
        "train_rows": len(train),
        "test_rows": len(test),
        "max_length": max_length,
        "base_length": base_length or max_length,
        "train_tokens": lengths_of(token_lengths_train, drawn[0]),
        "test_tokens": lengths_of(token_lengths_test, drawn[1]) if len(test) else None,
        "train_truncated": lines_where(train_counted, (length > max_length for length in token_lengths_train)),
        "test_truncated": lines_where(test_counted, (length > max_length for length in token_lengths_test)),
        "train_empty": _empty(train_counted, token_lengths_train),
        "test_empty": _empty(test_counted, token_lengths_test),
        "duplicates": lines_where(train, _repeats(same_train * labels + label)),
        "conflicts": lines_where(train, _differ(same_train, label)),
        "leaked": lines_where(test, same_test <= same_train.max()),
        "unused": list(train.unused),
        "counted": None if counted[0] is None else len(token_lengths_train),
        "second_column": train.second_column,
    }


def lost_texts(rows: LabelledText[Any], lengths: Sequence[int], max_length: int) -> list[str]:
    """How many texts that are to be scored are too long, in words; ``lengths``: their tokens, uncut."""
    too_long = lines_where(rows, (length > max_length for length in lengths))
    return rows_lost([(too_long, f"are longer than {max_length:,} tokens: what is beyond is not read")], len(rows))


def text_findings(report: TextReport) -> Iterable[Finding]:
    """Where the rows are from, how many there are, and how long."""
    yield Finding("Data", f"{report.source}, {columns_read(report)}")
    yield from columns_not_used(report.unused)
    yield Finding("Rows", f"{report.train_rows:,} to train, {report.test_rows:,} to test ({report.test_from})")
    yield token_lengths(report.train_tokens, report.max_length, report.base_length)
    if report.counted:
        yield Finding("Counted", f"the tokens of {report.counted:,} training texts: the longest, and others at random")


def columns_read(report: TextReport) -> str:
    """The columns of texts and labels."""
    texts = f"text in {quoted(report.text_column)}"
    if report.second_column is not None:
        texts = f"pairs of texts in {quoted(report.text_column)} and {quoted(report.second_column)}, read together"
    return f"{texts}, label in {quoted(report.label_column)}"


def _numbered(labels: Sequence[Hashable]) -> tuple[NDArray[np.int64], int]:
    """A number for each label, equal ones alike, and how many there are."""
    known: dict[Hashable, int] = {}
    numbers = (known.setdefault(label, len(known)) for label in labels)
    return np.fromiter(numbers, dtype=np.int64, count=len(labels)), len(known)


def _empty(rows: LabelledText[Any], tokens: Sequence[int]) -> Lines:
    return lines_where(rows, (length == 0 or _is_blank(text) for text, length in zip(rows.texts, tokens, strict=True)))


def _is_blank(text: Text) -> bool:
    return not text.strip() if isinstance(text, str) else not all(map(str.strip, text))


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
