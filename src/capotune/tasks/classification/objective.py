"""How held-out rows are scored where labels are skewed."""

from __future__ import annotations

from typing import ClassVar

import torch

from capotune.evaluation.metrics import metric
from capotune.tasks.text_targets.objective import RowCrossEntropy


class SkewedCrossEntropy(RowCrossEntropy):
    """The same where labels are skewed: held-out rows are scored by macro F1, then by loss."""

    metric: ClassVar[str] = "macro_f1"

    def _compared(self, predicted: torch.Tensor, targets: torch.Tensor) -> float:
        return metric(self.metric).score(torch.stack([targets, predicted], 1).numpy())
