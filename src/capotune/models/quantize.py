"""A model's checkpoint written anew with its linear weights in 4 bits, as bitsandbytes and Transformers publish it.

Tensors go from file to file one at a time. Quantized are the linear layers of the transformer; embeddings, norms,
pooler and heads are copied byte by byte, and so is everything else in the folder (tokenizer, generation settings,
pooling).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from capotune.events import OnProgress
from capotune.files import write_atomic
from capotune.kernels.nf4 import (
    NESTED_BLOCK_SIZE,
    WEIGHT_DTYPES,
    Linear4bit,
    QuantizedTensor,
    to_checkpoint,
)
from capotune.models.architecture import LINEAR_TYPES, bypassed_linears, is_linear
from capotune.models.base import Base, Quantization
from capotune.models.folder import ADAPTER, is_weights
from capotune.models.shard_writer import Plan, ShardWriter, whole_plan
from capotune.models.shards import DTYPES, StoredTensor
from capotune.models.stored_names import StoredNames
from capotune.models.stream import empty_model, quantize_weight, wrapper

HEADS = ("lm_head", "classifier", "score", "qa_outputs")
"""How heads are called that Transformers may put on this model later; it must not look for them in 4 bits."""


@dataclass(frozen=True)
class StoredLinear:
    """A linear layer's weight in a checkpoint."""

    path: str
    """Its layer, as a path in the backbone."""
    transposed: bool
    """Stored as (in, out), as Conv1D's is; quantized as (out, in)."""
    why_whole: str | None
    """Why 4 bits are not for it, in words; None: they are."""


@dataclass(frozen=True)
class LayerError:
    """How far a quantized weight Ŵ is from what it was, in Frobenius norms."""

    name: str
    shape: tuple[int, ...]
    norm: float
    """‖W‖"""
    difference_norm: float
    """‖W − Ŵ‖"""

    @property
    def relative_error(self) -> float:
        """‖W − Ŵ‖ / ‖W‖; 0 for a weight of zeros."""
        return self.difference_norm / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class Quantized:
    """What was written."""

    layers: tuple[LayerError, ...]
    quantized_weights: int
    all_weights: int


def stored_linears(base: Base) -> dict[str, StoredLinear]:
    """Weights of all linear layers of the transformer, by their names in the checkpoint.

    ``ModelError`` where there are none, and for models that read one text and write another.

    4 bits are not for the pooler, which is a head, nor for what Transformers leaves out: what the family keeps in fp32,
    and layers of a class of the family's own; nor for weights that the model's own code reads.
    """
    from transformers import AutoModel

    _ = base.text_config  # which not every model has
    model = empty_model(AutoModel, base.config)
    in_fp32, bypassed = {"pooler", *(getattr(model, "_keep_in_fp32_modules", None) or ())}, bypassed_linears(model)

    def why_whole(path: str, part: nn.Module) -> str | None:
        if type(part) not in (nn.Linear, Conv1D):
            return f"of a class that Transformers does not read in 4 bits, {type(part).__name__}"
        if path in bypassed or not in_fp32.isdisjoint(path.split(".")):
            return "not to be quantized in this family"
        return None

    layers = {
        f"{path}.weight": StoredLinear(path, isinstance(part, Conv1D), why_whole(path, part))
        for path, part in model.named_modules()
        if is_linear(part) and part is not model.get_output_embeddings()  # which Llama 4 has here
    }
    names = StoredNames(model, [stored.name for stored in base.tensors])
    found = {key: _kept_if_renamed(key, layers[name]) for key, name in names.whole.items() if name in layers}
    if not found:
        held_as, advice = wrapper(base, sorted(layers))
        raise base.error(f"no linear layer's weight is stored in {base.folder}{held_as}.", advice)
    return found


def _kept_if_renamed(key: str, layer: StoredLinear) -> StoredLinear:
    """A quantized weight's parts are named after it, as the weight of a layer."""
    return layer if key.endswith(".weight") else replace(layer, why_whole="stored under names of the family's own")


def quantizable_weights(base: Base) -> dict[str, StoredLinear]:
    """Those of the stored linear layers that 4 bits are for. ``ModelError`` where there are none."""
    linears = stored_linears(base)
    found = {key: layer for key, layer in linears.items() if layer.why_whole is None}
    if not found:
        first = next(iter(linears.values()))
        raise base.error(
            f"its linear layers are {first.why_whole}.",
            advice="Train qlora on it as it is: it is then quantized as it is loaded.",
        )
    return found


def write_quantized(
    base: Base,
    folder: Path,
    quantization: Quantization,
    *,
    layers: dict[str, StoredLinear] | None = None,
    progress: OnProgress | None = None,
) -> Quantized:
    """Write ``base`` with its linear weights in 4 bits into the existing ``folder``.

    ``layers`` are those that are quantized, by their weights' names in the checkpoint; None: ``quantizable_weights``,
    all that Transformers reads in 4 bits. Peak memory is one tensor and what quantizing it takes. Raises
    ``ModelError``, which names tensor and file, for weights that are damaged or not finite.
    """
    shards = base.tensors
    to_quantize = quantizable_weights(base) if layers is None else layers
    errors, read, quantized_weights = [], 0, 0
    buffer = shards.buffer_for(to_quantize)
    with ShardWriter(folder, (_plans(stored, to_quantize, quantization) for stored in shards)) as writer:
        for stored in shards:
            layer = to_quantize.get(stored.name)
            if layer is None:
                writer.copy(stored.name, shards.chunks(stored.name))
            else:
                weight = shards.read(stored.name, buffer)
                quantized = quantize_weight(
                    weight, layer.transposed, quantization, f"{stored.path}: the tensor {stored.name}"
                )
                write_tensors(writer, to_checkpoint(quantized, stored.name.removesuffix("weight")))
                errors.append(layer_error(stored.name, weight.t() if layer.transposed else weight, quantized))
                quantized_weights += quantized.numel
            read += stored.nbytes
            if progress is not None:
                progress(read, shards.nbytes)
    copy_other_files(base, folder)
    write_config(folder, base, quantization_config(base, quantization, to_quantize))
    return Quantized(tuple(errors), quantized_weights, sum(prod(stored.shape) for stored in shards))


def layer_error(name: str, weight: Tensor, quantized: QuantizedTensor) -> LayerError:
    """Of ``weight`` (out, in) and what its quantized form stands for."""
    norm = float(torch.linalg.vector_norm(weight, dtype=torch.float32))
    difference = Linear4bit.from_quantized(quantized).borrowed_weight(torch.float32).sub_(weight)
    return LayerError(name, quantized.shape, norm, float(torch.linalg.vector_norm(difference)))


def quantized_plans(name: str, shape: tuple[int, ...], quantization: Quantization) -> list[Plan]:
    """What ``to_checkpoint`` gives for the weight ``name`` of ``shape`` (out, in)."""
    numbers = prod(shape)
    blocks = -(-numbers // quantization.block_size)
    plans = [Plan.of(name, "U8", ((numbers + 1) // 2, 1)), Plan.of(f"{name}.quant_map", "F32", (16,))]
    plans.append(Plan.of(f"{name}.absmax", "U8" if quantization.double_quant else "F32", (blocks,)))
    if quantization.double_quant:
        plans.append(Plan.of(f"{name}.nested_absmax", "F32", (-(-blocks // NESTED_BLOCK_SIZE),)))
        plans.append(Plan.of(f"{name}.nested_quant_map", "F32", (256,)))
    return [*plans, Plan.of_text(f"{name}.quant_state.bitsandbytes__{quantization.quant_type}")]


def write_tensors(writer: ShardWriter, tensors: dict[str, Tensor]) -> None:
    """Write planned tensors by their names."""
    for name, tensor in tensors.items():
        writer.write(name, tensor)


def quantization_config(base: Base, quantization: Quantization, to_quantize: dict[str, StoredLinear]) -> dict[str, Any]:
    """What ``config.json`` says of the quantization, in Transformers' words."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quantization.quant_type,
        "bnb_4bit_use_double_quant": quantization.double_quant,
        "bnb_4bit_compute_dtype": _stored_dtype(base, to_quantize),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": _left_whole(base, to_quantize),
    }


def write_config(folder: Path, base: Base, stated: dict[str, Any] | None, **changed: Any) -> None:
    """``config.json`` of ``base`` with what is ``stated`` of the quantization (None: the weights are whole) and other
    values where they have ``changed``."""
    stale = ("quantization_config", "transformers_weights")
    config = {name: value for name, value in base.config_values.items() if name not in stale} | changed
    if stated is not None:
        config["quantization_config"] = stated
    write_atomic(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def copy_other_files(base: Base, folder: Path) -> None:
    """Everything in a model's folder but its weights and ``config.json``.

    Hidden files stay behind, and so do other copies of the model: folders with weights in them, unless modules.json
    says that they are part of it, and an adapter that lies in the folder.
    """
    parts = {module.folder for module in base.sentence_files.modules if module.folder}
    for path in sorted(base.folder.rglob("*")):
        name = path.relative_to(base.folder)
        is_hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not is_hidden and (name.parts[0] in parts or _comes_along(path, base.folder)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def _comes_along(path: Path, folder: Path) -> bool:
    """Whether a file that no other file names is more than another copy of the model, or a part of one."""
    if path.parent == folder:
        return not is_weights(path) and path.name not in ("config.json", ADAPTER, "capotune.json")
    inside = folder / path.relative_to(folder).parts[0]
    return not any(is_weights(other) for other in inside.rglob("*"))


def _plans(stored: StoredTensor, to_quantize: dict[str, StoredLinear], quantization: Quantization) -> list[Plan]:
    if stored.name not in to_quantize:
        return whole_plan(stored)
    shape = stored.shape[::-1] if to_quantize[stored.name].transposed else stored.shape
    return quantized_plans(stored.name, shape, quantization)


def _stored_dtype(base: Base, to_quantize: dict[str, StoredLinear]) -> str:
    """PyTorch's name of the dtype that the weights are stored in; the product runs in it."""
    dtype = DTYPES.get(base.tensors[next(iter(to_quantize))].dtype, torch.float32)
    return str(dtype if dtype in WEIGHT_DTYPES.values() else torch.float32).removeprefix("torch.")


def _left_whole(base: Base, to_quantize: dict[str, StoredLinear]) -> list[str]:
    """Linear layers that Transformers must not look for in 4 bits: pooler, heads, and what the family keeps in fp32."""
    import transformers

    config = base.config
    quantized = {layer.path for layer in to_quantize.values()}
    names = set(HEADS)
    for architecture in ("AutoModel", *(base.config_values.get("architectures") or ())):
        auto = getattr(transformers, architecture, None)
        if auto is None:  # the model's own code
            continue
        model = empty_model(auto, config)
        prefix = f"{model.base_model_prefix}."
        paths = [path.removeprefix(prefix) for path, part in model.named_modules() if isinstance(part, LINEAR_TYPES)]
        names.update(path for path in paths if path not in quantized)
    return sorted(name for name in names if not any(path.endswith(name) for path in quantized))
