"""Golden answers: what an adapter answered to a few texts of ours where it was trained, stored with it, so that another
machine can see that it answers the same. None of the user's rows is among the texts.

An answer is a distribution: over labels, over tags of each word, over next tokens. Of each the most probable choices
are stored with their probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from capotune.adapters.assemble import Assembled
from capotune.adapters.files import RECORD
from capotune.adapters.store import GoldenAnswer, StoredAdapter
from capotune.errors import AdapterError, CapotuneError

TEXTS = (
    "How do I change my address?",
    "The keeper wrote down the weather.",
    "In 1969 two people walked on the Moon.",
)
CHOICES, ROWS = 5, 8
"""Stored at most of each distribution, and distributions of each text."""
TOLERANCE, TOLERANCE_16_BITS = 1e-3, 5e-2
"""Of a probability, where the base computes in fp32 and in 16 bits: another processor adds in another order."""


@dataclass(frozen=True)
class GoldenCheck:
    """How far the answers of an adapter are from those that are stored with it."""

    compared: int
    """Probabilities."""
    distance: float
    """Largest difference of a probability."""
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether the difference is one of rounding."""
        return self.distance <= self.tolerance


def golden_answers(assembled: Assembled) -> list[dict[str, Any]]:
    """The answers to ``TEXTS``, as plain JSON; without those that the task cannot read or that are not finite."""
    found = []
    for text in TEXTS:
        try:
            rows = _probabilities(assembled, text)
        except CapotuneError:  # a text that leaves the base's vocabulary or length
            continue
        values, choices = rows.topk(min(CHOICES, rows.shape[1]), 1)
        if rows.numel() and bool(rows.isfinite().all()):
            pairs = zip(choices.tolist(), values.tolist(), strict=True)
            stored = [[[choice, round(p, 6)] for choice, p in zip(*pair, strict=True)] for pair in pairs]
            found.append({"text": text, "rows": stored})
    return found


def check_golden(stored: StoredAdapter, assembled: Assembled) -> GoldenCheck:
    """Ask the adapter on its base again. ``AdapterError`` where no answers are stored, or such as it cannot give."""
    answers = [GoldenAnswer.model_validate(one) for one in stored.record.get("golden", [])]
    if not answers:
        left_out = next((one for one in stored.record.get("left_out", []) if one.startswith("golden")), None)
        raise AdapterError(
            "no golden answers are stored with it, so there is nothing to check."
            f"{f' When it was pushed, {left_out} stayed behind.' if left_out else ''}",
            where=str(stored.folder if stored.is_foreign else stored.folder / RECORD),
            advice="Adapters that `train` and `compare` write hold some.",
        )
    compared, distance = 0, 0.0
    for answer in answers:
        rows = _probabilities(assembled, answer.text)
        choices = [choice for row in answer.rows for choice, _ in row]
        if len(rows) != len(answer.rows) or max(choices, default=0) >= rows.shape[1]:
            raise AdapterError(
                f"its golden answers to {answer.text!r} are of another form than the adapter's.",
                where=str(stored.folder / RECORD),
            )
        for row, expected in zip(rows, answer.rows, strict=True):
            distance = max(distance, *(abs(float(row[choice]) - p) for choice, p in expected))
            compared += len(expected)
    is_exact = stored.dtype == torch.float32
    return GoldenCheck(compared, distance, TOLERANCE if is_exact else TOLERANCE_16_BITS)


@torch.no_grad()
def _probabilities(assembled: Assembled, text: str) -> torch.Tensor:
    """(distributions, choices) fp32 on the CPU."""
    logits: torch.Tensor = assembled.task.golden_logits(assembled, text)
    return logits[:ROWS].float().cpu().softmax(1)
