"""What tagged sentences look like before time is spent on training: counts, lengths, and the rows that will mislead.

``inspect_tags`` only measures; nothing is changed or refused. Sentences are compared without regard to case.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from capotune.data.inspect.findings import Check, columns_not_used, rows_found, rows_lost, token_lengths
from capotune.data.inspect.measures import Lengths, Lines, lengths_of, lines_where
from capotune.data_blocks import Block, Counts, Finding, Findings
from capotune.tasks.token_classification.alignment import NOWHERE, Aligned
from capotune.tasks.token_classification.data import TaggedData, TaggedRows, sentence_groups

_CHECKS: Final[tuple[Check, ...]] = (
    ("Cut", "train_cut", "in train: longer than {limit}, the last words are not read"),
    ("Cut", "test_cut", "in test: longer than {limit}, the last words are not read and count as O"),
    ("Unread", "without_token", "in train: a word of which no token comes"),
    ("Twice", "duplicates", "in train: the repeat of an earlier row"),
    ("Conflict", "conflicts", "in train: the same sentence stands with other tags too"),
    ("Leak", "leaked", "in test: the sentence is in train too, so the score will be too good"),
)


@dataclass(frozen=True)
class TypeCount:
    """How many entities have a type."""

    name: str
    train: int
    test: int


@dataclass(frozen=True)
class TagReport:
    """What ``inspect_tags`` found. ``dataclasses.asdict`` gives plain JSON.

    Attributes:
        source, test_source: where the sentences are from.
        test_from: how the test rows were chosen, in words.
        described: the form and the columns that were read.
        train_rows, test_rows: number of sentences.
        train_words, test_words: their words.
        types: every type with its entities, the most frequent in train first.
        max_length: tokens of a sentence that the model gets to see.
        base_length: tokens that the base takes.
        train_tokens, test_tokens: lengths of sentences in tokens before anything is cut.
        train_cut, test_cut: sentences longer than ``max_length``.
        train_words_cut, test_words_cut: words that are lost of those.
        without_token: training sentences with a word of which no token comes.
        duplicates: training rows that repeat an earlier one, words and tags.
        conflicts: training rows whose words also stand in train with other tags.
        leaked: test rows whose words also stand in train.
        unused: columns that are not read.
    """

    source: str
    test_source: str
    test_from: str
    described: str
    train_rows: int
    test_rows: int
    train_words: int
    test_words: int
    types: list[TypeCount]
    max_length: int
    base_length: int
    train_tokens: Lengths
    test_tokens: Lengths | None
    train_cut: Lines
    test_cut: Lines
    train_words_cut: int
    test_words_cut: int
    without_token: Lines
    duplicates: Lines
    conflicts: Lines
    leaked: Lines
    unused: list[str] = field(default_factory=list)


def inspect_tags(
    data: TaggedData,
    train: Sequence[Aligned],
    test: Sequence[Aligned],
    max_length: int,
    base_length: int | None = None,
) -> TagReport:
    """Measure the data; ``train`` and ``test`` are its rows as the base reads them, of each at most ``max_length`` of
    the ``base_length`` tokens that it takes (None: as many)."""
    in_train, in_test = data.train.type_counts, data.test.type_counts
    groups = sentence_groups(data.train)
    known = set(groups)
    return TagReport(
        source=str(data.train.source),
        test_source=str(data.test.source),
        test_from=data.test_from,
        described=data.train.described,
        train_rows=len(data.train),
        test_rows=len(data.test),
        train_words=sum(map(len, data.train.words)),
        test_words=sum(map(len, data.test.words)),
        types=[TypeCount(name, number, in_test[name]) for name, number in in_train.most_common()],
        max_length=max_length,
        base_length=base_length or max_length,
        train_tokens=lengths_of([one.tokens for one in train]),
        test_tokens=lengths_of([one.tokens for one in test]) if test else None,
        train_cut=lines_where(data.train, (one.tokens > max_length for one in train)),
        test_cut=lines_where(data.test, (one.tokens > max_length for one in test)),
        train_words_cut=sum(one.cut for one in train),
        test_words_cut=sum(one.cut for one in test),
        without_token=lines_where(data.train, map(_lacks_a_token, train)),
        duplicates=lines_where(data.train, _repeats(data.train, groups)),
        conflicts=lines_where(data.train, _conflicts(data.train, groups)),
        leaked=lines_where(data.test, (group in known for group in sentence_groups(data.test))),
        unused=list(data.train.unused),
    )


def lost_sentences(rows: TaggedRows, aligned: Sequence[Aligned], max_length: int) -> list[str]:
    """How many sentences that are to be scored are too long, in words; ``aligned`` is how the base reads them."""
    too_long = lines_where(rows, (one.tokens > max_length for one in aligned))
    what = f"are longer than {max_length:,} tokens: their last words are not read and count as O"
    return rows_lost([(too_long, what)], len(rows))


def _lacks_a_token(one: Aligned) -> bool:
    return NOWHERE in one.first[: len(one.first) - one.cut]


def _repeats(rows: TaggedRows, groups: Sequence[tuple[str, ...]]) -> Iterable[bool]:
    seen: set[tuple[tuple[str, ...], tuple[str, ...]]] = set()
    for group, tags in zip(groups, rows.tags, strict=True):
        row = (group, tuple(tags))
        yield row in seen
        seen.add(row)


def _conflicts(rows: TaggedRows, groups: Sequence[tuple[str, ...]]) -> Iterable[bool]:
    tags_of: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for group, tags in zip(groups, rows.tags, strict=True):
        tags_of.setdefault(group, set()).add(tuple(tags))
    return (len(tags_of[group]) > 1 for group in groups)


def describe_tags(report: TagReport) -> list[Block]:
    """The report in words, and every type's entities."""
    counts = [[one.name, f"{one.train:,}", f"{one.test:,}"] for one in report.types]
    return [Findings(list(_findings(report))), Counts(["Type", "Train", "Test"], counts)]


def _findings(report: TagReport) -> Iterable[Finding]:
    yield Finding("Data", f"{report.source}, {report.described}")
    yield from columns_not_used(report.unused)
    tested = (
        f", {report.test_rows:,} to test ({report.test_from})" if report.test_rows else f"; test: {report.test_from}"
    )
    yield Finding("Sentences", f"{report.train_rows:,} to train{tested}")
    entities = sum(one.train for one in report.types)
    yield Finding("Words", f"{report.train_words:,} in train, {entities:,} entities of {len(report.types):,} types")
    yield token_lengths(report.train_tokens, report.max_length, report.base_length)
    yield from rows_found(report, _CHECKS, "no sentence is cut, repeated, tagged twice, or in both train and test")
