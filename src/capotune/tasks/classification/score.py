"""How well a classifier labels texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from capotune.data.labelled import LabelledText
from capotune.evaluation.metrics import classification_scores, metric, wilson_interval
from capotune.evaluation.pairs import RowCounts
from capotune.tasks.base import Scored


def scored(labels: Sequence[str], texts: LabelledText[str], logits: torch.Tensor, targets: torch.Tensor) -> Scored:
    """Accuracy with its Wilson interval, macro F1 and cross-entropy in nats, and each text's prediction.

    Shapes: logits (rows, labels), targets (rows,), positions in ``labels``.
    """
    found = classification_scores(logits, targets)
    return Scored(
        "accuracy",
        {"accuracy": found.accuracy, "macro_f1": found.macro_f1, "loss": found.loss},
        {"accuracy": wilson_interval(found.accuracy, found.rows)},
        found.rows,
        dict.fromkeys(("accuracy", "macro_f1", "loss"), f"{found.rows:,} rows"),
        _predictions(labels, texts, logits),
        right_or_wrong(logits.argmax(1), targets),
    )


def right_or_wrong(predicted: torch.Tensor, targets: torch.Tensor) -> RowCounts:
    """What each row adds to the accuracy; both (rows,)."""
    right = (predicted == targets).long()
    return RowCounts.of(metric("accuracy"), torch.stack([right, torch.ones_like(right)], 1).numpy())


def _predictions(labels: Sequence[str], texts: LabelledText[str], logits: torch.Tensor) -> list[dict[str, Any]]:
    probabilities, predicted = logits.softmax(1).max(1)
    rows = zip(texts.texts, texts.labels, texts.lines, predicted.tolist(), probabilities.tolist(), strict=True)
    return [
        {"text": text, "label": label, "predicted": labels[number], "probability": round(p, 6), "line": line}
        for text, label, line, number, p in rows
    ]
