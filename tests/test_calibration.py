"""Temperature and calibration error against a search over all temperatures and values worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from capotune.evaluation.calibration import confidence_bins, expected_calibration_error, fit_temperature


def drawn(rows: int, labels: int, scale: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets drawn from softmax(z), and logits ``scale``·z, whose right temperature is ``scale``."""
    generator = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(rows, labels, generator=generator)
    return scale * z, torch.multinomial(z.softmax(1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_the_temperature_undoes_a_scale(scale: float) -> None:
    assert fit_temperature(*drawn(20_000, 5, scale)) == pytest.approx(scale, rel=0.03)


def test_no_other_temperature_has_a_lower_cross_entropy() -> None:
    logits, targets = drawn(2_000, 4, 2.5)
    found = fit_temperature(logits, targets)
    losses = [float(functional.cross_entropy(logits / (found * factor), targets)) for factor in (0.97, 1, 1.03)]
    assert losses[1] == min(losses)


@pytest.mark.parametrize("rows", [0, 4])
def test_few_rows_that_are_all_right_leave_the_temperature_at_1(rows: int) -> None:
    assert fit_temperature(4 * torch.eye(4)[:rows], torch.arange(4)[:rows]) == 1


def test_many_rows_that_are_all_right_do_not_make_it_0() -> None:
    assert 0.05 < fit_temperature(torch.eye(4).repeat(50, 1), torch.arange(4).repeat(50)) < 0.5


def test_calibrated_logits_are_left_as_they_are_19_times_in_20() -> None:
    found = [fit_temperature(*drawn(300, 4, 1.0, seed)) for seed in range(100)]
    assert 88 <= found.count(1.0) <= 99


def test_predicted_labels_stay() -> None:
    logits, targets = drawn(500, 7, 4.0)
    assert torch.equal((logits / fit_temperature(logits, targets)).argmax(1), logits.argmax(1))


def test_bins_hold_equally_many_rows_and_the_error_is_their_mean_gap() -> None:
    sure = torch.tensor([0.6, 0.9, 0.7, 0.8])
    targets = torch.tensor([1, 0, 0, 0])  # the first row is predicted 0 and is 1
    bins = confidence_bins(torch.stack([sure, 1 - sure], 1), targets, bins=2)
    assert [(one.confidence, one.accuracy, one.rows) for one in bins] == [
        (pytest.approx(0.65), 0.5, 2),
        (pytest.approx(0.85), 1.0, 2),
    ]
    assert expected_calibration_error(bins) == pytest.approx((0.15 + 0.15) / 2)


def test_fewer_rows_than_bins_give_a_bin_each_and_none_give_no_error() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    assert [one.rows for one in confidence_bins(probabilities, torch.tensor([0, 1]))] == [1, 1]
    assert expected_calibration_error(confidence_bins(probabilities[:0], torch.tensor([], dtype=torch.long))) == 0


def test_calibrated_rows_have_a_small_error_and_overconfident_ones_a_large_one() -> None:
    logits, targets = drawn(20_000, 5, 3.0)
    before, after = (
        expected_calibration_error(confidence_bins((logits / scale).softmax(1), targets)) for scale in (1, 3)
    )
    assert before > 0.1
    assert after < 0.02
