"""What training minimises, and how held-out sentences are scored while it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional

from capotune.adapters.task_model import Objective, Score
from capotune.data.batches import IGNORE_INDEX, Batch, Targets
from capotune.tasks.token_classification.spans import EntityCounts, count


@dataclass(frozen=True)
class WordCrossEntropy(Objective):
    """Cross-entropy of each word's tag; held-out sentences are scored by entity F1, then by loss."""

    labels: tuple[str, ...]
    """Tags; a target is a position in this tuple."""

    metric: ClassVar[str] = "f1"

    def loss(self, model: Any, batch: Batch, label_smoothing: float) -> torch.Tensor:
        """Sum of the words' cross-entropies in nats."""
        targets, _ = _words(batch)
        logits = model.logits(batch).float()
        return functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)

    def units(self, targets: Targets, rows: list[int]) -> int:
        """The words, one at least."""
        words = sum(int(label != IGNORE_INDEX) for row in rows for label in targets[row])
        return max(1, words)

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """Of each row (sum of its losses in nats, words, entities found, wrongly predicted, missed), (rows, 5)."""
        targets, at = _words(batch)
        row = torch.searchsorted(batch.starts, at, right=True) - 1
        words = torch.bincount(row, minlength=len(batch.starts) - 1)
        return self.of_logits(model.logits(batch), targets, words.tolist())

    def of_logits(self, logits: torch.Tensor, targets: torch.Tensor, words: Sequence[int]) -> torch.Tensor:
        """``outputs`` of rows with so many ``words`` each, from logits (all words, labels) and targets (all words,)."""
        losses = functional.cross_entropy(logits.float(), targets, reduction="none").cpu()
        predicted = logits.argmax(1).cpu()
        rows = zip(*(torch.split(values, list(words)) for values in (losses, targets.cpu(), predicted)), strict=True)
        found = [(float(nats.sum()), len(nats), *self._entities(true, own)) for nats, true, own in rows]
        return torch.tensor(found, dtype=torch.float32).reshape(-1, 5)

    def score(self, outputs: torch.Tensor, targets: Targets) -> Score:  # noqa: ARG002 - the outputs hold the counts
        """(F1 of the entities among the words that are read, −loss a word)."""
        nats, words, *counts = outputs.double().sum(0).tolist()
        return EntityCounts(*map(int, counts)).f1, -nats / max(words, 1.0)

    def shown(self, score: Score) -> float:
        """The F1."""
        return score[0]

    def _entities(self, true: torch.Tensor, predicted: torch.Tensor) -> tuple[int, int, int]:
        counts = count(*([self.labels[at] for at in row.tolist()] for row in (true, predicted)))
        return counts.tp, counts.fp, counts.fn


def _words(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets of the batch's words and their flat positions, (words,) each."""
    assert batch.targets is not None
    assert batch.in_loss is not None
    return batch.targets[batch.in_loss], batch.in_loss
