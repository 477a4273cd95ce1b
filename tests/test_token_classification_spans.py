"""Tags and entities: equal to seqeval's default mode on random tags and on real ones."""

from __future__ import annotations

import random
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics import classification_report, f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities
from shared import SHARED, needs_shared

from capotune.tasks.token_classification.spans import (
    Entity,
    EntityCounts,
    as_iob2,
    count,
    count_by_type,
    entities,
    is_tag,
    scheme,
)

TAGS = ["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in ("PER", "LOC", "a-b")), *"BIES"]
tags = st.lists(st.sampled_from(TAGS), max_size=12)


def by_seqeval(sentence: list[str]) -> list[Entity]:
    return [Entity(kind, start, end + 1) for kind, start, end in get_entities(sentence)]


@given(tags)
def test_entities_are_those_of_seqeval(sentence: list[str]) -> None:
    assert entities(sentence) == by_seqeval(sentence)


@given(tags)
def test_iob2_has_the_same_entities_and_says_them_strictly(sentence: list[str]) -> None:
    same = as_iob2(sentence)
    assert entities(same) == entities(sentence)
    assert as_iob2(same) == same
    assert scheme([same]) == "IOB2"


@given(st.lists(st.tuples(tags, st.randoms(use_true_random=False)), min_size=1, max_size=8))
def test_scores_are_those_of_seqeval(rows: list[tuple[list[str], random.Random]]) -> None:
    true = [sentence for sentence, _ in rows]
    predicted = [[tag if chance.random() < 0.6 else chance.choice(TAGS) for tag in row] for row, chance in rows]
    found = sum((count(*pair) for pair in zip(true, predicted, strict=True)), EntityCounts())
    assert_equal_to_seqeval(true, predicted, found)


def assert_equal_to_seqeval(true: list[list[str]], predicted: list[list[str]], found: EntityCounts) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of divisions by zero
        assert found.precision == pytest.approx(precision_score(true, predicted), abs=1e-12)
        assert found.recall == pytest.approx(recall_score(true, predicted), abs=1e-12)
        assert found.f1 == pytest.approx(f1_score(true, predicted), abs=1e-12)


@needs_shared
def test_scores_on_real_tags_are_those_of_seqeval() -> None:
    """Entities cut short, of a wrong type, left out and made up, in whole and for each type."""
    text = (SHARED / "data" / "anem" / "test.conll").read_text(encoding="utf-8")
    true = [[line.split("\t")[-1] for line in part.split("\n")] for part in text.strip().split("\n\n")]
    kinds = sorted({tag for row in true for tag in row})
    chance = random.Random(0)
    predicted = [[tag if chance.random() < 0.9 else chance.choice(kinds) for tag in row] for row in true]
    by_type: dict[str, EntityCounts] = {}
    for pair in zip(true, predicted, strict=True):
        for kind, counts in count_by_type(*pair).items():
            by_type[kind] = by_type.get(kind, EntityCounts()) + counts
    total = sum(by_type.values(), EntityCounts())
    assert total.tp > 400
    assert_equal_to_seqeval(true, predicted, total)
    report = classification_report(true, predicted, output_dict=True, zero_division=0)
    assert set(by_type) == set(report) - {"micro avg", "macro avg", "weighted avg"}
    for kind, counts in by_type.items():
        assert counts.f1 == pytest.approx(report[kind]["f1-score"], abs=1e-12), kind
        assert counts.tp + counts.fn == report[kind]["support"]


@pytest.mark.parametrize(
    ("sentence", "name", "iob2"),
    [
        ("O B-X I-X O B-X", "IOB2", "O B-X I-X O B-X"),
        ("O I-X I-X B-X I-Y", "IOB1", "O B-X I-X B-X B-Y"),
        ("B-X I-X E-X S-X B-Y E-Y", "IOBES", "B-X I-X I-X B-X B-Y I-Y"),
        ("B-X I-X L-X U-X O", "BILOU", "B-X I-X I-X B-X O"),
        ("B-X M-X E-X S-X O", "BMES", "B-X I-X I-X B-X O"),
        ("B I O B", "IOB2", "B I O B"),
        ("", "IOB2", ""),
    ],
)
def test_every_scheme_is_known_and_read_into_iob2(sentence: str, name: str, iob2: str) -> None:
    assert scheme([sentence.split()]) == name
    assert as_iob2(sentence.split()) == iob2.split()


@pytest.mark.parametrize(("tag", "expected"), [
    ("O", True), ("B", True), ("I-PER", True), ("U-a-b", True), ("B-", False), ("PER", False), ("o", False),
    ("X-PER", False), ("", False), ("NN", False), ("0", False),
])  # fmt: skip
def test_what_is_a_tag(tag: str, expected: bool) -> None:
    assert is_tag(tag) == expected


def test_counts_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 tags and 1 predicted"):
        count(["O", "O"], ["O"])
