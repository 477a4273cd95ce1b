"""Adapters of PEFT's kinds on small random models: made by PEFT and read here, made here and read by PEFT.

``scripts/adapter_matrix.py`` runs all of it into docs/adapters.md; ``test_peft_adapters.py`` a part.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from generation_helpers import make_tokenizer
from torch import nn

import capotune
from capotune.data.batches import TokenRows

SIZES: dict[str, Any] = {"vocab_size": 360, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 0}
BLOCKS: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 96,
}  # fmt: skip
GROUPED = {**BLOCKS, "num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("BertConfig", BLOCKS),
    "DistilBERT": (
        "DistilBertConfig",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 96},
    ),
    "RoBERTa": ("RobertaConfig", {**BLOCKS, "max_position_embeddings": 98}),
    "DeBERTa-v3": (
        "DebertaV2Config",
        {**BLOCKS, "relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"],
         "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_buckets": 16},
    ),
    "ModernBERT": ("ModernBertConfig", {**BLOCKS, "cls_token_id": 2, "sep_token_id": 3, "local_attention": 8}),
    "GPT-2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}),
    "Llama": ("LlamaConfig", GROUPED),
    "Qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8, "tie_word_embeddings": True}),
    "Gemma 3": ("Gemma3TextConfig", {**GROUPED, "head_dim": 8, "sliding_window": 8}),
    "Phi-3": ("Phi3Config", GROUPED),
}  # fmt: skip
ENCODERS = ("BERT", "DistilBERT", "RoBERTa", "DeBERTa-v3", "ModernBERT")
TEXTS = [
    "What colour is grass?",
    "What colour is snow?",
    "now",
    "Once upon a time there was a parcel",
    "please tell me, my friend",
]


def make_base(family: str, folder: Path) -> Path:
    """The family's model with random weights, as Transformers saves it; encoders without a classifier's head."""
    import transformers

    name, sizes = FAMILIES[family]
    config = getattr(transformers, name)(**SIZES, **sizes, initializer_range=0.1)
    if folder.exists():
        return folder
    torch.manual_seed(0)
    auto = transformers.AutoModelForMaskedLM if family in ENCODERS else transformers.AutoModelForCausalLM
    if family == "BERT":  # whose published models hold a pooler
        auto = transformers.AutoModelForPreTraining
    model = auto.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Feature:
    """A kind of adapter, by what PEFT's configuration says."""

    kind: str = "LoraConfig"
    options: dict[str, Any] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    """``modules_to_save`` by what they are: embedding, output, norm."""
    embedding: bool = False
    """Whether the embedding is among the targets."""
    tokens: bool = False
    """Whether some tokens' rows are trained."""


LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6}
FEATURES = {
    "LoRA": Feature(options=LORA),
    "rsLoRA": Feature(options={**LORA, "use_rslora": True}),
    "DoRA": Feature(options={**LORA, "use_dora": True}),
    "patterns": Feature(options={**LORA, "rank_pattern": {"0": 2}, "alpha_pattern": {"1": 3}}),
    "one layer": Feature(options={**LORA, "layers_to_transform": [1]}),
    "bias all": Feature(options={**LORA, "bias": "all"}),
    "bias lora_only": Feature(options={**LORA, "bias": "lora_only"}),
    "bias of B": Feature(options={**LORA, "lora_bias": True}),
    "modules_to_save": Feature(options=LORA, whole=("embedding", "norm", "output")),
    "embedding": Feature(options=LORA, embedding=True),
    "trained tokens": Feature(options=LORA, tokens=True),
    "IA3": Feature(kind="IA3Config"),
    "prompt": Feature(kind="PromptTuningConfig", options={"num_virtual_tokens": 3}),
    "prefix": Feature(kind="PrefixTuningConfig", options={"num_virtual_tokens": 3}),
}


def names_of(model: nn.Module) -> dict[str, Any]:
    """What a model calls its parts: linear layers inside the blocks, the second of them, embedding, output, a norm."""
    from transformers.pytorch_utils import Conv1D

    backbone: Any = model.base_model  # type: ignore[union-attr]
    names = {part: path for path, part in model.named_modules()}
    linear = [path for path, part in model.named_modules() if isinstance(part, nn.Linear | Conv1D)]
    head = ("classifier", "score", "lm_head", "pre_classifier", "decoder", "pooler")
    inner = [path for path in linear if path.startswith(names[backbone]) and not any(one in path for one in head)]
    output: Any = model.get_output_embeddings()  # type: ignore[union-attr,operator]
    norms = [path for path, part in model.named_modules() if "Norm" in type(part).__name__]
    return {
        "linears": inner, "embedding": names[backbone.get_input_embeddings()], "norm": norms[-1],
        "output": None if output is None else names[output],
    }  # fmt: skip


def peft_config(feature: Feature, model: nn.Module, task_type: str) -> Any:
    """The configuration for this model."""
    names, options = names_of(model), dict(feature.options)
    last = sorted({path.rpartition(".")[2] for path in names["linears"]})
    if feature.kind == "PromptTuningConfig":
        width = model.get_input_embeddings().weight.shape[1]  # type: ignore[union-attr,operator]
        sizes = {"token_dim": width, "num_layers": 2, "num_attention_heads": 4}
        return peft.PromptTuningConfig(task_type=task_type, **sizes, **options)
    if feature.kind == "PrefixTuningConfig":
        return peft.PrefixTuningConfig(task_type=task_type, num_layers=2, **options)
    if feature.kind == "IA3Config":
        inner = names["linears"]
        return peft.IA3Config(task_type=task_type, target_modules=inner, feedforward_modules=inner[-2:])
    targets = names["linears"] if any("." in one for one in last) or task_type == "SEQ_CLS" else last
    for name in ("rank_pattern", "alpha_pattern"):
        if name in options:
            options[name] = {
                names["linears"][int(at)].replace(".", r"\."): value for at, value in options[name].items()
            }
    if "layers_to_transform" in options:
        targets = last
    if feature.embedding:
        targets = [*targets, names["embedding"]]
    if feature.whole:
        options["modules_to_save"] = [names[one] for one in feature.whole if names[one]]
    if feature.tokens:
        options["trainable_token_indices"] = {names["embedding"].rpartition(".")[2]: [7, 40, 41]}
    return peft.LoraConfig(task_type=task_type, target_modules=targets, **options)


def load_plain(base: Path, task_type: str) -> Any:
    """Transformers' own model; a head that the base lacks starts from a fixed seed, here as in PEFT's copy."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.manual_seed(3)
    if task_type == "CAUSAL_LM":
        return AutoModelForCausalLM.from_pretrained(base).eval()
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).eval()


def make_adapter(base: Path, folder: Path, feature: Feature, task_type: str) -> Any:
    """An adapter that PEFT writes, its weights moved from where they start; PEFT's model with it."""
    model = load_plain(base, task_type)
    config = peft_config(feature, model, task_type)
    if task_type == "SEQ_CLS" and feature.kind != "PromptTuningConfig":
        brought = [name for name in ("pre_classifier", "pooler") if hasattr(model, name)]
        config.modules_to_save = [*(config.modules_to_save or ()), *brought] or None
    made = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.save_pretrained(folder)
    return made


@torch.no_grad()
def difference(made: Any, loaded: Any, task_type: str) -> float:
    """Largest difference of PEFT's logits and ours, in shares of the largest logit where that is above 1.

    PEFT reads texts one at a time, a classifier here all at once.
    """
    ids = [loaded.tokenizer(text)["input_ids"] for text in TEXTS]
    virtual = list(loaded.method.virtual_token_ids)
    if task_type == "SEQ_CLS":
        task = loaded._assembled.task
        found = list(task.logits(loaded._assembled, TokenRows(ids, task.pad_id, virtual)))
    else:
        found = [loaded.model(input_ids=torch.tensor([[*virtual, *row]])).logits[0, len(virtual) :] for row in ids]
    worst = 0.0
    for row, ours in zip(ids, found, strict=True):
        given = torch.tensor([row])
        theirs = made(input_ids=given, attention_mask=torch.ones_like(given)).logits[0]
        theirs = theirs if task_type == "SEQ_CLS" else theirs[-len(row) :]
        worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1)))
    return worst


def read_here(base: Path, folder: Path, feature: Feature, task_type: str) -> float:
    """Made by PEFT, read here."""
    made = make_adapter(base, folder, feature, task_type)
    return difference(made, capotune.load(folder, model=str(base)), task_type)
