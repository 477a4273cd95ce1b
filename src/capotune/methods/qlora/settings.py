"""The settings of qlora."""

from __future__ import annotations

from typing import ClassVar, Literal

from capotune.methods.lora.settings import LoraSettings


class QloraSettings(LoraSettings):
    """QLoRA (Dettmers et al. 2023): LoRA over a base held in 4 bits."""

    method: ClassVar[str] = "qlora"
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit code book of the frozen weights."""
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights that share one scale."""
    double_quant: bool = True
    """Quantise the scales as well, to 8 bits."""

    @property
    def over_full_precision(self) -> LoraSettings:
        """LoRA of the same layers, ranks and scales."""
        return LoraSettings(**self.model_dump(include=set(LoraSettings.model_fields)))
