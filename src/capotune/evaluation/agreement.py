"""Whether what was written answers as the adapter does, and not as the base: by the distributions on some rows.

Distances are KL divergences in nats, mean over tokens (or rows, for labels). A result is refused that is as near to the
base as to the adapter, or farther from the adapter than rounding explains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from capotune.data.batches import IGNORE_INDEX, Encoded
from capotune.errors import AdapterError
from capotune.evaluation.divergence import compare_logits
from capotune.models.base import Base

ROWS = 32
"""Rows that are compared."""
MOST_TOKENS = 1024
"""Tokens of all rows: for each, three whole distributions are in memory."""
SAME = 1e-6
"""Distance below which two models are the same in fp32."""
Precision = Literal["F32", "F16", "BF16", "16-bit sums", "Q8_0", "4-bit"]
"""How weights are stored, from what costs the answers least to what costs them most; ``16-bit sums``: products are
computed in bf16 or fp16 too."""


@dataclass(frozen=True)
class Tolerance:
    """Most that a result may be from the adapter: the larger of the two."""

    share: float
    """Of the adapter's own distance from the base. KL grows with the square of a change in the logits: 1e-4 stands for
    a hundredth of the adapter's change."""
    nats: float
    """What rounding costs an adapter that changes little."""


TOLERANCES: dict[Precision, Tolerance] = {
    "F32": Tolerance(1e-4, SAME),
    "F16": Tolerance(2e-3, 1e-5),
    "BF16": Tolerance(0.02, 1e-3),
    "16-bit sums": Tolerance(0.02, 0.01),
    "Q8_0": Tolerance(0.02, 0.01),
    "4-bit": Tolerance(0.25, 0.01),
}
"""Measured on adapters that were trained on real rows, merged and read back, the larger of two texts: SmolLM2 (WikiSQL;
LoRA, and QLoRA into full precision; the adapter 0.6 to 4 nats from the base), capo-tiny (Python expressions; 1.7 to
2.9) and MiniLM (six labels of Banking77; 0.03 to 0.11). Nats, and share:

                 SmolLM2           capo-tiny         MiniLM
    F32          1e-11, 1e-11      2e-12, 1e-12      7e-14, 1e-12
    F16          1e-6,  1.4e-6     6e-7,  3e-7       3e-8,  4e-7
    BF16         7e-5,  9e-5       4e-5,  2e-5       2e-6,  5e-5
    16-bit sums  1.9e-3, 2.5e-3
    Q8_0         1.2e-3, 2.4e-2 (GSM8K, 0.05 from the base)
    4-bit        2.1,   1.2        0.30,  0.16       0.03,  0.43

Some ten times that is allowed, and more in F16 and BF16, where sums with large deltas are rounded in larger steps:
random LoRA on capo-tiny with ``lora_alpha`` from 4 to 256, 1.8 to 2.1 nats from the base, costs a share of at most
1e-8 in F32, 1e-3 in F16 and 1.4e-2 in BF16. A delta wrong by a hundredth costs 5e-4 to 3e-3 there up to 128 (at 256
the answers hardly change any more): F32 refuses it, and in BF16 it cannot be told from rounding.

For 4 bits half of the change is allowed. There SmolLM2's and MiniLM's sums answer as the base alone: a delta that is
smaller than the steps is lost when the sum is quantized again."""


_REPORT = "Please report this, with the base's name and the command."
_ADVICE: dict[Precision, str] = {
    "F16": "Merge into a copy of the base in float32; for a GGUF file give `gguf_type=F32` too.",
    "BF16": "Merge into a copy of the base in float32.",
    "4-bit": "The steps of 4 bits may be larger than the change: keep the adapter, or merge into full precision.",
}


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

    def check(self, precision: Precision, where: str) -> None:
        """``AdapterError`` when the result answers as the base, or not as the adapter. ``precision`` is that of the
        result, where it is less than what the adapter was asked with."""
        advice = f"It was not written. {_ADVICE.get(precision, _REPORT)}"
        if self.adapter_to_base > SAME and self.to_adapter >= self.to_base:
            raise AdapterError(
                f"what was written answers as the base does: {self.to_base:.3g} nats from it, and "
                f"{self.to_adapter:.3g} from the adapter.",
                where=where,
                advice=advice,
            )
        allowed = TOLERANCES[precision]
        most = max(allowed.share * self.adapter_to_base, allowed.nats)
        if not self.to_adapter <= most:
            raise AdapterError(
                f"what was written answers otherwise than the adapter: {self.to_adapter:.3g} nats from it, where "
                f"rounding to {precision} explains {most:.3g}.",
                where=where,
                advice=advice,
            )


def agreement(rows: Sequence[Encoded], adapter: Tensor, base: Tensor, result: Tensor) -> Agreement:
    """Of three models' logits (tokens or rows, choices), as ``answers_of`` gives them for the ``rows``."""
    near = compare_logits(adapter, result)
    to_base, gap = compare_logits(base, result), compare_logits(base, adapter)
    losses = [loss_of(rows, logits) for logits in (base, adapter, result)]
    return Agreement(
        len(rows), near.compared, near.kl_divergence, to_base.kl_divergence, gap.kl_divergence, near.top1_agreement,
        _recovered(*losses),
    )  # fmt: skip


def precision_of(base: Base) -> Precision:
    """The least one that weights of ``base`` are stored in."""
    if base.is_quantized:
        return "4-bit"
    stored = {tensor.dtype for tensor in base.tensors}
    return next((one for one in ("BF16", "F16") if one in stored), "F32")


def computes_in(dtype: torch.dtype) -> Precision:
    """The precision of what is computed in ``dtype``."""
    return "F32" if dtype == torch.float32 else "16-bit sums"


def least(*precisions: Precision) -> Precision:
    """The one with the fewest bits."""
    return max(precisions, key=list(TOLERANCES).index)


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


def loss_of(rows: Sequence[Encoded], logits: Tensor) -> float | None:
    """Mean cross-entropy of the tokens in the loss, in nats; None where there are none."""
    wanted = torch.tensor([label for one in rows for label in (*one.labels[1:], IGNORE_INDEX)])
    if len(wanted) != len(logits) or bool((wanted == IGNORE_INDEX).all()):
        return None
    return float(functional.cross_entropy(logits.float(), wanted, ignore_index=IGNORE_INDEX))
