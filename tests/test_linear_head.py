"""The linear head against scikit-learn, its own gradient, and awkward data."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

from capotune.engine import linear_head
from capotune.engine.linear_head import LinearHead, choose_regularization, solve

EXACT = 1e-14
"""A tolerance for double precision: weights then agree to about its root."""


def problem(
    rows: int, features: int, labels: int, seed: int = 0, dtype: torch.dtype = torch.float64, decay: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy clusters, correlated features of unequal scale, fewer directions that matter the larger ``decay``."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(rows) % labels
    centres = torch.randn(labels, features, generator=generator, dtype=torch.float64)
    x = centres[targets] + 2 * torch.randn(rows, features, generator=generator, dtype=torch.float64)
    x = x * torch.arange(1, features + 1) ** -decay
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64) / features**0.5
    return (x @ mix * torch.logspace(-2, 2, features, dtype=torch.float64) + 3).to(dtype), targets


def standardised(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(0)) / x.std(0, correction=0)


def objective(head: LinearHead, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """F in the coordinates the penalty is meant in."""
    penalty = (head.weight * x.std(0, correction=0)).square().sum()
    return functional.cross_entropy(head.logits(x), targets) + head.regularization * penalty


SHAPES = [(300, 20, 4), (60, 150, 5), (200, 12, 2), (9, 30, 9), (400, 60, 7)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("small_sample", [False, True])
@pytest.mark.parametrize("regularization", [1e-1, 1e-3])
def test_the_optimum_is_that_of_scikit_learn(
    shape: tuple[int, int, int], small_sample: bool, regularization: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, features, labels = shape
    if small_sample:  # so that the span of the sample is not enough
        monkeypatch.setattr(linear_head, "_SAMPLE", min(rows, features) // 4)
    x, targets = problem(rows, features, labels)
    head = solve(x, targets, labels, regularization, EXACT)
    # scikit-learn's own model of two labels has one weight vector, w = w₁ − w₀, with ‖w₀‖² + ‖w₁‖² = ½‖w‖²
    share = 2 if labels == 2 else 1
    model = LogisticRegression(C=share / (2 * regularization * rows), tol=1e-10, max_iter=10_000, solver="newton-cg")
    model.fit(standardised(x).numpy(), targets.numpy())
    expected = torch.as_tensor(model.predict_log_proba(standardised(x).numpy()))
    torch.testing.assert_close(head.logits(x).log_softmax(1), expected, rtol=1e-4, atol=1e-4)
    weight = head.weight * x.std(0, correction=0)
    if labels > 2:
        torch.testing.assert_close(weight, torch.as_tensor(model.coef_), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("small_sample", [False, True])
def test_the_weighted_optimum_is_that_of_scikit_learn(small_sample: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, features, labels = 300, 20, 4
    if small_sample:
        monkeypatch.setattr(linear_head, "_SAMPLE", features // 4)
    x, targets = problem(rows, features, labels)
    weights = torch.tensor([0.2, 3.0, 1.0, 0.5], dtype=torch.float64)
    head = solve(x, targets, labels, 1e-2, EXACT, label_weights=weights)
    model = LogisticRegression(C=1 / (2 * 1e-2 * rows), tol=1e-10, max_iter=10_000, solver="newton-cg")
    model.fit(standardised(x).numpy(), targets.numpy(), sample_weight=weights[targets].numpy())
    expected = torch.as_tensor(model.predict_log_proba(standardised(x).numpy()))
    torch.testing.assert_close(head.logits(x).log_softmax(1), expected, rtol=1e-4, atol=1e-4)


def test_equal_weights_are_none() -> None:
    x, targets = problem(200, 12, 4)
    plain = choose_regularization(x[:150], targets[:150], x[150:], targets[150:], 4)
    ones = torch.ones(4, dtype=torch.float64)
    weighted = choose_regularization(x[:150], targets[:150], x[150:], targets[150:], 4, label_weights=ones)
    assert weighted[1] == plain[1]
    torch.testing.assert_close(weighted[0].weight, plain[0].weight, rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sample", [768, 8])
def test_the_gradient_at_the_solution_vanishes(
    shape: tuple[int, int, int], sample: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_head, "_SAMPLE", sample)
    x, targets = problem(*shape)
    head = solve(x, targets, shape[2], 1e-2, EXACT)
    weight, bias = head.weight.requires_grad_(), head.bias.requires_grad_()
    objective(head, x, targets).backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert float((weight.grad / x.std(0, correction=0)).abs().max()) < 5e-6
    assert float(bias.grad.abs().max()) < 5e-6


@pytest.mark.parametrize("sample", [768, 16])
def test_the_default_tolerance_bounds_the_loss_in_single_precision(
    sample: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_head, "_SAMPLE", sample)
    x, targets = problem(400, 60, 7)
    best = float(objective(solve(x, targets, 7, 1e-3, EXACT), x, targets))
    head = solve(x.float(), targets, 7, 1e-3)
    assert head.weight.dtype == torch.float32
    single = LinearHead(head.weight.double(), head.bias.double(), 1e-3)
    assert best <= float(objective(single, x, targets)) <= best * (1 + 1e-3)


MANY_LABELS = (400, 150, 60)
"""As many as AMX takes, where there is one."""


@pytest.mark.parametrize("sample", [768, 50])
def test_sixteen_bits_are_enough_for_the_default_tolerance(sample: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_head, "_SAMPLE", sample)
    x, targets = problem(*MANY_LABELS)
    best = float(objective(solve(x, targets, 60, 1e-3, EXACT), x, targets))
    head = solve(x.float(), targets, 60, 1e-3)
    single = LinearHead(head.weight.double(), head.bias.double(), 1e-3)
    assert best <= float(objective(single, x, targets)) <= best * (1 + 1e-3)


@pytest.mark.parametrize("shape", [*SHAPES, MANY_LABELS])
@pytest.mark.parametrize("sample", [768, 8])
def test_a_start_near_by_leads_to_the_same_head(
    shape: tuple[int, int, int], sample: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_head, "_SAMPLE", sample)
    x, targets = problem(*shape)
    most = slice(len(x) // 10, None)
    near = solve(x[most], targets[most], shape[2], 1e-2)
    expected, found = solve(x, targets, shape[2], 1e-2, EXACT), solve(x, targets, shape[2], 1e-2, EXACT, near)
    torch.testing.assert_close(found.logits(x), expected.logits(x), rtol=1e-5, atol=1e-5)


def test_a_start_near_by_saves_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    x, targets = problem(400, 60, 7)
    steps, real = [0], linear_head._line_search

    def counted(*arguments: object) -> float:
        steps[0] += 1
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(linear_head, "_line_search", counted)
    solved = solve(x, targets, 7, 1e-3)
    from_nothing, steps[0] = steps[0], 0
    solve(x, targets, 7, 1e-3, near=solved)
    assert steps[0] < from_nothing / 3


def test_scale_and_shift_of_the_features_change_nothing() -> None:
    x, targets = problem(200, 15, 3)
    raw, plain = solve(x, targets, 3, 1e-2, EXACT), solve(standardised(x), targets, 3, 1e-2, EXACT)
    torch.testing.assert_close(raw.logits(x), plain.logits(standardised(x)), rtol=1e-6, atol=1e-6)


def test_a_constant_feature_has_no_weight() -> None:
    x, targets = problem(100, 6, 3, dtype=torch.float32)
    x[:, 2] = 7.25
    head = solve(x, targets, 3, 1e-3)
    assert head.weight[:, 2].tolist() == [0.0, 0.0, 0.0]
    assert head.weight[:, 3].abs().min() > 0


@pytest.mark.parametrize("sample", [768, 8])
def test_duplicated_features_share_the_weight(sample: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_head, "_SAMPLE", sample)
    x, targets = problem(150, 20, 3)
    head = solve(torch.cat([x, x], 1), targets, 3, 1e-2, EXACT)
    torch.testing.assert_close(head.weight[:, :20], head.weight[:, 20:], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("regularization", [1e-1, 1e-5])
@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(6, 4),
        torch.arange(6.0)[:, None].expand(6, 50),
        torch.arange(6.0)[:, None] * torch.logspace(-5, 8, 14),
        torch.eye(6),
    ],
    ids=["constant", "one direction", "very different scales", "separable"],
)
def test_awkward_features_give_a_finite_head(x: torch.Tensor, regularization: float) -> None:
    for targets, labels in ((torch.arange(6), 6), (torch.arange(6) % 2, 2), (torch.zeros(6, dtype=torch.long), 3)):
        head = solve(x, targets, labels, regularization)
        assert bool(head.weight.isfinite().all())
        assert bool(head.bias.isfinite().all())
        assert float(functional.cross_entropy(head.logits(x), targets)) <= torch.tensor(float(labels)).log() + 1e-5


def held_out_losses(x: torch.Tensor, targets: torch.Tensor, labels: int, held: slice, fit: slice) -> dict[float, float]:
    """λ → held-out loss of the exact head, for every λ of the path."""
    return {
        tried: float(
            functional.cross_entropy(solve(x[fit], targets[fit], labels, tried, 1e-8).logits(x[held]), targets[held])
        )
        for tried in linear_head._PATH
    }


@pytest.mark.parametrize("shape", [(300, 20, 4), (90, 150, 3), (500, 40, 2), (240, 30, 12)])
@pytest.mark.parametrize("rough", [linear_head._ROUGH_EXACT, 1e-8])
def test_the_regularization_is_that_of_trying_every_one(
    shape: tuple[int, int, int], rough: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_head, "_ROUGH_EXACT", rough)
    x, targets = problem(*shape)
    held, fit = slice(0, len(x) // 3), slice(len(x) // 3, None)
    losses = held_out_losses(x, targets, shape[2], held, fit)
    head, regularization = choose_regularization(x[fit], targets[fit], x[held], targets[held], shape[2])
    assert regularization == head.regularization
    if rough == 1e-8:
        assert regularization == min(losses, key=losses.__getitem__)
    assert losses[regularization] < 1.03 * min(losses.values())
    exact = solve(x[fit], targets[fit], shape[2], regularization, EXACT)
    gap = objective(head, x[fit], targets[fit]) / objective(exact, x[fit], targets[fit]) - 1
    assert 0 <= float(gap) < 5e-3


def test_a_path_within_a_sample_finds_a_regularization_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    x, targets = problem(900, 60, 5, decay=1.0)
    held, fit = slice(0, 300), slice(300, None)
    losses = held_out_losses(x, targets, 5, held, fit)
    monkeypatch.setattr(linear_head, "_SAMPLE", 30)
    _, regularization = choose_regularization(x[fit], targets[fit], x[held], targets[held], 5)
    assert losses[regularization] < 1.05 * min(losses.values())


def test_the_same_problem_gives_the_same_head() -> None:
    x, targets = problem(300, 40, 5, dtype=torch.float32)
    first, second = solve(x, targets, 5, 1e-3), solve(x, targets, 5, 1e-3)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_head_of_the_cpu() -> None:
    x, targets = problem(300, 40, 5, dtype=torch.float32)
    here, there = solve(x, targets, 5, 1e-2, 1e-6), solve(x.cuda(), targets.cuda(), 5, 1e-2, 1e-6)
    torch.testing.assert_close(here.logits(x), there.logits(x.cuda()).cpu(), rtol=1e-2, atol=1e-2)
