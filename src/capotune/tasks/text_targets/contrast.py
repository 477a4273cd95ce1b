"""In-batch contrast: texts of one label are drawn together, those of different labels apart."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.nn import functional

from capotune.adapters.task_model import Objective, Score
from capotune.data.batches import Batch, Targets

_TEMPERATURE = 0.1


class RowContrast(Objective):
    """Supervised contrast between the rows that go through the model together (P. Khosla et al. 2020, arXiv 2004.11362,
    eq. 2): n rows are n² pairs, where pairs that go through one by one are 2 rows each.

        row i:  − mean over rows j of its label of  log softmax over the rows k ≠ i of  cos(i, k)/0.1,  at j

    A head is not needed, and none is trained.
    """

    metric: ClassVar[str] = "loss"

    def loss(self, model: Any, batch: Batch, label_smoothing: float) -> torch.Tensor:  # noqa: ARG002 - of no label
        """Sum over the rows; one without another of its label adds nothing."""
        assert batch.targets is not None
        return _contrast(self.outputs(model, batch), batch.targets)

    def units(self, targets: Targets, rows: list[int]) -> int:  # noqa: ARG002
        """The rows."""
        return len(rows)

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """Pooled vectors (rows, features) of length 1."""
        return functional.normalize(model.features(batch), dim=1)

    def score(self, outputs: torch.Tensor, targets: Targets) -> Score:
        """(−mean loss,)."""
        assert isinstance(targets, torch.Tensor)
        return (-float(_contrast(outputs, targets)) / len(targets),)

    def shown(self, score: Score) -> float:
        """The mean loss."""
        return -score[0]


def _contrast(vectors: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The sum over the rows, a scalar; vectors (rows, features) of length 1."""
    itself = torch.eye(len(targets), dtype=torch.bool, device=vectors.device)
    similar = (vectors.float() @ vectors.float().t() / _TEMPERATURE).masked_fill(itself, -1e4)
    log_p = functional.log_softmax(similar, 1)
    same = ((targets[:, None] == targets[None]) & ~itself).float()
    return -((log_p * same).sum(1) / same.sum(1).clamp_min(1)).sum()
