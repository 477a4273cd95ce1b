"""Thresholds against a search over all of them, and what they come to on rows that nothing was chosen by."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capotune.evaluation.abstaining import answered, rows_needed, sure_enough

ROWS = st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=40)


@settings(max_examples=50)
@given(ROWS, st.sampled_from([0.5, 0.8, 0.9]))
def test_the_threshold_is_the_lowest_that_is_precise_enough_with_one_mistake_more(
    rows: list[tuple[int, bool]], precision: float
) -> None:
    confidence = torch.tensor([sure / 9 for sure, _ in rows], dtype=torch.float64)
    right = torch.tensor([true for _, true in rows], dtype=torch.bool)

    def is_enough(threshold: float) -> bool:
        answers = [true for sure, true in rows if sure / 9 >= threshold]
        return sum(answers) >= precision * (len(answers) + 1) - 1e-9

    good = [sure / 9 for sure, _ in rows if is_enough(sure / 9)]
    assert sure_enough(confidence, right, precision) == (pytest.approx(min(good)) if good else None)


@pytest.mark.parametrize(("precision", "rows"), [(0.5, 1), (0.9, 9), (0.95, 19), (0.99, 99)])
def test_so_many_rows_that_are_all_right_are_enough_and_one_fewer_are_not(precision: float, rows: int) -> None:
    assert rows_needed(precision) == rows
    sure, right = torch.linspace(0.5, 1, rows, dtype=torch.float64), torch.ones(rows, dtype=torch.bool)
    assert sure_enough(sure, right, precision) == pytest.approx(float(sure[0]))
    assert sure_enough(sure[1:], right[1:], precision) is None


def test_new_rows_are_as_precise_as_wanted_on_average() -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        confidence = torch.rand(rows, generator=generator)
        return confidence, torch.rand(rows, generator=generator) < 0.6 + 0.4 * confidence

    found = [sure_enough(*drawn(300), 0.9) for _ in range(200)]
    new = drawn(100_000)
    reached = [answered(*new, one).precision for one in found if one is not None]
    assert len(reached) > 190
    assert 0.9 <= sum(reached) / len(reached) < 0.92


def test_coverage_and_precision_are_those_of_the_rows_at_or_above_the_threshold() -> None:
    confidence, right = torch.tensor([0.9, 0.5, 0.4]), torch.tensor([True, False, True])
    found = answered(confidence, right, 0.5)
    assert (found.coverage, found.precision, found.rows) == (pytest.approx(2 / 3), 0.5, 3)
    nothing = answered(confidence, right, 0.95)
    assert nothing.coverage == 0
    assert math.isnan(nothing.precision)
