"""A linear head for numbers on fixed features, in closed form: ridge regression.

    min over W, b of  mean over rows of ‖xWᵀ + b − y‖² + λ·‖W‖²        x standardised

λ is the one of the path whose leave-one-out error is least: what each row's number would be predicted as by the others.
With H = x(xᵀx + nλI)⁻¹xᵀ + 11ᵀ/n it needs no second fit: the error of row i without row i is the error with it over
1 − Hᵢᵢ (D. M. Allen, "The relationship between variable selection and data augmentation and a method for prediction",
Technometrics 16 (1974), 125-127). One eigendecomposition, of xᵀx or of xxᵀ, whichever is smaller, serves every λ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from capotune.engine.linear_head import LinearHead

_PATH = tuple(10 ** (exponent / 2) for exponent in range(8, -7, -1))
_SMALLEST_STD = 1e-6  # a feature that never varies is left out rather than blown up
_NOTHING = 1e-6  # of what rounding leaves, beside what there is


def choose_ridge(features: torch.Tensor, targets: torch.Tensor) -> float:
    """The λ with the least leave-one-out error; features (rows, features), targets (rows, numbers), of two
    rows or more."""
    problem = _Problem.of(features, targets)
    return min(_PATH, key=problem.left_out_error)


def solve_ridge(features: torch.Tensor, targets: torch.Tensor, regularization: float) -> LinearHead:
    """The best head for one λ, for features as they come; shapes as in ``choose_ridge``."""
    return _Problem.of(features, targets).head(regularization)


@dataclass(frozen=True)
class _Problem:
    mean: torch.Tensor
    scale: torch.Tensor
    middle: torch.Tensor
    """(numbers,), the targets' means."""
    x: torch.Tensor
    """(rows, features), standardised."""
    y: torch.Tensor
    """(rows, numbers), without their means."""
    axes: torch.Tensor
    """(rows, axes), orthonormal: the left singular vectors of x."""
    squares: torch.Tensor
    """(axes,), the squared singular values."""

    @staticmethod
    def of(features: torch.Tensor, targets: torch.Tensor) -> _Problem:
        mean, middle, (rows, columns) = features.mean(0), targets.mean(0), features.shape
        x = features - mean
        std = torch.linalg.vector_norm(x, dim=0) / rows**0.5
        scale = torch.where(std > _SMALLEST_STD, std.reciprocal(), torch.zeros_like(std))
        x.mul_(scale)
        if rows <= columns:
            squares, axes = torch.linalg.eigh(x @ x.t())
        else:
            squares, right = torch.linalg.eigh(x.t() @ x)
            axes = x @ right
            axes.mul_(torch.where(squares > squares.max() * _NOTHING, squares, torch.inf).rsqrt())
        return _Problem(mean, scale, middle, x, targets - middle, axes, squares.clamp_min(0))

    def left_out_error(self, regularization: float) -> float:
        """The mean squared error of each row by a head that was fitted to the others."""
        rows = len(self.x)
        shares = self.squares / (self.squares + rows * regularization)
        fitted = self.axes @ (shares[:, None] * (self.axes.t() @ self.y))
        left = 1 - self.axes.square() @ shares - 1 / rows
        return float(((self.y - fitted) / left.clamp_min(_NOTHING)[:, None]).square().mean())

    def head(self, regularization: float) -> LinearHead:
        """For features as they come."""
        shrunk = (self.squares + len(self.x) * regularization).reciprocal()
        along = self.axes @ (shrunk[:, None] * (self.axes.t() @ self.y))
        weight = (self.x.t() @ along).t() * self.scale
        return LinearHead(weight, self.middle - weight @ self.mean, regularization)
