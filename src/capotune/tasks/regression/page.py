"""What a comparison's page shows of numbers: predicted beside true ones, and the worst errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from capotune.sections import Fact, Quote, Quotes, ScatterPlot, Section, TableSection
from capotune.tasks.text_targets.page import text_parts

_SHOWN_ERRORS = 12
_SHOWN_POINTS = 1000

Prediction = Mapping[str, Any]
"""A line of predictions.jsonl."""


def sections(record: Mapping[str, Any], method: str, predictions: Sequence[Prediction]) -> list[Section]:
    """Of the recommended ``method``: a picture of each number, the scores of several, and the worst errors."""
    names, scales = record["labels"], record["scales"]
    errors = [_error(row, names, scales) for row in predictions]
    worst = sorted(range(len(predictions)), key=lambda at: -errors[at][0])[:_SHOWN_ERRORS]
    note = (
        f"Test rows for which {method} is farthest off. Read these first: some will be numbers that the data has wrong."
    )
    shown: list[Section] = [_picture(name, method, predictions) for name in names]
    numbers = record["trained"].get("numbers")
    if numbers:
        columns = ["number", "RMSE", "MAE", "Pearson", "Spearman"]
        lines = [[name, *(f"{value:.4g}" for value in own.values())] for name, own in numbers.items()]
        shown.append(TableSection(f"How near {method} is", "Each number in its own unit.", columns, lines))
    return [*shown, Quotes("Its largest errors", note, [_quote(predictions[at], errors[at][1]) for at in worst])]


def _picture(name: str, method: str, predictions: Sequence[Prediction]) -> ScatterPlot:
    rows = predictions[:: -(-len(predictions) // _SHOWN_POINTS) or 1]
    margin = predictions[0].get("margins", {}).get(name) if predictions else None
    within = "" if margin is None else f" Nine in ten are to be within {margin:.4g} of it, between the thin lines."
    return ScatterPlot(
        f"{name}, as {method} predicts it",
        f"Each point is a test row; on the line predicted and true numbers are equal.{within}",
        f"true {name}", f"predicted {name}",
        [row["numbers"][name] for row in rows], [row["predicted"][name] for row in rows], margin,
    )  # fmt: skip


def _error(row: Prediction, names: Sequence[str], scales: Sequence[float]) -> tuple[float, str]:
    """The largest of the row, in standard deviations, and whose it is."""
    pairs = zip(names, scales, strict=True)
    return max((abs(row["predicted"][name] - row["numbers"][name]) / scale, name) for name, scale in pairs)


def _quote(row: Prediction, name: str) -> Quote:
    facts = [
        Fact(name, f"{row['numbers'][name]:.4g}"),
        Fact("predicted", f"{row['predicted'][name]:.4g}", wrong=True),
    ]
    return Quote(text_parts(row["text"]), facts)
