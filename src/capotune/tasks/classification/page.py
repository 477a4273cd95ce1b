"""What a comparison's page shows of labels: confusions, the surest mistakes, and what probabilities are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from capotune.evaluation.metrics import confusion
from capotune.sections import ConfusionMatrix, Fact, Point, Quote, Quotes, Reliability, Section
from capotune.tasks.text_targets.page import text_parts

_SHOWN_MISTAKES = 12


def sections(record: Mapping[str, Any], method: str, predictions: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Of the recommended ``method``, whose adapter has this ``record``: which labels it takes for which, the wrong
    labels it was surest of, and whether its probabilities mean what they say."""
    labels = record["labels"]
    number = {label: at for at, label in enumerate(labels)}
    predicted, true = (np.array([number[row[name]] for row in predictions]) for name in ("predicted", "label"))
    wrong = [row for row in predictions if row["label"] != row["predicted"]]
    surest = sorted(wrong, key=lambda row: -row["probability"])[:_SHOWN_MISTAKES]
    note = (
        f"Test rows that {method} got wrong while most certain. Read these first: some will be labels that the data "
        "has wrong."
    )
    return [
        ConfusionMatrix(f"What {method} confuses", list(labels), confusion(predicted, true, len(labels))),
        Quotes("Its most confident mistakes", note, [_mistake(row) for row in surest]),
        *_reliability(record["trained"].get("calibration")),
    ]


def _reliability(calibration: Mapping[str, Any] | None) -> list[Section]:
    if calibration is None:
        return []
    before, now = (f"{100 * calibration[name]:.1f} %" for name in ("error_before", "error"))
    note = (
        f"Test rows in {len(calibration['bins'])} parts of equal size, by the probability of their label: on the line "
        "as many are right as it says. The expected calibration error is "
        f"{now}, and was {before} before a temperature of {calibration['temperature']:.2f}, fitted on held-out rows."
    )
    points = [Point(one["confidence"], one["accuracy"], one["rows"]) for one in calibration["bins"]]
    return [Reliability("What its probabilities are worth", note, points)]


def _mistake(row: Mapping[str, Any]) -> Quote:
    facts = [
        Fact("labelled", row["label"]),
        Fact("predicted", row["predicted"], wrong=True),
        Fact("with", f"{100 * row['probability']:.1f} %"),
    ]
    return Quote(text_parts(row["text"]), facts)
