"""From which probability on a text has a label: chosen on held-out rows for the best F1.

A threshold of its own for each label, where enough held-out rows have the label; for others the one that is best for
all labels together. Where labels are rare, one half is far too high: the best threshold is half of the F1 that it
reaches (Z. C. Lipton, C. Elkan and B. Naryanaswamy, "Optimal thresholding of classifiers to maximize F1 measure", ECML
2014).
"""

from __future__ import annotations

import torch

ENOUGH = 10
"""Held-out rows with a label from which on it gets a threshold of its own."""


def choose_thresholds(logits: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """A probability for each label. Shapes: logits and targets (rows, labels), the latter 0 or 1; a half where no row
    has a label."""
    if not targets.any():
        return [0.5] * logits.shape[1]
    common, _ = best_threshold(logits.flatten(), targets.flatten())
    own = [
        best_threshold(logits[:, label], targets[:, label])[0] if targets[:, label].sum() >= ENOUGH else common
        for label in range(logits.shape[1])
    ]
    return [float(torch.tensor(one).sigmoid()) for one in own]


def best_threshold(logits: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
    """The logit (halfway between two neighbours) from which on to say yes for the best F1, and that F1; both (values,).

    Without a yes among the targets: 0.0 and an F1 of 0.
    """
    total = float(targets.sum())
    if not total:
        return 0.0, 0.0
    ordered, order = logits.double().sort(descending=True, stable=True)
    found = targets[order].double().cumsum(0)
    said = torch.arange(1, len(ordered) + 1)
    f1 = 2 * found / (said + total)
    last = torch.ones(len(ordered), dtype=torch.bool)
    last[:-1] = ordered[1:] < ordered[:-1]  # equal logits are all on one side
    at = int(torch.where(last, f1, -1.0).argmax())
    below = ordered[at + 1] if at + 1 < len(ordered) else ordered[at] - 2
    return float((ordered[at] + below) / 2), float(f1[at])
