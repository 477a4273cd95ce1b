"""What a comparison's page shows of labels: confusions, and the surest mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from capotune.evaluation.metrics import confusion
from capotune.sections import ConfusionMatrix, Fact, Quote, Quotes, Section
from capotune.tasks.text_targets.page import text_parts

_SHOWN_MISTAKES = 12


def sections(labels: Sequence[str], method: str, predictions: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Of the recommended ``method``: which labels it takes for which, and the wrong labels it was surest of."""
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
    ]


def _mistake(row: Mapping[str, Any]) -> Quote:
    facts = [
        Fact("labelled", row["label"]),
        Fact("predicted", row["predicted"], wrong=True),
        Fact("with", f"{100 * row['probability']:.1f} %"),
    ]
    return Quote(text_parts(row["text"]), facts)
