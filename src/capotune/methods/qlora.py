"""QLoRA: LoRA over a base held in 4 bits (Dettmers et al. 2023, arXiv 2305.14314, §3).

The base is quantized tensor by tensor while it streams from disk (``models.stream``), and each product dequantizes one
layer for as long as it takes (``kernels.nf4``); what trains is plain LoRA in fp32.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from capotune.methods.lora import Lora, LoraSettings
from capotune.models.base import Quantization


class QloraSettings(LoraSettings):
    """QLoRA (Dettmers et al. 2023): LoRA over a base held in 4 bits."""

    method: ClassVar[str] = "qlora"
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit code book of the frozen weights."""
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights that share one scale."""
    double_quant: bool = True
    """Quantise the scales as well, to 8 bits."""


class Qlora(Lora):
    """LoRA whose base layers are ``Linear4bit``."""

    Settings = QloraSettings
    settings: QloraSettings

    @property
    def quantization(self) -> Quantization:
        """The quantization that the base must be loaded with."""
        return Quantization(self.settings.quant_type, self.settings.block_size, self.settings.double_quant)
