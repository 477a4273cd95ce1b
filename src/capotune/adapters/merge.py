"""An adapter's change written into its base: a plain Transformers checkpoint that needs no adapter.

    W' = W + scale·BA        with DoRA each row is then rescaled to its learned magnitude

By default W is the base in full precision. A QLoRA adapter was trained over W in 4 bits, so that its change is then
added to other numbers than it was learned on; with ``requantize`` it is added to what the 4 bits stand for, and the sum
is packed again: dequantise, add, requantise. Tensors go from file to file one at a time.

A classifier's head is no part of such a checkpoint: it goes into an adapter of its own beside it (``adapter/``), which
reads the last layer of the merged base.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capotune.adapters.assemble import assemble, attach
from capotune.adapters.store import WEIGHTS, StoredAdapter, check_base, save_adapter, task_of
from capotune.errors import AdapterError, SettingError
from capotune.kernels.nf4 import QuantizedTensor, dequantize_4bit, to_checkpoint
from capotune.methods import Start
from capotune.methods.lora import merged
from capotune.models.load import Quantization, Source
from capotune.models.quantize import (
    Packable,
    copy_other_files,
    packable_weights,
    packed_plans,
    quantization_config,
    whole_plan,
    write_config,
    write_tensors,
)
from capotune.models.quantized import part_of, quantized_weights, read_quantized
from capotune.models.shard_writer import Plan, ShardWriter
from capotune.models.shards import Shards, StoredTensor
from capotune.models.stream import Progress, pack
from capotune.settings import FeatureExtractionSettings, LoraSettings, QloraSettings

ADAPTER = "adapter"
"""Folder of a merged classifier's head."""


@dataclass(frozen=True)
class _Change:
    """What an adapter adds to one weight."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None
    scale: float

    def apply(self, weight: Tensor) -> Tensor:
        """weight (out, in) in fp32 → with the change. ``AdapterError`` when the shapes do not fit."""
        if weight.shape != (self.b.shape[0], self.a.shape[1]):
            raise AdapterError(
                f"the adapter's change is {(self.b.shape[0], self.a.shape[1])} and the base's weight "
                f"{tuple(weight.shape)}; they do not belong together."
            )
        return merged(weight, self.a, self.b, self.scale, self.magnitude)


def check_mergeable(stored: StoredAdapter, source: Source, requantize: bool) -> LoraSettings:
    """The adapter's settings. ``SettingError`` when it cannot be merged so, ``AdapterError`` when the base is wrong."""
    settings = stored.settings
    if not isinstance(settings, LoraSettings):
        raise SettingError(
            f"{stored.folder}: {settings.method} has no change that could be written into the base's weights. lora and "
            "qlora adapters can be merged; use this one as it is."
        )
    check_base(stored, source)
    if source.is_packed and not requantize:
        raise SettingError(
            f"{stored.folder}: its base '{source.name}' is stored in 4 bits, so there are no weights in full precision "
            "to merge into. Give --requantize: the change is added to what the 4 bits stand for, and packed again."
        )
    if requantize and not source.is_packed and not isinstance(settings, QloraSettings):
        raise SettingError(
            f"{stored.folder}: --requantize is for adapters that were trained over 4 bits, and this one was trained in "
            "full precision. Leave it out; `capo quantize` packs the merged model."
        )
    return settings


def write_merged(
    stored: StoredAdapter,
    source: Source,
    folder: Path,
    *,
    requantize: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write the merged model into the existing ``folder``; returns how many weights the adapter changed.

    Raises ``SettingError`` for methods that cannot be merged so, ``AdapterError`` when adapter and base do not fit.
    """
    settings = check_mergeable(stored, source, requantize)
    merging = _Merging(source, _changes(stored, settings), requantize, settings, trust_remote_code)
    with ShardWriter(folder, merging.plans()) as writer:
        read = 0
        for tensor in merging.shards:
            merging.write(writer, tensor)
            read += tensor.nbytes
            if progress is not None:
                progress(read, merging.shards.nbytes)
    copy_other_files(source.folder, folder)
    write_config(folder, source, merging.stated())
    return len(merging.changes)


def save_head(stored: StoredAdapter, base: Source, final: Path) -> None:
    """A classifier's head as an adapter of the merged ``base``, which will be at ``final`` when all is done.

    The head was trained on the last layer; the stored one reads every layer and weighs all but the last with zero.
    """
    task = task_of(stored, base, False)
    assembled = assemble(base, FeatureExtractionSettings(trainable_layers=0), task, device=torch.device("cpu"))
    weight, bias = (stored.tensors[f"base_model.model.classifier.{name}"] for name in ("weight", "bias"))
    with torch.no_grad():
        assembled.model.classifier.weight.zero_()
        assembled.model.classifier.weight[:, -weight.shape[1] :] = weight
        assembled.model.classifier.bias.copy_(bias)
    attach(assembled, Start(torch.Generator()))
    trained = {**stored.record["trained"], "adapter": str(final / ADAPTER)}
    save_adapter(base.folder / ADAPTER, assembled, trained)


class _Merging:
    """One pass over the base's tensors."""

    def __init__(
        self, source: Source, changes: dict[str, _Change], requantize: bool, settings: LoraSettings, trust: bool
    ) -> None:
        self.source, self.trust = source, trust
        self.shards = Shards(source.weight_files)
        self.packed = quantized_weights(self.shards)
        self.layers = packable_weights(source, trust_remote_code=trust)
        self.changes = _by_stored_name(changes, self.layers)
        self.packing = source.packing()  # of the result; None: full precision
        if requantize and self.packing is None:
            assert isinstance(settings, QloraSettings)
            self.packing = Quantization(settings.quant_type, settings.block_size, settings.double_quant)

    def plans(self) -> Iterator[list[Plan]]:
        """What will be written, in order."""
        for stored in self.shards:
            if part_of(stored.name) is None:
                yield self._plan(stored)

    def write(self, writer: ShardWriter, stored: StoredTensor) -> None:
        """Write what ``stored`` becomes; the parts of a packed weight come with it."""
        name, change = stored.name, self.changes.get(stored.name)
        if part_of(name) is not None:
            return
        if not self._becomes_packed(name) and change is None:
            writer.copy(name, self.shards.chunks(name))
        elif name in self.packed and change is None:
            for part in (name, *self.packed[name]):
                writer.copy(part, self.shards.chunks(part))
        else:
            self._write_changed(writer, stored, change)

    def stated(self) -> dict[str, Any] | None:
        """``quantization_config`` of the result."""
        if self.source.is_packed:
            stated: dict[str, Any] = self.source.config()["quantization_config"]
            return stated
        return quantization_config(self.source, self.packing, self.layers, self.trust) if self.packing else None

    def _becomes_packed(self, name: str) -> bool:
        return name in self.packed if self.source.is_packed else self.packing is not None and name in self.layers

    def _plan(self, stored: StoredTensor) -> list[Plan]:
        name = stored.name
        if name in self.packed and name not in self.changes:
            return [plan for part in (name, *self.packed[name]) for plan in whole_plan(self.shards[part])]
        if not self._becomes_packed(name):
            return whole_plan(stored)
        assert self.packing is not None
        if name in self.packed:
            packed = read_quantized(self.shards, name, self.packed[name])
            return packed_plans(name, packed.shape, _packing_of(packed))
        shape = stored.shape[::-1] if self.layers[name].transposed else stored.shape
        return packed_plans(name, shape, self.packing)

    def _write_changed(self, writer: ShardWriter, stored: StoredTensor, change: _Change | None) -> None:
        name, layer = stored.name, self.layers[stored.name]
        what = f"{stored.path}: the tensor {name}"
        packed = read_quantized(self.shards, name, self.packed[name]) if name in self.packed else None
        whole = None if packed else self.shards.read(name)
        if whole is not None and self._becomes_packed(name):
            assert self.packing is not None
            packed = pack(whole, layer.transposed, self.packing, what)
        if packed is None:
            assert whole is not None
            assert change is not None
            weight = whole.t() if layer.transposed else whole
            new = self._changed(weight.float(), change, name).to(whole.dtype)
            writer.write(name, new.t() if layer.transposed else new)
            return
        if change is not None:
            weight = self._changed(dequantize_4bit(packed, torch.float32), change, name).to(packed.dtype)
            packed = pack(weight, False, _packing_of(packed), what)
        write_tensors(writer, to_checkpoint(packed, name.removesuffix("weight")))

    def _changed(self, weight: Tensor, change: _Change, name: str) -> Tensor:
        try:
            return change.apply(weight)
        except AdapterError as error:
            raise AdapterError(f"{name}: {error}") from None


def _packing_of(packed: QuantizedTensor) -> Quantization:
    return Quantization(packed.quant_type, packed.block_size, packed.nested)


def _changes(stored: StoredAdapter, settings: LoraSettings) -> dict[str, _Change]:
    """What the adapter adds, by the layer's path in the backbone."""
    prefix, ending = "base_model.model.", ".lora_A.weight"
    found = {}
    for key, a in stored.tensors.items():
        if not key.endswith(ending):
            continue
        layer = key.removesuffix(ending)
        b = stored.tensors.get(f"{layer}.lora_B.weight")
        magnitude = stored.tensors.get(f"{layer}.lora_magnitude_vector")
        if b is None or (magnitude is None) == settings.dora:
            raise AdapterError(f"{stored.folder / WEIGHTS}: what belongs to {key} is missing; the adapter is damaged.")
        path = layer.removeprefix(prefix).partition(".")[2]  # the first name is the backbone's
        change = _Change(a.float(), b.float(), None if magnitude is None else magnitude.float(), settings.scale)
        if not all(
            bool(torch.isfinite(part).all()) for part in (change.a, change.b, change.magnitude) if part is not None
        ):
            raise AdapterError(f"{stored.folder / WEIGHTS}: {layer} holds values that are NaN or infinite.")
        found[path] = change
    if not found:
        raise AdapterError(f"{stored.folder / WEIGHTS}: it holds no change of any layer.")
    return found


def _by_stored_name(changes: dict[str, _Change], layers: dict[str, Packable]) -> dict[str, _Change]:
    """By the weight's name in the checkpoint."""
    names = {layer.path: name for name, layer in layers.items()}
    lost = sorted(changes.keys() - names.keys())
    if lost:
        raise AdapterError(f"the adapter changes {', '.join(lost[:3])}, of which the base stores no weight.")
    return {names[path]: change for path, change in changes.items()}
