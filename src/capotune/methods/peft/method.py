"""An adapter that PEFT wrote, put on its base.

Low-rank deltas stay beside the frozen layers (``LoraLinear``, one scale each), whatever is stored in 4 bits; all else
takes the place of single parameters, and the base's own are set aside for ``detach``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from capotune.data.wording import shorten
from capotune.errors import AdapterError, SettingError
from capotune.kernels.nf4 import Linear4bit
from capotune.methods.base import LowRank, Method, Start
from capotune.methods.lora.method import LoraLinear
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.peft.parts import Change, Parts, embedding_delta, read_parts
from capotune.methods.peft.settings import PeftSettings
from capotune.methods.prompt_tuning.method import PromptTuning
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.models.architecture import Architecture, is_linear, plain_linear, swap

_SHOWN = 3


class Peft(Method):
    """Nothing is swapped before ``load``, since only the stored tensors say what is."""

    Settings = PeftSettings
    settings: PeftSettings

    def attach(self, model: nn.Module, architecture: Architecture, start: Start) -> None:
        """Vectors before the text, or before every block's keys and values, where there are some."""
        self.model, self.architecture = model, architecture
        self.layers: dict[str, LoraLinear] = {}
        self._set_aside: list[tuple[nn.Module, str, nn.Parameter | None]] = []
        self._idle: list[str] = []
        self.prompt: PromptTuning | None = None
        if self.settings.virtual_tokens:
            count, deep = self.settings.virtual_tokens, self.settings.deep
            prompt = PromptTuning(PromptTuningSettings(num_virtual_tokens=count, deep=deep, init="vocabulary"))
            try:
                prompt.attach(model, architecture, start)
            except SettingError as error:
                raise AdapterError(f"its soft prompt cannot stand here: {error.problem}") from None
            self.prompt = prompt

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put every stored tensor in its place.

        Raises ``AdapterError`` for one that lands nowhere or does not fit; the model is then as it was.
        """
        parts = read_parts(self.settings.config, tensors)
        try:
            self._check_places(parts)
            self._load_prompt(parts)
            for path, weight in parts.replaced.items():
                self._set(path, weight)
            for path, delta in parts.embeddings.items():
                self._change(f"{path}.weight", embedding_delta(delta, path))
            for path, changes in parts.changes.items():
                for change in changes:
                    self._change(path, change, everywhere=path in parts.tied)
            for path, low in parts.low_rank.items():
                self._adapt(path, low)
        except AdapterError:
            self.detach()
            raise

    def detach(self) -> None:
        """Put the base's own layers and parameters back."""
        for path, layer in self.layers.items():
            swap(self.model, path, layer.base_layer)
        for owner, name, parameter in reversed(self._set_aside):
            setattr(owner, name, parameter)
        if self.prompt is not None:
            self.prompt.detach()

    @property
    def virtual_token_ids(self) -> range:
        """Those of the vectors before the text."""
        return range(0) if self.prompt is None else self.prompt.virtual_token_ids

    @property
    def virtual_tokens_are_placeholders(self) -> bool:
        """Those of a deep prompt."""
        return self.prompt is not None and self.prompt.virtual_tokens_are_placeholders

    def notices(self) -> list[str]:
        """What is stored and does nothing here."""
        if not self._idle:
            return []
        stored = shorten(self._idle, _SHOWN)
        return [f"the adapter stores {stored}: the base has no such weights, and they would change nothing."]

    def parameters(self) -> dict[str, nn.Parameter]:
        """None: nothing trains."""
        return {}

    def expected_parameters(self) -> int:
        """0."""
        return 0

    def first_trainable_block(self) -> int:
        """No block trains."""
        raise NotImplementedError("an adapter of another program is not trained further")

    def peft_config(self) -> dict[str, Any]:
        """As it was read."""
        return dict(self.settings.config)

    def merge(self) -> bool:
        """Replace every adapted layer by a plain one; what else changed is in the parameters already."""
        for path, layer in self.layers.items():
            bias: Any = layer.base_layer.bias
            swap(self.model, path, plain_linear(layer.merged_weight(), bias))
        return self.prompt is None

    def adapted_layers(self) -> dict[str, LoraLinear] | None:
        """None where parameters were replaced, or vectors stand before the text."""
        return self.layers if self.prompt is None and not self._set_aside else None

    def unmerge(self) -> None:
        """Put the frozen layers with their deltas beside them back."""
        for path, layer in self.layers.items():
            swap(self.model, path, layer)

    @torch.no_grad()
    def write_into_base(self) -> int:
        """Put every change into the base's own layers, for good; returns how many modules changed.

        Raises ``AdapterError`` for a trained bias of a layer that has none: no configuration of the base asks for it.
        """
        names = {module: path for path, module in self.model.named_modules()}
        added = sorted(names[owner].removesuffix(".base_layer") for owner, _, old in self._set_aside if old is None)
        if added:
            raise AdapterError(f"it trained a bias of {shorten(added, _SHOWN)}, which has none in the base.")
        for path, layer in self.layers.items():
            base_layer, weight = layer.base_layer, layer.merged_weight()
            weight = weight.t().contiguous() if isinstance(base_layer, Conv1D) else weight
            swap(self.model, path, base_layer)
            self._put(base_layer, "weight", nn.Parameter(weight, requires_grad=False))
        return len({owner for owner, _, _ in self._set_aside})

    @classmethod
    def weight_changes(cls, settings: Any, tensors: Mapping[str, Tensor]) -> dict[str, Change] | None:
        """Of every adapted layer, by its path; None where more than linear layers changes."""
        found = cls.low_rank(settings, tensors)
        return None if found is None else {path: partial(_merged, path, low) for path, low in found.items()}

    @classmethod
    def low_rank(cls, settings: Any, tensors: Mapping[str, Tensor]) -> dict[str, LowRank] | None:
        """The deltas but those of zeros, unless all are; None where there is more or nothing, or a delta of a layer
        outside the backbone."""
        parts = read_parts(settings.config, tensors)
        more = parts.changes or parts.replaced or parts.embeddings or parts.bare or parts.prompt is not None
        if more or any("." not in path for path in parts.low_rank):
            return None
        return {path: low for path, low in parts.low_rank.items() if not low.is_zero} or parts.low_rank or None

    def _check_places(self, parts: Parts) -> None:
        """``AdapterError`` for trained tensors that the base has no place for; what does nothing is left out."""
        lost = sorted(path for path in parts.paths() if not self._has(path))
        self._idle = [path for path in lost if self._does_nothing(path, parts)]
        for path in self._idle:
            parts.leave_out(path)
        if trained := [path for path in lost if path not in self._idle]:
            raise AdapterError(
                f"it trained {shorten(trained, _SHOWN)}, which a {type(self.model).__name__} does not have.",
                advice="It belongs to another base: give that with `model`.",
            )

    def _does_nothing(self, path: str, parts: Parts) -> bool:
        """Whether it is a buffer, which the base computes for itself, or a delta of zeros."""
        owner, name = self._owner(path)
        low = parts.low_rank.get(path.rpartition(".")[0])
        is_zero = low is not None and low.is_zero
        return is_zero or (path in parts.replaced and owner is not None and name in owner._buffers)

    def _has(self, path: str) -> bool:
        owner, name = self._owner(path)
        if owner is None:
            return False
        if isinstance(owner, Linear4bit):
            return name in ("weight", "bias")
        return name in owner._parameters and (owner._parameters[name] is not None or name == "bias")

    def _owner(self, path: str) -> tuple[nn.Module | None, str]:
        parent, _, name = path.rpartition(".")
        try:
            return self.model.get_submodule(parent), name
        except AttributeError:
            return None, name

    def _load_prompt(self, parts: Parts) -> None:
        if (self.prompt is None) != (parts.prompt is None):
            raise AdapterError("adapter_config.json and the stored tensors differ in whether there is a soft prompt.")
        if self.prompt is not None:
            try:
                self.prompt.load({"prompt_embeddings": parts.prompt})  # type: ignore[dict-item]
            except ValueError as error:
                raise AdapterError(str(error)) from None

    def _adapt(self, path: str, low: LowRank) -> None:
        base_layer = self.model.get_submodule(path)
        if isinstance(base_layer, nn.Embedding):  # loralib calls its delta as it calls a linear layer's
            self._change(f"{path}.weight", embedding_delta(low, path))
            return
        if not is_linear(base_layer):
            raise AdapterError(
                f"{path} is a {type(base_layer).__name__}; deltas of linear layers and embeddings are read."
            )
        alpha = low.scale * low.rank
        settings = LoraSettings(rank=low.rank, alpha=alpha, dora=low.magnitude is not None)
        layer = LoraLinear(base_layer, settings, torch.Generator())
        stored = {"lora_A": low.a, "lora_B": low.b, "lora_magnitude_vector": low.magnitude}
        for name, tensor in stored.items():
            if tensor is None:
                continue
            parameter: Any = getattr(layer, name)
            if parameter.shape != tensor.shape:
                raise AdapterError(
                    f"{path}: {name} is {tuple(tensor.shape)}, and {tuple(parameter.shape)} fits the base's layer."
                )
            with torch.no_grad():
                parameter.copy_(tensor)
        self.layers[path] = layer.requires_grad_(False)
        swap(self.model, path, layer)

    @torch.no_grad()
    def _change(self, path: str, change: Change, *, everywhere: bool = False) -> None:
        """Change one parameter; ``everywhere``: that of every module that shares it."""
        owner, name = self._owner(path)
        assert owner is not None
        if isinstance(owner, Linear4bit) and name == "weight":
            raise AdapterError(f"{path} is stored in 4 bits, and this adapter changes it as a whole.")
        old: Any = getattr(owner, name)
        if old is None:
            weight: Any = owner.weight
            old = weight.new_zeros(weight.shape[1 if isinstance(owner, Conv1D) else 0])
        transposed = isinstance(owner, Conv1D) and old.dim() > 1
        new = change((old.t() if transposed else old).float())
        if getattr(owner, name) is None and not new.any():
            return  # (IA)³'s factor of a bias that the layer does not have
        new = nn.Parameter((new.t() if transposed else new).to(old.dtype).contiguous(), requires_grad=False)
        sharing = (
            [part for part in self.model.modules() if part._parameters.get(name) is old] if everywhere else [owner]
        )
        for one in sharing:
            self._put(one, name, new)

    def _set(self, path: str, weight: Tensor) -> None:
        owner, name = self._owner(path)
        assert owner is not None
        old: Any = getattr(owner, name)
        if isinstance(owner, Linear4bit) and name == "weight":
            raise AdapterError(f"{path} is stored in 4 bits, and this adapter replaces it.")
        if old is not None and old.shape != weight.shape:
            raise AdapterError(
                f"{path} is {tuple(old.shape)} in the base and {tuple(weight.shape)} in the adapter.",
                advice="Give the base that it was trained on, with its tokens, with `model`.",
            )
        like = old if old is not None else next(owner.parameters())
        self._put(owner, name, nn.Parameter(weight.to(like.device, like.dtype), requires_grad=False))

    def _put(self, owner: nn.Module, name: str, new: nn.Parameter) -> None:
        self._set_aside.append((owner, name, getattr(owner, name)))
        setattr(owner, name, new)


def _merged(path: str, low: LowRank, weight: Tensor) -> Tensor:
    if weight.shape != low.shape:
        raise AdapterError(f"{path}: the LoRA delta is {low.shape} and the base's weight {tuple(weight.shape)}.")
    return low.merged(weight)
