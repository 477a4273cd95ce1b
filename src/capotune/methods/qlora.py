"""QLoRA: LoRA over a base held in 4 bits (Dettmers et al. 2023, arXiv 2305.14314, §3).

The base is packed tensor by tensor while it streams from disk (``models.load``) and each product unpacks one layer for
as long as it takes (``kernels.nf4``); what trains is plain LoRA in fp32.
"""

from __future__ import annotations

from capotune.methods.lora import Lora
from capotune.models.load import Quantization
from capotune.settings import QloraSettings


class Qlora(Lora):
    """LoRA whose base layers are ``Linear4bit``."""

    settings: QloraSettings

    @property
    def quantization(self) -> Quantization:
        """The packing that the base must be loaded with."""
        return Quantization(self.settings.quant_type, self.settings.block_size, self.settings.double_quant)
