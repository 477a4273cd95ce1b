"""How held-out rows are scored while a head learns labels of an order."""

from __future__ import annotations

from typing import ClassVar

import torch

from capotune.adapters.task_model import Score
from capotune.data.batches import Targets
from capotune.tasks.ordinal.score import median_label
from capotune.tasks.text_targets.objective import RowCrossEntropy


class OrdinalCrossEntropy(RowCrossEntropy):
    """Cross-entropy of a row's label; held-out rows are scored by how many steps the median label is off, then by
    loss."""

    metric: ClassVar[str] = "steps"

    def score(self, outputs: torch.Tensor, targets: Targets) -> Score:
        """(−mean steps, −cross-entropy)."""
        assert isinstance(targets, torch.Tensor)
        _, loss = super().score(outputs, targets)
        return -float((median_label(outputs.softmax(1)) - targets).abs().float().mean()), loss

    def shown(self, score: Score) -> float:
        """The mean steps."""
        return -score[0]
