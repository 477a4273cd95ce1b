"""An adapter's change written into its base: a plain Transformers checkpoint that needs no adapter.

    W' = W + scale·BA        with DoRA each row is then rescaled to its trained magnitude
    W' = trained W           in the last blocks, where feature extraction trained those

By default W is the base in full precision. A QLoRA adapter was trained over W in 4 bits, so that its delta is then
added to other values than it was trained on; with ``requantize`` it is added to what the 4 bits stand for, and the sum
is quantized again: dequantize, add, quantize. Tensors go from file to file one at a time.

A task's head is no part of such a checkpoint: it goes into an adapter of its own beside it (``runs.convert``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoModel

from capotune import methods
from capotune.adapters.files import WEIGHTS
from capotune.adapters.store import StoredAdapter, check_base
from capotune.errors import AdapterError, SettingError
from capotune.events import OnProgress, Reporter, ignore
from capotune.kernels.nf4 import QuantizedTensor, dequantize_4bit, to_checkpoint
from capotune.models.architecture import text_part
from capotune.models.base import Base, Quantization
from capotune.models.quantize import (
    copy_other_files,
    quantizable_weights,
    quantization_config,
    quantized_plans,
    stored_linears,
    write_config,
    write_tensors,
)
from capotune.models.quantized import part_of, quantized_weights, read_quantized
from capotune.models.shard_writer import Plan, ShardWriter, whole_plan
from capotune.models.shards import DTYPES, StoredTensor, Tensors
from capotune.models.stored_names import StoredNames
from capotune.models.stream import empty_model, quantize_weight

AnyChange = TypeVar("AnyChange")
Change = Callable[[Tensor], Tensor]
"""From a weight (out, in), fp32, to the merged one."""


@dataclass(frozen=True)
class Changes:
    """What an adapter makes of its base's weights."""

    layers: dict[str, Change]
    """By the weight's path in the backbone."""
    replaced: dict[str, Tensor]
    """Weights that stand in place of the base's, by their path in the backbone."""


def check_mergeable(stored: StoredAdapter, base: Base, requantize: bool, report: Reporter = ignore) -> Changes:
    """The adapter's changes.

    Raises ``SettingError`` when it cannot be merged so, ``AdapterError`` when the base is another one or the adapter is
    damaged.
    """
    method = methods.get(stored.settings.method)
    try:
        layers = method.weight_changes(stored.settings, stored.tensors)
    except AdapterError as error:
        raise AdapterError(str(error), where=str(stored.folder / WEIGHTS)) from None
    replaced = method.replaced_weights(stored.settings, stored.tensors)
    if layers is None and not replaced:
        raise SettingError(
            f"{stored.settings.method} has no change that could be written into the base's weights.",
            where=str(stored.folder),
            advice="Adapters of lora, qlora, and feature-extraction with trained blocks can be merged; use this one as "
            "it is.",
        )
    check_base(stored, base, report)
    if base.is_quantized and not requantize:
        raise SettingError(
            f"its base '{base.name}' is stored in 4 bits, so there are no weights in full precision to merge into.",
            where=str(stored.folder),
            advice="Give `requantize=True`: the delta is added to what the 4 bits stand for, and quantized again.",
        )
    if requantize and not base.is_quantized and method(stored.settings).quantization is None:
        raise SettingError(
            "it is for adapters that were trained over 4 bits, and this one was trained in full precision.",
            where=str(stored.folder),
            setting="requantize",
            advice="Leave it out; `capo quantize` quantizes the merged model.",
        )
    # the first name is the backbone's; a head's weights have but one name before their own
    inside = {path.partition(".")[2]: weight for path, weight in replaced.items() if path.count(".") > 1}
    return Changes({f"{path.partition('.')[2]}.weight": change for path, change in (layers or {}).items()}, inside)


def write_merged(
    stored: StoredAdapter, base: Base, folder: Path, *, requantize: bool = False, progress: OnProgress | None = None
) -> int:
    """Write the merged model into the existing ``folder``; returns how many layers the adapter changed.

    Raises ``SettingError`` for methods that cannot be merged so, ``AdapterError`` when adapter and base do not fit.
    """
    changes = check_mergeable(stored, base, requantize)
    quantization = methods.get(stored.settings.method)(stored.settings).quantization if requantize else None
    merging = _Merging(base, changes, quantization)
    with ShardWriter(folder, merging.plans()) as writer:
        read = 0
        for tensor in merging.shards:
            merging.write(writer, tensor)
            read += tensor.nbytes
            if progress is not None:
                progress(read, merging.shards.nbytes)
    copy_other_files(base, folder)
    write_config(folder, base, merging.stated())
    return len({name.rpartition(".")[0] for name in (*merging.changes, *merging.replaced)})


class _Merging:
    """One pass over the base's tensors."""

    def __init__(self, base: Base, changes: Changes, quantization: Quantization | None) -> None:
        self.base = base
        self.shards = base.tensors
        self.quantized = quantized_weights(self.shards)
        """Parts of each weight that is stored in 4 bits, by its name."""
        self.layers = stored_linears(base)
        names = _stored_names(base, self.shards)
        self.changes: dict[str, Change] = _by_stored_name(changes.layers, names)
        self.replaced: dict[str, Tensor] = _by_stored_name(changes.replaced, names)
        self.quantization = base.quantization or quantization
        """Of the result; None: full precision."""
        self.to_quantize = quantizable_weights(base) if quantization and not base.is_quantized else {}

    def plans(self) -> Iterator[list[Plan]]:
        """What will be written, in order."""
        for stored in self.shards:
            if part_of(stored.name) is None:
                yield self._plan(stored)

    def write(self, writer: ShardWriter, stored: StoredTensor) -> None:
        """Write what ``stored`` becomes; the parts of a quantized weight come with it."""
        name, change = stored.name, self.changes.get(stored.name)
        if part_of(name) is not None:
            return
        if name in self.replaced:
            writer.write(name, _as_stored(self.replaced[name], stored))
        elif not self._becomes_quantized(name) and change is None:
            writer.copy(name, self.shards.chunks(name))
        elif name in self.quantized and change is None:
            for part in (name, *self.quantized[name]):
                writer.copy(part, self.shards.chunks(part))
        else:
            self._write_changed(writer, stored, change)

    def stated(self) -> dict[str, Any] | None:
        """``quantization_config`` of the result."""
        if self.base.is_quantized:
            stated: dict[str, Any] = self.base.config_values["quantization_config"]
            return stated
        return quantization_config(self.base, self.quantization, self.to_quantize) if self.quantization else None

    def _becomes_quantized(self, name: str) -> bool:
        if self.base.is_quantized:
            return name in self.quantized
        return self.quantization is not None and name in self.to_quantize

    def _plan(self, stored: StoredTensor) -> list[Plan]:
        name = stored.name
        if name in self.quantized and name not in self.changes:
            return [plan for part in (name, *self.quantized[name]) for plan in whole_plan(self.shards[part])]
        if not self._becomes_quantized(name):
            return whole_plan(stored)
        assert self.quantization is not None
        if name in self.quantized:
            found = read_quantized(self.shards, name, self.quantized[name])
            return quantized_plans(name, found.shape, _quantization_of(found))
        shape = stored.shape[::-1] if self.layers[name].transposed else stored.shape
        return quantized_plans(name, shape, self.quantization)

    def _write_changed(self, writer: ShardWriter, stored: StoredTensor, change: Change | None) -> None:
        name, layer = stored.name, self.layers[stored.name]
        what = f"{stored.path}: the tensor {name}"
        quantized = read_quantized(self.shards, name, self.quantized[name]) if name in self.quantized else None
        whole = None if quantized else self.shards.read(name)
        if whole is not None and self._becomes_quantized(name):
            assert self.quantization is not None
            quantized = quantize_weight(whole, layer.transposed, self.quantization, what)
        if quantized is None:
            assert whole is not None
            assert change is not None
            weight = whole.t() if layer.transposed else whole
            new = change(weight.float())
            writer.write(name, _as_stored(new.t() if layer.transposed else new, stored))
            return
        if change is not None:
            weight = change(dequantize_4bit(quantized, torch.float32)).to(quantized.dtype)
            quantized = quantize_weight(weight, False, _quantization_of(quantized), what)
        write_tensors(writer, to_checkpoint(quantized, name.removesuffix("weight")))


def _quantization_of(quantized: QuantizedTensor) -> Quantization:
    return Quantization(quantized.quant_type, quantized.block_size, quantized.nested)


def _as_stored(weight: Tensor, stored: StoredTensor) -> Tensor:
    """``weight`` in the dtype that the base stores. ``AdapterError`` when it does not fit there."""
    if tuple(weight.shape) != stored.shape:
        raise AdapterError(f"{stored.name} is {tuple(weight.shape)} in the adapter and {stored.shape} in the base.")
    found = weight.to(DTYPES[stored.dtype])
    if not found.isfinite().all():
        raise AdapterError(
            f"{stored.name} would hold values that are NaN or infinite in {str(found.dtype).removeprefix('torch.')}.",
            advice="The adapter is damaged, or the dtype too narrow: merge into a copy of the base in float32.",
        )
    return found


def _stored_names(base: Base, shards: Tensors) -> dict[str, str]:
    """Of the base's weights, by path in the backbone, and where a part of it reads text by path in that part too, since
    some families load it alone."""
    model = empty_model(AutoModel, base.config)
    keys = [stored.name for stored in shards if part_of(stored.name) is None]
    whole = {path: key for key, path in StoredNames(model, keys).whole.items()}
    text = f"{text_part(model)}."
    return {**{path.removeprefix(text): key for path, key in whole.items() if path.startswith(text)}, **whole}


def _by_stored_name(changes: dict[str, AnyChange], names: dict[str, str]) -> dict[str, AnyChange]:
    """``changes`` by the weight's name in the checkpoint, which ``names`` gives for each path in the backbone."""
    lost = sorted(changes.keys() - names.keys())
    if lost:
        raise AdapterError(
            f"the adapter changes {', '.join(lost[:3])}, which the base does not store as one weight.",
            advice="It cannot be merged into this base; use it as it is.",
        )
    return {names[path]: change for path, change in changes.items()}
