"""Checkpoints that hold linear weights in 4 bits already, as Transformers saves them with bitsandbytes.

Beside ``….weight`` (the codes) stand its parts, ``….weight.absmax``, ``….weight.quant_state.bitsandbytes__nf4`` and so
on (``kernels.nf4.to_checkpoint``), in the same shard or another one. That it is so stands in ``config.json`` under
``quantization_config``.
"""

from __future__ import annotations

import re
from typing import Any

from capotune.errors import ModelError
from capotune.kernels.nf4 import QuantizedTensor, from_checkpoint
from capotune.models.shards import Tensors

_PART = re.compile(r"(.*\.weight)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)")


def holds_4_bits(config: dict[str, Any]) -> bool:
    """Whether ``config.json`` says that the weights are in bitsandbytes' 4 bits.

    Raises ``ModelError``, which says what to give instead, for weights that are stored in a way that is not read here.
    """
    stated = config.get("quantization_config")
    if stated is None:
        return False
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    if method == "bitsandbytes" and stated.get("load_in_4bit"):
        return True
    found = "bitsandbytes' 8 bits" if method == "bitsandbytes" else f"the format {method!r}"
    raise ModelError(
        f"its weights are stored in {found} (quantization_config in config.json), which is not read here. Give the "
        "model in full precision, or in bitsandbytes' 4 bits."
    )


def part_of(name: str) -> str | None:
    """The weight that the tensor ``name`` is a part of; None for a tensor that stands for itself."""
    found = _PART.fullmatch(name)
    return found.group(1) if found else None


def quantized_weights(shards: Tensors) -> dict[str, list[str]]:
    """Weights that are stored in 4 bits, with the names of their parts."""
    parts: dict[str, list[str]] = {}
    for stored in shards:
        weight = part_of(stored.name)
        if weight is not None:
            parts.setdefault(weight, []).append(stored.name)
    return parts


def read_quantized(shards: Tensors, weight: str, parts: list[str]) -> QuantizedTensor:
    """The weight in 4 bits, as it is stored. ``ModelError`` names tensor and file when its parts do not fit."""
    tensors = {name: shards.read(name) for name in (weight, *parts) if name in shards}
    try:
        return from_checkpoint(tensors, weight.removesuffix("weight"))
    except ModelError as error:
        where = shards[weight if weight in shards else parts[0]].path
        raise ModelError(f"{where}: {error}") from None
