"""What training minimises where a row has one class, and how held-out rows are scored while it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional

from capotune.adapters.task_model import Objective, Score
from capotune.data.batches import Batch, Targets


@dataclass(frozen=True)
class RowCrossEntropy(Objective):
    """Cross-entropy of a row's label; held-out rows are scored by accuracy, then by loss."""

    weights: Sequence[float] = ()
    """Of each label's rows; empty: 1 for each."""

    metric: ClassVar[str] = "accuracy"

    def loss(self, model: Any, batch: Batch, label_smoothing: float) -> torch.Tensor:
        """Sum of the rows' weighted cross-entropies in nats."""
        assert batch.targets is not None
        logits = self.outputs(model, batch)
        return functional.cross_entropy(
            logits, batch.targets, self._weights(logits), reduction="sum", label_smoothing=label_smoothing
        )

    def units(self, targets: Targets, rows: list[int]) -> int:  # noqa: ARG002 - a row is a unit, whatever its label
        """The rows."""
        return len(rows)

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """Logits (rows, labels)."""
        logits: torch.Tensor = model.logits(batch)
        return logits

    def score(self, outputs: torch.Tensor, targets: Targets) -> Score:
        """(``metric``, −weighted cross-entropy)."""
        assert isinstance(targets, torch.Tensor)
        loss = functional.cross_entropy(outputs, targets, self._weights(outputs))
        return self._compared(outputs.argmax(1), targets), -float(loss)

    def shown(self, score: Score) -> float:
        """The ``metric``."""
        return score[0]

    def _compared(self, predicted: torch.Tensor, targets: torch.Tensor) -> float:
        return float((predicted == targets).float().mean())

    def _weights(self, logits: torch.Tensor) -> torch.Tensor | None:
        return torch.tensor(self.weights, device=logits.device, dtype=logits.dtype) if self.weights else None
