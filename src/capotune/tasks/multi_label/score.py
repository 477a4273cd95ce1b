"""How well texts are given their labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from capotune.data.labelled import LabelledText
from capotune.evaluation.metrics import Metric, f1_interval, f1_of, metric, register, wilson_interval
from capotune.evaluation.pairs import RowCounts
from capotune.tasks.base import Scored

for _metric in (
    Metric(
        "micro_f1", "micro F1", "2·tp / (2·tp + fp + fn) of all labels of all test rows together, where tp labels are "
        "given and right, fp are given and wrong, fn are missed",
        kind="percentage", columns=("tp", "fp", "fn"), from_sums=f1_of,
    ),
    Metric("subset_accuracy", "all labels right", "the share of test rows whose labels are all right",
           kind="percentage", columns=("correct", "rows")),
):  # fmt: skip
    register(_metric)


def scored(
    labels: Sequence[str],
    thresholds: Sequence[float],
    rows: LabelledText[tuple[str, ...]],
    logits: torch.Tensor,
    targets: torch.Tensor,
) -> Scored:
    """Micro F1 with its interval, macro F1, the share of rows that are right as a whole, and the loss in nats a label.

    Shapes: logits and targets (rows, labels). The macro F1 is the mean over labels that a row has or is given.
    """
    given = (logits.sigmoid() >= torch.tensor(thresholds)).numpy()
    true = targets.numpy() > 0
    right, wrong, missed = given & true, given & ~true, ~given & true
    by_row = np.stack([right.sum(1), wrong.sum(1), missed.sum(1)], 1)
    by_label = np.stack([right.sum(0), wrong.sum(0), missed.sum(0)], 1)
    occurs = by_label.sum(1) > 0
    whole = float((given == true).all(1).mean())
    scores = {
        "micro_f1": float(f1_of(by_row.sum(0))),
        "macro_f1": float(f1_of(by_label[occurs]).mean()) if occurs.any() else 0.0,
        "subset_accuracy": whole,
        "loss": float(functional.binary_cross_entropy_with_logits(logits, targets)),
    }
    f1_ends = f1_interval(by_row.tolist())
    intervals = {"subset_accuracy": wilson_interval(whole, len(rows)), **({"micro_f1": f1_ends} if f1_ends else {})}
    return Scored(
        "micro_f1",
        scores,
        intervals,
        len(rows),
        dict.fromkeys(scores, f"{len(rows):,} rows"),
        _predictions(labels, rows, given, logits.sigmoid().numpy()),
        RowCounts.of(metric("micro_f1"), by_row),
        {"labels": dict(zip(labels, map(_of_label, by_label.tolist()), strict=True))},
    )


def same_for_all(rows: Sequence[Collection[str]]) -> float:
    """The highest micro F1 of giving every row the same labels, those that most rows have."""
    counts = np.sort(np.array(list(Counter(chain.from_iterable(rows)).values()), dtype=float))[::-1]
    f1 = 2 * counts.cumsum() / (len(rows) * np.arange(1, len(counts) + 1) + counts.sum())
    return float(f1.max(initial=0.0))


def _of_label(counts: list[int]) -> dict[str, Any]:
    """Of one label: rows that have it, and how well these are found."""
    right, wrong, missed = counts
    return {
        "rows": right + missed,
        "precision": right / max(1, right + wrong),
        "recall": right / max(1, right + missed),
        "f1": float(f1_of(np.array(counts))),
    }


def _predictions(
    labels: Sequence[str], rows: LabelledText[tuple[str, ...]], given: np.ndarray, probabilities: np.ndarray
) -> list[dict[str, Any]]:
    return [
        {
            "text": text,
            "labels": list(own),
            "predicted": [label for label, yes in zip(labels, said, strict=True) if yes],
            "probabilities": {label: round(float(p), 4) for label, p in zip(labels, sure, strict=True)},
            "line": line,
        }
        for text, own, line, said, sure in zip(rows.texts, rows.labels, rows.lines, given, probabilities, strict=True)
    ]
