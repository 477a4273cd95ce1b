"""Scores of labels, of written answers and of loss, with their uncertainty. The labels' formulas are scikit-learn's."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the report takes its intervals from here, and must not wait for these
    import numpy as np
    import torch

_Z_95 = 1.959963984540054


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
    from torch.nn import functional

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
    import torch
    from torch.nn import functional

    sums = torch.zeros(labels, train.shape[1]).index_add_(0, targets, functional.normalize(train, dim=1))
    return functional.normalize(test, dim=1) @ functional.normalize(sums, dim=1).t()


def exact_match(predicted: str, expected: str) -> bool:
    """Whether an answer is the expected one but for white space around it."""
    return predicted.strip() == expected.strip()


def rouge_l(predicted: str, expected: str) -> float:
    """F1 (0 to 1) of the longest common subsequence of words, in lower case and without punctuation.

    ROUGE-L of C.-Y. Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", ACL 2004 workshop, §3.1, with equal
    weight of precision and recall. Words are runs of letters, digits and underscores in any script; no stemming.
    """
    found, wanted = (re.findall(r"\w+", text.lower()) for text in (predicted, expected))
    if not found or not wanted:
        return float(found == wanted)
    return 2 * _common_subsequence(found, wanted) / (len(found) + len(wanted))


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table at a time as bits of one integer.

    H. Hyyrö, "Bit-parallel LCS-length computation revisited", AWOCA 2004. A bit of ``row`` is 0 where the length grows.
    """
    places: dict[str, int] = {}
    for at, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << at
    every = row = (1 << len(one)) - 1
    for word in other:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & every
    return len(one) - row.bit_count()


def perplexity(loss: float) -> float:
    """e to the mean loss in nats: among how many equally likely tokens the model chooses. Infinite above 709 nats."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def wilson_interval(score: float, rows: int) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion ``score`` that was measured on ``rows`` rows.

    The score interval of E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference",
    Journal of the American Statistical Association 22 (1927), 209-212. With p the proportion, n the rows, z = 1.96:
    (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n). Unlike p ± z √(p(1-p)/n) it stays inside 0 and 1 and keeps a
    width at p = 1.
    """
    if rows == 0:
        return 0.0, 1.0
    ratio = _Z_95**2 / rows
    middle = score + ratio / 2
    spread = math.sqrt(ratio * score * (1 - score) + ratio**2 / 4)
    low, high = (middle - spread) / (1 + ratio), (middle + spread) / (1 + ratio)
    return max(0.0, min(low, score)), min(1.0, max(high, score))  # rounding puts 1.0 a hair above its own interval


def mean_interval(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float] | None:
    """The 95 % confidence interval of Σ sums / Σ counts when rows, not single tokens, were drawn.

    A row gives a sum (its tokens' losses) over a count (its tokens); counts of 1 give the plain mean's interval. The
    standard error is the ratio estimator's: √(n/(n-1) · Σ(sum - mean·count)²) / Σ counts (W. G. Cochran, Sampling
    Techniques, 3rd ed. 1977, §6.4), since tokens of one row are alike and rows differ in length. None with fewer than
    two rows, which say nothing of the spread. For perplexity take e to both ends.
    """
    rows, all_counts = len(sums), sum(counts)
    if rows < 2:
        return None
    mean = math.fsum(sums) / all_counts
    squares = math.fsum((own - mean * count) ** 2 for own, count in zip(sums, counts, strict=True))
    error = math.sqrt(rows / (rows - 1) * squares) / all_counts
    return mean - _Z_95 * error, mean + _Z_95 * error
