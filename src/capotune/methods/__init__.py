"""The four techniques: what is trained inside a frozen model."""

from __future__ import annotations

from capotune.methods.base import Method, Start, Untouched
from capotune.methods.feature_extraction import FeatureExtraction
from capotune.methods.lora import Lora
from capotune.methods.prompt_tuning import PromptTuning
from capotune.methods.qlora import Qlora
from capotune.settings import MethodSettings

__all__ = ["METHODS", "Method", "Start", "Untouched", "make"]

METHODS: dict[str, type[Method]] = {
    "feature-extraction": FeatureExtraction,
    "lora": Lora,
    "qlora": Qlora,
    "prompt-tuning": PromptTuning,
}


def make(settings: MethodSettings) -> Method:
    """The method that the settings are of, not attached yet."""
    return METHODS[settings.method](settings)
