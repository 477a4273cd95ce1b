"""Tiny random models of the families that the installed Transformers knows, each with a tokenizer made on the spot.

A family's configuration class is shrunk by the names of its fields: widths, layers, heads, experts, states, vocabulary.
What a family needs beside that stands in ``OVERRIDES``; ``VARIANTS`` are further shapes of a family.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 400
LAYERS = 3
POSITIONS = 96
TEXT = """The keeper wrote down the weather every morning, and the names of the ships that passed the island.
One winter the boat did not come for six weeks, so he mended the old sail and went to the village himself.
How do I change the address on my order? I moved last week and the parcel has not been sent yet.
My invoice shows two payments. Please send the money back to my card as soon as you can.
In 1969 two people walked on the Moon; about 600 million watched it on television."""

# The first rule whose expression matches a field's whole name decides; a smaller default stays.
RULES: list[tuple[str, int]] = [
    (r".*vocab_size(_per_layer_input)?|n_tokens|vocab_size_.*", VOCABULARY),
    (r"(num_)?hidden_layers|num_layers|n_layers?|(en|de)coder_layers|num_(en|de)coder_layers|layers|depth", LAYERS),
    (r"(mamba_)?d_head|dim_head", 16),
    (r".*(num_)?(key_value|kv)_heads", 2),
    (r"(.*_)?(num_|n_)?(attention_|self_attention_|cross_attention_)?heads?", 4),
    (
        r"(sliding|attention|local|chunk)_?window(_size|_len)?|sliding_window_size|local_attention|attention_chunk_size",
        16,
    ),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length|max_.*positions?",
        POSITIONS,
    ),
    (r"context_length|max_position|seq_len|max_seqlen|model_max_length|max_target_positions", POSITIONS),
    (r"(num|n)_(local|routed|total)?_?experts|.*num_experts|moe_num_experts|num_local_experts|ffn_num_experts", 4),
    (r"(num_)?experts_per_tok(en)?|moe_(k|topk|top_k)|top_k_experts|num_selected_experts|num_experts_per_token", 2),
    (r"n_group|topk_group|first_k_dense_replace|moe_layer_start_index", 1),
    (r"(embedding_size|embed_size|word_embed_proj_dim|emb_size|embed_proj_dim)", 32),
    (r"(q|kv|o|qk)_lora_rank|.*_rank|.*lowrank", 16),
    (r"qk_(rope|nope)_head_dim|index_head_dim|rotary_dim", 8),
    (r"(linear_|v_|mamba_|attn_|global_|swa_|cross_)?(key_|value_)?(head_dim|d_head|dim_head|kv_channels|d_kv)", 16),
    (r"attention_head_size|head_size|kv_channels|key_size|value_size|.*head_dim|mamba_d_head", 16),
    (r"(moe_|shared_|expert_).*(intermediate|ffn|hidden).*(size|dim)|.*expert.*_(size|dim)", 32),
    (r"(ssm_)?state_size|(mamba_)?d_state|mamba_d_state|time_step_rank", 8),
    (r".*chunk_size|.*chunk_length|block_size|.*_block_size|sliding_window_pattern", 16),
    (r"n_groups|mamba_n_groups|ssm_n_groups", 1),
    (r"index_topk|num_buckets|position_buckets|relative_attention_num_buckets", 8),
    (
        r".*(intermediate|ffn|feed_forward|inner|mlp|ff)_?(size|dim|hidden_size)|d_ff|dim_ff|d_inner|n_inner|dff|hidden_dim",
        128,
    ),
    (r"(hidden|d|embed|embd|emb|model|width|text|decoder|encoder|lru|bottleneck)_?(size|model|dim|width)", 64),
    (
        r"attention_hidden_size|n_embd|dim|d_model|(vision_|projector_)?(projection|output|input)_dim|"
        r"hidden_size_per_layer_input|lru_width|mamba_d_ssm",
        64,
    ),
    (r"image_size|num_channels_out|max_2d_position_embeddings|num_mel_bins", 28),
]
IDS = {"pad": 0, "bos": 1, "eos": 2, "unk": 3, "mask": 4, "cls": 1, "sep": 2, "decoder_start": 1}

_SECTIONS = {
    "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": "auto", "mamba_n_groups": 1}
OVERRIDES: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 128},
    "granitemoehybrid": {**_MAMBA2, "layer_types": ["mamba", "attention", "mamba"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "n_mamba_heads": 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba"], "use_mamba_kernels": False},
    "reformer": {
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [8, 12],
        "attn_layers": ["local", "lsh", "local"],
        "vocab_size": VOCABULARY,
    },
    "squeezebert": {"embedding_size": 64},
    "mpnet": {"relative_attention_num_buckets": 32},
    "xlstm": {"embedding_dim": 64, "qk_dim_factor": 1.0, "num_blocks": 3},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "qwen2_vl": _SECTIONS,
    "qwen2_5_vl": _SECTIONS,
    "longcat_flash": {"head_dim": 8},
    "hrm_text": {"num_layers_per_stack": 1, "H_cycles": 1, "L_cycles": 1, "num_hidden_layers": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0},
    "esmc": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
    },
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1},
}
WRAPPERS = (
    "gemma3",
    "gemma4",
    "idefics3",
    "internvl",
    "llama4",
    "llava",
    "mistral3",
    "paligemma",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_vl",
    "smolvlm",
)
"""Families whose text part is described under ``text_config``."""
_SHORT_ROPE = {"rope_theta": 10_000.0, "original_max_position_embeddings": 24}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-rope-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama-rope-dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, **_SHORT_ROPE}, "max_position_embeddings": 96},
    ),
    "llama-rope-yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **_SHORT_ROPE}}),
    "llama-rope-llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_SHORT_ROPE,
            }
        },
    ),
    "phi3-longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 24,
            "rope_parameters": {
                "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [3.0] * 8, **_SHORT_ROPE,
            },
        },
    ),
    "opt-narrow-embedding": ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "falcon-alibi": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "num_kv_heads": 4}),
    "falcon-new-decoder": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "mistral-window": ("mistral", {"sliding_window": 16}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
}  # fmt: skip


def families() -> dict[str, str]:
    """Each family's model type, and what it is listed as: ``causal``, ``encoder``, ``encoder-decoder``, ``wrapper``."""
    found: dict[str, str] = {}
    for name in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        found[name] = "encoder-decoder"
    for name in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        found.setdefault(name, "encoder")
    for name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        found.setdefault(name, "causal")
    found |= dict.fromkeys(WRAPPERS, "wrapper")
    return {name: found[name] for name in sorted(found)} | dict.fromkeys(VARIANTS, "variant")


def tiny_config(family: str) -> Any:
    """A small configuration of the family or variant."""
    model_type, extra = VARIANTS.get(family, (family, {}))
    return shrunk(CONFIG_MAPPING[model_type], {**OVERRIDES.get(model_type, {}), **extra})


def shrunk(cls: type, fixed: dict[str, Any]) -> Any:
    """An instance of the configuration class with small values; ``fixed`` ones are as given."""
    default = cls()
    values: dict[str, Any] = {}
    for name in _fields(cls):
        value = vars(default).get(name)
        if name in cls.sub_configs:
            values[name] = None if value is None else shrunk(type(value), fixed.get(name, {}))
        elif isinstance(value, int) and not isinstance(value, bool):
            values[name] = _small(name, value)
    if "kv_lora_rank" in values and "num_key_value_heads" in values:  # latent attention shares no heads
        values["num_key_value_heads"] = values["num_attention_heads"]
    count = fixed.get(_layers_field(values), LAYERS)
    for name in _fields(cls):
        value = vars(default).get(name)
        per_layer = isinstance(value, list | tuple) and len(value) == _layers(default) and name not in fixed
        if per_layer and not name.endswith("_config"):
            kinds = list(dict.fromkeys(_small(name, one) if type(one) is int else one for one in value))
            count = max(count, len(kinds)) if len(kinds) <= 4 else count
            values[name] = (kinds * count)[:count]
    values |= {name: count for name in values if name == _layers_field(values)}
    lists = {name: (value * count)[:count] for name, value in values.items() if isinstance(value, list)}
    return cls(**{**values, **lists, **{name: value for name, value in fixed.items() if name not in cls.sub_configs}})


def _fields(cls: type) -> Iterator[str]:
    skipped = {"id2label", "label2id", "num_labels", "problem_type", "architectures", "transformers_version"}
    own = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    return (field.name for field in dataclasses.fields(cls) if field.name not in skipped | (own - _SPECIAL))


_SPECIAL = {"pad_token_id", "bos_token_id", "eos_token_id", "vocab_size"}


def _small(name: str, value: int) -> int:
    if token := re.fullmatch(r"(\w+?)_(token_id|token_index|index|id)", name):
        return IDS.get(token.group(1), min(value, 5))
    for expression, most in RULES:
        if re.fullmatch(expression, name):
            return min(value, most)
    return value


def _layers_field(values: dict[str, Any]) -> str:
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "layers")
    return next((name for name in names if name in values), "")


def _layers(config: Any) -> int:
    return int(getattr(config, "num_hidden_layers", 0) or 0)


def make(family: str, folder: Path) -> Any:
    """Save a tiny model of the family with random weights and its tokenizer; returns its configuration.

    Raises whatever Transformers raises where the family cannot be made small so.
    """
    config = tiny_config(family)
    torch.manual_seed(0)
    with torch.device("meta"):
        empty = _model_class(config).from_config(config)
    if sum(weight.numel() for weight in empty.parameters()) > 4_000_000:
        raise ValueError("not small: " + ", ".join(_largest(empty)))
    model = spread(_model_class(config).from_config(tiny_config(family)))
    model.save_pretrained(folder)
    reads_both_ways = type(config) in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING
    tokenizer(getattr(config.get_text_config(), "pad_token_id", None) == 1, marks=reads_both_ways).save_pretrained(
        folder
    )
    return config


def _model_class(config: Any) -> Any:
    for auto, mapping in (
        (transformers.AutoModelForSeq2SeqLM, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
        (transformers.AutoModel, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING),
        (transformers.AutoModelForImageTextToText, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
        (transformers.AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING),
    ):
        if type(config) in mapping:
            return auto
    return transformers.AutoModel


def _largest(model: Any) -> list[str]:
    named = sorted(model.named_parameters(), key=lambda one: -one[1].numel())[:4]
    return [f"{name} {tuple(weight.shape)}" for name, weight in named]


@torch.no_grad()
def spread(model: Any) -> Any:
    """Random weights large enough that differences show; those that hold rates of a recurrence stay near their own."""
    generator = torch.Generator().manual_seed(7)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        if weight.dim() < 2 or re.search(r"A_log|decay|dt_|\bD\b|time_", name):
            weight.add_(noise, alpha=0.05)
        else:
            weight.copy_(noise * (0.3 if re.search("emb|wte", name) else 0.08))
    return model.eval()


def tokenizer(pad_is_one: bool, marks: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE without a stated longest input; with ``marks`` a text stands between two special tokens."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if pad_is_one else ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 20, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXT.splitlines(), trainer)
    if marks:
        ids = [(token, special.index(token)) for token in ("<s>", "</s>")]
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=ids
        )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    of_encoder = {"mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"} if marks else {}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names, **of_encoder)
