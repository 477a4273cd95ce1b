"""Scores of written answers and of loss, against other ways to compute them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from capotune.evaluation.metrics import (
    Metric,
    exact_match,
    label_scores,
    mean_interval,
    metric,
    perplexity,
    register,
    rouge_l,
    wilson_interval,
)  # fmt: skip

# --- the registry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "counts", "score"),
    [
        ("accuracy", [[1, 1], [0, 1], [1, 1], [1, 1]], 3 / 4),
        ("exact_match", [[1, 1], [0, 1]], 1 / 2),
        ("rouge_l", [[0.5, 1], [1.0, 1]], 3 / 4),
        ("loss", [[3.0, 2], [1.0, 6]], 1 / 2),
        ("perplexity", [[3.0, 2], [1.0, 6]], math.exp(1 / 2)),
        ("f1", [[2, 1, 0], [1, 0, 3]], 6 / 10),
        ("f1", [[0, 0, 0]], 0.0),
        ("loss", [[0.0, 0]], 0.0),
    ],
)
def test_a_score_is_made_of_the_sums_of_its_counts(name: str, counts: list[list[float]], score: float) -> None:
    assert metric(name).score(np.array(counts, dtype=float)) == pytest.approx(score)
    assert len(metric(name).columns) == len(counts[0])


def test_the_f1_of_entities_is_scikit_learns_of_single_labels() -> None:
    from sklearn.metrics import f1_score

    generator = np.random.default_rng(0)
    true, predicted = generator.integers(0, 2, (2, 50))
    counts = np.stack([true & predicted, predicted & ~true & 1, true & ~predicted & 1], 1)
    assert metric("f1").score(counts.astype(float)) == pytest.approx(f1_score(true, predicted))


def test_each_label_has_its_own_scores() -> None:
    targets, predicted = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1])
    found = label_scores(predicted, targets, ["a", "b", "none of them"])
    assert found["a"] == {"precision": 1.0, "recall": pytest.approx(2 / 3), "f1": pytest.approx(0.8), "rows": 3}
    assert found["b"] == {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "rows": 1}
    assert found["none of them"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "rows": 0}


def test_metrics_know_their_words_and_direction() -> None:
    assert [metric(name).words for name in ("rouge_l", "exact_match", "f1")] == ["ROUGE-L", "exact match", "F1"]
    lower = [name for name in ("accuracy", "f1", "loss", "perplexity", "macro_f1") if not metric(name).higher_is_better]
    assert lower == ["loss", "perplexity"]
    assert [metric(name).is_proportion for name in ("accuracy", "exact_match", "f1", "rouge_l")] == [1, 1, 0, 0]


def test_an_unknown_metric_is_shown_as_it_is_until_it_is_registered() -> None:
    assert metric("mean_rank") == Metric("mean_rank", "mean rank")
    own = register(Metric("mean_rank_of_a_test", "mean rank", "where the right one stands", higher_is_better=False))
    assert metric("mean_rank_of_a_test") is own


@pytest.mark.parametrize(
    ("value", "name", "text"),
    [
        (12.345, "perplexity", "12.3"),
        (1.2, "loss", "1.20"),
        (0.0123, "loss", "0.0123"),
        (1234.5, "perplexity", "1,234"),
        (0.0, "loss", "0.00"),
        (math.inf, "perplexity", "inf"),
        (math.nan, "loss", "-"),
        (0.4531, "rouge_l", "45.3 %"),
    ],
)
def test_scores_have_three_digits(value: float, name: str, text: str) -> None:
    assert metric(name).text(value) == text


@pytest.mark.parametrize(
    ("value", "base", "name", "text"),
    [(12.34, 41.2, "perplexity", "-28.9"), (12.34, 812.0, "perplexity", "-800"), (0.71, 0.03, "exact_match", "+68.0"),
     (12.3, math.inf, "perplexity", "-"), (0.456, 0.412, "loss", "+0.044"), (0.5, 0.5004, "accuracy", "+0.0")],
)  # fmt: skip
def test_a_difference_is_no_more_exact_than_its_scores(value: float, base: float, name: str, text: str) -> None:
    assert metric(name).difference_text(value - base, max(value, base)) == text


# --- labels, answers and losses ---------------------------------------------------------------------------------------

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


@pytest.mark.parametrize(
    ("successes", "rows", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_matches_the_published_examples(successes: int, rows: int, low: float, high: float) -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3 (score, no continuity correction)."""
    assert wilson_interval(successes / rows, rows) == pytest.approx((low, high), abs=6e-5)
    assert wilson_interval(0.5, 0) == (0.0, 1.0)


@pytest.mark.parametrize("score", [0.0, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("rows", [0, 1, 10, 3080])
def test_wilson_holds_the_score_and_stays_in_range(score: float, rows: int) -> None:
    low, high = wilson_interval(score, rows)
    assert 0 <= low <= score <= high <= 1
    assert low < high


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
