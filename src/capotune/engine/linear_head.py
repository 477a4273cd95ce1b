"""A linear head on fixed features, solved to convergence instead of trained in steps.

Multinomial logistic regression is convex: there is one best head, found without a learning rate.

    min over W, b of  F = mean cross-entropy(xWᵀ + b) + λ·‖W‖²        x standardised

The mean may be a weighted one, with a weight for each label. Where a row has a yes or no for each label, the
cross-entropy is the sum of theirs: a logistic regression for each label, with one λ.

λ is chosen on held-out rows along a path from strong to weak, each solution starting the next. Features and the
standardisation are folded into one plain linear layer at the end.

How it is solved: by L-BFGS whose first guess of the inverse curvature is P⁻¹, with

    P = c·Cov(x) + 2λ·I,     c = mean over rows and labels of p(1 − p) at the start

after the bound ½(I − 11ᵀ/labels) ⊗ Cov(x) + 2λ·I of D. Böhning, "Multinomial logistic regression algorithm", Annals of
the Institute of Statistical Mathematics 44 (1992): the same shape, with the curvature found instead of the largest
possible. Most of the work is done in the span of a sample of rows, with far fewer columns. If those are all rows, the
best head lies in their span; if not, the full problem is solved from there, with P known in that span. Products keep
16 bits of each value where AMX is there (``kernels.linear``): the smallest tolerance asked for in
training is far above that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from capotune.events import nothing
from capotune.kernels.execution import reduced_precision
from capotune.kernels.linear import LinearInput, input_gradient

_PATH = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5)
_SMALLEST_STD = 1e-6  # a feature that never varies is left out rather than blown up
_SAMPLE = 768  # rows whose span is searched first
_ROUGH, _ROUGH_EXACT = 5e-3, 1e-3  # tolerances on the path, within a sample's span and where that is all there is
_MAX_STEPS, _HISTORY = 500, 10


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
    features: torch.Tensor,
    targets: torch.Tensor,
    held_features: torch.Tensor,
    held_targets: torch.Tensor,
    labels: int,
    tolerance: float = 2e-3,
    label_weights: torch.Tensor | None = None,
    on_iteration: Callable[[], object] = nothing,
) -> tuple[LinearHead, float]:
    """The head whose held-out cross-entropy is lowest along the path, and its λ.

    Shapes: features (rows, features), targets (rows,) int64 positions of labels, or (rows, labels) fp32 with 1 for yes
    and 0 for no. The path ends when the held-out loss has risen twice in a row.
    On the path the problem is solved roughly and within the sample's span; the λ chosen is then solved to
    ``tolerance``, looser than that of ``solve``: this head is to be judged or trained on, not the final one.
    ``label_weights`` (labels,) multiply the cross-entropy of each label's rows, fitted and held out; None: 1 for each.
    ``on_iteration`` is called before every step of the solver.
    """
    problem = _Problem.of(features, targets, label_weights, on_iteration)
    held = problem.project(held_features)
    head = best = problem.zeros(labels)
    best_loss, worse, chosen = float("inf"), 0, _PATH[0]
    for regularization in _PATH:
        head = problem.minimize_in_span(head, regularization, problem.rough)
        loss = float(_rows(held, held_targets, label_weights).loss(_logits(held, head))[0])
        if loss < best_loss:
            best, best_loss, worse, chosen = head, loss, 0, regularization
        else:
            worse += 1
            if worse == 2:
                break
    return problem.finish(best, chosen, tolerance), chosen


def solve(
    features: torch.Tensor,
    targets: torch.Tensor,
    labels: int,
    regularization: float,
    tolerance: float = 1e-4,
    near: LinearHead | None = None,
    label_weights: torch.Tensor | None = None,
    on_iteration: Callable[[], object] = nothing,
) -> LinearHead:
    """The best head for one λ: F is within about ``tolerance``·F of its minimum. ``near``: one to start from, such as
    that of most of these rows; without it the path is followed. ``label_weights`` as in ``choose_regularization``."""
    problem = _Problem.of(features, targets, label_weights, on_iteration)
    if near is not None:
        return problem.finish(problem.in_span(near), regularization, tolerance)
    head = problem.zeros(labels)
    for stronger in _PATH:
        if stronger > 2 * regularization:
            head = problem.minimize_in_span(head, stronger, problem.rough)
    return problem.finish(head, regularization, tolerance)


@dataclass(frozen=True)
class _Problem:
    """Rows to fit, standardised; a head is one tensor (labels, columns + 1) whose last column is the bias."""

    mean: torch.Tensor
    scale: torch.Tensor
    x: torch.Tensor
    """(rows, features), standardised."""
    targets: torch.Tensor
    label_weights: torch.Tensor | None
    basis: torch.Tensor
    """(features, columns), orthonormal: the principal axes of the rows within the span of a sample of them."""
    variance: torch.Tensor
    """(columns,), along those axes."""
    z: torch.Tensor
    """x·basis, (rows, columns)."""
    exact: bool
    """Whether the best head is sure to lie in the span."""
    on_iteration: Callable[[], object]

    @staticmethod
    def of(
        features: torch.Tensor,
        targets: torch.Tensor,
        label_weights: torch.Tensor | None,
        on_iteration: Callable[[], object],
    ) -> _Problem:
        mean, (rows, columns) = features.mean(0), features.shape
        x = features - mean
        std = torch.linalg.vector_norm(x, dim=0) / rows**0.5
        scale = torch.where(std > _SMALLEST_STD, std.reciprocal(), torch.zeros_like(std))
        x.mul_(scale)
        count = rows if rows <= max(_SAMPLE, columns // 4) else _SAMPLE
        sample = torch.arange(count, device=x.device) * rows // count
        basis = torch.linalg.qr(x[sample].t())[0]
        z = x @ basis
        variance, axes = torch.linalg.eigh(z.t() @ z / rows)
        exact = count == rows or basis.shape[1] == columns
        basis, z, variance = basis @ axes, z @ axes, variance.clamp_min(0)
        return _Problem(mean, scale, x, targets, label_weights, basis, variance, z, exact, on_iteration)

    @property
    def rough(self) -> float:
        """The tolerance on the path."""
        return _ROUGH_EXACT if self.exact else _ROUGH

    def zeros(self, labels: int) -> torch.Tensor:
        return self.z.new_zeros(labels, self.z.shape[1] + 1)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Other rows in the coordinates of ``z``."""
        return (features - self.mean).mul_(self.scale) @ self.basis

    def in_span(self, head: LinearHead) -> torch.Tensor:
        """What is of ``head`` in the coordinates of ``z``."""
        weight = torch.where(self.scale > 0, head.weight / self.scale, 0)
        bias = head.bias + head.weight @ self.mean
        return torch.cat([weight @ self.basis, bias[:, None]], 1)

    def minimize_in_span(self, head: torch.Tensor, regularization: float, tolerance: float) -> torch.Tensor:
        """The best head (labels, columns + 1) within the span, from ``head``."""

        def precondition(gradient: torch.Tensor, c: float) -> torch.Tensor:
            weight = gradient[:, :-1] / (c * self.variance + 2 * regularization)
            return torch.cat([weight, gradient[:, -1:] / c], 1)

        return self._minimize(self.z, head, regularization, precondition, tolerance)

    def finish(self, head: torch.Tensor, regularization: float, tolerance: float) -> LinearHead:
        """The best of all heads, from one within the span, for features as they come."""
        head = self.minimize_in_span(head, regularization, tolerance if self.exact else min(self.rough, 10 * tolerance))
        head = torch.cat([head[:, :-1] @ self.basis.t(), head[:, -1:]], 1)
        if not self.exact:
            columns, span = self.basis.shape
            rest = float((self.scale > 0).sum() - self.variance.sum()) / (columns - span)

            def precondition(gradient: torch.Tensor, c: float) -> torch.Tensor:
                outside = c * rest + 2 * regularization  # P is taken to be this times I outside the span
                inside = (c * self.variance + 2 * regularization).reciprocal() - 1 / outside
                weight = gradient[:, :-1]
                within = input_gradient(weight.contiguous(), self.basis) * inside
                weight = weight / outside + LinearInput(within).linear(self.basis)
                return torch.cat([weight, gradient[:, -1:] / c], 1)

            head = self._minimize(self.x, head, regularization, precondition, tolerance)
        weight = head[:, :-1] * self.scale
        return LinearHead(weight, head[:, -1] - weight @ self.mean, regularization)

    def _minimize(
        self,
        x: torch.Tensor,
        head: torch.Tensor,
        regularization: float,
        precondition: Callable[[torch.Tensor, float], torch.Tensor],
        tolerance: float,
    ) -> torch.Tensor:
        rows = _rows(x, self.targets, self.label_weights)
        return _minimize(rows, head, regularization, precondition, tolerance, self.on_iteration)


class _Rows(Protocol):
    """What is fitted, and how logits (labels, rows) meet the targets."""

    @property
    def x(self) -> torch.Tensor:
        """(rows, columns)."""

    def loss(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean loss, a scalar, and the probabilities (labels, rows)."""

    def curvature(self, p: torch.Tensor) -> float:
        """The mean of p(1 − p)."""

    def residual(self, p: torch.Tensor) -> torch.Tensor:
        """The gradient of the mean loss by the logits (labels, rows), in place of the probabilities ``p``."""

    def along(self, logits: torch.Tensor, step: torch.Tensor) -> Callable[[float], tuple[torch.Tensor, torch.Tensor]]:
        """From t to the first and second derivative by t of the mean loss at logits + t·step, scalars."""


def _rows(x: torch.Tensor, targets: torch.Tensor, label_weights: torch.Tensor | None) -> _Rows:
    """Rows of one label each, or where targets are (rows, labels), of a yes or no for each label."""
    if targets.dim() == 2:
        return _YesOrNo(x, targets.t())
    return _OneLabel(x, targets, None if label_weights is None else label_weights[targets])


@dataclass(frozen=True)
class _OneLabel:
    """Targets (rows,), and the weights (rows,) of the rows' losses; None: 1 for each."""

    x: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor | None

    def loss(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_p = torch.log_softmax(logits, 0)
        return -self._mean(self._at_target(log_p)), log_p.exp_()

    def curvature(self, p: torch.Tensor) -> float:
        return float(self._mean(p * (1 - p)))

    def residual(self, p: torch.Tensor) -> torch.Tensor:
        p[self.targets, torch.arange(len(self.targets), device=p.device)] -= 1
        p /= len(self.x)
        return p if self.weights is None else p.mul_(self.weights)

    def along(self, logits: torch.Tensor, step: torch.Tensor) -> Callable[[float], tuple[torch.Tensor, torch.Tensor]]:
        target = self._mean(self._at_target(step))

        def at(t: float) -> tuple[torch.Tensor, torch.Tensor]:
            p = torch.softmax(torch.add(logits, step, alpha=t), 0).mul_(step)
            mean = p.sum(0)
            return self._mean(mean) - target, self._mean(p.mul_(step).sum(0) - mean.square())

        return at

    def _mean(self, values: torch.Tensor) -> torch.Tensor:
        """The weighted mean of a value of each row."""
        return (values if self.weights is None else values * self.weights).mean()

    def _at_target(self, values: torch.Tensor) -> torch.Tensor:
        """Of values (labels, rows) those of each row's own label, (rows,)."""
        return values[self.targets, torch.arange(len(self.targets), device=values.device)]


@dataclass(frozen=True)
class _YesOrNo:
    """Targets (labels, rows), 1 for yes and 0 for no; a row's loss is the sum of its labels'."""

    x: torch.Tensor
    targets: torch.Tensor

    def loss(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        losses = functional.softplus(logits) - self.targets * logits
        return losses.sum() / len(self.x), logits.sigmoid()

    def curvature(self, p: torch.Tensor) -> float:
        return float((p * (1 - p)).mean())

    def residual(self, p: torch.Tensor) -> torch.Tensor:
        return p.sub_(self.targets).div_(len(self.x))

    def along(self, logits: torch.Tensor, step: torch.Tensor) -> Callable[[float], tuple[torch.Tensor, torch.Tensor]]:
        def at(t: float) -> tuple[torch.Tensor, torch.Tensor]:
            p = torch.add(logits, step, alpha=t).sigmoid_()
            second = (p * (1 - p) * step.square()).sum()
            return ((p - self.targets) * step).sum() / len(self.x), second / len(self.x)

        return at


def _minimize(
    rows: _Rows,
    head: torch.Tensor,
    regularization: float,
    precondition: Callable[[torch.Tensor, float], torch.Tensor],
    tolerance: float,
    on_iteration: Callable[[], object],
) -> torch.Tensor:
    """L-BFGS with an exact line search, until the loss still to gain, about ½·gᵀP⁻¹g, is below ``tolerance``·F.

    Along a line the logits are linear, so a step costs two products with x, however often the line search looks.
    """
    logits = _logits(rows.x, head)
    pairs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # step s, change of gradient y, s·y
    before, before_p, step = head, head, head
    c = 0.0
    for number in range(_MAX_STEPS):
        on_iteration()
        loss, p = rows.loss(logits)
        loss = loss + regularization * head[:, :-1].square().sum()
        if number == 0:
            c = max(rows.curvature(p), 1e-8)
        residual = rows.residual(p)
        weight = _gradient(residual, rows.x).add_(head[:, :-1], alpha=2 * regularization)
        gradient = torch.cat([weight, residual.sum(1)[:, None]], 1)
        preconditioned = precondition(gradient, c)
        if float(_dot(gradient, preconditioned)) <= 2 * tolerance * float(loss):
            break
        direction, scale = gradient, gradient.new_ones(())
        if number:
            change = gradient - before
            curvature = _dot(step, change)
            scale = curvature / _dot(change, preconditioned - before_p)
            pairs = [*pairs[1 - _HISTORY :], (step, change, curvature)]
        weights = []
        for s, y, sy in reversed(pairs):
            weights.append(_dot(s, direction) / sy)
            direction = direction - weights[-1] * y
        direction = scale * precondition(direction, c) if pairs else preconditioned
        for s, y, sy in pairs:
            direction = direction + (weights.pop() - _dot(y, direction) / sy) * s
        direction = -direction
        along = _logits(rows.x, direction)
        length = _line_search(logits, along, rows, head, direction, regularization, float(_dot(gradient, direction)))
        if not length > 0:
            break  # rounding leaves nothing to gain
        step, before, before_p = length * direction, gradient, preconditioned
        head = head + step
        logits = logits.add_(along, alpha=length)
    return head


def _line_search(
    logits: torch.Tensor,
    along: torch.Tensor,
    rows: _Rows,
    head: torch.Tensor,
    direction: torch.Tensor,
    regularization: float,
    slope: float,
) -> float:
    """The length t at which F(head + t·direction), convex in t, is flat to a tenth of its slope at 0.

    Newton's method in one dimension, kept between the longest length known too short and the shortest too long.
    """
    if not slope < 0:
        return 0.0
    derivatives = rows.along(logits, along)
    w, d = head[:, :-1], direction[:, :-1]
    linear, square = 2 * regularization * _dot(w, d), 2 * regularization * _dot(d, d)
    low, high, t = 0.0, float("inf"), 1.0
    for _ in range(20):
        once, twice = derivatives(t)
        first, second = float(once + linear + t * square), float(twice + square)
        if abs(first) <= 0.1 * -slope:
            break
        low, high = (t, high) if first < 0 else (low, t)
        t = t - first / second if second > 0 else high
        if not low < t < min(high, 10 * low + 10):
            t = (low + high) / 2 if high < float("inf") else 10 * low
    return t


def _logits(x: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """(labels, rows): a matrix with few rows before one with many is the quicker way round on a CPU."""
    with reduced_precision():
        return LinearInput(head[:, :-1]).linear(x).add_(head[:, -1:])


def _gradient(residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(labels, columns) of (labels, rows)."""
    with reduced_precision():
        return input_gradient(residual, x)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.dot(a.flatten(), b.flatten())
