"""Scores of written answers and of loss, against other ways to compute them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capotune.evaluation.metrics import exact_match, mean_interval, perplexity, rouge_l, wilson_interval

WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=12)


@pytest.mark.parametrize(
    ("predicted", "expected", "same"),
    [("42", "42", True), (" 42\n", "42", True), ("42.", "42", False), ("Yes", "yes", False), ("", " ", True)],
)
def test_exact_match_ignores_white_space_around_alone(predicted: str, expected: str, same: bool) -> None:
    assert exact_match(predicted, expected) is same


@pytest.mark.parametrize(
    ("predicted", "expected", "score"),
    [
        ("police kill the gunman", "police killed the gunman", 3 / 4),  # the examples of Lin 2004, §3.1
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("The cat!", "the, CAT", 1.0),
        ("the cat sat", "the dog sat down", 2 * 2 / 7),
        ("größe über alles", "Größe ÜBER", 2 * 2 / 5),
        ("", "", 1.0),
        ("...", "!", 1.0),
        ("", "word", 0.0),
        ("word", "", 0.0),
        ("one", "two", 0.0),
    ],
)
def test_rouge_l_of_known_pairs(predicted: str, expected: str, score: float) -> None:
    assert rouge_l(predicted, expected) == pytest.approx(score)


def subsequence(one: list[str], other: list[str]) -> int:
    """The textbook's table."""
    table = np.zeros((len(one) + 1, len(other) + 1), dtype=int)
    for i, word in enumerate(one):
        for j, against in enumerate(other):
            table[i + 1, j + 1] = table[i, j] + 1 if word == against else max(table[i, j + 1], table[i + 1, j])
    return int(table[-1, -1])


@given(WORDS, WORDS)
def test_rouge_l_counts_the_longest_common_subsequence(one: list[str], other: list[str]) -> None:
    found = rouge_l(" ".join(one), " ".join(other))
    if one and other:
        assert found == pytest.approx(2 * subsequence(one, other) / (len(one) + len(other)))
    else:
        assert found == float(one == other)


def test_perplexity_is_e_to_the_loss() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e6) == math.inf


def test_wilson_interval_of_a_published_case() -> None:
    """Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263 and 0 of 20."""
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=6e-5)
    assert wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=6e-5)
    assert wilson_interval(0.5, 0) == (0.0, 1.0)


def test_mean_interval_of_single_values_is_the_plain_one() -> None:
    values = [0.2, 0.9, 0.4, 0.7, 0.1, 0.3]
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    expected = (np.mean(values) - 1.959964 * error, np.mean(values) + 1.959964 * error)
    assert mean_interval(values, [1] * 6) == pytest.approx(expected, rel=1e-6)


def test_mean_interval_needs_two_rows() -> None:
    assert mean_interval([3.0], [2]) is None
    assert mean_interval([], []) is None


def test_mean_interval_of_equal_rows_has_no_width() -> None:
    low, high = mean_interval([2.0, 4.0, 8.0], [1, 2, 4]) or (0, 0)
    assert low == pytest.approx(2.0)
    assert high == pytest.approx(2.0)


def test_mean_interval_holds_the_truth_19_times_in_20() -> None:
    """Rows whose tokens are alike and whose lengths differ: an interval over single tokens would be too short."""
    generator = np.random.default_rng(0)
    held, trials, truth = 0, 1000, 2.0
    for _ in range(trials):
        counts = generator.integers(1, 40, 80)
        row_loss = truth + generator.normal(0, 0.5, 80)
        sums = [
            float((loss + generator.normal(0, 1, count)).sum()) for loss, count in zip(row_loss, counts, strict=True)
        ]
        low, high = mean_interval(sums, counts.tolist()) or (0, 0)
        held += low <= truth <= high
    assert 0.925 < held / trials < 0.975
