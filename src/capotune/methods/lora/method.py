"""LoRA: W stays frozen, two small matrices carry the change (Hu et al. 2021, arXiv 2106.09685, §4).

    y = xWᵀ + bias + scale·(xAᵀ)Bᵀ        A (rank, in) Kaiming-uniform, B (out, rank) zero: at the start nothing changes

The product BA has W's shape and is never formed in training. DoRA (Liu et al. 2024, arXiv 2402.09353, §4) also trains
each output's magnitude m and lets BA change the direction only:

    y = (m / ‖W + scale·BA‖)·(xWᵀ + scale·(xAᵀ)Bᵀ) + bias        norms over rows, held constant in the gradient (§4.3)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from capotune.errors import AdapterError, SettingError, quoted
from capotune.kernels.lora_linear import (
    LinearLayer,
    LoraModule,
    few_rows,
    lora_linear_of_few,
    lora_linears,
    lora_reference,
)
from capotune.kernels.nf4 import Linear4bit
from capotune.methods.base import LowRank, Method, Start
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.patterns import is_slow_target
from capotune.models.architecture import Architecture, linear_shape, plain_linear, swap
from capotune.settings import nearest

_SHARED = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))
"""Layers that have one input, by the names that most families give them, in the order they are called."""


class LoraLinear(LoraModule):
    """A frozen linear layer (Linear, Conv1D or 4-bit) with a trainable LoRA delta beside it."""

    def __init__(self, base_layer: nn.Module, settings: LoraSettings, generator: torch.Generator) -> None:
        super().__init__()
        out_features, in_features = linear_shape(base_layer)
        self.base_layer = base_layer
        self.scale = settings.scale
        self.dropout = settings.dropout
        bound = 1 / math.sqrt(in_features)  # Kaiming-uniform with a = √5, as PEFT starts A
        a = torch.empty(settings.rank, in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(a.to(self.device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, settings.rank, device=self.device))
        self.lora_magnitude_vector = (
            nn.Parameter(torch.linalg.norm(self.dense_weight(torch.float32), dim=1)) if settings.dora else None
        )
        self.shared: SharedInput | None = None
        """Where other layers have the same input."""

    @property
    def device(self) -> torch.device:
        """Where the frozen weight is."""
        layer: Any = self.base_layer
        device: torch.device = layer.codes.device if isinstance(layer, Linear4bit) else layer.weight.device
        return device

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The frozen weight (out, in); a new tensor only when it is stored in 4 bits or another dtype."""
        if isinstance(self.base_layer, Linear4bit):
            return self.base_layer.dense_weight(dtype)
        layer: Any = self.base_layer
        weight: torch.Tensor = layer.weight.to(dtype)
        return weight.t() if isinstance(self.base_layer, Conv1D) else weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) → (..., out)."""
        bias: torch.Tensor | None = self.base_layer.bias  # type: ignore[assignment]
        if self.lora_magnitude_vector is not None:
            return self._dora(x, bias)
        if self.dropout and self.training:
            dropped = functional.dropout(x, self.dropout)
            change = functional.linear(functional.linear(dropped, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
            return self.base_layer(x) + self.scale * change  # type: ignore[no-any-return]
        layer = self.base_layer
        if isinstance(layer, Linear4bit) and not torch.is_grad_enabled() and layer.multiplies_quantized(x):
            change = functional.linear(functional.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
            return layer(x) + self.scale * change  # type: ignore[no-any-return]
        if few_rows(x):
            return lora_linear_of_few(x, self.linear_layer())
        if self.shared is not None and torch.is_grad_enabled():
            return self.shared.output(self, x)
        return lora_linears((x,), (self.linear_layer(),))[0]

    def linear_layer(self) -> LinearLayer:
        """What ``kernels.lora_linear`` computes with."""
        layer: Any = self.base_layer
        weight = layer.borrowed_weight if isinstance(layer, Linear4bit) else self.dense_weight
        return LinearLayer(weight, layer.bias, self.lora_A, self.lora_B, self.scale)

    @property
    def why_not_plain(self) -> str | None:
        """What a forward pass in training does, or will do, beside W and the LoRA delta, if anything."""
        if self.lora_magnitude_vector is not None:
            return "DoRA's magnitudes"
        return "LoRA's dropout" if self.dropout else None

    def merged_weight(self) -> torch.Tensor:
        """W + scale·BA (out, in) in fp32, with DoRA's magnitudes applied."""
        weight = self.dense_weight(torch.float32)
        return merged(weight, self.lora_A, self.lora_B, self.scale, self.lora_magnitude_vector).detach()

    def _dora(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        assert self.lora_magnitude_vector is not None
        factor = self.lora_magnitude_vector / self._row_norms()
        dropped = functional.dropout(x, self.dropout, self.training) if self.dropout else x
        factor = factor.to(x.dtype)
        if dropped is x:
            return factor * lora_reference(x, self.dense_weight, None, self.lora_A, self.lora_B, self.scale) + _or0(
                bias
            )
        low = functional.linear(dropped, self.lora_A.to(x.dtype))
        change = functional.linear(low, self.lora_B.to(x.dtype)) * self.scale
        frozen = functional.linear(x, self.dense_weight(x.dtype))
        # as PEFT: dropout acts on the change and on the rescaling, the frozen path itself stays whole
        rescaled = functional.linear(dropped, self.dense_weight(x.dtype))
        return frozen + (factor - 1) * rescaled + factor * change + _or0(bias)

    @torch.no_grad()
    def _row_norms(self) -> torch.Tensor:
        """‖W + scale·BA‖ of each row (out,) without forming BA: ‖w‖² + 2s·w·(BA) + s²·b(AAᵀ)bᵀ."""
        weight, a, b = self.dense_weight(torch.float32), self.lora_A, self.lora_B
        cross = ((weight @ a.t()) * b).sum(1)
        square = ((b @ (a @ a.t())) * b).sum(1)
        return (weight.square().sum(1) + 2 * self.scale * cross + self.scale**2 * square).clamp_min(0).sqrt()


class SharedInput:
    """Layers that a block calls one after the other on the same input: the first call computes them all.

    Which layers those are is known by name (``_SHARED``). That the input is the same is seen at each call: if it is
    not, every layer is computed by itself from then on.
    """

    def __init__(self, layers: tuple[LoraLinear, ...]) -> None:
        self.layers = layers
        self._input: torch.Tensor | None = None
        self._outputs: dict[LoraLinear, torch.Tensor] = {}

    def output(self, layer: LoraLinear, x: torch.Tensor) -> torch.Tensor:
        """What ``layer`` gives for x (..., in)."""
        if layer is self.layers[0]:
            self._input = x
            outs = lora_linears((x,), [one.linear_layer() for one in self.layers])
            self._outputs = dict(zip(self.layers, outs, strict=True))
        same = x is self._input and layer in self._outputs
        if not same:
            for one in self.layers:
                one.shared = None
        out = self._outputs.pop(layer) if same else lora_linears((x,), (layer.linear_layer(),))[0]
        if not self._outputs:
            self._input = None  # so that its memory is free again
        return out


def merged(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, magnitude: torch.Tensor | None
) -> torch.Tensor:
    """weight + scale·BA (out, in), with DoRA's ``magnitude`` (out,) each row rescaled to it."""
    return LowRank(a, b, scale, magnitude).merged(weight)


def _scaled(tensors: dict[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
    """The same with every B multiplied by ``factor``."""
    if factor == 1:
        return tensors
    return {key: tensor * factor if ".lora_B." in key else tensor for key, tensor in tensors.items()}


def _checked_merge(
    weight: torch.Tensor, *, path: str, parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], scale: float
) -> torch.Tensor:
    """``merged`` for a weight (out, in) of another checkpoint. ``AdapterError`` when the shapes do not fit."""
    a, b, magnitude = parts
    shape = (b.shape[0], a.shape[1])
    if weight.shape != shape:
        raise AdapterError(
            f"{path}: the LoRA delta is {shape} and the base's weight {tuple(weight.shape)}; they do not fit together."
        )
    return merged(weight, a, b, scale, magnitude)


def _or0(bias: torch.Tensor | None) -> torch.Tensor | float:
    return 0.0 if bias is None else bias


class Lora(Method):
    """Every chosen linear layer becomes a ``LoraLinear``."""

    Settings = LoraSettings
    settings: LoraSettings
    saves_head_whole = True

    def attach(self, model: nn.Module, architecture: Architecture, start: Start) -> None:
        """Swap the target layers. ``SettingError`` when a target matches nothing or the rank is too large."""
        self.model, self.architecture = model, architecture
        self.targets = find_targets(architecture, self.settings.target_modules, self.settings.layers)
        self._check_rank()
        self.layers: dict[str, LoraLinear] = {}
        for path in self.targets:
            self.layers[path] = LoraLinear(model.get_submodule(path), self.settings, start.generator)
            swap(model, path, self.layers[path])
        self._share_inputs()
        self.train_mode(False)

    def detach(self) -> None:
        """Put the frozen layers back."""
        for path, layer in self.layers.items():
            swap(self.model, path, layer.base_layer)

    def parameters(self) -> dict[str, nn.Parameter]:
        """A and B of every target, and the magnitude with DoRA, by PEFT's keys."""
        found: dict[str, nn.Parameter] = {}
        for path, layer in self.layers.items():
            found[f"{self.key_prefix}{path}.lora_A.weight"] = layer.lora_A
            found[f"{self.key_prefix}{path}.lora_B.weight"] = layer.lora_B
            if layer.lora_magnitude_vector is not None:
                found[f"{self.key_prefix}{path}.lora_magnitude_vector"] = layer.lora_magnitude_vector
        return found

    def expected_parameters(self) -> int:
        """Σ rank·(in + out) over the targets, and out more with DoRA."""
        shapes = [linear_shape(layer.base_layer) for layer in self.layers.values()]
        return sum(self.settings.rank * (out + into) + (out if self.settings.dora else 0) for out, into in shapes)

    def notices(self) -> list[str]:
        """Which matrices stay frozen though every linear layer is adapted: those that a mixture's experts share."""
        stacked = self.architecture.stacked
        if self.settings.target_modules != ("all-linear",) or not stacked:
            return []
        names = ", ".join(sorted({".".join(path.split(".")[-2:]) for path in stacked}))
        count = sum(self.model.get_parameter(path).numel() for path in stacked)
        how = " and in full precision" if self.quantization else ""
        return [
            f"{self.name} adapts linear layers and leaves the experts' {count:,} weights frozen{how}: {names} are "
            "stacks of matrices."
        ]

    def learning_rates(self) -> dict[str, float]:
        """LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns ``lora_plus_ratio`` times as fast as A."""
        rate: Any = self.settings.learning_rate
        ratio = self.settings.lora_plus_ratio
        return {key: rate * (ratio if ".lora_B." in key else 1) for key in self.parameters()}

    def first_trainable_block(self) -> int:
        """The lowest block with a target; 0 when a target stands outside the blocks."""
        return min(self.architecture.block_of(path) or 0 for path in self.targets)

    def train_mode(self, on: bool) -> None:
        """Dropout before A on or off."""
        for layer in self.layers.values():
            layer.train(on)

    def merge(self) -> bool:
        """Replace every target by a plain linear layer with W + scale·BA."""
        for path, layer in self.layers.items():
            bias: Any = layer.base_layer.bias
            swap(self.model, path, plain_linear(layer.merged_weight(), bias))
        return True

    def adapted_layers(self) -> dict[str, LoraLinear]:
        """Every target."""
        return self.layers

    def unmerge(self) -> None:
        """Put the frozen layers with their deltas beside them back; ``merge`` left them untouched."""
        for path, layer in self.layers.items():
            swap(self.model, path, layer)

    @classmethod
    def weight_changes(
        cls, settings: Any, tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """W (out, in) fp32 → W + scale·BA of every adapted layer, by its path with the backbone's name before it.

        Raises ``AdapterError`` for tensors that lack a part, do not fit W, or are not finite.
        """
        found = cls.low_rank(settings, tensors)
        return {
            path: partial(_checked_merge, path=path, parts=(one.a, one.b, one.magnitude), scale=one.scale)
            for path, one in found.items()
        }

    @classmethod
    def low_rank(cls, settings: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, LowRank]:
        """A, B, scale and magnitude of every adapted layer. Raises ``AdapterError`` for tensors that lack a part or are
        not finite."""
        found: dict[str, LowRank] = {}
        for key, a in tensors.items():
            layer, _, name = key.partition(".lora_A.weight")
            if key != f"{layer}.lora_A.weight" or name:
                continue
            b, magnitude = (tensors.get(f"{layer}.{part}") for part in ("lora_B.weight", "lora_magnitude_vector"))
            if b is None or (magnitude is None) == settings.dora:
                raise AdapterError(f"what belongs to {key} is missing; the adapter is damaged.")
            if not all(bool(torch.isfinite(part).all()) for part in (a, b, magnitude) if part is not None):
                raise AdapterError(f"{layer} holds values that are NaN or infinite.")
            wide = None if magnitude is None else magnitude.float()
            found[layer.removeprefix(cls.key_prefix)] = LowRank(a.float(), b.float(), settings.scale, wide)
        if not found:
            raise AdapterError("it holds no LoRA delta of any layer.")
        return found

    def peft_config(self) -> dict[str, Any]:
        """A PEFT ``LoraConfig`` as it stands in adapter_config.json."""
        settings = self.settings
        return {
            "peft_type": "LORA",
            "r": settings.rank,
            "lora_alpha": settings.stored_alpha,
            "lora_dropout": settings.dropout,
            "target_modules": self.architecture.short_names(self.targets),
            "use_rslora": False,
            "use_dora": settings.dora,
            "bias": "none",
            "init_lora_weights": True,
            "fan_in_fan_out": any(isinstance(layer.base_layer, Conv1D) for layer in self.layers.values()),
        }

    def stored(self) -> dict[str, torch.Tensor]:
        """A, B and magnitudes; where lora_alpha/rank is not the scale of training, B holds the difference."""
        return _scaled(super().stored(), self.settings.scale / (self.settings.stored_alpha / self.settings.rank))

    @classmethod
    def trained(
        cls, settings: Any, tensors: dict[str, torch.Tensor], config: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """The same with B as it was trained. Adapters written before have it so, and ``use_rslora`` in their config.

        Raises ``AdapterError`` where the config states no scale, and for an A of another rank than the settings'.
        """
        for key, tensor in tensors.items():
            if key.endswith(".lora_A.weight") and (tensor.dim() != 2 or len(tensor) != settings.rank):
                raise AdapterError(f"{key} is {tuple(tensor.shape)}, and the settings say rank {settings.rank}.")
        try:
            scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
        except (KeyError, TypeError, ValueError, ArithmeticError):
            raise AdapterError("adapter_config.json must state r, lora_alpha and use_rslora.") from None
        ratio = scale / settings.scale
        if not 0 < ratio < math.inf:
            raise AdapterError(f"adapter_config.json says a scale of {scale:g}.")
        return _scaled(tensors, ratio)

    def _share_inputs(self) -> None:
        """Layers of one block part that have an input in common are computed together."""
        for parent in dict.fromkeys(path.rpartition(".")[0] for path in self.targets):
            for names in _SHARED:
                layers = tuple(self.layers[f"{parent}.{name}"] for name in names if f"{parent}.{name}" in self.layers)
                widths = {linear_shape(layer.base_layer)[1] for layer in layers}
                if len(layers) == len(names) and len(widths) == 1 and not self.settings.dora:
                    for layer in layers:
                        layer.shared = SharedInput(layers) if layer is layers[0] else layers[0].shared

    def _check_rank(self) -> None:
        largest = max(min(linear_shape(self.model.get_submodule(path))) for path in self.targets)
        if self.settings.rank > largest:
            raise SettingError(
                "more than any target layer has.",
                setting="rank",
                given=self.settings.rank,
                allowed=f"1 to {largest}",
                advice="8 to 64 is usual.",
            )


def find_targets(
    architecture: Architecture, target_modules: tuple[str, ...], layers: tuple[int, ...] | None
) -> tuple[str, ...]:
    """Paths of the linear layers that the settings mean, in the model's order.

    ``all-linear`` is every linear layer of the backbone; an entry is a name or an ending of a path; a single entry with
    characters that no name has is a regular expression over whole paths. Every entry must match something.
    """
    if not target_modules:
        raise SettingError("name at least one layer, or give all-linear.", setting="target_modules")
    if not architecture.linears:
        raise SettingError(
            "this model has no linear layers that could be changed.",
            setting="target_modules",
            advice="Train feature-extraction or prompt-tuning on it.",
        )
    chosen: set[str] = set()
    for entry in target_modules:
        found = [path for path in architecture.linears if _matches(entry, path)]
        if not found:
            names = sorted({path.rpartition(".")[2] for path in architecture.linears})
            raise SettingError(
                f"'{entry}' matches no linear layer of this model.{nearest(entry, names)}",
                setting="target_modules",
                advice=f"Layers are called: {', '.join(names)}; or give all-linear.",
            )
        chosen.update(found)
    if layers is not None:
        count = len(architecture.blocks)
        if architecture.why_no_blocks:
            raise _layers_error(layers, f"{architecture.why_no_blocks} Leave it out to train in all of them.")
        wrong = [number for number in layers if not 0 <= number < count]
        if wrong or not layers:
            raise _layers_error(layers, f"this model has blocks 0 to {count - 1}.")
        chosen = {path for path in chosen if architecture.block_of(path) in layers}
        if not chosen:
            raise _layers_error(layers, "no target layer stands in these blocks.")
    return tuple(path for path in architecture.linears if path in chosen)


def _layers_error(layers: tuple[int, ...], problem: str) -> SettingError:
    return SettingError(problem, setting="layers", given=" ".join(map(str, layers)))


def _matches(entry: str, path: str) -> bool:
    if entry == "all-linear" or path == entry or path.endswith("." + entry):
        return True
    if re.fullmatch(r"[\w.\-]+", entry):
        return False
    if is_slow_target(entry):
        raise SettingError(
            f"{quoted(entry)} is no pattern that is tried here: it may take for ever.",
            setting="target_modules",
            advice="Name the layers by the endings of their paths.",
        )
    try:
        return re.fullmatch(entry, path) is not None
    except (re.error, OverflowError, RecursionError) as error:
        raise SettingError(
            f"{quoted(entry)} is not a valid regular expression ({error}).", setting="target_modules"
        ) from None
