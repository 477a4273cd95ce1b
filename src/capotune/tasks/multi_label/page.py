"""What a comparison's page shows of several labels: each label's score, and texts with most mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from capotune.evaluation.metrics import f1_of
from capotune.sections import Fact, Quote, Quotes, Section, TableSection
from capotune.tasks.text_targets.page import text_parts

_SHOWN_MISTAKES = 12
_COLUMNS = ["label", "test rows with it", "found", "missed", "wrongly given", "precision", "recall", "F1", "threshold"]

Prediction = Mapping[str, Any]
"""A line of predictions.jsonl."""


def sections(record: Mapping[str, Any], method: str, predictions: Sequence[Prediction]) -> list[Section]:
    """Of the recommended ``method``: a line for each label, and the texts with most wrong labels."""
    wrong = [row for row in predictions if set(row["labels"]) != set(row["predicted"])]
    worst = sorted(wrong, key=lambda row: -len(set(row["labels"]) ^ set(row["predicted"])))[:_SHOWN_MISTAKES]
    note = (
        f"Test rows for which {method} gives most wrong labels or misses most. Read these first: some will be labels "
        "that the data has wrong."
    )
    return [_by_label(record, method, predictions), Quotes("Texts with most mistakes", note, [*map(_quote, worst)])]


def _by_label(record: Mapping[str, Any], method: str, predictions: Sequence[Prediction]) -> TableSection:
    counts = {label: np.zeros(3, dtype=int) for label in record["labels"]}
    for row in predictions:
        true, given = set(row["labels"]), set(row["predicted"])
        for column, names in enumerate((true & given, given - true, true - given)):
            for label in names:
                counts[label][column] += 1
    thresholds = dict(zip(record["labels"], record["thresholds"], strict=True))
    rows = sorted(counts.items(), key=lambda item: (-item[1][0] - item[1][2], item[0]))
    note = "A text has a label from its threshold on, a probability that held-out rows chose for the best F1."
    lines = [_line(label, own, f"{thresholds[label]:.2f}") for label, own in rows]
    lines.append(_line("all", sum(counts.values(), np.zeros(3, dtype=int)), ""))
    return TableSection(f"What {method} finds", note, _COLUMNS, lines)


def _line(label: str, counts: np.ndarray, threshold: str) -> list[str]:
    right, wrong, missed = map(int, counts)
    shares = right / max(1, right + wrong), right / max(1, right + missed), float(f1_of(counts))
    numbers = (f"{number:,}" for number in (right + missed, right, missed, wrong))
    return [label, *numbers, *(f"{share:.2f}" for share in shares), threshold]


def _quote(row: Prediction) -> Quote:
    missed = [label for label in row["labels"] if label not in row["predicted"]]
    given = [label for label in row["predicted"] if label not in row["labels"]]
    right = [label for label in row["labels"] if label in row["predicted"]]
    facts = [
        Fact(words, ", ".join(names), wrong)
        for words, names, wrong in (("right", right, False), ("missed", missed, False), ("given", given, True))
        if names
    ]
    return Quote(text_parts(row["text"]), facts)
