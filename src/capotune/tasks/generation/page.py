"""What a comparison's page shows of written text: the same prompts, answered by everyone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from capotune.sections import Answered, Section, SideBySide

SHOWN_ANSWERS = 5


def sections(predictions: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Section]:
    """The first test rows that all (the base too) have answered, with what each wrote."""
    written = {who: {row["prompt"]: row["written"] for row in rows} for who, rows in predictions.items()}
    first = next(iter(predictions.values()))
    shared = [row for row in first if all(row["prompt"] in answers for answers in written.values())]
    prompts = [
        Answered(row["prompt"], row["expected"], {who: answers[row["prompt"]] for who, answers in written.items()})
        for row in shared[:SHOWN_ANSWERS]
    ]
    return [SideBySide("The same prompts, answered", "Test rows, not seen in training.", prompts)]
