"""The settings of an adapter that PEFT wrote: its own configuration."""

from __future__ import annotations

from typing import Any, ClassVar

from capotune.settings import TrainingSettings


class PeftSettings(TrainingSettings):
    """What ``adapter_config.json`` says. Nothing is trained by it."""

    method: ClassVar[str] = "peft"
    config: dict[str, Any]
    """The configuration as it is stored."""

    @property
    def virtual_tokens(self) -> int:
        """Vectors before every text."""
        return int(self.config.get("num_virtual_tokens") or 0)

    @property
    def deep(self) -> bool:
        """Whether these stand before every block's keys and values, and not before the input's embeddings."""
        return self.config.get("peft_type") == "PREFIX_TUNING"

    @property
    def trains(self) -> bool:
        """It was trained elsewhere."""
        return False
