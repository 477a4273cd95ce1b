"""Whether what was written answers as the adapter does, and not as the base: by the distributions on some rows.

Distances are KL divergences in nats, mean over tokens (or rows, for labels). A result is refused that is as near to the
base as to the adapter, or farther from the adapter than rounding explains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from capotune.data.batches import IGNORE_INDEX, Encoded
from capotune.errors import AdapterError
from capotune.evaluation.divergence import compare_logits

ROWS = 32
"""Rows that are compared."""
MOST_TOKENS = 1024
"""Tokens of all rows: for each, three whole distributions are in memory."""
SAME = 1e-6
"""Distance below which two models are the same in fp32."""
EXACT, ROUNDED = 1e-4, 0.25
"""Most that the result may be from the adapter, as a part of the adapter's distance from the base: where nothing is
rounded but fp32, and where weights are rounded to fewer bits. KL grows with the square of a change in the logits: 1e-4
stands for a hundredth of the adapter's change, 0.25 for half of it."""


@dataclass(frozen=True)
class Agreement:
    """How far a result is from the adapter and from the base."""

    rows: int
    compared: int
    """Tokens, or rows of labels."""
    to_adapter: float
    to_base: float
    adapter_to_base: float
    top1_agreement: float
    """Part for which result and adapter find the same answer most probable."""
    recovered: float | None
    """Part of the adapter's gain in loss that the result has; None where the adapter gains nothing on these rows, or
    they have no loss over tokens."""

    def check(self, rounded: bool, where: str) -> None:
        """``AdapterError`` when the result answers as the base, or not as the adapter. ``rounded``: whether its weights
        have fewer bits than those that the adapter was asked with."""
        advice = "It was not written. Please report this, with the base's name and the command."
        if self.adapter_to_base > SAME and self.to_adapter >= self.to_base:
            raise AdapterError(
                f"what was written answers as the base does: {self.to_base:.3g} nats from it, and "
                f"{self.to_adapter:.3g} from the adapter.",
                where=where,
                advice=advice,
            )
        most = max((ROUNDED if rounded else EXACT) * self.adapter_to_base, 1e-3 if rounded else SAME)
        if not self.to_adapter <= most:
            raise AdapterError(
                f"what was written answers otherwise than the adapter: {self.to_adapter:.3g} nats from it, where "
                f"{most:.3g} would be rounding.",
                where=where,
                advice=advice,
            )


def agreement(rows: Sequence[Encoded], adapter: Tensor, base: Tensor, result: Tensor) -> Agreement:
    """Of three models' logits (tokens or rows, choices), as ``answers_of`` gives them for the ``rows``."""
    near = compare_logits(adapter, result)
    to_base, gap = compare_logits(base, result), compare_logits(base, adapter)
    losses = [_loss(rows, logits) for logits in (base, adapter, result)]
    return Agreement(
        len(rows), near.compared, near.kl_divergence, to_base.kl_divergence, gap.kl_divergence, near.top1_agreement,
        _recovered(*losses),
    )  # fmt: skip


def cut_to_fit(rows: Sequence[Encoded], longest: int) -> list[Encoded]:
    """Rows cut to ``longest`` tokens, as many as ``ROWS`` and ``MOST_TOKENS`` allow."""
    chosen: list[Encoded] = []
    left = MOST_TOKENS
    for one in rows[:ROWS]:
        size = min(longest, left, len(one.ids))
        if size < 1 or (chosen and size < min(longest, len(one.ids))):
            break
        chosen.append(Encoded(one.ids[:size], one.labels[:size], one.tokens))
        left -= size
    return chosen


def _recovered(base: float | None, adapter: float | None, result: float | None) -> float | None:
    if base is None or adapter is None or result is None or base - adapter < 1e-3:
        return None
    return (base - result) / (base - adapter)


def _loss(rows: Sequence[Encoded], logits: Tensor) -> float | None:
    """Mean cross-entropy of the tokens in the loss, in nats; None where there are none."""
    wanted = torch.tensor([label for one in rows for label in (*one.labels[1:], IGNORE_INDEX)])
    if len(wanted) != len(logits) or bool((wanted == IGNORE_INDEX).all()):
        return None
    return float(functional.cross_entropy(logits.float(), wanted, ignore_index=IGNORE_INDEX))
