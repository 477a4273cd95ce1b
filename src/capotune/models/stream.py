"""A model whose linear weights are in 4 bits, filled from disk tensor by tensor.

The whole model is never in memory at full precision: it is built without weights, and a linear layer's weight is
quantized before the next tensor is read. A weight that is stored in 4 bits goes in as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from capotune.errors import ModelError
from capotune.events import OnProgress
from capotune.kernels.nf4 import WEIGHT_DTYPES, Linear4bit, QuantizedTensor, quantize_4bit
from capotune.models.architecture import LINEAR_TYPES, base_path, bypassed_linears, is_linear, linear_shape, swap
from capotune.models.base import first_line
from capotune.models.quantized import part_of, quantized_weights, read_quantized
from capotune.models.shards import Tensors
from capotune.models.stored_names import Parts, StoredNames

if TYPE_CHECKING:
    from capotune.models.base import Base, Quantization


def stream_quantized(
    auto_class: Any,
    base: Base,
    config: Any,
    dtype: torch.dtype,
    quantization: Quantization | None,
    progress: OnProgress | None = None,
) -> Any:
    """The model of Transformers' ``auto_class`` with its linear layers in 4 bits and all else in ``dtype``.

    A model that is stored in 4 bits keeps its own quantization; else ``quantization`` applies to every linear layer but
    a language model's output layer. Peak memory is the quantized model and one tensor at full precision.

    Raises ``ModelError``, which names tensor and file, for weights that are missing, damaged, not finite or do not fit.
    """
    model = empty_model(auto_class, config, dtype)
    shards = base.tensors
    filling = _Filling(model, base, shards, dtype, None if base.is_quantized else quantization)
    read, total = 0, shards.nbytes
    for stored in shards:
        filling.take(stored.name)
        read += stored.nbytes
        if progress is not None:
            progress(read, total)
    check_complete(base, filling.missing)
    model.tie_weights()  # an output layer that is the embedding is not stored a second time
    return model


def empty_model(auto_class: Any, config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model of one of Transformers' classes, ``Auto…`` or another, without storage for its weights."""
    with _parameters_on_meta():
        return auto_class.from_config(config, dtype=dtype) if hasattr(auto_class, "from_config") else auto_class(config)


def quantizable(model: Any) -> dict[str, str]:
    """Weights that 4 bits are for, by name, with their layers' paths: every linear layer's below the output head, but
    those that the model's own code reads.

    Some causal models give no path of a base model, and hold their output layer beside its parts.
    """
    base, bypassed, head = base_path(model), bypassed_linears(model), model.get_output_embeddings()
    return {
        f"{path}.weight": path
        for path, part in model.named_modules()
        if is_linear(part) and part is not head and path.startswith(base) and path not in bypassed
    }


class _Filling:
    """A model on its way from empty to whole."""

    def __init__(
        self, model: Any, base: Base, shards: Tensors, dtype: torch.dtype, quantization: Quantization | None
    ) -> None:
        self.model, self.base, self.shards, self.dtype = model, base, shards, dtype
        self.quantization = quantization
        self.to_quantize = quantizable(model) if quantization else {}
        self.quantized = quantized_weights(shards)
        self.missing = {name for name, _ in model.named_parameters()}
        self.names = StoredNames(model, [stored.name for stored in shards if not part_of(stored.name)])
        self.awaited = {parts.target: set(parts.patterns) for parts in self.names.parts.values()}
        """Of each weight that is stored in parts, those that were not met yet."""
        self.buffer = shards.buffer_for(key for key, name in self.names.whole.items() if name in self.to_quantize)
        if base.is_quantized and not self.quantized:
            raise base.error(
                f"quantization_config in {base.folder / 'config.json'} says that weights are stored in 4 bits, and "
                "none is.",
                advice="Download or save the model again, or take that entry out.",
            )

    def take(self, key: str) -> None:
        """Read the tensor that is stored as ``key`` into its place, if it has one."""
        if key in self.names.parts:
            parts = self.names.parts[key]
            self.awaited[parts.target].discard(key)
            if not self.awaited[parts.target]:
                self._put_converted(parts)
        elif key in self.names.whole:
            name = self.names.whole[key]
            if key in self.quantized:
                self._put_quantized(key, name)
            else:
                buffer = self.buffer if name in self.to_quantize else None
                self._put(name, self.shards.read(key, buffer), f"{self.shards[key].path}: the tensor {key}")

    def _put_converted(self, parts: Parts) -> None:
        one = next(iter(parts.patterns))
        if any(key in self.quantized for key in parts.patterns):
            raise self.base.error(f"{one} is stored in 4 bits, and {parts.target} is made of several such tensors.")
        try:
            made = parts.converted(self.model, self.shards.read)
        except (RuntimeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise self.base.error(f"{parts.target} cannot be made of {one} and others: {first_line(error)}") from None
        for name, tensor in made.items():
            self._put(name, tensor, f"{self.shards[one].path}: the tensor {one}")

    def _put(self, name: str, tensor: torch.Tensor, what: str) -> None:
        """``what`` names the stored tensor for messages."""
        path, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(path)
        expected = getattr(owner, leaf).shape
        if tensor.shape != expected:
            raise wrong_shape(self.base, name, tensor.shape, expected)
        self.missing.discard(name)
        if name in self.to_quantize:
            assert self.quantization is not None
            quantized = quantize_weight(tensor, isinstance(owner, Conv1D), self.quantization, what)
            swap(self.model, path, Linear4bit.from_quantized(quantized, bias=owner.bias))
        elif leaf in owner._buffers:
            owner.get_buffer(leaf).copy_(tensor)
        else:
            setattr(owner, leaf, nn.Parameter(tensor.to(self.dtype), requires_grad=False))

    def _put_quantized(self, key: str, name: str) -> None:
        quantized = read_quantized(self.shards, key, self.quantized[key])
        path = name.rpartition(".")[0]
        layer = self.model.get_submodule(path)
        expected = linear_shape(layer) if isinstance(layer, LINEAR_TYPES) else tuple(layer.weight.shape)
        if quantized.shape != expected or not isinstance(layer, LINEAR_TYPES):
            raise wrong_shape(self.base, name, quantized.shape, expected)
        self.missing.discard(name)
        swap(self.model, path, Linear4bit.from_quantized(quantized, bias=layer.bias))


def quantize_weight(weight: torch.Tensor, transposed: bool, quantization: Quantization, what: str) -> QuantizedTensor:
    """``weight`` in 4 bits, as (out, in); ``transposed``: it is stored as (in, out), as Conv1D's is.

    ``ModelError`` begins with ``what``, which names the tensor, when its values are not finite.
    """
    if weight.dtype not in WEIGHT_DTYPES.values():
        weight = weight.float()
    try:
        return quantize_4bit(
            weight.t().contiguous() if transposed else weight,
            quant_type=quantization.quant_type,
            block_size=quantization.block_size,
            double_quant=quantization.double_quant,
        )
    except ModelError as error:
        raise ModelError(f"{what} cannot be stored in 4 bits: {error}") from None


def check_complete(base: Base, missing: Any) -> None:
    """``ModelError`` when weights other than a pooler's are ``missing``."""
    lacking = sorted(key for key in missing if "pooler" not in key.split("."))
    if lacking:
        shown = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
        held_as, advice = wrapper(base, lacking)
        raise base.error(f"the weights in {base.folder} lack {shown}{held_as}.", advice)


def wrapper(base: Base, lacking: list[str]) -> tuple[str, str | None]:
    """Where most of the ``lacking`` weights are stored under a wrapper's prefix: that, in words, and what to do."""
    stored = [tensor.name for tensor in base.tensors]
    endings = (f".{key}" for key in lacking)
    found = Counter(name[: 1 - len(end)] for end in endings for name in stored if name.endswith(end))
    prefix, count = found.most_common(1)[0] if found else ("", 0)
    if count <= len(lacking) // 2 or sum(name.startswith(prefix) for name in stored) <= len(stored) // 2:
        return "", None
    return (
        f"; it holds them as {prefix}…",
        "A wrapper was saved (torch.compile's, DataParallel's, PEFT's …): save the model inside it with "
        "save_pretrained, or take the prefix off the tensors' names.",
    )


def wrong_shape(base: Base, name: str, found: Any, expected: Any) -> ModelError:
    """The error for a stored tensor of another shape than the configuration asks for."""
    return base.error(
        f"the tensor {name} in {base.folder} is {tuple(found)}, where config.json asks for {tuple(expected)}.",
        advice="Download or save the model again.",
    )


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters without storage; buffers, which are computed and not stored, are real."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None and parameter.device.type != "meta":  # a second name of one that is there stays tied
            empty = nn.Parameter(parameter.to("meta"), requires_grad=False)
            module._parameters[name] = empty

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
