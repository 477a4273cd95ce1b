"""Feature extraction: early layers stay fixed, the last blocks or a head alone adapt (Peters et al. 2019).

With ``trainable_layers=0`` nothing inside the backbone trains: the task's head reads every layer's pooled states, which
are computed once. With k above 0 the last k blocks train on the states that enter them, computed once as well.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from capotune.config import FeatureExtractionSettings
from capotune.errors import SettingError
from capotune.kernels.nf4 import Linear4bit
from capotune.methods.base import Method, Start
from capotune.models.architecture import Architecture, swap


class FeatureExtraction(Method):
    """The last k blocks become trainable copies; the frozen originals are kept aside."""

    settings: FeatureExtractionSettings

    @property
    def feature_layers(self) -> tuple[int, ...] | None:
        """A head alone reads all layers; above trained blocks, the last."""
        return (-1,) if self.settings.trainable_layers else None

    def attach(self, model: nn.Module, architecture: Architecture, start: Start) -> None:  # noqa: ARG002 - no random numbers
        """Copy the last k blocks. ``SettingError`` when the model has fewer."""
        count, trainable = len(architecture.blocks), self.settings.trainable_layers
        if trainable > count:
            raise SettingError(
                f"--trainable-layers {trainable}: this model has {count} blocks; allowed are 0 to {count}."
            )
        if trainable and any(isinstance(model.get_submodule(path), Linear4bit) for path in architecture.linears):
            raise SettingError(
                f"--trainable-layers {trainable}: this base is stored in 4 bits, and such weights cannot train. Give "
                "the model in full precision, or --trainable-layers 0, or train lora or qlora on it."
            )
        self.model, self.architecture = model, architecture
        self.originals = {path: model.get_submodule(path) for path in architecture.blocks[count - trainable :]}
        self.copies = {path: copy.deepcopy(block) for path, block in self.originals.items()}
        for path, block in self.copies.items():
            block.requires_grad_(True)
            swap(model, path, block)

    def detach(self) -> None:
        """Put the frozen blocks back."""
        for path, block in self.originals.items():
            swap(self.model, path, block)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every weight of the last k blocks."""
        return {
            f"{self.key_prefix}{path}.{name}": parameter
            for path, block in self.copies.items()
            for name, parameter in block.named_parameters()
        }

    def expected_parameters(self) -> int:
        """The weights of the k frozen originals."""
        return sum(parameter.numel() for block in self.originals.values() for parameter in block.parameters())

    def first_trainable_block(self) -> int:
        """L − k; with k = 0 no block at all, so L."""
        return len(self.architecture.blocks) - int(self.settings.trainable_layers)

    def peft_config(self) -> dict[str, Any]:
        """Not a PEFT type; the file says so plainly."""
        return {"peft_type": None, "trainable_layers": self.settings.trainable_layers}
