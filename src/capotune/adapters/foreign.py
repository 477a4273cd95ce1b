"""An adapter folder that PEFT wrote: read and checked, as far as that goes without its base.

adapter_config.json          PEFT's configuration
adapter_model.safetensors    the trained weights
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from capotune.adapters.files import CONFIG, WEIGHTS, read_json, read_tensors, read_text
from capotune.data.wording import shorten
from capotune.errors import AdapterError, quoted
from capotune.methods.peft.parts import Parts, read_parts
from capotune.methods.peft.settings import PeftSettings
from capotune.models.hub import hub_name

_KINDS = {"LORA", "IA3", "TRAINABLE_TOKENS", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"}
_TASKS = {"CAUSAL_LM": "generation", "SEQ_CLS": "classification"}
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` under which PEFT leaves the base's weights as they are."""
_UNREAD = {
    "alora_invocation_tokens": "activated LoRA, which acts from some tokens on",
    "use_qalora": "QA-LoRA, which pools what its layers read",
    "target_parameters": "deltas of stacked parameters",
    "layer_replication": "layers that are there twice",
    "megatron_config": "layers of Megatron",
    "arrow_config": "Arrow, which chooses among adapters",
    "exclude_modules_during_inference": "layers that are left out in use",
    "kasa_config": "KaSA",
    "use_bdlora": "block-diagonal LoRA",
}
"""Settings that change what a forward pass computes and are not read, with what they are."""
_KNOWN = {
    "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "task_type",
    "r", "lora_alpha", "lora_dropout", "lora_bias", "target_modules", "exclude_modules", "fan_in_fan_out", "bias",
    "use_rslora", "use_dora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "trainable_token_indices", "token_indices", "ensure_weight_tying", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "megatron_core", "runtime_config", "qalora_group_size",
    "feedforward_modules", "init_ia3_weights", "init_weights", "num_virtual_tokens", "token_dim",
    "num_transformer_submodules", "num_attention_heads", "num_layers", "prompt_tuning_init", "prompt_tuning_init_text",
    "prompt_tuning_init_state_dict_path", "tokenizer_name_or_path", "tokenizer_kwargs",
    "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout", "modules_tied",
    "monteclora_config", "velora_config", "prefix_projection",
    *_UNREAD,
}  # fmt: skip


@dataclass(frozen=True)
class ForeignAdapter:
    """What the folder holds."""

    settings: PeftSettings
    tensors: dict[str, torch.Tensor]
    task: str
    base: str
    notices: list[str] = field(default_factory=list)


def is_foreign(folder: Path) -> bool:
    """Whether PEFT wrote the folder, and not this package, whose record may be lost."""
    text = read_text(folder, "README.md") or ""
    ours = "library_name: capotune" in text or "\n- capotune\n" in text  # a tag of the card
    return (folder / CONFIG).is_file() and not ours


def read_foreign(folder: Path) -> ForeignAdapter:
    """Read and check the folder. ``AdapterError`` says what cannot be used."""
    config = read_json(folder, CONFIG)
    notices = _check_config(folder, config)
    tensors = read_tensors(folder)
    if not tensors:
        raise AdapterError("it holds no tensor.", where=str(folder / WEIGHTS))
    try:
        parts = read_parts(config, tensors)
    except AdapterError as error:
        raise AdapterError(error.problem, where=str(folder), advice=error.advice) from None
    count, stored = config.get("num_virtual_tokens") or 0, 0 if parts.prompt is None else len(parts.prompt)
    if count != stored:
        raise AdapterError(
            f"adapter_config.json says {count} virtual tokens, and {stored} are stored.", where=str(folder)
        )
    notices += _notices(config, parts)
    task = _task(folder, config, parts, notices)
    base = config.get("base_model_name_or_path")
    named = base if isinstance(base, str) and base else ""
    revision = config.get("revision")
    if isinstance(revision, str) and hub_name(f"{named}@{revision}"):
        named = f"{named}@{revision}"
    return ForeignAdapter(PeftSettings(config=config), tensors, task, named, notices)


def _check_config(folder: Path, config: dict[str, Any]) -> list[str]:
    """``AdapterError`` for what is not read; else what is passed over, a sentence each."""
    where = str(folder / CONFIG)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise AdapterError(
            f"its peft_type is {quoted(kind)}, which is not read here.",
            where=where,
            advice=f"Read are: {', '.join(sorted(_KINDS))}.",
        )
    for name, what in _UNREAD.items():
        if config.get(name):
            raise AdapterError(
                f"{name} is set: {what}. That is not read here.", where=where, advice="Merge it in PEFT."
            )
    start = config.get("init_lora_weights")
    if kind == "LORA" and not any(start is one for one in _PLAIN_STARTS) and start not in _PLAIN_STARTS:
        raise AdapterError(
            f"init_lora_weights is {quoted(start)}: PEFT changed the base's weights at the start of training, and this "
            "adapter belongs to the changed ones.",
            where=where,
            advice="Save it in PEFT with path_initial_model_for_weight_conversion, which makes plain LoRA of it.",
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise AdapterError(f"{name} is no object.", where=where)
    count = config.get("num_virtual_tokens")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise AdapterError(f"num_virtual_tokens is {quoted(count)}.", where=where)
    unknown = sorted(
        name for name, value in config.items() if name not in _KNOWN and value not in (None, False, {}, [])
    )
    return (
        [f"adapter_config.json says {', '.join(map(quoted, unknown))}, which is not known and passed over."]
        if unknown
        else []
    )


def _notices(config: dict[str, Any], parts: Parts) -> list[str]:
    """What is passed over: layers that the configuration names and no tensor trains, and copies of the base's own."""
    notices = []
    targets = config.get("target_modules")
    named = [one for one in targets if isinstance(one, str)] if isinstance(targets, list) else []
    touched = {path.rpartition(".")[0] for path in parts.paths()}
    absent = [one for one in named if not any(path == one or path.endswith(f".{one}") for path in touched)]
    if absent:
        notices.append(f"adapter_config.json names {shorten(absent)}; no tensor of it is stored.")
    if parts.copies:
        notices.append(
            f"the adapter stores {shorten(sorted(parts.copies), 3)}, a copy of the base's own, which is not read."
        )
    return notices


def _task(folder: Path, config: dict[str, Any], parts: Parts, notices: list[str]) -> str:
    stated = config.get("task_type")
    if isinstance(stated, str) and stated in _TASKS:
        return _TASKS[stated]
    if stated is not None and stated != "FEATURE_EXTRACTION":
        raise AdapterError(
            f"its task_type is {quoted(stated)}, which is not read here.",
            where=str(folder / CONFIG),
            advice=f"Read are: {', '.join(_TASKS)}.",
        )
    has_head = any(path.partition(".")[0] in ("score", "classifier") for path in parts.replaced)
    task = "classification" if has_head else "generation"
    notices.append(f"adapter_config.json names no task; by its tensors it is {task}.")
    return task
