"""Ridge regression in closed form, beside scikit-learn and beside leaving each row out."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.preprocessing import StandardScaler

from capotune.engine.numbers_head import _PATH, choose_ridge, solve_ridge
from capotune.evaluation.neighbours import NEIGHBOURS, neighbours_mean
from capotune.tasks.multi_label.thresholds import best_threshold, choose_thresholds
from capotune.tasks.regression.intervals import choose_margins


def problem(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = 3 * torch.randn(rows, columns, generator=generator) + 1
    x[:, 0] = 2  # one that never varies
    y = 0.3 * x @ torch.randn(columns, 2, generator=generator) + torch.randn(rows, 2, generator=generator) + 5
    return x, y


@pytest.mark.parametrize(("rows", "columns"), [(40, 60), (120, 30), (30, 30)])
def test_head_is_scikit_learns_and_lambda_is_that_of_leaving_each_row_out(rows: int, columns: int) -> None:
    x, y = problem(rows, columns)
    chosen = choose_ridge(x, y)
    scaled = StandardScaler().fit_transform(x.double().numpy())
    search = RidgeCV([rows * one for one in _PATH], scoring="neg_mean_squared_error").fit(scaled, y.numpy())
    assert search.alpha_ == pytest.approx(rows * chosen)
    head = solve_ridge(x, y, chosen)
    expected = Ridge(alpha=rows * chosen).fit(scaled, y.double().numpy()).predict(scaled)
    torch.testing.assert_close(head.logits(x), torch.from_numpy(expected).float(), rtol=1e-3, atol=1e-3)


def test_neighbours_mean_is_that_of_the_most_similar_rows() -> None:
    x, y = problem(50, 8)
    similar = torch.nn.functional.cosine_similarity(x[:1], x[1:])
    expected = y[1:][similar.argsort(descending=True)[:NEIGHBOURS]].mean(0)
    torch.testing.assert_close(neighbours_mean(x[1:], y[1:], x[:1])[0], expected)


def test_margin_holds_nine_in_ten_rows_and_needs_nine() -> None:
    generator = torch.Generator().manual_seed(0)
    errors = torch.randn(2000, 1, generator=generator)
    margins = choose_margins(errors[:500], torch.zeros(500, 1))
    assert margins is not None
    assert (errors[500:].abs() <= margins[0]).float().mean() == pytest.approx(0.9, abs=0.03)
    assert choose_margins(errors[:8], torch.zeros(8, 1)) is None
    assert choose_margins(errors[:9], torch.zeros(9, 1)) == [float(errors[:9].abs().max())]


def test_threshold_has_the_best_f1_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, generator=generator).round(decimals=1)
    targets = (logits + torch.randn(60, generator=generator) > 0.8).float()

    def f1(threshold: float) -> float:
        said = logits >= threshold
        return float(2 * (said * targets).sum() / (said.sum() + targets.sum()))

    threshold, best = best_threshold(logits, targets)
    assert f1(threshold) == pytest.approx(best)
    assert best == pytest.approx(max(f1(float(one)) for one in logits))


def test_rare_labels_share_a_threshold_and_none_is_a_half() -> None:
    logits = torch.linspace(-4, 4, 40)[:, None].expand(40, 3).contiguous()
    logits[:, 0] -= 3
    targets = torch.zeros(40, 3)
    targets[28:, 0], targets[12:15, 1] = 1, 1
    first, second, third = choose_thresholds(logits, targets)
    assert second == third
    assert first != pytest.approx(second)
    assert choose_thresholds(logits, torch.zeros(40, 3)) == [0.5, 0.5, 0.5]
