"""Adapters of PEFT's kinds on small random models: made by PEFT and read here, made here and read by PEFT.

``scripts/adapter_matrix.py`` runs all of it into docs/adapters.md; ``test_peft_adapters.py`` a part.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import generation_helpers
import helpers
import peft
import torch
from generation_helpers import make_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn

import capotune
from capotune.adapters.store import save_adapter
from capotune.data.batches import TokenRows
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.methods.qlora.settings import QloraSettings
from capotune.settings import TrainingSettings

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
    bare: bool = False
    """Whether the tensors are renamed as loralib calls them: parameters of the layer itself."""


_PROMPTS = ("PromptTuningConfig", "PromptEncoderConfig")
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
    "embedding, DoRA": Feature(options={**LORA, "use_dora": True}, embedding=True),
    "loralib's names": Feature(options=LORA, embedding=True, bare=True),
    "trained tokens": Feature(options=LORA, tokens=True),
    "trained tokens alone": Feature(kind="TrainableTokensConfig"),
    "IA3": Feature(kind="IA3Config"),
    "prompt": Feature(kind="PromptTuningConfig", options={"num_virtual_tokens": 3}),
    "p-tuning": Feature(kind="PromptEncoderConfig", options={"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
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
    if feature.kind in _PROMPTS:
        width = model.get_input_embeddings().weight.shape[1]  # type: ignore[union-attr,operator]
        sizes = {"token_dim": width, "num_layers": 2, "num_attention_heads": 4}
        return getattr(peft, feature.kind)(task_type=task_type, **sizes, **options)
    if feature.kind == "TrainableTokensConfig":
        last = names["embedding"].rpartition(".")[2]
        return peft.TrainableTokensConfig(task_type=task_type, target_modules=[last], token_indices=[7, 40, 41])
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
    if task_type == "SEQ_CLS" and feature.kind not in _PROMPTS:
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
    if feature.bare:
        _rename_as_loralib(folder / "adapter_model.safetensors")
    return made


def _rename_as_loralib(path: Path) -> None:
    bare = {key.removeprefix("base_model.model."): tensor for key, tensor in load_file(path).items()}
    for key in [key for key in bare if ".lora_" in key]:
        bare[key.removesuffix(".weight").replace(".lora_embedding_", ".lora_")] = bare.pop(key)
    save_file(bare, path)


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


# ------------------------------------------------------------------------------------------ made here, read by PEFT

PROMPT: dict[str, Any] = {"num_virtual_tokens": 3, "init": "vocabulary", "learning_rate": 0.1, "epochs": 1}
TRAINED_HERE: dict[str, TrainingSettings] = {
    "LoRA": LoraSettings(rank=4, alpha=6),
    "rsLoRA": LoraSettings(rank=4, alpha=6, rslora=True),
    "DoRA": LoraSettings(rank=4, alpha=6, dora=True),
    "one layer": LoraSettings(rank=4, alpha=6, layers=(1,)),
    "QLoRA": QloraSettings(rank=4, alpha=6),
    "prompt": PromptTuningSettings(deep=False, **PROMPT),
    "prefix": PromptTuningSettings(deep=True, **PROMPT),
}


def read_there(base: Path, folder: Path, settings: TrainingSettings, task_type: str) -> float:
    """Made here, its weights moved from where they start, read by PEFT.

    For labels PEFT reads it on ``capotune.load_base``, which has our head, and a base in 4 bits too; else on
    Transformers' own model.
    """
    place = generation_helpers.on_base if task_type == "CAUSAL_LM" else helpers.on_base
    assembled = place(base, settings)
    helpers.shake(assembled)
    save_adapter(folder, assembled, helpers.TRAINED | {"scores": {}})
    on_ours = task_type == "SEQ_CLS" or isinstance(settings, QloraSettings)
    model: Any = capotune.load_base(folder) if on_ours else load_plain(base, task_type)
    made = peft.PeftModel.from_pretrained(model, folder).eval()
    return difference(made, capotune.load(folder), task_type)


# ----------------------------------------------------------------------------------------------------------- the matrix

MADE_BY_PEFT, MADE_HERE = "made by PEFT, read here", "made here, read by PEFT"
_NO_PREFIX = "PEFT puts prefixes only into models that take `past_key_values`, which this one does not."


@dataclass(frozen=True)
class Cell:
    """One adapter on one model."""

    direction: str
    task_type: str
    feature: str
    family: str

    @property
    def reason(self) -> str | None:
        """Why there is no such adapter; None where there is."""
        if self.feature == "prefix" and self.family in ("DistilBERT", "DeBERTa-v3", "ModernBERT"):
            return _NO_PREFIX
        if self.feature == "trained tokens alone" and self.task_type == "SEQ_CLS":
            return "PEFT stores no head beside them."
        lost = self.feature in ("prompt", "p-tuning") and self.direction == MADE_BY_PEFT
        if lost and self.family == "DeBERTa-v3":
            return (
                "Refused: PEFT stores no pooler with a soft prompt, and no pretrained DeBERTa has one, so what it was "
                "trained with is lost."
            )
        return None

    def measure(self, base: Path, folder: Path) -> float:
        """The largest difference (``difference``), with the adapter written into ``folder``."""
        if self.direction == MADE_BY_PEFT:
            return read_here(base, folder, FEATURES[self.feature], self.task_type)
        return read_there(base, folder, TRAINED_HERE[self.feature], self.task_type)


def cells() -> list[Cell]:
    """Architecture × feature × task × direction; encoders write no text."""
    return [
        Cell(direction, task_type, feature, family)
        for direction, features in ((MADE_BY_PEFT, FEATURES), (MADE_HERE, TRAINED_HERE))
        for task_type in ("CAUSAL_LM", "SEQ_CLS")
        for feature in features
        for family in FAMILIES
        if task_type == "SEQ_CLS" or family not in ENCODERS
    ]
