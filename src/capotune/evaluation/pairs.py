"""How much one technique's score differs from another's, when both answered the same rows.

A row that is hard for one technique is mostly hard for the other too. So the difference of two scores on the same rows
is known better than either score, and it is the rows' own differences that say how well.

One estimate serves every metric: the jackknife. Leaving out row i gives the score s₍ᵢ₎; the row's pseudo-value is
n·s − (n−1)·s₍ᵢ₎ (J. W. Tukey, "Bias and confidence in not-quite large samples", Annals of Mathematical Statistics 29
(1958), 614). The pseudo-values of one technique minus those of the other, row by row, are treated as n independent
draws of the difference. For accuracy they are the rows' own 1, 0 and −1, that is McNemar's table; for ratios (loss, F1)
and functions of ratios (perplexity) they are the linearised residuals of sampling theory (W. G. Cochran, Sampling
Techniques, 3rd ed. 1977, §6.17). It needs no random numbers and one pass over the rows; a bootstrap would give the same
interval in large samples, and none at all where no row differs.

Scores from 0 to 1 get two rows more, in one of which each technique wins by 1. For accuracy this is the interval of
D. G. Bonett and R. M. Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on
paired data", Journal of Educational and Behavioral Statistics 37 (2012), 479-488, which M. W. Fagerland, S. Lydersen
and P. Laake recommend (Statistics in Medicine 33 (2014), 2850-2875): it keeps a width where no row differs, and covers
the truth at least 93 times in 100 from few rows on. Scores without an upper end get Student's quantile instead.

Coverage, simulated (``tests/test_pairs.py`` repeats part of it; 2,000 trials for each cell, 95 % wanted):

    accuracy    5 to 3,000 rows, 50 to 99 % right, correlation 0 to 0.99: 93 to 97 where many rows differ, up to 100
                where few do (the interval is then wider than it need be)
    F1          93 to 99.7 from 20 sentences on
    loss        94 to 97 from 5 rows on
    perplexity  92 to 97 from 5 rows on where the rows' losses are alike; 86 to 91 with 10 to 50 rows, and 93 with 300,
                where they are spread over a factor of 50

The best technique is chosen by the same rows, which favours it. The intervals are not widened for that: of four equally
good techniques with 500 rows the cheapest was shown to be worse 5 to 7 times in 100 (1,500 trials), and no technique
was 80 to 83 times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from capotune.evaluation.metrics import Metric, metric

if TYPE_CHECKING:  # NumPy changes the warning filters when it is imported
    import numpy as np

_Z_95 = 1.959963984540054
Interval = tuple[float, float]


@dataclass(frozen=True, eq=False)
class RowCounts:
    """What each scored test row adds to a score: the content of ``test_rows.json``."""

    metric: str
    columns: tuple[str, ...]
    """``Metric.columns``."""
    counts: np.ndarray
    """(rows, columns) float64."""
    positions: np.ndarray
    """(rows,) int: each row's position among the test rows, rising; a technique may have scored a part of them."""

    @classmethod
    def of(cls, metric: Metric, counts: Any, positions: Any = None) -> RowCounts:
        """From rows of counts in the order of ``metric.columns``; ``positions`` None: every test row, in its order."""
        import numpy as np

        table = np.asarray(counts, dtype=np.float64).reshape(-1, len(metric.columns))
        at = np.arange(len(table)) if positions is None else np.asarray(positions, dtype=np.int64)
        return cls(metric.name, metric.columns, table, at)

    def to_dict(self) -> dict[str, Any]:
        """As plain values; whole numbers as such, and ``positions`` only where rows are missing."""
        import numpy as np

        rows = [[int(value) if value.is_integer() else value for value in row] for row in self.counts.tolist()]
        content = {"metric": self.metric, "columns": list(self.columns), "rows": rows}
        every = np.array_equal(self.positions, np.arange(len(rows)))
        return content if every else {**content, "positions": self.positions.tolist()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> RowCounts:
        """Read back what ``to_dict`` gave."""
        import numpy as np

        columns = tuple(content["columns"])
        counts = np.asarray(content["rows"], dtype=np.float64).reshape(-1, len(columns))
        positions = np.asarray(content.get("positions", range(len(counts))), dtype=np.int64)
        return cls(content["metric"], columns, counts, positions)


@dataclass(frozen=True)
class Difference:
    """One score minus another."""

    value: float
    interval: Interval | None
    """95 % confidence interval; None where nothing tells how sure the difference is."""
    paired_rows: int = 0
    """Rows that both scores were compared on, row by row; 0: the two scores were compared as if on different rows."""


def paired_difference(metric: Metric, one: RowCounts, other: RowCounts) -> Difference | None:
    """The score of ``one`` minus that of ``other`` on the rows that both have.

    None where they cannot be paired: other metrics, no common row, or counts that are not finite.
    """
    import numpy as np

    if not one.metric == other.metric == metric.name or not one.columns == other.columns == metric.columns:
        return None
    _, here, there = np.intersect1d(one.positions, other.positions, assume_unique=True, return_indices=True)
    mine, its = one.counts[here], other.counts[there]
    if not len(here) or not (np.isfinite(mine).all() and np.isfinite(its).all()):
        return None
    difference = metric.score(mine) - metric.score(its)
    if not math.isfinite(difference):
        return None
    return Difference(difference, _interval(metric, mine, its, difference), len(here))


def score_interval(counts: RowCounts) -> Interval | None:
    """The 95 % confidence interval of a percentage by the same jackknife, within 0 and 1; two rows more, one right and
    one wrong, keep it a width. None without rows."""
    import numpy as np

    known = metric(counts.metric)
    if not len(counts.counts):
        return None
    score, by_row = known.score(counts.counts), _pseudo_values(known, counts.counts)
    by_row = np.concatenate([by_row + (score - by_row.mean()), [1.0, 0.0]])
    middle, reach = float(by_row.mean()), _Z_95 * float(by_row.std()) / math.sqrt(len(by_row))
    return max(0.0, min(score, middle - reach)), min(1.0, max(score, middle + reach))


def unpaired_difference(one: float, its: Interval | None, other: float, others: Interval | None) -> Difference:
    """One score minus another by their own intervals, as if they came from different rows: wider than need be.

    The square-and-add rule: R. G. Newcombe, Statistics in Medicine 17 (1998), 873-890, method 10; for any two estimates
    G. Y. Zou and A. Donner, Statistics in Medicine 27 (2008), 1693-1702. A score without an interval counts as exact.
    """
    value = one - other
    if its is None and others is None:
        return Difference(value, None)
    (low, high), (other_low, other_high) = its or (one, one), others or (other, other)
    return Difference(value, (value - math.hypot(one - low, other_high - other),
                              value + math.hypot(high - one, other - other_low)))  # fmt: skip


def _interval(metric: Metric, one: np.ndarray, other: np.ndarray, difference: float) -> Interval | None:
    import numpy as np

    rows = len(one)
    if rows == 1 and not metric.is_percentage:  # one row says nothing of the spread
        return None
    by_row = _pseudo_values(metric, one) - _pseudo_values(metric, other)
    by_row += difference - by_row.mean()
    if metric.is_percentage:
        by_row = np.concatenate([by_row, [1.0, -1.0]])
        middle, reach = float(by_row.mean()), _Z_95 * float(by_row.std()) / math.sqrt(len(by_row))
        return max(-1.0, middle - reach), min(1.0, middle + reach)
    reach = _student_95(rows - 1) * float(by_row.std(ddof=1)) / math.sqrt(rows)
    return (difference - reach, difference + reach) if math.isfinite(reach) else None


def _pseudo_values(metric: Metric, counts: np.ndarray) -> np.ndarray:
    """(rows,): n·score − (n−1)·the score without the row."""
    import numpy as np

    rows, whole = len(counts), metric.score(counts)
    if rows == 1:
        return np.array([whole])
    values: np.ndarray = rows * whole - (rows - 1) * metric.without_each(counts)
    return values


def _student_95(freedom: int) -> float:
    """Student's two-sided 95 % quantile, to 3 % from 2 degrees of freedom on (Abramowitz and Stegun 1964, 26.7.5)."""
    z = _Z_95
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
