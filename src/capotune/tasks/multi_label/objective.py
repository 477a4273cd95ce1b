"""What training on several labels minimises."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.nn import functional

from capotune.adapters.task_model import Objective, Score
from capotune.data.batches import Batch, Targets
from capotune.tasks.multi_label.thresholds import best_threshold


class LabelCrossEntropy(Objective):
    """Cross-entropy of each label's yes or no, the mean of all labels; held-out rows are scored by micro F1 at the one
    threshold for all labels that is best there, then by loss.

    Targets are (rows, labels) fp32, 1 where a row has the label and 0 where not.
    """

    metric: ClassVar[str] = "micro_f1"

    def loss(self, model: Any, batch: Batch, label_smoothing: float) -> torch.Tensor:
        """Sum of the rows' losses in nats; smoothing moves targets towards a half."""
        assert batch.targets is not None
        logits = self.outputs(model, batch)
        targets = batch.targets * (1 - label_smoothing) + label_smoothing / 2
        return functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / logits.shape[1]

    def units(self, targets: Targets, rows: list[int]) -> int:  # noqa: ARG002 - a row is a unit, whatever its labels
        """The rows."""
        return len(rows)

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """Logits (rows, labels)."""
        logits: torch.Tensor = model.logits(batch)
        return logits

    def score(self, outputs: torch.Tensor, targets: Targets) -> Score:
        """(micro F1, −cross-entropy)."""
        assert isinstance(targets, torch.Tensor)
        _, f1 = best_threshold(outputs.flatten(), targets.flatten())
        return f1, -float(functional.binary_cross_entropy_with_logits(outputs, targets))

    def shown(self, score: Score) -> float:
        """The micro F1."""
        return score[0]
