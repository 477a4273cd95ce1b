"""The settings of lora."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from capotune.settings import Count, Positive, TrainingSettings


class LoraSettings(TrainingSettings):
    """LoRA (Hu et al. 2021): W stays frozen, y = xWᵀ + scale·(xAᵀ)Bᵀ."""

    method: ClassVar[str] = "lora"
    rank: Count = 16
    """Rows of A, columns of B: how large a change can be."""
    alpha: Positive = 32.0
    """Scale of the change: alpha/rank, or alpha/√rank with rslora."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of A."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Linear layers to adapt: `all-linear`, names or endings of names (`query value`), or one regular expression."""
    layers: tuple[int, ...] | None = None
    """Only the blocks with these numbers (from 0)."""
    rslora: bool = False
    """Scale by alpha/√rank (Kalajdzievski 2023), which keeps large ranks trainable."""
    dora: bool = False
    """Learn a magnitude for each output beside the direction (DoRA, Liu et al. 2024)."""
    lora_plus_ratio: Positive = 1.0
    """Learning rate of B over that of A (LoRA+, Hayou et al. 2024)."""

    @property
    def scale(self) -> float:
        """Factor of the low-rank product: alpha/rank, or alpha/√rank with rslora."""
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))

    @property
    def stored_alpha(self) -> int:
        """The ``lora_alpha`` of an adapter file, a whole number that divided by the rank is the scale of the file's BA.

        Many loaders read rank and ``lora_alpha`` alone, some as whole numbers: where these cannot say the scale, the
        file's B holds it and they say 1.
        """
        return self.rank if self.rslora or self.alpha != int(self.alpha) else int(self.alpha)
