"""What a GGUF file says of a model besides its weights, from Transformers' config: the inverse of ``architectures``.

A file's keys are llama.cpp's; what it assumes where one is missing is left out. Rotary scaling that llama.cpp reads as
tensors (Llama 3's factors, LongRoPE's two lists) is returned beside the metadata.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capotune.models.base import Base
from capotune.models.gguf.architectures import Architecture, named_in_gguf
from capotune.models.gguf.file import GgufFile
from capotune.models.gguf.rope import FREQUENCIES, LONG, SHORT


def architecture_in_gguf(base: Base) -> tuple[str, Architecture]:
    """GGUF's name of the base's family, and how it is stored. ``ModelError`` for one that is not written."""
    found = named_in_gguf(base.config.model_type)
    if found is None:
        raise base.error(
            f"a {base.config.model_type} model is not written as GGUF.",
            advice="Give `loader=transformers` and convert that folder with llama.cpp's convert_hf_to_gguf.py.",
        )
    return found


def head_of(base: Base) -> GgufFile:
    """What a file of this base says of its shapes, as ``restore`` and ``store`` ask for it; it holds no tensor."""
    name, architecture = architecture_in_gguf(base)
    return GgufFile(Path(base.name), {"general.architecture": name, **of_config(base.config, name, architecture)}, {})


def of_config(config: Any, name: str, architecture: Architecture) -> dict[str, Any]:
    """The architecture's own entries: whole numbers, floats, strings."""
    hidden, count = config.hidden_size, config.num_attention_heads
    width = getattr(config, "head_dim", None) or hidden // count
    inners = (_own(config, key) for key in ("ffn_hidden_size", "n_inner", "intermediate_size"))
    values: dict[str, Any] = {key: _own(config, setting) for setting, key in architecture.names.items()}
    values["vocab_size"] = config.vocab_size
    values["feed_forward_length"] = next((size for size in inners if size), 4 * hidden)
    values.setdefault("context_length", _own(config, "seq_length") or 2048)
    values["attention.head_count_kv"] = _own(config, "num_kv_heads") or _own(config, "num_key_value_heads")
    if width != hidden // count:
        values |= {"attention.key_length": width, "attention.value_length": width}
    values["attn_logit_softcapping"] = _own(config, "attn_logit_softcapping")
    values["final_logit_softcapping"] = _own(config, "final_logit_softcapping")
    if _own(config, "use_parallel_residual") is not None:
        values["use_parallel_residual"] = bool(config.use_parallel_residual)
    values |= _rope(config, width)
    return {f"{name}.{key}": _typed(key, value) for key, value in values.items() if value is not None}


def rope_tensors(config: Any) -> dict[str, Tensor]:
    """Scaling of the rotary positions that a file holds as tensors."""
    rope = _parameters(config)
    if rope.get("rope_type") == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        width = 2 * len(inverse)
        return {FREQUENCIES: rope["rope_theta"] ** (-torch.arange(0, width, 2) / width) / inverse}
    if rope.get("rope_type") == "longrope":
        return {LONG: torch.tensor(rope["long_factor"]), SHORT: torch.tensor(rope["short_factor"])}
    return {}


def _rope(config: Any, width: int) -> dict[str, Any]:
    rope = _parameters(config)
    if not rope:
        return {}
    found: dict[str, Any] = {
        "rope.dimension_count": int(width * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": rope["rope_theta"],
    }
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": rope["factor"]}
        found["rope.scaling.original_context_length"] = rope.get("original_max_position_embeddings")
        found["rope.scaling.yarn_beta_fast"] = rope.get("beta_fast")
        found["rope.scaling.yarn_beta_slow"] = rope.get("beta_slow")
    if kind == "longrope":
        original = rope.get("original_max_position_embeddings") or _own(config, "original_max_position_embeddings")
        scale = config.max_position_embeddings / original
        usual = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        found["rope.scaling.original_context_length"] = original
        found["rope.scaling.attn_factor"] = rope.get("attention_factor") or usual
    return found


def _parameters(config: Any) -> dict[str, Any]:
    """``rope_parameters``, of the layers that see all where a family has several kinds; empty without any."""
    found: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    full: dict[str, Any] = found.get("full_attention", found)
    return full


def _own(config: Any, name: str) -> Any:
    return getattr(config, name, None)


def _typed(key: str, value: Any) -> Any:
    """Factors and epsilons are floats, whatever a config writes them as."""
    is_float = key.endswith(("epsilon", "softcapping", "freq_base", "factor", "beta_fast", "beta_slow"))
    return float(value) if is_float else value
