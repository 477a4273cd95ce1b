"""Paired differences: published formulas, another way to compute them, and how often they hold the truth."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from capotune.evaluation.metrics import Metric, metric
from capotune.evaluation.pairs import (
    RowCounts,
    _pseudo_values,
    _student_95,
    paired_difference,
    score_interval,
    unpaired_difference,
)

ACCURACY, LOSS, PERPLEXITY, F1 = (metric(name) for name in ("accuracy", "loss", "perplexity", "f1"))
MACRO_F1 = metric("macro_f1")


def right(*correct: int) -> RowCounts:
    return RowCounts.of(ACCURACY, [[one, 1] for one in correct])


def interval(known: Metric, one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    found = paired_difference(known, RowCounts.of(known, one), RowCounts.of(known, other))
    assert found is not None
    assert found.interval is not None
    return found.interval


# --- the counts of rows -----------------------------------------------------------------------------------------------


def test_counts_round_trip_through_json() -> None:
    counts = RowCounts.of(LOSS, [[0.1, 3], [2.5, 4]], [0, 5])
    content = json.loads(json.dumps(counts.to_dict()))
    assert content == {
        "metric": "loss",
        "columns": ["nats", "tokens"],
        "rows": [[0.1, 3], [2.5, 4]],
        "positions": [0, 5],
    }
    again = RowCounts.from_dict(content)
    assert np.array_equal(again.counts, counts.counts)
    assert np.array_equal(again.positions, counts.positions)
    assert right(1, 0).to_dict() == {"metric": "accuracy", "columns": ["correct", "rows"], "rows": [[1, 1], [0, 1]]}


def test_no_rows_round_trip_through_json() -> None:
    assert RowCounts.from_dict(json.loads(json.dumps(right().to_dict()))).counts.shape == (0, 2)


# --- the difference of two techniques ---------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [(12, 9, 3, 1), (0, 0, 1, 20), (5, 0, 0, 5), (0, 0, 1, 0), (3, 40, 15, 200)])
def test_accuracy_has_the_interval_of_bonett_and_price(table: tuple[int, int, int, int]) -> None:
    """Bonett and Price 2012, equation 3: a row is added to both cells in which one technique alone is right."""
    both, first, second, neither = table
    one = [1] * both + [1] * first + [0] * second + [0] * neither
    other = [1] * both + [0] * first + [1] * second + [0] * neither
    rows = sum(table)
    p_first, p_second = (first + 1) / (rows + 2), (second + 1) / (rows + 2)
    middle = p_first - p_second
    reach = 1.959963984540054 * math.sqrt((p_first + p_second - middle**2) / (rows + 2))
    found = paired_difference(ACCURACY, right(*one), right(*other))
    assert found is not None
    assert found.value == pytest.approx((first - second) / rows)
    assert found.interval == pytest.approx((max(-1, middle - reach), min(1, middle + reach)))
    assert found.paired_rows == rows


def test_losses_of_one_token_a_row_have_the_paired_t_interval() -> None:
    generator = np.random.default_rng(0)
    one, other = generator.gamma(2, 1, (2, 12))
    counts = [np.stack([nats, np.ones(12)], 1) for nats in (one, other)]
    reach = 2.200985 * np.std(one - other, ddof=1) / math.sqrt(12)  # Student's quantile with 11 degrees of freedom
    middle = np.mean(one - other)
    assert interval(LOSS, *counts) == pytest.approx((middle - reach, middle + reach), rel=1e-4)


@pytest.mark.parametrize(("freedom", "quantile"), [(2, 4.302653), (4, 2.776445), (10, 2.228139), (100, 1.983972)])
def test_students_quantile_is_near_the_tables(freedom: int, quantile: float) -> None:
    assert _student_95(freedom) == pytest.approx(quantile, rel=0.07 / freedom)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12))
def test_pseudo_values_leave_out_one_row_at_a_time(rows: list[tuple[int, int, int]]) -> None:
    counts = np.array(rows, dtype=float)
    whole = F1.score(counts)
    left_out = [F1.score(np.delete(counts, at, 0)) for at in range(len(rows))]
    expected = [len(rows) * whole - (len(rows) - 1) * score for score in left_out]
    assert _pseudo_values(F1, counts) == pytest.approx(expected)


@pytest.mark.parametrize("known", [LOSS, PERPLEXITY, F1])
def test_the_interval_is_near_that_of_a_paired_bootstrap(known: Metric) -> None:
    generator = np.random.default_rng(1)
    one, other = rows_of(known)(generator, 400)
    drawn = generator.integers(0, 400, (2000, 400))
    assert known.from_sums is not None
    differences = known.from_sums(one[drawn].sum(1)) - known.from_sums(other[drawn].sum(1))
    low, high = np.quantile(differences, [0.025, 0.975])
    assert interval(known, one, other) == pytest.approx((low, high), abs=0.15 * (high - low))


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=12))
def test_macro_f1_and_what_it_is_without_each_row_are_scikit_learns(rows: list[tuple[int, int]]) -> None:
    def expected(some: list[tuple[int, int]]) -> float:
        label, predicted = zip(*some, strict=True)
        return float(f1_score(label, predicted, average="macro", zero_division=0))

    counts = np.array(rows, dtype=np.float64)
    assert MACRO_F1.score(counts) == pytest.approx(expected(rows))
    without = [expected(rows[:at] + rows[at + 1 :]) for at in range(len(rows))]
    assert MACRO_F1.without_each(counts) == pytest.approx(without)


def labelled(rows: int, seed: int) -> np.ndarray:
    """(rows, 2) skewed labels, and predictions that are right for 7 in 10 rows whatever the label."""
    rng = np.random.default_rng(seed)
    label, other = (rng.choice(5, rows, p=[0.6, 0.2, 0.1, 0.06, 0.04]) for _ in range(2))
    return np.stack([label, np.where(rng.random(rows) < 0.7, label, other)], 1)


def test_the_interval_of_macro_f1_holds_the_truth_19_times_in_20() -> None:
    truth, trials = MACRO_F1.score(labelled(300_000, 0)), 300
    found = [score_interval(RowCounts.of(MACRO_F1, labelled(300, 1 + seed))) for seed in range(trials)]
    assert 0.92 * trials <= sum(one is not None and one[0] <= truth <= one[1] for one in found) <= 0.99 * trials


def test_the_difference_of_two_macro_f1_is_known_better_than_each() -> None:
    one = labelled(500, 0)
    other = np.where(np.arange(500)[:, None] < 10, one[:, :1], one)
    low, high = interval(MACRO_F1, other, one)
    alone = score_interval(RowCounts.of(MACRO_F1, one))
    assert alone is not None
    assert 0 < high - low < 0.5 * (alone[1] - alone[0])


def test_no_rows_have_no_interval() -> None:
    assert score_interval(RowCounts.of(MACRO_F1, [])) is None


def test_without_a_row_that_differs_the_interval_keeps_a_width() -> None:
    narrow, wide = (interval(ACCURACY, one, one) for one in (np.ones((300, 2)), np.ones((10, 2))))
    assert narrow == pytest.approx((-0.0092, 0.0092), abs=1e-4)
    assert wide[1] > 0.2


@pytest.mark.parametrize("known", [ACCURACY, LOSS, PERPLEXITY, F1])
def test_swapping_the_techniques_turns_the_interval_round(known: Metric) -> None:
    one, other = rows_of(known)(np.random.default_rng(2), 30)
    low, high = interval(known, one, other)
    assert interval(known, other, one) == pytest.approx((-high, -low))
    assert low < known.score(one) - known.score(other) < high


def test_a_single_row_says_nothing_of_a_loss_and_little_of_an_accuracy() -> None:
    found = paired_difference(LOSS, RowCounts.of(LOSS, [[2.0, 3]]), RowCounts.of(LOSS, [[1.0, 3]]))
    assert found is not None
    assert (found.value, found.interval) == (pytest.approx(1 / 3), None)
    low, high = interval(ACCURACY, np.array([[1.0, 1.0]]), np.array([[0.0, 1.0]]))
    assert low < 0
    assert high > 0.9


def test_only_rows_that_both_have_are_compared() -> None:
    one = RowCounts.of(ACCURACY, [[1, 1], [0, 1], [1, 1]], [1, 4, 6])
    other = RowCounts.of(ACCURACY, [[0, 1], [1, 1], [1, 1]], [0, 4, 6])
    found = paired_difference(ACCURACY, one, other)
    assert found is not None
    assert (found.value, found.paired_rows) == (-0.5, 2)


@pytest.mark.parametrize(
    "other",
    [
        RowCounts.of(ACCURACY, [[1, 1]], [7]),
        RowCounts.of(ACCURACY, []),
        RowCounts.of(ACCURACY, [[math.nan, 1]]),
        RowCounts.of(metric("exact_match"), [[1, 1]]),
    ],
)
def test_rows_that_do_not_match_are_not_paired(other: RowCounts) -> None:
    assert paired_difference(ACCURACY, right(1), other) is None


def test_rows_without_anything_to_find_do_no_harm() -> None:
    nothing = np.zeros((5, 3))
    assert interval(F1, nothing, nothing)[0] < 0 < interval(F1, nothing, nothing)[1]
    one = nothing.copy()
    one[0, 0] = 1
    low, high = interval(F1, one, nothing)
    assert -1 <= low < 0 < high <= 1


def test_an_infinite_perplexity_has_no_difference() -> None:
    one, other = (RowCounts.of(PERPLEXITY, [[nats, 1.0], [1.0, 1.0]]) for nats in (5000.0, 1.0))
    assert paired_difference(PERPLEXITY, one, other) is None


def test_unpaired_a_score_without_an_interval_counts_as_exact() -> None:
    found = unpaired_difference(0.5, None, 0.6, (0.55, 0.64))
    assert found.interval == pytest.approx((-0.14, -0.05))
    assert unpaired_difference(0.5, None, 0.6, None).interval is None
    assert found.paired_rows == 0


# --- how often the interval holds the truth ---------------------------------------------------------------------------

Rows = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


def rows_of(known: Metric) -> Rows:
    """Draws the counts of two techniques, the second a little worse, on rows of which some are harder for both."""

    def accuracy(generator: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
        hard = generator.normal(size=rows)
        one, other = (hard + generator.normal(0, 0.7, rows) < ease for ease in (1.2, 1.0))
        return np.stack([one, np.ones(rows)], 1), np.stack([other, np.ones(rows)], 1)

    def losses(generator: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = generator.integers(1, 40, rows)
        hard = np.exp(generator.normal(0.3, 0.3, rows))
        one, other = (tokens * hard * np.exp(generator.normal(ease, 0.2, rows)) for ease in (0.0, 0.05))
        return np.stack([one, tokens], 1), np.stack([other, tokens], 1)

    def entities(generator: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
        there, hard = generator.poisson(1.5, rows), generator.normal(size=rows)
        both = []
        for ease in (1.2, 1.0):
            chance = 1 / (1 + np.exp(-ease - hard - generator.normal(0, 0.3, rows)))
            found = generator.binomial(there, chance)
            wrong = generator.binomial(there - found, 0.5) + generator.poisson(0.1, rows)
            both.append(np.stack([found, wrong, there - found], 1).astype(float))
        return both[0], both[1]

    return {"accuracy": accuracy, "loss": losses, "perplexity": losses, "f1": entities}[known.name]


@pytest.mark.parametrize("rows", [20, 300])
@pytest.mark.parametrize("known", [ACCURACY, LOSS, PERPLEXITY, F1], ids=lambda known: known.name)
def test_the_interval_holds_the_truth_19_times_in_20(known: Metric, rows: int) -> None:
    draw = rows_of(known)
    one, other = draw(np.random.default_rng(0), 1_000_000)
    truth = known.score(one) - known.score(other)
    generator, trials, held = np.random.default_rng(1), 600, 0
    for _ in range(trials):
        low, high = interval(known, *draw(generator, rows))
        held += low <= truth <= high
    assert 0.92 < held / trials < (0.975 if rows == 300 else 0.999)


def test_pairs_resolve_what_two_separate_scores_do_not() -> None:
    one, other = rows_of(ACCURACY)(np.random.default_rng(3), 1000)
    low, high = interval(ACCURACY, one, other)
    error = math.sqrt(sum(p * (1 - p) / 1000 for p in (ACCURACY.score(one), ACCURACY.score(other))))
    assert high - low < 0.85 * 2 * 1.96 * error
