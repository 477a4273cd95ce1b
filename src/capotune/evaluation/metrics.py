"""What a score is: one registry of metrics, and how labels, written answers and losses are scored.

A metric that adds up over rows is a function of the sums of some counts of each row (``Metric.columns``); of any other
it is known what it would be without each row. From the same counts come the score, and the paired difference of two
techniques (``evaluation/pairs.py``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # the report takes its intervals from here, and must not wait for these
    import numpy as np
    import torch

_Z_95 = 1.959963984540054
_TINY = 1e-300


@dataclass(frozen=True)
class Metric:
    """What is known of a score by its name, so that no other code asks which metric it has before it."""

    name: str
    """As it stands in files: ``exact_match``."""
    words: str
    """As people read it: ``exact match``."""
    definition: str = ""
    """What it counts, as half a sentence."""
    higher_is_better: bool = True
    kind: Literal["percentage", "plain"] = "plain"
    """``percentage``: from 0 to 1, shown as 0 to 100 %. ``plain``: shown as it is."""
    columns: tuple[str, ...] = ()
    """The counts of each row that the score is made of; empty for a score that does not add up over rows."""
    from_sums: Callable[[np.ndarray], np.ndarray] | None = None
    """The score (...) of sums of ``columns`` (..., columns); 0 where nothing was counted. None where it does not add
    up."""
    from_rows: Callable[[np.ndarray], tuple[float, np.ndarray]] | None = None
    """Instead of ``from_sums``: of rows with these ``columns`` (rows, columns) the score, and what it is without each,
    (rows,)."""

    @property
    def is_percentage(self) -> bool:
        return self.kind == "percentage"

    @property
    def is_proportion(self) -> bool:
        """Whether each row is right or wrong, and the score is the share of right ones."""
        return self.columns == _RIGHT_OR_WRONG

    def score(self, counts: np.ndarray) -> float:
        """The score of rows with these counts (rows, columns)."""
        if self.from_rows is not None:
            return self.from_rows(counts)[0]
        assert self.from_sums is not None
        return float(self.from_sums(counts.sum(0)))

    def without_each(self, counts: np.ndarray) -> np.ndarray:
        """The score of the other rows, for each row, (rows,)."""
        if self.from_rows is not None:
            return self.from_rows(counts)[1]
        assert self.from_sums is not None
        without: np.ndarray = self.from_sums(counts.sum(0) - counts)
        return without

    def points(self, difference: float) -> float:
        """A difference of two scores in points: percentage points, or the metric's own unit."""
        return 100 * difference if self.is_percentage else difference

    def text(self, value: float, digits: int = 1) -> str:
        """A percentage with ``digits`` decimals, else ``digits`` + 2 significant digits; a dash for NaN."""
        if math.isnan(value):
            return "-"
        return f"{100 * value:.{digits}f} %" if self.is_percentage else f"{value:,.{decimals(value, digits + 2)}f}"

    def text_with_name(self, value: float) -> str:
        """A score that says what it is, since a bare number could be anything: ``94.1 %``, ``perplexity 12.3``."""
        return self.text(value) if self.is_percentage else f"{self.words} {self.text(value)}"

    def difference_text(self, difference: float, beside: float) -> str:
        """A signed difference in points, as exact as the score ``beside`` it; a dash for NaN and infinity."""
        if not math.isfinite(difference):
            return "-"
        digits = 1 if self.is_percentage else decimals(beside)
        text = f"{self.points(difference):+,.{digits}f}"
        return text if float(text.replace(",", "")) else text.replace("-", "+")  # no "-0.0"


def decimals(value: float, significant: int = 3) -> int:
    """How many decimals show this many significant digits; none are cut before the point."""
    before = math.floor(math.log10(abs(value))) + 1 if math.isfinite(value) and value else 1
    return max(0, significant - before)


def _ratio(sums: np.ndarray) -> np.ndarray:
    """The first sum over the second; 0 where nothing was counted."""
    quotient: np.ndarray = sums[..., 0] / sums[..., 1].clip(_TINY)
    return quotient


def _exponential_of_ratio(sums: np.ndarray) -> np.ndarray:
    import numpy as np

    with np.errstate(over="ignore"):  # infinite above 709 nats
        exponential: np.ndarray = np.exp(_ratio(sums))
    return exponential


def f1_of(sums: np.ndarray) -> np.ndarray:
    """Of (..., 3) tp, fp and fn: 2·tp / (2·tp + fp + fn); 0 where there is nothing to find and nothing was found."""
    twice = 2 * sums[..., 0]
    quotient: np.ndarray = twice / (twice + sums[..., 1] + sums[..., 2]).clip(_TINY)
    return quotient


def _macro_f1(rows: np.ndarray) -> tuple[float, np.ndarray]:
    """Of rows (label, predicted label). A label counts where some row has it or is predicted to; leaving out a row
    changes the F1 of its two labels alone."""
    import numpy as np

    if not len(rows):
        return 0.0, np.zeros(0)
    label, predicted = rows.astype(np.int64).T
    right = label == predicted
    labels = int(rows.max()) + 1
    found = np.bincount(label[right], minlength=labels)  # 2·tp + fp + fn is how often a label is in either column
    either = np.bincount(label, minlength=labels) + np.bincount(predicted, minlength=labels)
    f1 = 2 * found / either.clip(1)
    total, count = f1.sum(), (either > 0).sum()

    def without(own: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The change of the sum and of the count when rows leave a label ``times`` times."""
        left = either[own] - times
        return 2 * (found[own] - right) / left.clip(1) - f1[own], (left == 0).astype(np.int64)

    change, gone = without(label, 1 + right)
    other, other_gone = without(predicted, np.ones_like(label))
    change, gone = change + np.where(right, 0, other), gone + np.where(right, 0, other_gone)
    return float(total / count), (total + change) / (count - gone).clip(1)


_RIGHT_OR_WRONG = ("correct", "rows")
_METRICS: dict[str, Metric] = {}


def register(metric: Metric) -> Metric:
    """Make a metric known by its name; a task with a score of its own calls this where it defines it."""
    _METRICS[metric.name] = metric
    return metric


def metric(name: str) -> Metric:
    """The metric of this name; of an unknown one nothing is known but its name."""
    return _METRICS.get(name) or Metric(name, name.replace("_", " "))


for _metric in (
    Metric(
        "accuracy", "accuracy", "the share of test rows whose label is the right one",
        kind="percentage", columns=_RIGHT_OR_WRONG, from_sums=_ratio,
    ),
    Metric(
        "exact_match", "exact match",
        "the share of answers that are the expected one to the letter, blanks around it aside",
        kind="percentage", columns=_RIGHT_OR_WRONG, from_sums=_ratio,
    ),
    Metric(
        "rouge_l", "ROUGE-L", "how many words, in their order, an answer shares with the expected one: F1 of the "
        "longest common subsequence (Lin 2004), the mean of all answers",
        kind="percentage", columns=("rouge_l", "rows"), from_sums=_ratio,
    ),
    Metric(
        "f1", "F1", "2·tp / (2·tp + fp + fn), where tp entities are found with their exact ends and type, fp are found "
        "and not there, fn are there and not found",
        kind="percentage", columns=("tp", "fp", "fn"), from_sums=f1_of,
    ),
    Metric(
        "macro_f1", "macro F1", "the mean of every label's F1, each label counting alike", kind="percentage",
        columns=("label", "predicted"), from_rows=_macro_f1,
    ),
    Metric(
        "loss", "loss", "mean cross-entropy of what all test rows hold to predict, in nats",
        higher_is_better=False, columns=("nats", "tokens"), from_sums=_ratio,
    ),
    Metric(
        "perplexity", "perplexity",
        "the exponential of the mean loss: as if the model wavered between so many tokens at each step",
        higher_is_better=False, columns=("nats", "tokens"), from_sums=_exponential_of_ratio,
    ),
    Metric(
        "general_change", "general text", "the change in mean loss on text that no run trained on, in nats a token: "
        "above 0 the adapted model is worse there than its base", higher_is_better=False,
    ),
    Metric(
        "general_agreement", "same next token",
        "the share of that text's positions where the adapted model and its base find the same token most probable",
        kind="percentage",
    ),
    Metric(
        "part_of_change", "part of the change",
        "the part of what training changed that was left, since the rest gained little on held-out rows and cost much "
        "on other text",
        kind="percentage",
    ),
):  # fmt: skip
    register(_metric)


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


def label_scores(predicted: torch.Tensor, targets: torch.Tensor, labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of each label its precision, recall, F1 and ``rows`` that have it; 0 where nothing was predicted or is there.

    Shapes: predicted (rows,), targets (rows,), positions in ``labels``.
    """
    from sklearn.metrics import precision_recall_fscore_support

    found = precision_recall_fscore_support(
        targets.numpy(), predicted.numpy(), labels=range(len(labels)), zero_division=0
    )
    columns = zip(*(values.tolist() for values in found), strict=True)
    names = ("precision", "recall", "f1", "rows")
    return {label: dict(zip(names, row, strict=True)) for label, row in zip(labels, columns, strict=True)}


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


def f1_interval(counts: Sequence[Sequence[int]]) -> tuple[float, float] | None:
    """The 95 % confidence interval of F1 when rows with these tp, fp and fn were drawn, as that of a ratio of sums: F1
    is the sum of 2·tp over the sum of 2·tp + fp + fn. None where there is nothing to find, or one row."""
    sums, sizes = [2 * tp for tp, _, _ in counts], [2 * tp + fp + fn for tp, fp, fn in counts]
    found = mean_interval(sums, sizes) if any(sizes) else None
    return None if found is None else (max(0.0, found[0]), min(1.0, found[1]))
