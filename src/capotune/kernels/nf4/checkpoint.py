"""The published file layout of a tensor in 4 bits, bitsandbytes' own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from capotune.errors import ModelError
from capotune.kernels.nf4.reference import dequantize_absmax
from capotune.kernels.nf4.tables import absmax_map, code_values
from capotune.kernels.nf4.tensor import NESTED_BLOCK_SIZE, WEIGHT_DTYPES, QuantizedTensor

__all__ = ["from_checkpoint", "is_weight_key", "to_checkpoint"]


def to_checkpoint(q: QuantizedTensor, prefix: str = "") -> dict[str, Tensor]:
    """``q`` under the names and bytes that bitsandbytes publishes (its ``QuantState.as_dict(packed=True)``).

    Keys, each after ``prefix`` (as "model.layers.0.mlp.up_proj."): weight uint8 (ceil(n/2), 1); weight.absmax;
    weight.quant_map fp32 (16,); when double-quantised weight.nested_absmax and weight.nested_quant_map fp32 (256,);
    weight.quant_state.bitsandbytes__nf4 (or __fp4): JSON as uint8. Tensors that belong to ``q`` are not copied.
    """
    device = q.codes.device
    facts: dict[str, Any] = {
        "quant_type": q.quant_type,
        "blocksize": q.block_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": q.shape,
    }
    tensors = {"": q.codes.view(-1, 1), ".absmax": q.absmax, ".quant_map": code_values(q.quant_type, device).clone()}
    if q.nested_absmax is not None and q.offset is not None:
        facts |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32", "nested_offset": q.offset.item()}
        tensors |= {".nested_absmax": q.nested_absmax, ".nested_quant_map": absmax_map(device).clone()}
    packed = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    tensors[f".quant_state.bitsandbytes__{q.quant_type}"] = packed
    return {f"{prefix}weight{name}": tensor for name, tensor in tensors.items()}


def from_checkpoint(tensors: Mapping[str, Tensor], prefix: str = "") -> QuantizedTensor:
    """The tensor stored under ``prefix`` in the published layout; see ``to_checkpoint``. Other keys are ignored.

    Raises ``ModelError`` that names the tensor when a part is missing, truncated, of the wrong dtype, not finite, or at
    odds with the stated shape, type or block size.
    """
    name = f"{prefix}weight"
    facts = _read_facts(tensors, name)
    try:
        return _assemble(tensors, name, facts)
    except ModelError as error:
        raise ModelError(f"{name}: {error}; the checkpoint is damaged or not bitsandbytes' 4-bit format") from None


def _assemble(tensors: Mapping[str, Tensor], name: str, facts: dict[str, Any]) -> QuantizedTensor:
    # FSDP stores the packed bytes in the model's dtype; they are the same bytes.
    codes = _part(tensors, name).reshape(-1).contiguous().view(torch.uint8)
    nested_absmax = offset = None
    if "nested_offset" in facts:
        nested_absmax = _part(tensors, f"{name}.nested_absmax")
        offset = torch.tensor(_number(facts, "nested_offset"), dtype=torch.float32, device=codes.device)
        if facts.get("nested_blocksize") != NESTED_BLOCK_SIZE:
            raise ModelError(f"nested block size {facts.get('nested_blocksize')!r} is not {NESTED_BLOCK_SIZE}")
    absmax = _part(tensors, f"{name}.absmax")
    kind, block_size = facts["quant_type"], facts.get("blocksize")
    q = QuantizedTensor(codes, absmax, kind, block_size, _shape(facts), _dtype(facts), nested_absmax, offset)  # type: ignore[arg-type]
    if not torch.equal(_part(tensors, f"{name}.quant_map"), code_values(q.quant_type, codes.device)):
        raise ModelError(f"quant_map is not the {q.quant_type} table")
    q = _with_known_map(q, tensors, name)
    for label, values in (("absmax", q.absmax), ("nested_absmax", q.nested_absmax), ("nested_offset", q.offset)):
        if values is not None and not bool(torch.isfinite(values).all()):
            raise ModelError(f"{label} holds values that are NaN or infinite")
    return q


def _with_known_map(q: QuantizedTensor, tensors: Mapping[str, Tensor], name: str) -> QuantizedTensor:
    """Read absmax through a foreign 8-bit map once and keep the values: such checkpoints exist.

    Old CPU builds of bitsandbytes overwrote the first entry of the map with −1.
    """
    if q.nested_absmax is None or q.offset is None:
        return q
    values = _part(tensors, f"{name}.nested_quant_map")
    if values.dtype != torch.float32 or tuple(values.shape) != (256,):
        raise ModelError(f"nested_quant_map is {values.dtype} {tuple(values.shape)}, not torch.float32 (256,)")
    if torch.equal(values, absmax_map(values.device)):
        return q
    absmax = dequantize_absmax(q.absmax, values, q.nested_absmax, q.offset)
    return replace(q, absmax=absmax, nested_absmax=None, offset=None)


def _read_facts(tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """The JSON beside the codes; its key ends in the quantisation type."""
    start = f"{name}.quant_state.bitsandbytes__"
    keys = [key for key in tensors if key.startswith(start)]
    if len(keys) != 1:
        raise ModelError(f"{name}: expected one tensor {start}<type>, found {len(keys)}; is this a 4-bit checkpoint?")
    try:
        facts = json.loads(bytes(tensors[keys[0]].tolist()))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{keys[0]}: not JSON stored as uint8 ({error}); the checkpoint is damaged") from None
    if not isinstance(facts, dict) or facts.get("quant_type") != keys[0].removeprefix(start):
        raise ModelError(f"{keys[0]}: its content does not name the type in its key; the checkpoint is damaged")
    return facts


def _part(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise ModelError(f"tensor {key} is missing")
    return tensors[key]


def _shape(facts: dict[str, Any]) -> tuple[int, ...]:
    shape = facts.get("shape")
    if not isinstance(shape, list) or not shape or not all(type(size) is int and size > 0 for size in shape):
        raise ModelError(f"stated shape {shape!r} is not a list of positive whole numbers")
    return tuple(shape)


def _dtype(facts: dict[str, Any]) -> torch.dtype:
    name = facts.get("dtype")
    if not isinstance(name, str) or name not in WEIGHT_DTYPES:
        raise ModelError(f"original dtype {name!r} is not one of {', '.join(WEIGHT_DTYPES)}")
    return WEIGHT_DTYPES[name]


def _number(facts: dict[str, Any], key: str) -> float:
    if type(facts[key]) is not float:
        raise ModelError(f"{key} {facts[key]!r} is not a number")
    return float(facts[key])


def is_weight_key(key: str, prefix: str) -> bool:
    return key == f"{prefix}weight" or key.startswith(f"{prefix}weight.")
