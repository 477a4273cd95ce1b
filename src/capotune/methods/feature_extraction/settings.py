"""The settings of feature extraction."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from capotune.errors import SettingError
from capotune.settings import Context, Positive, TrainingSettings


class FeatureExtractionSettings(TrainingSettings):
    """Frozen layers, computed once; a head, or the last blocks and a head, adapt."""

    method: ClassVar[str] = "feature-extraction"
    trainable_layers: int | None = Field(default=None, ge=0)
    """Last blocks that train, with the norm above them. Left out: 0 for labels (the head alone, which is solved to
    convergence, not trained in steps), 2 for text."""
    learning_rate: Positive | None = None
    """Peak learning rate of the last blocks. Left out: 1e-4 for labels; for text by the model's width, as LoRA's."""

    def _defaults(self, context: Context) -> dict[str, Any]:
        chosen = super()._defaults(context)
        if context.has_head:
            return {**chosen, "learning_rate": 1e-4, "trainable_layers": 0}
        return {**chosen, "trainable_layers": 2}

    def completed(self, context: Context) -> FeatureExtractionSettings:
        """As for every method; ``SettingError`` for no trainable layer where the task has no head of its own."""
        if self.trainable_layers == 0 and not context.has_head:
            raise SettingError(
                "trains a head alone, and text has none of its own.",
                setting="trainable_layers",
                given=0,
                allowed="1 or more",
            )
        return super().completed(context)
