"""The rule that recommends a technique, and what it comes to in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from capotune.report._records import Comparison, ComparisonRow
from capotune.report._words import PROPORTIONS, listed, score_text, score_with_name


def recommend(
    rows: Sequence[ComparisonRow],
    test_rows: int,
    higher_is_better: bool = True,
    *,
    metric: str = "accuracy",
    base_score: float = math.nan,
) -> tuple[str, str]:
    """Choose the method to take, and say why in a sentence with its numbers.

    The rule: the cheapest technique whose score is within the 95 % confidence interval of the best score on the test
    rows. Cheapest is least training time, then the smaller adapter. The interval is the best row's own, else, for a
    proportion, Wilson's; the bound itself is within. A score with neither (a loss, F1) is met
    only by its equal. Techniques without a finite score are passed over; with none left the method is an empty string.

    The rule is cautious about a gain: all techniques answer the same rows, so a difference that the interval does not
    resolve may still be real.
    """
    finished = [row for row in rows if math.isfinite(row.score)]
    if not finished:
        return "", "No technique finished with a score, so there is nothing to recommend."
    best = best_row(finished, higher_is_better)
    low, high = interval(best, test_rows, metric)
    within = [row for row in finished if (row.score >= low if higher_is_better else row.score <= high)]
    chosen = min(within, key=_cost)
    sentences = [_why(best, chosen, finished, test_rows, metric, higher_is_better)]
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
    return min((row for row in rows if math.isfinite(row.score)), key=lambda row: (sign * row.score, _cost(row)))


def interval(row: ComparisonRow, rows: int, metric: str) -> tuple[float, float]:
    """The 95 % confidence interval of a row's score; it holds the score, and has no width where none is known."""
    if row.interval is not None and all(map(math.isfinite, row.interval)):
        low, high = row.interval
        return min(low, row.score), max(high, row.score)
    if metric not in PROPORTIONS:
        return row.score, row.score
    from capotune.evaluation.metrics import wilson_interval  # here, for it imports torch

    return wilson_interval(row.score, rows)


def has_interval(comparison: Comparison) -> bool:
    """Whether some score's interval is known."""
    ends = [interval(row, comparison.test_rows, comparison.metric) for row in scored(comparison)]
    return any(low < high for low, high in ends)


def interval_name(comparison: Comparison) -> str:
    """What the interval is called: a proportion's is Wilson's, whoever computed it."""
    return "Wilson interval" if comparison.metric in PROPORTIONS else "interval"


def _cost(row: ComparisonRow) -> tuple[float, int]:
    return row.train_seconds, row.adapter_bytes


def _why(
    best: ComparisonRow,
    chosen: ComparisonRow,
    finished: Sequence[ComparisonRow],
    test_rows: int,
    metric: str,
    higher_is_better: bool,
) -> str:
    """Why ``chosen`` and not ``best``, or why the best itself."""
    score = score_with_name(best.score, metric)
    if len(finished) == 1:
        return f"{best.method} is the only technique with a score ({score})."
    winners = [row.method for row in finished if row.score == best.score]
    who, whose = ("it", "its") if len(winners) == 1 else (best.method, "the")
    if best is min(finished, key=_cost):
        return f"{listed(winners)} scored best ({score}); {who} is also the cheapest to train."
    low, high = interval(best, test_rows, metric)
    if low == high:
        return f"{listed(winners)} scored best ({score})."
    end, highest, down = (low, "highest", "down") if higher_is_better else (high, "best", "up")
    digits = 1 if score_text(end, metric) != score_text(chosen.score, metric) else 2
    first = (
        f"{listed(winners)} scored {highest} ({score}); with {test_rows:,} test rows {whose} 95 % interval "
        f"reaches {down} to {score_text(end, metric, digits)}"
    )
    if chosen is best:
        return f"{first}, and nothing cheaper comes that close."
    within = f"{chosen.method} ({score_text(chosen.score, metric, digits)}) is within it"
    return f"{first}. {within} and {saving(best, chosen)}."


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
        return f"{chosen.method} scores best: {score_with_name(chosen.score, comparison.metric)}"
    return f"{chosen.method} comes within the margin of error of {best.method} and {saving(best, chosen)}"


def hurts(comparison: Comparison) -> bool:
    """Whether the base is clearly better than the best technique."""
    best = best_row(comparison.rows, comparison.higher_is_better)
    low, high = interval(best, comparison.test_rows, comparison.metric)
    base = comparison.base_score
    return base > high if comparison.higher_is_better else base < low


def scored(comparison: Comparison) -> list[ComparisonRow]:
    """The rows that have a finite score."""
    return [row for row in comparison.rows if math.isfinite(row.score)]


def recommended_row(comparison: Comparison) -> ComparisonRow | None:
    """The row of the recommended method, if there is one."""
    return next((row for row in scored(comparison) if row.method == comparison.recommended), None)
