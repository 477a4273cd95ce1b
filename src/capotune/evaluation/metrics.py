"""Scores of classification and loss, with their uncertainty. The formulas are scikit-learn's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional


@dataclass(frozen=True)
class ClassificationScores:
    """How well logits (rows, labels) meet targets (rows,)."""

    accuracy: float
    macro_f1: float
    loss: float
    """Mean cross-entropy in nats."""
    rows: int


def classification_scores(logits: torch.Tensor, targets: torch.Tensor) -> ClassificationScores:
    """Accuracy, macro F1 over the labels that occur, and cross-entropy."""
    from sklearn.metrics import f1_score

    predicted = logits.argmax(1)
    return ClassificationScores(
        accuracy=float((predicted == targets).float().mean()),
        macro_f1=float(f1_score(targets.numpy(), predicted.numpy(), average="macro", zero_division=0)),
        loss=float(functional.cross_entropy(logits.float(), targets)),
        rows=len(targets),
    )


def confusion(predicted: np.ndarray, targets: np.ndarray, labels: int) -> list[list[int]]:
    """Counts (true label, predicted label)."""
    from sklearn.metrics import confusion_matrix

    counts: list[list[int]] = confusion_matrix(targets, predicted, labels=range(labels)).tolist()
    return counts


def nearest_mean_logits(train: torch.Tensor, targets: torch.Tensor, test: torch.Tensor, labels: int) -> torch.Tensor:
    """What the untrained base can do: cosine similarity (rows, labels) to each label's mean vector.

    Shapes: train (rows, features), targets (rows,), test (rows, features).
    """
    sums = torch.zeros(labels, train.shape[1]).index_add_(0, targets, functional.normalize(train, dim=1))
    return functional.normalize(test, dim=1) @ functional.normalize(sums, dim=1).t()
