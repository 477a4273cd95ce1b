"""What training on numbers minimises."""

from __future__ import annotations

from typing import Any

import torch

from capotune.adapters.task_model import Objective, Score
from capotune.data.batches import Batch, Targets
from capotune.tasks.regression.score import compared_metric


class SquaredError(Objective):
    """Squared error of standardised numbers, the mean of all of a row; held-out rows are scored by its root, in the
    number's own unit where there is one, in standard deviations where there are several.

    Targets are (rows, numbers) fp32, in standard deviations of the training rows from their mean.
    """

    def __init__(self, scales: tuple[float, ...]) -> None:
        self.metric = compared_metric(len(scales))  # type: ignore[misc]
        self.unit = scales[0] if len(scales) == 1 else 1.0

    def loss(self, model: Any, batch: Batch, label_smoothing: float) -> torch.Tensor:  # noqa: ARG002 - it is for classes
        """Sum of the rows' losses."""
        assert batch.targets is not None
        return (self.outputs(model, batch) - batch.targets).square().mean(1).sum()

    def units(self, targets: Targets, rows: list[int]) -> int:  # noqa: ARG002 - a row is a unit, whatever its numbers
        """The rows."""
        return len(rows)

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """Standardised numbers (rows, numbers)."""
        outputs: torch.Tensor = model.logits(batch)
        return outputs

    def score(self, outputs: torch.Tensor, targets: Targets) -> Score:
        """(−root mean squared error,)."""
        assert isinstance(targets, torch.Tensor)
        return (-self.unit * float((outputs - targets).square().mean().sqrt()),)

    def shown(self, score: Score) -> float:
        """The root mean squared error."""
        return -score[0]
