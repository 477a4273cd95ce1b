"""How near predicted numbers are to the true ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from capotune.data.labelled import LabelledText
from capotune.evaluation.metrics import Metric, mean_interval, metric, register, wilson_interval
from capotune.evaluation.pairs import RowCounts
from capotune.tasks.base import Scored


def _root_of_ratio(sums: np.ndarray) -> np.ndarray:
    root: np.ndarray = np.sqrt(sums[..., 0] / sums[..., 1].clip(1e-300))
    return root


_SQUARES = ("squared_error", "rows")
for _metric in (
    Metric(
        "rmse", "root mean squared error", "the root of the mean squared distance of a number from the true one",
        higher_is_better=False, columns=_SQUARES, from_sums=_root_of_ratio,
    ),
    Metric(
        "standard_rmse", "root mean squared error (standard deviations)", "the same of all numbers together, each "
        "divided by its standard deviation in the training rows",
        higher_is_better=False, columns=_SQUARES, from_sums=_root_of_ratio,
    ),
    Metric("mae", "mean absolute error", "how far a number is off on average", higher_is_better=False),
    Metric("standard_mae", "mean absolute error (standard deviations)", "how far a number is off on average",
           higher_is_better=False),
    Metric("pearson", "Pearson correlation", "of predicted and true numbers, from -1 to 1"),
    Metric("spearman", "Spearman correlation", "of their ranks, from -1 to 1"),
    Metric("coverage", "in the interval", "the share of true numbers that are in their 90 % interval",
           kind="percentage"),
):  # fmt: skip
    register(_metric)


def compared_metric(numbers: int) -> str:
    """By which techniques are compared: in the number's own unit; several numbers have no unit in common."""
    return "rmse" if numbers == 1 else "standard_rmse"


def scored(
    names: Sequence[str],
    rows: LabelledText[tuple[float, ...]],
    predicted: np.ndarray,
    scales: Sequence[float],
    margins: Sequence[float] | None,
) -> Scored:
    """Errors, correlations (the mean of the numbers'), and how many true numbers are in their interval.

    Shapes: predicted (rows, numbers), in their own units; ``scales`` are standard deviations of the training rows,
    ``margins`` half the intervals' widths.
    """
    true, count = np.array(rows.labels, dtype=np.float64).reshape(-1, len(names)), len(names)
    unit = np.ones(1) if count == 1 else np.array(scales)
    errors = (predicted - true) / unit
    squares = np.square(errors).mean(1)
    prefix = "" if count == 1 else "standard_"
    each = {name: _of_number(true[:, at], predicted[:, at]) for at, name in enumerate(names)}
    scores = {
        f"{prefix}rmse": float(np.sqrt(squares.mean())),
        f"{prefix}mae": float(np.abs(errors).mean()),
        **{one: float(np.mean([own[one] for own in each.values()])) for one in ("pearson", "spearman")},
    }
    intervals: dict[str, tuple[float, float]] = {}
    if ends := mean_interval(squares.tolist(), [1] * len(rows)):
        low, high = max(0.0, ends[0]), ends[1]
        intervals[f"{prefix}rmse"] = low**0.5, high**0.5
    if margins is not None:
        inside = np.abs(predicted - true) <= np.array(margins)
        scores["coverage"] = float(inside.mean())
        if count == 1:
            intervals["coverage"] = wilson_interval(scores["coverage"], len(rows))
    compared = compared_metric(count)
    return Scored(
        compared,
        scores,
        intervals,
        len(rows),
        dict.fromkeys(scores, f"{len(rows):,} rows"),
        _predictions(names, rows, predicted, margins),
        RowCounts.of(metric(compared), np.stack([squares, np.ones_like(squares)], 1)),
        {"numbers": each} if count > 1 else {},
    )


def _of_number(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    errors = predicted - true
    return {
        "rmse": float(np.sqrt(np.square(errors).mean())),
        "mae": float(np.abs(errors).mean()),
        "pearson": correlation(true, predicted),
        "spearman": correlation(_ranks(true), _ranks(predicted)),
    }


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's; 0 where one of them does not vary, which says nothing of the other."""
    one, other = one - one.mean(), other - other.mean()
    size = float(np.sqrt(np.square(one).sum() * np.square(other).sum()))
    return float((one * other).sum()) / size if size > 0 else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """Equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    mean: np.ndarray = (ends - (counts - 1) / 2)[place]
    return mean


def _predictions(
    names: Sequence[str],
    rows: LabelledText[tuple[float, ...]],
    predicted: np.ndarray,
    margins: Sequence[float] | None,
) -> list[dict[str, Any]]:
    return [
        {
            "text": text,
            "numbers": dict(zip(names, true, strict=True)),
            "predicted": dict(zip(names, own, strict=True)),
            **({"margins": dict(zip(names, margins, strict=True))} if margins else {}),
            "line": line,
        }
        for text, true, line, own in zip(rows.texts, rows.labels, rows.lines, predicted.tolist(), strict=True)
    ]
