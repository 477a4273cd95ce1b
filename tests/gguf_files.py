"""GGUF files of tiny random models, written as llama.cpp's converter (convert_hf_to_gguf.py) writes them.

The changes to values and order are that converter's own formulas, the names those of the package gguf.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quantize
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

VOCABULARY = 288
TEXT = "The quick brown fox jumps over 12 lazy dogs, isn't it? Don't: 3.14 is near π.\n\n  Two  spaces, 日本語, 👍. "
TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def byte_level() -> Tokenizer:
    """Byte-level BPE that splits digits, as SmolLM's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(TOKENS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT] * 9, trainer)
    return tokenizer


def permuted(weights: Tensor, heads: int) -> Tensor:
    """llama.cpp's LlamaModel.permute."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def llama_change(name: str, weights: Tensor, config: Any) -> Tensor:
    if name.endswith(("q_proj.weight", "q_proj.bias")):
        return permuted(weights, config.num_attention_heads)
    if name.endswith(("k_proj.weight", "k_proj.bias")):
        return permuted(weights, config.num_key_value_heads)
    return weights


def norms_change(name: str, weights: Tensor, _config: Any) -> Tensor:
    return weights + 1 if name.endswith("norm.weight") or "layernorm.weight" in name else weights


def gpt2_change(name: str, weights: Tensor, _config: Any) -> Tensor:
    is_transposed = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
    return weights.T if is_transposed else weights


def bloom_change(name: str, weights: Tensor, config: Any) -> Tensor:
    if "query_key_value" not in name:
        return weights
    heads, hidden = config.n_head, config.hidden_size
    parts = weights.reshape(heads, 3, hidden // heads, *weights.shape[1:])
    return torch.cat([parts[:, at].reshape(hidden, *weights.shape[1:]) for at in range(3)])


def falcon_change(name: str, weights: Tensor, config: Any) -> Tensor:
    if "query_key_value" not in name:
        return weights
    heads, groups = config.num_attention_heads, config.num_kv_heads or 1
    width = config.hidden_size // heads
    parts = weights.view(groups, heads // groups + 2, width, width * heads)
    q, k, v = parts[:, :-2], parts[:, [-2]], parts[:, [-1]]
    return torch.cat([part.reshape(-1, width * heads) for part in (q, k, v)])


def mamba_change(name: str, weights: Tensor, _config: Any) -> Tensor:
    return -torch.exp(weights) if name.endswith(".A_log") else weights


def as_it_is(_name: str, weights: Tensor, _config: Any) -> Tensor:
    return weights


@dataclass(frozen=True)
class Family:
    """A family's tiny configuration, and what llama.cpp's converter does with it."""

    architecture: str
    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    """Besides the counts that all write."""
    change: Callable[[str, Tensor, Any], Tensor] = as_it_is
    epsilon: str = "rms"

    def model(self, seed: int = 0) -> Any:
        """Random weights, norms and biases among them."""
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(self.model_type, **{**SIZES, **self.config})
        ).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.2)
        return model


def write(
    family: Family,
    path: Path,
    model: Any = None,
    quantization: str = "F32",
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, Tensor] | None = None,
) -> Any:
    """Write the family's model (made here if none is given) and return it. ``metadata`` of None leaves an entry out."""
    model = model or family.model()
    config = model.config
    writer = GGUFWriter(path, family.architecture)
    for key, value in {**_metadata(family, config), **tokenizer_metadata(), **(metadata or {})}.items():
        _add(writer, key, value)
    for name, values in {**_tensors(family, model), **(tensors or {})}.items():
        _add_tensor(writer, name, values, quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def tokenizer_metadata() -> dict[str, Any]:
    """Of ``byte_level``."""
    tokenizer = byte_level()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    kinds = [{"<think>": 4}.get(token, 3 if token in TOKENS else 1) for token in tokens]
    prefix = "tokenizer.ggml."
    return {
        prefix + "model": "gpt2", prefix + "pre": "smollm", prefix + "tokens": tokens, prefix + "token_type": kinds,
        prefix + "merges": [" ".join(merge) for merge in merges], prefix + "bos_token_id": 1,
        prefix + "eos_token_id": 2, prefix + "padding_token_id": 2, "tokenizer.chat_template": TEMPLATE,
    }  # fmt: skip


def _metadata(family: Family, config: Any) -> dict[str, Any]:
    inners = (getattr(config, name, None) for name in ("ffn_hidden_size", "intermediate_size"))
    inner = next((size for size in inners if size), 4 * config.hidden_size)
    positions = getattr(config, "max_position_embeddings", 128)
    values = {
        "block_count": config.num_hidden_layers, "embedding_length": config.hidden_size, "feed_forward_length": inner,
        "attention.head_count": config.num_attention_heads, "context_length": positions,
    }  # fmt: skip
    kv = getattr(config, "num_kv_heads", None) or getattr(config, "num_key_value_heads", None)
    if kv:
        values["attention.head_count_kv"] = kv
    for name in ("rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_epsilon"):
        if hasattr(config, name):
            key = "layer_norm_rms_epsilon" if name == "rms_norm_eps" else "layer_norm_epsilon"
            values[f"attention.{key}"] = float(getattr(config, name))
    return {f"{family.architecture}.{key}": value for key, value in {**values, **family.metadata}.items()}


def _tensors(family: Family, model: Any) -> dict[str, Tensor]:
    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = get_tensor_name_map(arch, model.config.num_hidden_layers)
    found = {}
    for name, parameter in model.named_parameters():
        for part, values in _parts(name, family.change(name, parameter.detach(), model.config)).items():
            form = part.removeprefix("transformer.") if family.architecture == "bloom" else part
            called = names.get_name(form, try_suffixes=(".weight", ".bias"))
            assert called is not None, name
            found[f"{called}.weight" if called.endswith("_exps") else called] = values.squeeze()
    return found


def _parts(name: str, values: Tensor) -> dict[str, Tensor]:
    """An expert's two matrices apart, as models' own files and llama.cpp have them."""
    if not name.endswith("experts.gate_up_proj"):
        return {name: values}
    gate, up = values.chunk(2, dim=1)
    return {name.replace("gate_up_proj", part): half for part, half in (("gate_proj", gate), ("up_proj", up))}


def _add_tensor(writer: GGUFWriter, name: str, values: Tensor, quantization: str) -> None:
    kind = GGMLQuantizationType[quantization if values.dim() > 1 and not name.startswith("rope") else "F32"]
    data = values.float().contiguous().numpy()
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        writer.add_tensor(name, data.astype(np.float16 if kind == GGMLQuantizationType.F16 else np.float32))
    else:
        writer.add_tensor(name, quantize(data, kind), raw_dtype=kind)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_int32(key, value) if value < 0 else writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


# ---------------------------------------------------------------------------------------- SentencePiece


def sentencepiece() -> Tokenizer:
    """A BPE tokenizer as Llama 2's: a space before each text, unknown characters as bytes."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    latin = [TEXT.encode("ascii", "ignore").decode()] * 9
    trained.train_from_iterator(latin, trainers.BpeTrainer(vocab_size=VOCABULARY - 259, show_progress=False))
    learnt = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += sorted(learnt["vocab"], key=lambda token: learnt["vocab"][token])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge) for merge in learnt["merges"]]
    bpe = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = trained.normalizer
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def sentencepiece_metadata(tokenizer: Tokenizer) -> dict[str, Any]:
    """Tokens with their scores and without merges, as SentencePiece has them."""
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    merged = ["".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    scores = [-float(merged.index(token)) if token in merged else -1e6 for token in tokens]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    prefix = "tokenizer.ggml."
    return {
        prefix + "model": "llama", prefix + "pre": "default", prefix + "tokens": tokens, prefix + "scores": scores,
        prefix + "token_type": kinds, prefix + "merges": None, prefix + "bos_token_id": 1, prefix + "eos_token_id": 2,
        prefix + "unknown_token_id": 0, prefix + "padding_token_id": None,
    }  # fmt: skip


# --------------------------------------------------------------------------------------------- families


def rope(kind: str = "default", theta: float = 10_000.0, **rest: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **rest}}


def rope_tensors(family: Family) -> dict[str, Tensor]:
    """Scaling that converters write as tensors: Llama 3's factors, Phi-3's two lists."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = family.config.get("rope_parameters", {})
    if parameters.get("rope_type") == "llama3":
        inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](family.model().config, "cpu")
        width = 2 * len(inverse)
        return {"rope_freqs.weight": parameters["rope_theta"] ** (-torch.arange(0, width, 2) / width) / inverse}
    if parameters.get("rope_type") == "longrope":
        lists = {"long": parameters["long_factor"], "short": parameters["short_factor"]}
        return {f"rope_factors_{name}.weight": torch.tensor(values) for name, values in lists.items()}
    return {}


LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
WIDE = {"attention.key_length": 64, "rope.dimension_count": 64, "rope.freq_base": 500_000.0}
WINDOW = {"attention.sliding_window": 8}
EXPERTS = {"expert_count": 4, "expert_used_count": 2}
LONG = [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
SHORT = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7]


def llama3(factor: float, low: float, high: float, original: int) -> dict[str, Any]:
    numbers = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    return {"head_dim": 64, **rope("llama3", 500_000.0, original_max_position_embeddings=original, **numbers)}


FAMILIES = {
    "Llama": Family("llama", "llama", {"tie_word_embeddings": True}, {"rope.dimension_count": 16}, llama_change),
    "Llama with biases": Family("llama", "llama", {"attention_bias": True, "mlp_bias": True}, {}, llama_change),
    "Llama, linear scaling": Family("llama", "llama", rope("linear", factor=4.0), LINEAR, llama_change),
    "Llama 3": Family("llama", "llama", llama3(8.0, 1.0, 4.0, 8192), WIDE, llama_change),
    "Llama 3, other scaling": Family("llama", "llama", llama3(32.0, 2.0, 6.0, 4096), WIDE, llama_change),
    "Mistral": Family("llama", "mistral", {"sliding_window": 8}, WINDOW, llama_change),
    "Qwen2": Family("qwen2", "qwen2"),
    "Qwen2, YaRN": Family(
        "qwen2", "qwen2", rope("yarn", factor=4.0, original_max_position_embeddings=32),
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
    ),
    "Qwen3": Family("qwen3", "qwen3", {"head_dim": 32}, {"attention.key_length": 32}),
    "Gemma": Family("gemma", "gemma", {"head_dim": 32}, {"attention.key_length": 32}, norms_change),
    "Gemma 2": Family(
        "gemma2", "gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8},
        WINDOW | {"attention.key_length": 32, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        norms_change,
    ),
    "Gemma 3": Family(
        "gemma3", "gemma3_text",
        {
            "num_hidden_layers": 7, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
        WINDOW | LINEAR | {"attention.key_length": 32, "rope.freq_base": 1e6}, norms_change,
    ),
    "Phi-3": Family("phi3", "phi3", {"pad_token_id": 0, "sliding_window": 8}, WINDOW | {"rope.dimension_count": 16}),
    "Phi-3, partly rotary": Family(
        "phi3", "phi3", {"pad_token_id": 0, **rope(partial_rotary_factor=0.5)},
        {"attention.sliding_window": 0, "rope.dimension_count": 8},
    ),
    "Phi-3, long": Family(
        "phi3", "phi3",
        {
            "pad_token_id": 0, "original_max_position_embeddings": 8,
            **rope("longrope", long_factor=LONG, short_factor=SHORT),
        },
        {
            "rope.dimension_count": 16, "rope.scaling.original_context_length": 8,
            "rope.scaling.attn_factor": math.sqrt(1 + math.log(16) / math.log(8)),
        },
    ),
    "GPT-2": Family("gpt2", "gpt2", {"n_inner": 96, "bos_token_id": 0, "eos_token_id": 0}, {}, gpt2_change),
    "StableLM": Family(
        "stablelm", "stablelm", {"use_qkv_bias": True, **rope(partial_rotary_factor=0.25)}, {"rope.dimension_count": 4}
    ),
    "Nemotron": Family(
        "nemotron", "nemotron", rope(partial_rotary_factor=0.5), {"rope.dimension_count": 8}, norms_change
    ),
    "StarCoder2": Family("starcoder2", "starcoder2"),
    "Falcon": Family("falcon", "falcon", {"ffn_hidden_size": 96, "num_kv_heads": 1}, {}, falcon_change),
    "Falcon, new": Family(
        "falcon", "falcon", {"ffn_hidden_size": 96, "num_kv_heads": 2, "new_decoder_architecture": True}, {},
        falcon_change,
    ),
    "Bloom": Family("bloom", "bloom", {"n_layer": 2, "n_head": 4}, {}, bloom_change),
    "Mixtral": Family("llama", "mixtral", {"num_local_experts": 4, **rope()}, EXPERTS, llama_change),
    "Qwen2-MoE": Family(
        "qwen2moe", "qwen2_moe",
        {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
        },
        EXPERTS | {"expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 64},
    ),
    "Qwen3-MoE": Family(
        "qwen3moe", "qwen3_moe",
        {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32,
            "norm_topk_prob": True,
        },
        EXPERTS | {"expert_feed_forward_length": 32, "attention.key_length": 32},
    ),
    "LFM2": Family(
        "lfm2", "lfm2",
        {
            "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "conv_bias": False,
            "norm_eps": 1e-6, **rope(theta=1e6),
        },
        {
            "attention.head_count_kv": [0, 2], "attention.layer_norm_rms_epsilon": 1e-6, "shortconv.l_cache": 3,
            "rope.freq_base": 1e6,
        },
    ),
    "Mamba": Family(
        "mamba", "mamba", {"state_size": 8, "time_step_rank": 4},
        {
            "ssm.state_size": 8, "ssm.time_step_rank": 4, "ssm.inner_size": 96, "ssm.conv_kernel": 4,
            "attention.layer_norm_rms_epsilon": 1e-5,
        },
        mamba_change,
    ),
}  # fmt: skip
"""By name; each with something that a reader may lose."""
