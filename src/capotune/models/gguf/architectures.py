"""How a GGUF file's architecture is called and configured in Transformers, and how its tensors change on the way.

llama.cpp's converter renames tensors, and for some architectures it changes their values or their order; each change is
undone here (``restore``), and done where a file is written (``store``). What a file does not say is what llama.cpp
assumes. Sources: llama.cpp's convert_hf_to_gguf.py (changes),
src/llama-model.cpp (what is assumed), gguf-py's constants.py and tensor_mapping.py (names).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from capotune.models.gguf.file import GgufFile
from capotune.models.gguf.rope import rope

Restore = Callable[[GgufFile, str, Tensor], Tensor]
"""(file, tensor's name in GGUF, its values as stored) → its values in Transformers."""


def as_stored(_file: GgufFile, _name: str, values: Tensor) -> Tensor:
    """Nothing was changed."""
    return values


@dataclass(frozen=True)
class Architecture:
    """One of GGUF's architectures in Transformers' terms."""

    model_type: str
    names: dict[str, str]
    """Transformers' setting → GGUF's key under the architecture's name; a key that a file lacks is left out."""
    rest: Callable[[GgufFile], dict[str, Any]]
    """Further settings, from anything in the file."""
    restore: Restore = as_stored
    store: Restore = as_stored
    """The inverse of ``restore``: from the values in Transformers to those in a file."""
    restored: tuple[str, ...] = ()
    """Ends of the names of tensors that ``restore`` and ``store`` are for."""
    is_written: bool = True
    """Whether models are also written so."""

    def config(self, file: GgufFile) -> dict[str, Any]:
        """Settings for Transformers' config class. ``ModelError`` for a count that is none, or differs by block."""
        values = {name: number(file, key) for name, key in self.names.items() if file.get(key) is not None}
        if values.get("sliding_window") == 0:
            del values["sliding_window"]  # how converters write that there is none
        return values | _common(file) | self.rest(file)

    def changes(self, name: str) -> bool:
        """Whether ``restore`` and ``store`` are for this tensor."""
        return name.endswith(self.restored) if self.restored else False


def number(file: GgufFile, key: str, default: Any = None) -> Any:
    """A number of the architecture; of a list with one value for each block, the one that all have."""
    value = file.get(key, default)
    if hasattr(value, "tolist"):
        different = set(value.tolist())
        if len(different) != 1:
            raise file.error(f"{key} differs from block to block ({value.tolist()[:8]} …), which is not read here.")
        value = different.pop()
    if value is not None and type(value) not in (int, float):
        raise file.error(f"{key} is {value!r}, and a number is needed.")
    return value


def has(file: GgufFile, end: str) -> bool:
    """Whether the first block has a tensor by this name."""
    return f"blk.0.{end}" in file.tensors


def head_width(file: GgufFile) -> int:
    """Width of an attention head: as the file says, else the hidden size shared out."""
    return int(number(file, "attention.key_length") or number(file, "embedding_length") // heads(file))


def heads(file: GgufFile) -> int:
    """Query heads. ``ModelError`` without them."""
    count = number(file, "attention.head_count")
    if not isinstance(count, int) or count < 1:
        raise file.error(f"attention.head_count is {count}.")
    return count


def kv_heads(file: GgufFile) -> int:
    """Heads of keys and values."""
    count = number(file, "attention.head_count_kv", heads(file))
    if not isinstance(count, int) or count < 1 or heads(file) % count:
        raise file.error(f"attention.head_count_kv is {count}, with {heads(file)} heads of queries.")
    return count


def _common(file: GgufFile) -> dict[str, Any]:
    embedding, output = file.tensors.get("token_embd.weight"), file.tensors.get("output.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise file.error("it holds no token_embd.weight, the embedding of a language model's tokens.")
    ids = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": output is None or _same_bytes(file, "token_embd.weight", "output.weight"),
        **{name: file.metadata.get(f"tokenizer.ggml.{kind}_token_id") for name, kind in ids.items()},
    }


def _same_bytes(file: GgufFile, one: str, other: str) -> bool:
    """Whether two tensors are the same: some converters write a tied output layer a second time."""
    first, second = file.tensors[one], file.tensors[other]
    if (first.shape, first.quantization) != (second.shape, second.quantization):
        return False
    pairs = zip(file.chunks(one), file.chunks(other), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


# ------------------------------------------------------------------------------------------------ settings


def _plain(file: GgufFile) -> dict[str, Any]:
    return {"num_key_value_heads": kv_heads(file), "rope_parameters": rope(file)}


def _fully_rotary(file: GgufFile) -> dict[str, Any]:
    if _rotary_part(file) != 1:
        raise file.error(f"it rotates {file.get('rope.dimension_count')} of each head's {head_width(file)} dimensions.")
    return _plain(file)


def _llama(file: GgufFile) -> dict[str, Any]:
    return {
        **_fully_rotary(file),
        "head_dim": head_width(file),
        "attention_bias": has(file, "attn_q.bias"),
        "mlp_bias": has(file, "ffn_up.bias"),
    }


def _mistral(file: GgufFile) -> dict[str, Any]:
    return {**_fully_rotary(file), "head_dim": head_width(file)}


def _qwen2(file: GgufFile) -> dict[str, Any]:
    return {**_fully_rotary(file), "use_sliding_window": False}


def _qwen3(file: GgufFile) -> dict[str, Any]:
    return {**_qwen2(file), "head_dim": head_width(file), "attention_bias": has(file, "attn_q.bias")}


def _gemma(file: GgufFile) -> dict[str, Any]:
    return {**_fully_rotary(file), "head_dim": head_width(file), "hidden_activation": "gelu_pytorch_tanh"}


def _gemma2(file: GgufFile) -> dict[str, Any]:
    return {
        **_gemma(file),
        "query_pre_attn_scalar": _query_scalar(file, blocks_of_27b=46),
        "attn_logit_softcapping": file.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": file.get("final_logit_softcapping", 30.0),
    }


def _gemma3(file: GgufFile) -> dict[str, Any]:
    every = number(file, "attention.sliding_window_pattern", 6)
    blocks = number(file, "block_count")
    return {
        **_gemma(file),
        "query_pre_attn_scalar": _query_scalar(file, blocks_of_27b=62),
        "final_logit_softcapping": file.get("final_logit_softcapping"),
        "layer_types": ["sliding_attention" if (at + 1) % every else "full_attention" for at in range(blocks)],
        "rope_parameters": {
            "full_attention": rope(file, 1e6),
            "sliding_attention": {"rope_type": "default", "rope_theta": file.get("rope.freq_base_swa", 10_000.0)},
        },
    }


def _query_scalar(file: GgufFile, blocks_of_27b: int) -> int:
    """What queries are divided by the root of: a head's width, but in Gemma's 27B the hidden size by heads. Files do
    not say it; llama.cpp too goes by the number of blocks."""
    is_27b = number(file, "block_count") == blocks_of_27b
    return int(number(file, "embedding_length") // heads(file)) if is_27b else head_width(file)


def _phi3(file: GgufFile) -> dict[str, Any]:
    original = file.get("rope.scaling.original_context_length", number(file, "context_length"))
    parameters = rope(file) | {"partial_rotary_factor": _rotary_part(file)}
    return {**_plain(file), "original_max_position_embeddings": original, "rope_parameters": parameters}


def _rotary_part(file: GgufFile) -> float:
    width = head_width(file)
    return float(number(file, "rope.dimension_count", width) / width)


def _partly_rotary(file: GgufFile) -> dict[str, Any]:
    return {**_plain(file), "rope_parameters": rope(file) | {"partial_rotary_factor": _rotary_part(file)}}


def _stablelm(file: GgufFile) -> dict[str, Any]:
    return {
        **_partly_rotary(file),
        "use_qkv_bias": has(file, "attn_q.bias"),
        "use_parallel_residual": not has(file, "ffn_norm.weight"),
    }


def _nemotron(file: GgufFile) -> dict[str, Any]:
    return {
        **_partly_rotary(file),
        "head_dim": head_width(file),
        "attention_bias": has(file, "attn_q.bias"),
        "mlp_bias": has(file, "ffn_up.bias"),
    }


def _starcoder2(file: GgufFile) -> dict[str, Any]:
    return {**_plain(file), "use_bias": has(file, "attn_q.bias")}


def _experts(file: GgufFile) -> dict[str, Any]:
    """A mixture of experts in the place of each block's MLP (Shazeer et al. 2017)."""
    used, inner = number(file, "expert_used_count"), number(file, "feed_forward_length", 0)
    return {
        **_fully_rotary(file),
        "head_dim": head_width(file),
        "num_experts": number(file, "expert_count"),
        "num_experts_per_tok": used,
        "moe_intermediate_size": number(file, "expert_feed_forward_length", inner // max(1, used)),
    }


def _qwen2_moe(file: GgufFile) -> dict[str, Any]:
    shared = number(file, "expert_shared_feed_forward_length", number(file, "feed_forward_length", 0))
    return {**_experts(file), "shared_expert_intermediate_size": shared, "qkv_bias": has(file, "attn_q.bias")}


def _qwen3_moe(file: GgufFile) -> dict[str, Any]:
    return {**_experts(file), "norm_topk_prob": True, "attention_bias": has(file, "attn_q.bias")}


def _mixtral(file: GgufFile) -> dict[str, Any]:
    return {**_experts(file), "num_local_experts": number(file, "expert_count")}


def _lfm2(file: GgufFile) -> dict[str, Any]:
    """Blocks without heads of keys are convolutions."""
    by_block = file.get("attention.head_count_kv")
    counts = by_block.tolist() if hasattr(by_block, "tolist") else [by_block] * number(file, "block_count")
    return {
        "layer_types": ["full_attention" if count else "conv" for count in counts],
        "num_key_value_heads": max(counts),
        "block_auto_adjust_ff_dim": False,
        "conv_bias": False,
        "rope_parameters": rope(file, 1e6),
    }


def _mamba(file: GgufFile) -> dict[str, Any]:
    if file.get("ssm.dt_b_c_rms"):
        raise file.error("it is a Falcon-Mamba, which is not read here.")
    return {
        "use_conv_bias": has(file, "ssm_conv1d.bias"),
        "use_bias": False,
    }


def _falcon(file: GgufFile) -> dict[str, Any]:
    return {
        "num_kv_heads": kv_heads(file),
        "multi_query": kv_heads(file) == 1,
        "new_decoder_architecture": has(file, "attn_norm_2.weight"),
        "parallel_attn": True,
        "alibi": False,
        "bias": has(file, "attn_qkv.bias"),
        "rope_parameters": rope(file),
    }


def _nothing(_file: GgufFile) -> dict[str, Any]:
    return {}


# ------------------------------------------------------------------------------------------------- tensors


def _unpermuted(file: GgufFile, name: str, values: Tensor) -> Tensor:
    """Rows of each head from pairs (0, 1), (2, 3) … to halves: llama.cpp rotates neighbours, Transformers halves."""
    count = heads(file) if ".attn_q." in name else kv_heads(file)
    return values.view(count, values.shape[0] // count // 2, 2, -1).transpose(1, 2).reshape(values.shape)


def _permuted(file: GgufFile, name: str, values: Tensor) -> Tensor:
    """Rows of each head from halves to pairs."""
    count = heads(file) if ".attn_q." in name else kv_heads(file)
    return values.reshape(count, 2, values.shape[0] // count // 2, -1).transpose(1, 2).reshape(values.shape)


def _less_one(_file: GgufFile, _name: str, values: Tensor) -> Tensor:
    """The family multiplies by 1 + weight, and the file holds the sum."""
    return values - 1


def _plus_one(_file: GgufFile, _name: str, values: Tensor) -> Tensor:
    return values + 1


def _logarithms(_file: GgufFile, _name: str, values: Tensor) -> Tensor:
    """A file holds −exp of Mamba's A_log."""
    return torch.log(-values)


def _bloom_qkv(file: GgufFile, _name: str, values: Tensor) -> Tensor:
    """From all queries, all keys, all values to the three of each head in turn."""
    return values.view(3, heads(file), values.shape[0] // 3 // heads(file), -1).transpose(0, 1).reshape(values.shape)


def _bloom_parts(file: GgufFile, _name: str, values: Tensor) -> Tensor:
    """From the three of each head in turn to all queries, all keys, all values."""
    return values.reshape(heads(file), 3, values.shape[0] // 3 // heads(file), -1).transpose(0, 1).reshape(values.shape)


def _falcon_qkv(file: GgufFile, _name: str, values: Tensor) -> Tensor:
    """From all queries, all keys, all values to a group's queries, its key and its value in turn."""
    groups, width = kv_heads(file), head_width(file)
    per_group = heads(file) // groups
    queries, keys, more = torch.split(values, [heads(file) * width, groups * width, groups * width])
    parts = [queries.view(groups, per_group, width, -1), *(part.view(groups, 1, width, -1) for part in (keys, more))]
    return torch.cat(parts, dim=1).reshape(values.shape)


def _falcon_parts(file: GgufFile, _name: str, values: Tensor) -> Tensor:
    """From a group's queries, its key and its value in turn to all queries, all keys, all values."""
    groups, width = kv_heads(file), head_width(file)
    per_group = heads(file) // groups
    grouped = values.reshape(groups, per_group + 2, width, -1)
    parts = torch.split(grouped, [per_group, 1, 1], dim=1)
    return torch.cat([part.reshape(groups * part.shape[1] * width, -1) for part in parts]).reshape(values.shape)


# --------------------------------------------------------------------------------------------------- table

_DECODER = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
}
_RMS = _DECODER | {"rms_norm_eps": "attention.layer_norm_rms_epsilon"}
_WINDOWED = _RMS | {"sliding_window": "attention.sliding_window"}
_EPSILON = "attention.layer_norm_epsilon"
_QUERIES_AND_KEYS = ("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")

ARCHITECTURES = {
    "llama": Architecture("llama", _RMS, _llama, _unpermuted, _permuted, _QUERIES_AND_KEYS),
    "qwen2": Architecture("qwen2", _RMS, _qwen2),
    "qwen3": Architecture("qwen3", _RMS, _qwen3),
    "gemma": Architecture("gemma", _RMS, _gemma, _less_one, _plus_one, ("norm.weight",)),
    "gemma2": Architecture("gemma2", _WINDOWED, _gemma2, _less_one, _plus_one, ("norm.weight",)),
    "gemma3": Architecture("gemma3_text", _WINDOWED, _gemma3, _less_one, _plus_one, ("norm.weight",)),
    "phi3": Architecture("phi3", _WINDOWED, _phi3),
    "stablelm": Architecture("stablelm", _DECODER | {"layer_norm_eps": _EPSILON}, _stablelm),
    "nemotron": Architecture(
        "nemotron", _DECODER | {"norm_eps": _EPSILON}, _nemotron, _less_one, _plus_one, ("norm.weight",)
    ),
    "starcoder2": Architecture("starcoder2", _DECODER | {"norm_epsilon": _EPSILON}, _starcoder2),
    "falcon": Architecture(
        "falcon",
        {
            **{name: key for name, key in _DECODER.items() if name != "intermediate_size"},
            "ffn_hidden_size": "feed_forward_length",
            "layer_norm_epsilon": _EPSILON,
        },
        _falcon,
        _falcon_qkv,
        _falcon_parts,
        ("attn_qkv.weight", "attn_qkv.bias"),
    ),
    "bloom": Architecture(
        "bloom",
        {
            "hidden_size": "embedding_length",
            "n_layer": "block_count",
            "n_head": "attention.head_count",
            "layer_norm_epsilon": _EPSILON,
        },
        _nothing,
        _bloom_qkv,
        _bloom_parts,
        ("attn_qkv.weight", "attn_qkv.bias"),
    ),
    "gpt2": Architecture(
        "gpt2",
        {
            "n_embd": "embedding_length",
            "n_layer": "block_count",
            "n_head": "attention.head_count",
            "n_inner": "feed_forward_length",
            "n_positions": "context_length",
            "layer_norm_epsilon": _EPSILON,
        },
        _nothing,
    ),
    "qwen2moe": Architecture("qwen2_moe", _RMS, _qwen2_moe, is_written=False),
    "qwen3moe": Architecture("qwen3_moe", _RMS, _qwen3_moe, is_written=False),
    "lfm2": Architecture(
        "lfm2",
        _DECODER | {"norm_eps": "attention.layer_norm_rms_epsilon", "conv_L_cache": "shortconv.l_cache"},
        _lfm2,
        is_written=False,
    ),
    "mamba": Architecture(
        "mamba",
        {
            "hidden_size": "embedding_length",
            "num_hidden_layers": "block_count",
            "layer_norm_epsilon": "attention.layer_norm_rms_epsilon",
            "intermediate_size": "ssm.inner_size",
            "conv_kernel": "ssm.conv_kernel",
            "state_size": "ssm.state_size",
            "time_step_rank": "ssm.time_step_rank",
        },
        _mamba,
        _logarithms,
        restored=("ssm_a",),
        is_written=False,
    ),
}
"""By ``general.architecture``."""
_MISTRAL = Architecture("mistral", _WINDOWED, _mistral, _unpermuted, _permuted, _QUERIES_AND_KEYS)
_MIXTRAL = Architecture("mixtral", _WINDOWED, _mixtral, _unpermuted, restored=_QUERIES_AND_KEYS, is_written=False)
_NOT_READ = {
    **dict.fromkeys(("t5", "t5encoder", "umt5"), "they read one text and write another"),
    "gpt-oss": "their experts stand otherwise in the file than in Transformers, and 4 bits are not for them",
    "minimax-m2": "their experts' biases stand beside the model's weights in Transformers",
    "gemma4": "heads and inputs differ from block to block",
    "deci": "Transformers has no class of its own for them",
}
"""Why architectures that Transformers knows in GGUF are not read here, in words."""


def named_in_gguf(model_type: str) -> tuple[str, Architecture] | None:
    """GGUF's name of a family of Transformers', and how it is stored; None for one that is not written."""
    if model_type == _MISTRAL.model_type:
        return "llama", _MISTRAL
    written = ((name, one) for name, one in ARCHITECTURES.items() if one.is_written)
    return next(((name, one) for name, one in written if one.model_type == model_type), None)


def architecture_of(file: GgufFile) -> Architecture:
    """The file's architecture. ``ModelError`` for one that is not read.

    A Mistral and a Mixtral call themselves a llama; it is one, unless it has experts, or its attention sees a window
    only.
    """
    import gguf

    if file.architecture == "llama" and number(file, "expert_count", 0):
        return _MIXTRAL
    if file.architecture == "llama" and number(file, "attention.sliding_window", 0):
        return _MISTRAL
    if file.architecture not in ARCHITECTURES:
        why = f": {_NOT_READ[file.architecture]}" if file.architecture in _NOT_READ else ""
        raise file.error(
            f"models of the architecture '{file.architecture}' are not read from GGUF{why}; "
            f"{', '.join(ARCHITECTURES)} are.",
            advice="Give the Transformers folder of the model instead.",
        )
    if file.architecture not in gguf.MODEL_ARCH_NAMES.values():
        raise file.error(
            f"the installed gguf {version('gguf')} does not know the tensors of '{file.architecture}'.",
            advice="Run: pip install --upgrade gguf",
        )
    return ARCHITECTURES[file.architecture]
