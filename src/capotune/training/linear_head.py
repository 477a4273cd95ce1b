"""A linear head on fixed features, solved to convergence instead of trained in steps.

Multinomial logistic regression is convex: L-BFGS finds the one best head in seconds, without a learning rate.

    min over W, b of  mean cross-entropy(xWᵀ + b) + λ·‖W‖²        x standardised

λ is chosen on held-out rows along a path from strong to weak, each solution starting the next. Features and the
standardisation are folded into one plain linear layer at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

_PATH = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5)
_SMALLEST_STD = 1e-6  # a feature that never varies is left out rather than blown up


@dataclass(frozen=True)
class LinearHead:
    """weight (labels, features) and bias (labels,) for features as they come, not standardised."""

    weight: torch.Tensor
    bias: torch.Tensor
    regularization: float
    """The λ it was solved with."""

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """(rows, features) → (rows, labels)."""
        return functional.linear(features, self.weight, self.bias)


def choose_regularization(
    features: torch.Tensor, targets: torch.Tensor, held_features: torch.Tensor, held_targets: torch.Tensor, labels: int
) -> tuple[LinearHead, float]:
    """The head whose held-out cross-entropy is lowest along the path, and its λ.

    Shapes: features (rows, features), targets (rows,). The path ends when the held-out loss has risen twice in a row.
    """
    best: LinearHead | None = None
    best_loss, worse, start = float("inf"), 0, None
    for regularization in _PATH:
        head, start = _solve(features, targets, labels, regularization, start)
        loss = float(functional.cross_entropy(head.logits(held_features), held_targets))
        if loss < best_loss:
            best, best_loss, worse = head, loss, 0
        else:
            worse += 1
            if worse == 2:
                break
    assert best is not None
    return best, best.regularization


def solve(features: torch.Tensor, targets: torch.Tensor, labels: int, regularization: float) -> LinearHead:
    """The best head for one λ."""
    return _solve(features, targets, labels, regularization, None)[0]


def _solve(
    features: torch.Tensor, targets: torch.Tensor, labels: int, regularization: float, start: torch.Tensor | None
) -> tuple[LinearHead, torch.Tensor]:
    """The head and the solution in standardised coordinates (features + 1, labels), to start the next from."""
    mean, std = features.mean(0), features.std(0, correction=0)
    scale = torch.where(std > _SMALLEST_STD, std.reciprocal(), torch.zeros_like(std))
    x = (features - mean).mul_(scale)
    packed = x.new_zeros(x.shape[1] + 1, labels) if start is None else start.clone()
    packed = _lbfgs(x, targets, regularization, packed)
    weight = (packed[:-1] * scale[:, None]).t().contiguous()
    return LinearHead(weight, packed[-1] - weight @ mean, regularization), packed


def _lbfgs(x: torch.Tensor, targets: torch.Tensor, regularization: float, packed: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(len(x), device=x.device)
    solver = torch.optim.LBFGS(
        [packed],
        max_iter=100,
        history_size=10,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
    )

    @torch.no_grad()
    def closure() -> torch.Tensor:
        weight, bias = packed[:-1], packed[-1]
        log_p = torch.log_softmax(torch.addmm(bias, x, weight), dim=1)
        loss = -log_p[rows, targets].mean() + regularization * weight.square().sum()
        residual = log_p.exp_()  # d loss / d logits = (p − onehot) / rows
        residual[rows, targets] -= 1
        residual /= len(x)
        packed.grad = torch.cat([x.t() @ residual + 2 * regularization * weight, residual.sum(0, keepdim=True)])
        return loss

    solver.step(closure)  # type: ignore[no-untyped-call]
    return packed
