"""The rule that recommends a technique."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from capotune.evaluation.metrics import metric, wilson_interval
from capotune.evaluation.pairs import Difference, RowCounts, paired_difference, unpaired_difference
from capotune.report._records import Comparison, ComparisonRow, Interval
from capotune.report._sentences import above_chance, loses, why, why_none


def recommend(
    comparison: Comparison, counts: Mapping[str, RowCounts] | None = None, base_counts: RowCounts | None = None
) -> Comparison:
    """The comparison with each technique's difference from the best, the method to take, and why.

    The rule: of the techniques that are not shown to be worse than the best, take the cheapest. Cheapest is least
    training time, then the smaller adapter. Shown to be worse is a technique whose difference from the best has a 95 %
    interval on the worse side of 0 alone. ``comparison.tolerance`` lets in one that is shown to be worse, when the
    difference itself (the one that the table shows, not an end of its interval) is a loss of at most so many points.

    ``counts`` holds each technique's ``test_rows.json``; with it the difference is taken row by row
    (``evaluation/pairs.py``). Without a technique's counts, its difference comes from the two scores' own intervals, as
    if from different rows; without those, only an equal score is not worse. A technique without a finite score is
    passed over; with none left, or none above ``comparison.chance``, the recommended method is an empty string: where
    all have learned nothing, the cheapest is no better than the others.
    """
    counts = counts or {}
    finished = scored(comparison)
    if not finished or not above_chance(comparison):
        rows = tuple(replace(row, difference=None, difference_interval=None, paired_rows=0) for row in comparison.rows)
        return replace(comparison, rows=rows, best="", recommended="", why=why_none(comparison))
    best = best_row(finished, comparison.higher_is_better)
    rows = tuple(_with_difference(row, best, comparison, counts) for row in comparison.rows)
    to_base = _base_difference(comparison, best, counts, base_counts)
    comparison = replace(
        comparison, rows=rows, best=best.method, base_difference=to_base.value if to_base else None,
        base_difference_interval=to_base.interval if to_base else None,
    )  # fmt: skip
    chosen = min((row for row in rows if _may_be_taken(row, comparison)), key=cost)
    comparison = replace(comparison, recommended=chosen.method)
    return replace(comparison, why=why(comparison, _base_difference(comparison, chosen, counts, base_counts)))


def scored(comparison: Comparison) -> list[ComparisonRow]:
    """The rows that have a finite score."""
    return [row for row in comparison.rows if math.isfinite(row.score)]


def best_row(rows: Sequence[ComparisonRow], higher_is_better: bool) -> ComparisonRow:
    """The best score; among equals the cheapest."""
    sign = -1 if higher_is_better else 1
    return min((row for row in rows if math.isfinite(row.score)), key=lambda row: (sign * row.score, cost(row)))


def cost(row: ComparisonRow) -> tuple[float, int]:
    """What makes one technique cheaper than another."""
    return row.train_seconds, row.adapter_bytes


def interval(row: ComparisonRow, rows: int, name: str) -> Interval:
    """The 95 % confidence interval of a row's score; it holds the score, and has no width where none is known or an
    end is not finite, as of a perplexity beyond all numbers."""
    low, high = _known_interval(row.score, row.interval, rows, name) or (row.score, row.score)
    if not (math.isfinite(low) and math.isfinite(high)):
        return row.score, row.score
    return min(low, row.score), max(high, row.score)


def has_interval(comparison: Comparison) -> bool:
    """Whether some score's interval is known."""
    ends = [interval(row, comparison.test_rows, comparison.metric) for row in scored(comparison)]
    return any(low < high for low, high in ends)


def interval_name(comparison: Comparison) -> str:
    """What the interval of a score is called: a proportion's is Wilson's, whoever computed it."""
    return "Wilson interval" if metric(comparison.metric).is_proportion else "interval"


def _known_interval(score: float, own: Interval | None, rows: int, name: str) -> Interval | None:
    """The score's own interval, else Wilson's for a proportion."""
    if own is not None and all(map(math.isfinite, own)):
        return own
    return wilson_interval(score, rows) if metric(name).is_proportion and 0 <= score <= 1 else None


def _with_difference(
    row: ComparisonRow, best: ComparisonRow, comparison: Comparison, counts: Mapping[str, RowCounts]
) -> ComparisonRow:
    if row.method == best.method:
        return replace(row, difference=0.0, difference_interval=None, paired_rows=0)
    if not math.isfinite(row.score):
        return replace(row, difference=None, difference_interval=None, paired_rows=0)
    found = _paired(comparison, counts.get(row.method), counts.get(best.method))
    if found is None:
        name, rows = comparison.metric, comparison.test_rows
        its, bests = (_known_interval(one.score, one.interval, rows, name) for one in (row, best))
        found = unpaired_difference(row.score, its, best.score, bests)
    return replace(row, difference=found.value, difference_interval=found.interval, paired_rows=found.paired_rows)


def _base_difference(
    comparison: Comparison, row: ComparisonRow, counts: Mapping[str, RowCounts], base_counts: RowCounts | None
) -> Difference | None:
    """The base's score minus the row's."""
    if not math.isfinite(comparison.base_score):
        return None
    if found := _paired(comparison, base_counts, counts.get(row.method)):
        return found
    name, rows = comparison.metric, comparison.test_rows
    base = _known_interval(comparison.base_score, None, rows, name)
    return unpaired_difference(
        comparison.base_score, base, row.score, _known_interval(row.score, row.interval, rows, name)
    )


def _paired(comparison: Comparison, one: RowCounts | None, other: RowCounts | None) -> Difference | None:
    if one is None or other is None:
        return None
    return paired_difference(metric(comparison.metric), one, other)


def _may_be_taken(row: ComparisonRow, comparison: Comparison) -> bool:
    return row.difference is not None and (not loses(row, comparison) or _within_tolerance(row, comparison))


def _within_tolerance(row: ComparisonRow, comparison: Comparison) -> bool:
    """Whether the row's loss against the best is one that the user accepts."""
    assert row.difference is not None
    loss = metric(comparison.metric).points(abs(row.difference))
    return round(loss, 9) <= comparison.tolerance
