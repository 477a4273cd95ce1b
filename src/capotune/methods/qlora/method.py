"""QLoRA: LoRA over a base held in 4 bits (Dettmers et al. 2023, arXiv 2305.14314, §3).

The base is quantized tensor by tensor while it streams from disk (``models.stream``), and each product dequantizes one
layer for as long as it takes (``kernels.nf4``); what trains is plain LoRA in fp32.
"""

from __future__ import annotations

from capotune.methods.lora.method import Lora
from capotune.methods.qlora.settings import QloraSettings
from capotune.models.base import Quantization


class Qlora(Lora):
    """LoRA whose base layers are ``Linear4bit``."""

    Settings = QloraSettings
    settings: QloraSettings

    @property
    def quantization(self) -> Quantization:
        """The quantization that the base must be loaded with."""
        return Quantization(self.settings.quant_type, self.settings.block_size, self.settings.double_quant)
