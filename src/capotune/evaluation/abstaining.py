"""When a classifier had better say nothing: thresholds that are chosen on held-out rows.

To answer only what one is sure of is selective classification (Y. Geifman and R. El-Yaniv, "Selective Classification
for Deep Neural Networks", NeurIPS 2017): *coverage* is the share of the rows that get an answer, *precision* the share
of the answers that are right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Answered:
    """What comes of answering some rows only."""

    coverage: float
    """Share of the rows that get an answer."""
    precision: float
    """Share of the answers that are right; NaN where there is none."""
    rows: int
    """Rows, answered or not."""


def rows_needed(precision: float) -> int:
    """The fewest held-out rows on which ``sure_enough`` can find a threshold: as many as are right at 1 mistake."""
    return math.ceil(round(precision / (1 - precision), 6))


def sure_enough(confidence: torch.Tensor, right: torch.Tensor, precision: float) -> float | None:
    """The lowest confidence from which on at least ``precision`` of the answers are right; None where there is none.

    The threshold is chosen on the very rows that it is judged by, which favours it, so one mistake more is counted than
    there is, as in conformal risk control (A. Angelopoulos et al., ICLR 2024, eq. 4): of ``n`` answers at least
    (n + 1)·precision are right.

    Args:
        confidence: (rows,), of held-out rows.
        right: (rows,) bool, whether their answers are right.
        precision: wanted, between 0 and 1.
    """
    import torch

    order = confidence.argsort(descending=True)
    sure, hits = confidence[order].double(), right[order].double().cumsum(0)
    answers = torch.arange(1, len(order) + 1)
    is_last = torch.ones(len(order), dtype=torch.bool)  # of rows that are equally sure, which stand or fall together
    is_last[:-1] = sure[1:] < sure[:-1]
    enough = (hits >= precision * (answers + 1) - 1e-9) & is_last
    return float(sure[enough.nonzero()[-1, 0]]) if enough.any() else None


def answered(confidence: torch.Tensor, right: torch.Tensor, threshold: float) -> Answered:
    """Coverage and precision of answering where the confidence (rows,) is at least ``threshold``."""
    given = confidence >= threshold
    answers, rows = int(given.sum()), len(confidence)
    return Answered(answers / max(1, rows), float(right[given].double().mean()) if answers else math.nan, rows)
