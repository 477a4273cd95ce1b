"""How near predicted labels of an order are to the true ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from capotune.data.labelled import LabelledText
from capotune.evaluation.metrics import Metric, mean_interval, metric, register, wilson_interval
from capotune.evaluation.pairs import RowCounts
from capotune.tasks.base import Scored


def _kappa(sums: np.ndarray) -> np.ndarray:
    """1 − the squared steps, over those of the same predictions for rows in random order."""
    squares, true, its_squares, said, their_squares, rows = np.moveaxis(sums, -1, 0)
    by_chance = its_squares + their_squares - 2 * true * said / rows.clip(1)
    kappa: np.ndarray = 1 - squares / np.where(by_chance > 0, by_chance, np.inf)
    return kappa


for _metric in (
    Metric(
        "steps", "mean steps off", "by how many steps of the order a label is off, on average",
        higher_is_better=False, columns=("steps", "rows"), from_sums=lambda sums: sums[..., 0] / sums[..., 1].clip(1),
    ),
    Metric(
        "kappa", "quadratic weighted kappa", "1 where all labels are right, 0 where they are no nearer than the same "
        "labels in random order; a miss counts by the square of its steps (Cohen 1968)",
        columns=("squared_steps", "true", "true_squared", "predicted", "predicted_squared", "rows"), from_sums=_kappa,
    ),
):  # fmt: skip
    register(_metric)


def median_label(probabilities: torch.Tensor) -> torch.Tensor:
    """(rows,): the first label up to which the probabilities (rows, labels) come to a half; no other has fewer expected
    steps to the true one."""
    return (probabilities.cumsum(1) < 0.5).sum(1).clamp_max(probabilities.shape[1] - 1)


def scored(labels: Sequence[str], rows: LabelledText[str], logits: torch.Tensor, targets: torch.Tensor) -> Scored:
    """Mean steps off with their interval, quadratic weighted kappa, accuracy, and the loss in nats.

    Shapes: logits (rows, labels), targets (rows,), positions in ``labels``.
    """
    probabilities = logits.softmax(1)
    predicted = median_label(probabilities)
    said, true = predicted.numpy().astype(np.float64), targets.numpy().astype(np.float64)
    steps, ones = np.abs(said - true), np.ones(len(true))
    accuracy = float((steps == 0).mean())
    scores = {
        "steps": float(steps.mean()),
        "kappa": metric("kappa").score(np.stack([steps**2, true, true**2, said, said**2, ones], 1)),
        "accuracy": accuracy,
        "loss": float(functional.cross_entropy(logits, targets)),
    }
    intervals = {"accuracy": wilson_interval(accuracy, len(true))}
    if ends := mean_interval(steps.tolist(), [1] * len(steps)):
        intervals["steps"] = max(0.0, ends[0]), ends[1]
    return Scored(
        "steps",
        scores,
        intervals,
        len(true),
        dict.fromkeys(scores, f"{len(true):,} rows"),
        _predictions(labels, rows, predicted, probabilities),
        RowCounts.of(metric("steps"), np.stack([steps, ones], 1)),
    )


def _predictions(
    labels: Sequence[str], rows: LabelledText[str], predicted: torch.Tensor, probabilities: torch.Tensor
) -> list[dict[str, Any]]:
    sure = probabilities.gather(1, predicted[:, None])[:, 0]
    place = {label: at for at, label in enumerate(labels)}
    each = zip(rows.texts, rows.labels, rows.lines, predicted.tolist(), sure.tolist(), strict=True)
    return [
        {
            "text": text, "label": label, "predicted": labels[number], "probability": round(p, 6),
            "place": place[label], "steps": abs(number - place[label]), "line": line,
        }
        for text, label, line, number, p in each
    ]  # fmt: skip
