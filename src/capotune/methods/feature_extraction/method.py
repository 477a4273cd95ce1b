"""Feature extraction: early layers stay fixed, the last blocks or a head alone adapt (Peters et al. 2019).

With ``trainable_layers=0`` nothing inside the backbone trains: the task's head reads every layer's pooled states, which
are computed once. With k above 0 the last k blocks and the norm above them train, in fp32, on the states that enter
them, computed once as well.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from capotune.errors import SettingError
from capotune.kernels.nf4 import Linear4bit
from capotune.methods.base import Method, Start
from capotune.methods.feature_extraction.settings import FeatureExtractionSettings
from capotune.models.architecture import Architecture, swap


class FeatureExtraction(Method):
    """The last k blocks and the norm become trainable copies; the frozen originals are set aside."""

    Settings = FeatureExtractionSettings
    known_to_peft = False
    settings: FeatureExtractionSettings

    @property
    def feature_layers(self) -> tuple[int, ...] | None:
        """A head alone reads all layers; above trained blocks, the last."""
        return (-1,) if self.settings.trainable_layers else None

    def attach(self, model: nn.Module, architecture: Architecture, start: Start) -> None:  # noqa: ARG002 - no random numbers
        """Copy the last k blocks and the norm. ``SettingError`` when the model has fewer blocks."""
        count, trainable = len(architecture.blocks), self.settings.trainable_layers
        assert trainable is not None
        if trainable and architecture.why_no_blocks:
            raise SettingError(
                architecture.why_no_blocks,
                setting="trainable_layers",
                given=trainable,
                allowed="0",
                advice="lora and qlora train in all of them.",
            )
        if trainable > count:
            raise SettingError(
                f"this model has {count} blocks.",
                setting="trainable_layers",
                given=trainable,
                allowed=f"0 to {count}",
            )
        if trainable and any(isinstance(model.get_submodule(path), Linear4bit) for path in architecture.linears):
            raise SettingError(
                "this base is stored in 4 bits, and such weights cannot train.",
                setting="trainable_layers",
                given=trainable,
                advice="Give the model in full precision, or `trainable_layers=0`, or train lora or qlora on it.",
            )
        self.model, self.architecture = model, architecture
        paths = [*architecture.blocks[count - trainable :]] if trainable else []
        if paths and architecture.norm is not None:
            paths.append(architecture.norm)
        self.originals = {path: model.get_submodule(path) for path in paths}
        self.copies = {path: copy.deepcopy(part).float().requires_grad_(True) for path, part in self.originals.items()}
        for path, part in self.copies.items():
            swap(model, path, part)
        if paths:
            self._bridge_dtypes(paths[0], paths[-1])

    def _bridge_dtypes(self, first: str, last: str) -> None:
        """Where the base computes in less than fp32, raise what enters the copies and lower what leaves them."""
        dtype = next(self.originals[first].parameters()).dtype
        if dtype != torch.float32:
            self.copies[first].register_forward_pre_hook(_raise_states, with_kwargs=True)
            self.copies[last].register_forward_hook(lambda _module, _given, states: _lowered(states, dtype))

    def detach(self) -> None:
        """Put the frozen parts back."""
        for path, part in self.originals.items():
            swap(self.model, path, part)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every weight of the last k blocks and of the norm."""
        return {
            f"{self.key_prefix}{path}.{name}": parameter
            for path, part in self.copies.items()
            for name, parameter in part.named_parameters()
        }

    def expected_parameters(self) -> int:
        """The weights of the frozen originals."""
        return sum(parameter.numel() for part in self.originals.values() for parameter in part.parameters())

    def first_trainable_block(self) -> int:
        """L − k; with k = 0 no block at all, so L."""
        return len(self.architecture.blocks) - int(self.settings.trainable_layers or 0)

    @classmethod
    def replaced_weights(cls, settings: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Every weight of the last blocks and of the norm, and a head's; none where only a head is trained."""
        if not settings.trainable_layers:
            return {}
        return {key.removeprefix(cls.key_prefix): tensor for key, tensor in tensors.items()}

    def peft_config(self) -> dict[str, Any]:
        """Not a PEFT type; the file says so plainly."""
        return {"peft_type": None, "trainable_layers": self.settings.trainable_layers}


def _lowered(output: Any, dtype: torch.dtype) -> Any:
    """A block's output, its states or a tuple that begins with them, with these in ``dtype``."""
    return (output[0].to(dtype), *output[1:]) if isinstance(output, tuple) else output.to(dtype)


def _raise_states(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].float()}
    return (args[0].float(), *args[1:]), kwargs
