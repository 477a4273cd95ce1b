"""How a head for numbers is solved on features."""

from __future__ import annotations

from collections.abc import Callable

import torch

from capotune.engine.linear_head import LinearHead
from capotune.engine.numbers_head import choose_ridge, solve_ridge
from capotune.tasks.solved_head import HeadSolver


class RidgeSolver(HeadSolver):
    """Ridge regression in closed form; targets (units, numbers) fp32. λ is chosen by the leave-one-out error of the
    units that are fitted: those held out are left to judge it."""

    def choose(
        self,
        features: torch.Tensor,
        targets: torch.Tensor,
        held_features: torch.Tensor,  # noqa: ARG002
        held_targets: torch.Tensor,  # noqa: ARG002
        on_iteration: Callable[[], object],
    ) -> tuple[LinearHead, float]:
        """The least leave-one-out error."""
        on_iteration()
        regularization = choose_ridge(features, targets)
        return solve_ridge(features, targets, regularization), regularization

    def solve(
        self,
        features: torch.Tensor,
        targets: torch.Tensor,
        regularization: float,
        near: LinearHead | None,  # noqa: ARG002 - it is found at once
        on_iteration: Callable[[], object],
    ) -> LinearHead:
        """At once."""
        on_iteration()
        return solve_ridge(features, targets, regularization)
