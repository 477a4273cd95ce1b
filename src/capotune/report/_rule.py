"""The rule that recommends a technique, and what it comes to in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from capotune.report._records import Comparison, ComparisonRow
from capotune.report._words import PROPORTIONS, listed, score_text

_Z_95 = 1.959963984540054


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


def recommend(
    rows: Sequence[ComparisonRow],
    test_rows: int,
    higher_is_better: bool = True,
    *,
    metric: str = "accuracy",
    base_score: float = math.nan,
) -> tuple[str, str]:
    """Choose the method to take, and say why in a sentence with its numbers.

    The rule: the cheapest technique whose score is within the test set's 95 % confidence interval of the best.
    Cheapest is least training time, then the smaller adapter. The interval is Wilson's around the best score
    (``wilson_interval``), the bound itself included. A metric that is not a proportion (a loss, F1) has no such
    interval: there only an equal score is within it. Techniques without a score are passed over; with none left the
    method is an empty string.

    The rule is cautious about a gain: all techniques answer the same rows, so a difference that the interval does not
    resolve may still be real.
    """
    finished = [row for row in rows if not math.isnan(row.score)]
    if not finished:
        return "", "No technique finished with a score, so there is nothing to recommend."
    best = best_row(finished, higher_is_better)
    low, high = interval(best.score, test_rows, metric)
    within = [row for row in finished if (row.score >= low if higher_is_better else row.score <= high)]
    chosen = min(within, key=_cost)
    sentences = [_why(best, chosen, finished, test_rows, metric)]
    base = f"base without fine-tuning ({score_text(base_score, metric)})"
    if base_score > high if higher_is_better else base_score < low:
        each = "It" if len(finished) == 1 else "Every technique"
        sentences.append(f"{each} scored clearly worse than the {base}: on this data fine-tuning does not help.")
    elif low <= base_score <= high:
        sentences.append(f"The {base} is inside the interval of the best too: a gain is not shown.")
    return chosen.method, " ".join(sentences)


def best_row(rows: Sequence[ComparisonRow], higher_is_better: bool) -> ComparisonRow:
    """The best score; among equals the cheapest."""
    sign = -1 if higher_is_better else 1
    return min((row for row in rows if not math.isnan(row.score)), key=lambda row: (sign * row.score, _cost(row)))


def interval(score: float, rows: int, metric: str) -> tuple[float, float]:
    """The 95 % confidence interval of a score; a metric that is not a proportion has one without width."""
    return wilson_interval(score, rows) if metric in PROPORTIONS else (score, score)


def _cost(row: ComparisonRow) -> tuple[float, int]:
    return row.train_seconds, row.adapter_bytes


def _why(
    best: ComparisonRow, chosen: ComparisonRow, finished: Sequence[ComparisonRow], test_rows: int, metric: str
) -> str:
    """Why ``chosen`` and not ``best``, or why the best itself."""
    score = score_text(best.score, metric)
    if len(finished) == 1:
        return f"{best.method} is the only technique with a score ({score})."
    winners = [row.method for row in finished if row.score == best.score]
    if best is min(finished, key=_cost):
        who = "it" if len(winners) == 1 else best.method
        return f"{listed(winners)} scored best ({score}); {who} is also the cheapest to train."
    if metric not in PROPORTIONS:
        return f"{listed(winners)} scored best ({score})."
    low, _ = wilson_interval(best.score, test_rows)
    digits = 1 if score_text(low, metric) != score_text(chosen.score, metric) else 2
    reach = f"with {test_rows:,} test rows its 95 % interval reaches down to {score_text(low, metric, digits)}"
    if chosen is best:
        return f"{listed(winners)} scored highest ({score}); {reach}, and nothing cheaper comes that close."
    within = f"{chosen.method} ({score_text(chosen.score, metric, digits)}) is within it"
    return f"{listed(winners)} scored highest ({score}); {reach}. {within} and {saving(best, chosen)}."


def saving(costly: ComparisonRow, cheap: ComparisonRow) -> str:
    """What the cheap technique saves: ``trains 6 times faster``."""
    ratio = costly.train_seconds / max(cheap.train_seconds, 1e-9)
    if ratio >= 1.15:
        return f"trains {_times(ratio)} times faster"
    return "has the smaller adapter" if ratio == 1 else "trains slightly faster"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 2.95 else f"{ratio:.1f}".removesuffix(".0")


def finding(comparison: Comparison) -> str:
    """The result in one line, for the plot's title."""
    chosen = recommended_row(comparison)
    if chosen is None:
        return "No technique finished with a score"
    if hurts(comparison):
        return "No technique reaches the base without fine-tuning"
    best = best_row(comparison.rows, comparison.higher_is_better)
    if best.score == chosen.score:
        return f"{chosen.method} scores best: {score_text(chosen.score, comparison.metric)}"
    return f"{chosen.method} comes within the margin of error of {best.method} and {saving(best, chosen)}"


def hurts(comparison: Comparison) -> bool:
    """Whether the base is clearly better than the best technique."""
    best = best_row(comparison.rows, comparison.higher_is_better)
    low, high = interval(best.score, comparison.test_rows, comparison.metric)
    base = comparison.base_score
    return base > high if comparison.higher_is_better else base < low


def scored(comparison: Comparison) -> list[ComparisonRow]:
    """The rows that have a score."""
    return [row for row in comparison.rows if not math.isnan(row.score)]


def recommended_row(comparison: Comparison) -> ComparisonRow | None:
    """The row of the recommended method, if there is one."""
    return next((row for row in scored(comparison) if row.method == comparison.recommended), None)
