"""Packed batches: which models can read them, that they read them as they do one by one, and that nothing stays."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import generation_helpers as writing
import numpy as np
import pytest
import torch
import transformers
from helpers import accumulate, examples, fit, on_base, predict_logits, sequences, shake
from test_contract import VARIANTS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from torch.nn import functional

import capotune
from capotune.adapters.assemble import Assembled
from capotune.data.batches import IGNORE_INDEX, Batch, TokenRows, collate, epoch_order, parts_of, sorted_order
from capotune.engine import loop as loop_module
from capotune.engine.activation_cache import ActivationCache
from capotune.errors import DataError
from capotune.evaluation.boundary import compute_boundary
from capotune.evaluation.forward import Examples, held_out_score, outputs
from capotune.evaluation.generate import generate
from capotune.kernels import prefix
from capotune.kernels.attention import Sequences
from capotune.methods.feature_extraction.settings import FeatureExtractionSettings
from capotune.models.base import Base, Pooling
from capotune.models.prefix import PREFIXED
from capotune.models.sequence_packing import Packing, packed, probe_sequences, relative_error, try_packing
from capotune.settings import DecodingSettings, TrainingSettings
from capotune.tasks.classification import Classification
from capotune.tasks.text_targets.features import compute_features

PADDED = Packing(None, "for this test")
SMALL: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
WINDOW = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}

PACKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("LlamaConfig", GROUPED, 0),
    "qwen2": ("Qwen2Config", GROUPED, 0),
    "qwen2-window": ("Qwen2Config", {**GROUPED, "use_sliding_window": True, **WINDOW}, 0),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 16}, 0),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 6}, 0),
    "gemma3": (
        "Gemma3TextConfig",
        {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 20, **WINDOW},
        0,
    ),
    "phi3": ("Phi3Config", {**GROUPED, "sliding_window": 6}, 0),
    "gpt-neox": ("GPTNeoXConfig", SMALL, 0),
    "opt": (
        "OPTConfig",
        {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "activation_dropout": 0.1},
        0,
    ),
    "olmo2": ("Olmo2Config", GROUPED, 0),
    "granite": ("GraniteConfig", {**GROUPED, "attention_multiplier": 0.1, "logits_scaling": 3.0}, 0),
    "gpt2": ("GPT2Config", GPT2, 0),
    "bert": ("BertConfig", SMALL, 0),
    "roberta": ("RobertaConfig", SMALL, 2),
    "xlm-r": ("XLMRobertaConfig", SMALL, 2),
    "electra": ("ElectraConfig", {**SMALL, "embedding_size": 24}, 0),
    "distilbert": ("DistilBertConfig", SMALL, 0),
    "albert": ("AlbertConfig", {**SMALL, "embedding_size": 24}, 0),
    "modernbert": ("ModernBertConfig", {**SMALL, "local_attention": 8, "global_attn_every_n_layers": 2}, 0),
}
"""Configuration, its values, and the position of a sequence's first token."""
WRITE = ["llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "gpt-neox", "opt", "olmo2", "granite", "gpt2"]
IS_EAGER = "the model's attention is eager"
PADS: dict[str, tuple[str, dict[str, Any], str]] = {
    "mamba": ("MambaConfig", SMALL, rf"the model has layers of other kinds \(linear_attention\)|{IS_EAGER}"),
    "bloom": ("BloomConfig", {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4}, IS_EAGER),
    "falcon": (
        "FalconConfig",
        {**SMALL, "alibi": True},
        r"the model's code does not take packed sequences \(.+\)",
    ),
    "deberta-v2": ("DebertaV2Config", {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, IS_EAGER),
    "mpnet": ("MPNetConfig", SMALL, IS_EAGER),
    "gemma2": (
        "Gemma2Config",
        {**GROUPED, "head_dim": 8, "sliding_window": 6},
        rf"{IS_EAGER}|the model's code does not take packed sequences \(its attention asks for softcap\)",
    ),
    "gpt-oss": (
        "GptOssConfig",
        {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
        IS_EAGER,
    ),
}
"""Configuration, its values, and why it is padded; the second reason is that of Transformers 5.3."""
LENGTHS = [1, 1, 5, 5, 5, 17, 30, 2, 60, 60, 11]
"""Of the sequences that are read: together many more than positions, some longer than an attention window."""


def spread(model: Any) -> Any:
    """Weights so large that every token matters to the others, biases and norms not as they are made."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(0.2 * noise if weight.dim() > 1 else weight + 0.1 * noise)
    return model.requires_grad_(False).eval()


def made(config: str, values: dict[str, Any], auto_class: str = "AutoModel", **more: Any) -> Any:
    """A model with random weights, as ``load`` leaves it."""
    configuration = getattr(transformers, config)(**values, **more)
    configuration.use_cache = False
    model = getattr(transformers, auto_class).from_config(configuration)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return spread(model)


@cache
def family(name: str) -> Any:
    return made(*({**PACKS, **PADS}[name][:2]))


@cache
def rows_to_read() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(4, 50, (length,), generator=generator).tolist() for length in LENGTHS]


def batch_of(packing: Packing) -> Batch:
    return collate(rows_to_read(), np.arange(len(LENGTHS)), 1, first_position=packing.first_position)


def read(model: Any, packing: Packing, what: str = "hidden_states") -> torch.Tensor:
    """Flat states of every layer, (layers, tokens, hidden), or logits (tokens, words)."""
    batch = batch_of(packing)
    with packed(model.base_model, packing):
        out = model(**batch.inputs, **({"output_hidden_states": True} if what == "hidden_states" else {}))
    return torch.stack([batch.flat(states) for states in (out[what] if what == "hidden_states" else [out[what]])])


def read_alone(model: Any) -> torch.Tensor:
    """The same, one sequence after the other, as anyone would."""
    each = [model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in rows_to_read()]
    return torch.stack([torch.cat([states[0] for states in layer]) for layer in zip(*each, strict=True)])


def names_of_attention(model: nn.Module) -> set[str]:
    return {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}


# --------------------------------------------------------------------------------------------------------- which can


@torch.no_grad()
@pytest.mark.parametrize("name", PACKS)
def test_packed_outputs_match_one_by_one(name: str) -> None:
    model = family(name)
    packing = try_packing(model)
    assert packing == Packing(PACKS[name][2])
    alone = read_alone(model)
    torch.testing.assert_close(read(model, packing), alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read(model, PADDED), alone, rtol=1e-5, atol=1e-5)
    assert names_of_attention(model) == {"sdpa"}


@torch.no_grad()
@pytest.mark.parametrize("name", PACKS)
def test_trial_notices_a_difference(name: str) -> None:
    """Tokens of a sequence matter to each other, and its neighbours would matter if they were seen."""
    model, ids = family(name), rows_to_read()[8] + rows_to_read()[9]
    both = model(input_ids=torch.tensor([ids[30:90]])).last_hidden_state[0, 30:]
    alone = model(input_ids=torch.tensor([ids[60:90]])).last_hidden_state[0]
    assert (both - alone).abs().max() > 0.05
    other = model(input_ids=torch.tensor([[4 + ids[60] % 40, *ids[61:90]]])).last_hidden_state[0]
    assert (other - alone)[1:].abs().max() > 0.05


@pytest.mark.parametrize("name", PACKS)
def test_packed_gradients_match_padded(name: str) -> None:
    model = copy.deepcopy(family(name)).requires_grad_(True)
    found: list[dict[str, torch.Tensor]] = []
    for packing in (try_packing(model), PADDED):
        model.zero_grad()
        batch = batch_of(packing)
        with packed(model, packing):
            states = batch.flat(model(**batch.inputs).last_hidden_state)
            (states * torch.linspace(-1, 1, states.numel()).view(states.shape)).sum().backward()
        found.append({key: weight.grad for key, weight in model.named_parameters() if weight.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 10
    for key, one in found[0].items():
        largest = float(found[1][key].abs().max())
        torch.testing.assert_close(one, found[1][key], rtol=0, atol=2e-5 * max(largest, 1.0), msg=key)


@torch.no_grad()
@pytest.mark.parametrize("name", WRITE)
def test_logits(name: str) -> None:
    """Through the language model's own class, whatever it does to its logits."""
    model = made(*PACKS[name][:2], auto_class="AutoModelForCausalLM")
    packing = try_packing(model.base_model)
    assert packing.first_position == 0
    found, expected = read(model, packing, "logits"), read(model, PADDED, "logits")
    assert float(expected.std()) > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", PADS)
def test_other_models_are_padded(name: str) -> None:
    model, why = family(name), PADS[name][2]
    packing = try_packing(model)
    assert packing.first_position is None
    assert packing.why_not is not None
    assert packing.described == f"padded: {packing.why_not}"
    assert re.fullmatch(why, packing.why_not)
    alone = read_alone(model)
    torch.testing.assert_close(read(model, packing), alone, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ what the trial finds


def llama(**values: Any) -> Any:
    return made("LlamaConfig", GROUPED, **values)


class Changed(nn.Module):
    """A block whose input is changed first."""

    def __init__(self, block: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.block, self.change = block, change

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        changed: torch.Tensor = self.block(self.change(hidden_states), *args, **kwargs)
        return changed


def before_the_last_block(change: Callable[[torch.Tensor], torch.Tensor], model: Any = None) -> Any:
    model = model or llama()
    model.layers[1] = Changed(model.layers[1], change)
    return model


MIXES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "first token": lambda states: states + states[:, :1],
    "mean": lambda states: states + states.mean(1, keepdim=True),
    "token before": lambda states: states + torch.roll(states, 1, 1),
    "sum so far": lambda states: states.cumsum(1),
    "own positions": lambda states: states + torch.arange(states.shape[1])[:, None] / 10,
    "turned round": lambda states: states.flip(1),
}
"""What a model might do to its states besides attention, which knows nothing of sequences."""


@pytest.mark.parametrize("name", MIXES)
def test_a_model_that_mixes_tokens_is_padded(name: str) -> None:
    model = before_the_last_block(MIXES[name])
    packing = try_packing(model)
    assert packing.first_position is None
    assert "packed, the model computes something else (by " in packing.described
    assert names_of_attention(model) == {"sdpa"}


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [
        (torch.float32, 1.0),
        (torch.float32, 300.0),
        (torch.bfloat16, 1.0),
        (torch.bfloat16, 30.0),
    ],
)
def test_few_huge_values_do_not_prevent_packing(dtype: torch.dtype, largest: float) -> None:
    """Trained models have dimensions whose numbers are hundreds of times the others'."""
    model = before_the_last_block(MIXES["token before"])
    with torch.no_grad():
        model.embed_tokens.weight[:, 3] += largest
        model.norm.weight[3] = largest
    assert try_packing(model.to(dtype)).first_position is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "opt", "roberta"])
def test_half_precision_packs_as_well(name: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(family(name)).to(dtype)
    assert try_packing(model) == Packing(PACKS[name][2])


class Deaf(Changed):
    """Does not hand on what it does not know."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, position_embeddings: Any = None, **__: Any) -> torch.Tensor:
        return self.block(hidden_states, position_embeddings=position_embeddings)  # type: ignore[no-any-return]


def test_model_that_drops_the_sequences_is_padded() -> None:
    model = llama()
    model.layers[1] = Deaf(model.layers[1], lambda states: states)
    assert try_packing(model) == Packing(
        None, "the model's code does not take packed sequences (its attention asks for a mask or dropout)"
    )
    assert names_of_attention(model) == {"sdpa"}


@pytest.mark.parametrize("name", ["softcap", "position_bias", "s_aux", "head_mask"])
def test_model_whose_attention_asks_for_more_is_padded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    attention = type(model.layers[0].self_attn)
    real = attention.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return real(self, *args, **kwargs, **({name: torch.ones(1)} if self.layer_idx == 1 else {}))

    assert try_packing(model) == Packing(0)
    monkeypatch.setattr(attention, "forward", forward)
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "sdpa", lambda *_, **__: real_sdpa(*_, **__))
    assert try_packing(model) == Packing(
        None, f"the model's code does not take packed sequences (its attention asks for {name})"
    )


def real_sdpa(*args: Any, **kwargs: Any) -> Any:
    """Transformers' own, without what it would refuse."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    kept = {key: value for key, value in kwargs.items() if key not in ("softcap", "position_bias")}
    return sdpa_attention_forward(*args, **kept)


@pytest.mark.parametrize(
    ("config", "values"),
    [
        ("MistralConfig", GROUPED),
        ("PhimoeConfig", {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1}),
    ],
)
@pytest.mark.parametrize("window", [600])
def test_long_window_is_kept(config: str, values: dict[str, Any], window: int) -> None:
    """Phimoe's attention is told of its window by the mask alone."""
    model = made(config, {**values, "max_position_embeddings": 2048}, sliding_window=window)
    packing = try_packing(model)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, 50, (length,), generator=generator).tolist() for length in (window + 100, 7)]
    batch = collate(rows, np.arange(2), 1, first_position=packing.first_position)
    with torch.no_grad(), packed(model, packing):
        found = batch.flat(model(**batch.inputs).last_hidden_state)
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor([row])).last_hidden_state[0] for row in rows])
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


def test_layers_with_windows_of_their_own() -> None:
    model = made("MistralConfig", {**GROUPED, "per_layer_config": {1: {"sliding_window": 5}}})
    assert re.match("packed|.*differ in the window", try_packing(model).described)  # 5.3 knows no layers of their own
    assert [len(ids) for ids in probe_sequences(model.config)] == [5, 3]


def test_a_window_is_tried() -> None:
    """A model that forgets its window between mask and attention is found out where the window is short."""
    model = family("mistral")
    forgetful = copy.deepcopy(model)
    for layer in forgetful.layers:
        layer.self_attn.config = copy.copy(layer.self_attn.config)
        layer.self_attn.config.sliding_window = None
    assert try_packing(model) == Packing(0)
    assert "computes something else" in try_packing(forgetful).described


# --------------------------------------------------------------------------------------------- the trial leaves nothing


@pytest.mark.parametrize("name", ["bert", "gpt2", "opt", "distilbert"])
def test_dropout_is_off_while_it_is_tried(name: str) -> None:
    model = copy.deepcopy(family(name))
    every = list(model.modules())
    dropouts = [module for module in every if isinstance(module, nn.Dropout)]
    for module in every:
        for name_of_rate in ("p", "dropout"):  # OPT's blocks have no layer for it
            if isinstance(getattr(module, name_of_rate, None), float):
                setattr(module, name_of_rate, 0.5)
    expected = try_packing(model)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model.train()
    assert not torch.equal(*(model(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state for _ in range(2)))
    torch.set_rng_state(before)
    for some in (every, dropouts, every[::2]):
        model.eval()
        for module in some:
            module.training = True
        flags = [module.training for module in every]
        assert try_packing(model) == expected == Packing(0)
        assert [module.training for module in every] == flags
    assert torch.equal(torch.get_rng_state(), before)


def test_a_trial_that_fails_leaves_nothing_either() -> None:
    def refuse(_: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("not this one")

    model = before_the_last_block(refuse).train()
    with pytest.raises(NotImplementedError):
        try_packing(model)
    assert all(module.training for module in model.modules())
    assert names_of_attention(model) == {"sdpa"}


class OutOfTimeError(Exception):
    """Stands for whatever may go wrong inside."""


def test_attention_is_restored() -> None:
    model = copy.deepcopy(family("llama"))
    model.layers[1] = copy.deepcopy(model.layers[1])
    with packed(model, Packing(0)):
        assert names_of_attention(model) == {"capotune_packed"}
        with packed(model, Packing(0)):
            pass
        assert names_of_attention(model) == {"capotune_packed"}
    assert names_of_attention(model) == {"sdpa"}
    with pytest.raises(OutOfTimeError), packed(model, Packing(0)):
        raise OutOfTimeError
    assert names_of_attention(model) == {"sdpa"}
    model.layers[1].self_attn.config._attn_implementation = "eager"
    with pytest.raises(OutOfTimeError), packed(model, Packing(0)):
        raise OutOfTimeError
    assert model.config._attn_implementation == "sdpa"
    assert model.layers[1].self_attn.config._attn_implementation == "eager"
    with packed(model, PADDED):
        assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "modernbert"])
def test_copied_blocks_are_packed_too(name: str) -> None:
    """A copy of a block has a copy of the configuration."""
    model = copy.deepcopy(family(name))
    path = next(path for path, part in model.named_modules() if isinstance(part, nn.ModuleList))
    blocks = model.get_submodule(path)
    packing = try_packing(model)
    blocks[1] = copy.deepcopy(blocks[1])
    configs = {id(module.config) for module in model.modules() if hasattr(module, "config")}
    assert len(configs) > 1
    assert try_packing(model) == packing == Packing(0)
    torch.testing.assert_close(read(model, packing), read_alone(model), rtol=1e-5, atol=1e-5)
    assert names_of_attention(model) == {"sdpa"}


REGISTERED = """
import torch, capotune, capotune.api, capotune.models.sequence_packing, capotune.engine.loop
from transformers import AttentionInterface, AutoModel, LlamaConfig
known = lambda: "capotune_packed" in AttentionInterface._global_mapping
seen = [known()]
model = AutoModel.from_config(LlamaConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
)).eval()
seen.append(known())
print(capotune.models.sequence_packing.try_packing(model).described, *seen, known())
"""


def test_importing_registers_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-B", "-W", "ignore", "-c", REGISTERED],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.split() == ["packed", "False", "False", "True"]


# -------------------------------------------------------------------------------------------------------------- batches


def values_for(batch: Batch, width: int = 3) -> torch.Tensor:
    """(tokens, width), all different."""
    return torch.arange(sum(batch.sequences.lengths) * width).view(-1, width) + 1.0


@pytest.mark.parametrize("first", [None, 0, 2])
def test_flat_and_laid_out(first: int | None) -> None:
    rows = [[9, 9, 9], [8], [7, 7, 7, 7], [6, 6]]
    batch = collate(rows, np.array([2, 0, 3]), pad_id=1, prefix=[40, 41], first_position=first)
    flat = [40, 41, 7, 7, 7, 7, 40, 41, 9, 9, 9, 40, 41, 6, 6]
    assert batch.sequences.lengths == (6, 5, 4)
    assert batch.starts.tolist() == [0, 6, 11, 15]
    assert batch.flat(batch.input_ids).tolist() == flat
    values = values_for(batch)
    laid = batch.laid_out(values)
    assert torch.equal(batch.flat(laid), values)
    assert [len(part) for part in batch.split(values)] == [6, 5, 4]
    assert torch.equal(torch.cat(batch.split(values)), values)
    if first is None:
        assert batch.inputs.keys() == {"input_ids", "attention_mask"}
        assert laid.shape == (3, 6, 3)
        assert not laid[1, 5:].any()
        assert not laid[2, 4:].any()
        assert batch.input_ids.tolist()[2] == [40, 41, 6, 6, 1, 1]
    else:
        assert batch.inputs.keys() == {"input_ids", "position_ids", "sequences"}
        assert laid.shape == (1, 15, 3)
        assert batch.position_ids is not None
        positions = [*range(first, first + 6), *range(first, first + 5), *range(first, first + 4)]
        assert batch.position_ids.tolist() == [positions]


@pytest.mark.parametrize("first", [None, 0])
def test_targets(first: int | None) -> None:
    rows = [[9, 9, 9], [8], [7, 7]]
    chosen = np.array([2, 0])
    classes = collate(rows, chosen, 1, targets=torch.tensor([5, 6, 7]), first_position=first)
    assert classes.targets is not None
    assert classes.targets.tolist() == [7, 5]
    labels = [[IGNORE_INDEX, 9, 9], [IGNORE_INDEX], [IGNORE_INDEX, 7]]
    tokens = collate(rows, chosen, 1, [40, 41], labels, first_position=first)
    no = IGNORE_INDEX
    assert tokens.targets is not None
    assert tokens.targets.tolist() == [no, no, no, 7, no, no, no, 9, 9]
    assert tokens.flat(tokens.input_ids).tolist() == [40, 41, 7, 7, 40, 41, 9, 9, 9]
    assert collate(rows, chosen, 1, first_position=first).targets is None


@pytest.mark.parametrize("first", [None, 0])
def test_to_another_device(first: int | None) -> None:
    batch = collate([[9, 9], [8]], np.arange(2), 1, targets=torch.tensor([1, 0]), first_position=first)
    there = batch.to(torch.device("meta"))
    assert there.sequences == batch.sequences
    assert there.starts.device.type == there.input_ids.device.type == "meta"
    for name in ("attention_mask", "position_ids", "targets"):
        one, other = getattr(there, name), getattr(batch, name)
        assert (one is None) == (other is None)
        assert one is None or (one.device.type == "meta" and one.shape == other.shape)
    assert batch.input_ids.device.type == "cpu"


@pytest.mark.parametrize("budget", [1, 30, 64, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_parts(budget: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 40, 200).tolist()
    rows = generator.permutation(200)[:90]
    parts = parts_of(rows, lengths, budget)
    found = np.concatenate(parts)
    assert sorted(found.tolist()) == sorted(rows.tolist())
    sizes = [lengths[row] for row in found]
    assert sizes == sorted(sizes)
    for number, part in enumerate(parts):
        longest = max(lengths[row] for row in part)
        assert len(part) == 1 or longest * len(part) <= budget
        if number + 1 < len(parts):  # one more would not have fitted
            assert lengths[parts[number + 1][0]] * (len(part) + 1) > budget
    assert [part.tolist() for part in sorted_order(lengths, budget)] == [
        part.tolist() for part in parts_of(np.arange(200), lengths, budget)
    ]


def test_sequences_of_equal_length_keep_their_order() -> None:
    assert [part.tolist() for part in parts_of(np.array([5, 0, 3, 1]), [2, 2, 9, 2, 9, 2], 4)] == [[5, 0], [3, 1]]


# ---------------------------------------------------------------------------------------------------------- whole paths


@pytest.fixture
def models(bert: Path, llama: Path, gpt2: Path) -> dict[str, Path]:
    return {"bert": bert, "llama": llama, "gpt2": gpt2}


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences of each call of the packed attention."""
    calls: list[int] = []
    real = prefix.packed_attention

    def note(q: Any, k: Any, v: Any, sequences: Sequences, **how: Any) -> torch.Tensor:
        calls.append(len(sequences.lengths))
        return real(q, k, v, sequences, **how)

    monkeypatch.setattr(prefix, "packed_attention", note)
    return calls


Make = Callable[[], Assembled]


def silent(assembled: Assembled) -> Assembled:
    """Without dropout, whose random numbers stand for other tokens where batches are laid out otherwise."""
    for module in assembled.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return assembled


def padded(assembled: Assembled) -> Assembled:
    vars(assembled)["packing"] = PADDED
    return assembled


def both_ways(make: Make) -> tuple[Assembled, Assembled]:
    """The same model, reading packed and padded batches."""
    one, other = silent(make()), padded(silent(make()))
    assert one.packing == Packing(0)
    return one, other


def shorter(settings: TrainingSettings, **changes: Any) -> TrainingSettings:
    return settings.model_copy(update={"epochs": 2, "patience": 2, "batch_size": 8, **changes})


@dataclass(frozen=True)
class Trained:
    """What a training says and leaves."""

    losses: list[float]
    """Of each step."""
    scores: list[float]
    """The mean loss and the held-out score of each epoch, then the score at the end."""
    weights: dict[str, torch.Tensor]


def trained(assembled: Assembled, train: Examples, held: Examples) -> Trained:
    """Two epochs, its attention looked after."""
    scores: list[float] = []
    before = names_of_attention(assembled.backbone)
    assert before == {PREFIXED if getattr(assembled.method.settings, "deep", None) else "sdpa"}

    def on_epoch(_: Any, loss: float, score: float) -> None:
        scores.extend([loss, score])

    size = assembled.method.settings.batch_size
    assert size is not None
    alike = partial(epoch_order, train.rows.lengths, size, 0)  # the same parts of a step, padded or packed
    state, losses = fit(assembled, train_examples=train, held_examples=held, on_epoch=on_epoch, batches=alike)
    assert state.step == len(losses) == 6
    assert len(scores) == 4
    assert max(losses) - min(losses) > 1e-3
    assert names_of_attention(assembled.backbone) == before
    return Trained(losses, [*scores, *held_out_score(assembled, held)], state.weights)


def assert_alike(one: Trained, other: Trained) -> None:
    """The weights too, but for the few whose gradients are almost nothing, which AdamW makes as large as all others."""
    torch.testing.assert_close(one.losses, other.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.scores, other.scores, rtol=1e-5, atol=1e-6)
    assert one.weights
    assert one.weights.keys() == other.weights.keys()
    for key, weight in one.weights.items():
        off = (weight - other.weights[key]).abs() / other.weights[key].abs().max()
        if key.endswith("attention.self.key.bias"):
            continue  # adds as much to every score of a token: its gradient is rounding and nothing else
        if key.endswith("attn.c_attn.bias"):
            off = torch.cat([off[:32], off[64:]])
        assert float(off.max()) < 1e-3, key
        assert int((off > 2e-5).sum()) <= max(8, 0.02 * off.numel()), key


def assert_trained_alike(
    make: Make, attended: list[int], of: Callable[[Assembled, int, int], Examples] = examples
) -> None:
    """Packed and padded, and each what it should be."""
    found: list[Trained] = []
    for assembled in both_ways(make):
        attended.clear()
        found.append(trained(assembled, of(assembled, 24, 0), of(assembled, 10, 1)))
        assert bool(attended) == (assembled.packing.first_position is not None)
    assert_alike(*found)


STEPPED = [name for name in VARIANTS if name != "features" and "dropout" not in name]
EVERYWHERE = ("features-k1", "features-k2", "lora", "qlora", "prompt-labels")
PAIRS = [(name, base) for base in ("bert", "llama", "gpt2") for name in STEPPED if base == "bert" or name in EVERYWHERE]


@pytest.mark.usefixtures("all_bits")
@pytest.mark.parametrize(("variant", "base"), PAIRS)
def test_training(variant: str, base: str, models: dict[str, Path], attended: list[int]) -> None:
    settings = shorter(VARIANTS[variant])
    assert_trained_alike(lambda: on_base(models[base], settings), attended)


HOW: dict[str, dict[str, Any]] = {
    "in small parts": {"micro_batch_tokens": 20},
    "a row at a time": {"micro_batch_tokens": 1},
    "checkpointing": {"gradient_checkpointing": True},
    "label smoothing": {"label_smoothing": 0.1},
}


@pytest.mark.usefixtures("all_bits")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("variant", "base"), [("lora", "bert"), ("features-k1", "llama"), ("prompt-labels", "gpt2")])
def test_training_otherwise(how: str, variant: str, base: str, models: dict[str, Path], attended: list[int]) -> None:
    settings = shorter(VARIANTS[variant], **HOW[how])
    assert_trained_alike(lambda: on_base(models[base], settings), attended)


WRITING: list[tuple[str, str, dict[str, Any]]] = [
    ("lora", "llama", {}),
    ("lora", "gpt2", {"label_smoothing": 0.1}),
    ("lora-dora", "qwen2", {"micro_batch_tokens": 30}),
    ("qlora", "llama", {"gradient_checkpointing": True}),
    ("qlora", "gpt2", {}),
    ("features-k1", "llama", {}),
    ("features-k1", "gpt2", {"gradient_checkpointing": True}),
    ("features-k2", "qwen2", {"label_smoothing": 0.1}),
    ("prompt-labels", "llama", {"micro_batch_tokens": 1}),
    ("prompt-labels", "gpt2", {}),
    ("prompt-text", "qwen2", {"gradient_checkpointing": True}),
]


@pytest.mark.usefixtures("all_bits")
@pytest.mark.parametrize("plain", [True, False], ids=["plain head", "own logits"])
@pytest.mark.parametrize(("variant", "base", "changes"), WRITING)
def test_training_to_write(
    variant: str, base: str, changes: dict[str, Any], plain: bool, writers: dict[str, Path], attended: list[int]
) -> None:
    settings = shorter(VARIANTS[variant], **changes)

    def make() -> Assembled:
        return writing.with_plain_head(writing.on_base(writers[base], settings), plain)

    assert_trained_alike(make, attended, writing.examples)


@pytest.mark.parametrize("base", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("pooling", ["cls", "last", "max", "mean"])
@pytest.mark.parametrize("variant", ["lora", "prompt-labels", "features-k1"])
def test_pooling(variant: str, pooling: Pooling, base: str, models: dict[str, Path]) -> None:
    """Logits, loss and gradients of each, against the model asked row by row, without a batch of ours."""
    found: list[tuple[torch.Tensor, float, dict[str, Any]]] = []
    for assembled in both_ways(lambda: on_base(models[base], VARIANTS[variant], pool=pooling)):
        shake(assembled)
        given = examples(assembled, 11, seed=3)
        alone = [one_by_one(assembled, row) for row in range(11)]
        logits = predict_logits(assembled, given.rows)
        torch.testing.assert_close(logits, torch.cat(alone), rtol=0, atol=2e-5)
        assert isinstance(given.targets, torch.Tensor)
        loss = accumulate(assembled, given, np.arange(11), assembled.method.settings)
        assert loss == pytest.approx(float(functional.cross_entropy(torch.cat(alone), given.targets)), rel=1e-5)
        gradients = {key: weight.grad for key, weight in assembled.trainable().items()}
        found.append((logits, loss, gradients))
    (logits, loss, gradients), (expected_logits, expected_loss, expected) = found
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert all(gradient is not None for gradient in gradients.values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6, msg=key)


def pooled_alone(assembled: Assembled, ids: list[int], layer: int, skip: int = 0) -> torch.Tensor:
    """(hidden,) of one sequence read alone, pooled here."""
    states = assembled.backbone(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0, skip:]
    ways = {"cls": states[0], "last": states[-1], "max": states.amax(0), "mean": states.mean(0)}
    return ways[assembled.model.pooling]


@torch.no_grad()
def one_by_one(assembled: Assembled, row: int) -> torch.Tensor:
    """Logits (1, labels) of a row of ``examples``."""
    rows = examples(assembled, 11, seed=3).rows
    pooled = pooled_alone(assembled, [*rows.prefix, *rows.sequences[row]], -1, len(rows.prefix))
    logits: torch.Tensor = assembled.model.classifier(pooled)[None]
    return logits


@pytest.mark.parametrize("base", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("variant", ["lora", "prompt-labels"])
def test_what_a_writer_learns(variant: str, base: str, writers: dict[str, Path]) -> None:
    """The loss of a step against Transformers' own, asked row by row."""
    for assembled in both_ways(lambda: writing.on_base(writers[base], shorter(VARIANTS[variant]))):
        given = writing.examples(assembled, 9, seed=4)
        assert isinstance(given.targets, list)
        expected: list[list[float]] = []
        for ids, labels in zip(given.rows.sequences, given.targets, strict=True):
            before = [*given.rows.prefix]
            with torch.no_grad():
                logits = assembled.model(input_ids=torch.tensor([[*before, *ids]])).logits[0, :-1]
            wanted = torch.tensor([*before, *labels][1:])
            wanted[: len(before)] = IGNORE_INDEX
            nats = float(functional.cross_entropy(logits, wanted, ignore_index=IGNORE_INDEX, reduction="sum"))
            expected.append([nats, sum(label != IGNORE_INDEX for label in labels)])
        of_rows = torch.tensor(expected)
        torch.testing.assert_close(outputs(assembled, given), of_rows, rtol=1e-5, atol=1e-5)
        mean = float(of_rows[:, 0].sum() / of_rows[:, 1].sum())
        chosen = np.random.default_rng(0).permutation(9)
        assert accumulate(assembled, given, chosen, assembled.method.settings) == pytest.approx(mean, rel=1e-5)
        assert held_out_score(assembled, given)[0] == pytest.approx(-mean, rel=1e-5)


@pytest.mark.usefixtures("all_bits")
@pytest.mark.parametrize("base", ["bert", "llama", "gpt2"])
def test_features(base: str, models: dict[str, Path], attended: list[int]) -> None:
    """Of every layer, in the order of the rows."""
    one, other = both_ways(lambda: on_base(models[base], FeatureExtractionSettings()))
    rows = TokenRows(sequences(23, seed=6), one.task.pad_id)
    layers = one.model.feature_layers
    attended.clear()
    found = compute_features(one, layers, rows, None, reduced=True)
    assert max(attended) == 23
    attended.clear()
    torch.testing.assert_close(found, compute_features(other, layers, rows, None, reduced=True), rtol=0, atol=1e-5)
    assert not attended
    with torch.no_grad():
        alone = [torch.cat([pooled_alone(one, ids, layer) for layer in layers]) for ids in rows.sequences]
    torch.testing.assert_close(found, torch.stack(alone), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("all_bits")
@pytest.mark.parametrize(
    ("variant", "base"), [("features-k1", "bert"), ("lora-layers", "llama"), ("lora-layers", "gpt2")]
)
def test_states_kept_at_a_boundary(
    variant: str, base: str, models: dict[str, Path], tmp_path: Path, attended: list[int]
) -> None:
    """Computed packed or padded, used packed or padded, or not kept: one training."""
    settings = shorter(VARIANTS[variant])
    found: list[Trained] = []
    for number, (computing, using) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1), (None, 0)]):
        assembled = both_ways(lambda: on_base(models[base], settings))[using]
        train, held = examples(assembled, 24), examples(assembled, 10, seed=1)
        if computing is not None:
            computer = both_ways(lambda: on_base(models[base], settings))[computing]
            store = ActivationCache(tmp_path / str(number), {})
            block = assembled.method.first_trainable_block()
            assert block > 0
            attended.clear()
            train, held = (
                Examples(one.rows, one.targets, store.boundary(computer, block, one.rows)) for one in (train, held)
            )
            assert bool(attended) == (computing == 0)
        attended.clear()
        found.append(trained(assembled, train, held))
        assert bool(attended) == (using == 0)
    for one in found[1:]:
        assert_alike(one, found[0])


@pytest.mark.parametrize("base", ["bert", "llama", "gpt2"])
def test_states_at_a_boundary(base: str, models: dict[str, Path]) -> None:
    """Each row's where it belongs, against the block's input when a row is read alone."""
    one, other = both_ways(lambda: on_base(models[base], VARIANTS["features-k1"]))
    rows = TokenRows(sequences(13, seed=8), one.task.pad_id)
    block = one.method.first_trainable_block()
    found = compute_boundary(one, block, rows)
    torch.testing.assert_close(found, compute_boundary(other, block, rows), rtol=0, atol=1e-5)
    with torch.no_grad():
        alone = [
            one.backbone(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[block][0]
            for ids in rows.sequences
        ]
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------------- after it is done


@pytest.mark.parametrize("moment", ["a step", "the loss", "the score", "packing"])
def test_an_error_puts_the_attention_back(moment: str, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assembled = on_base(llama, shorter(VARIANTS["features-k1"]))
    inside: list[set[str]] = []

    def fail(*_: Any, **__: Any) -> Any:
        inside.append(names_of_attention(assembled.backbone))
        raise OutOfTimeError

    options: dict[str, Any] = {"on_step": fail} if moment == "a step" else {}
    if moment == "the loss":
        monkeypatch.setattr(type(assembled.task.objective), "loss", fail)
    if moment == "the score":
        monkeypatch.setattr(type(assembled.task.objective), "outputs", fail)
    if moment == "packing":
        monkeypatch.setattr(loop_module, "batch_of", fail)
    with pytest.raises(OutOfTimeError):
        fit(assembled, **options)
    assert inside == [{"capotune_packed"}]
    assert names_of_attention(assembled.backbone) == {"sdpa"}


def test_writing_goes_on_as_before(llama_writer: Path) -> None:
    """Between trainings a model writes with its own attention, and the same text as one that was never packed."""
    assembled = writing.on_base(llama_writer, shorter(VARIANTS["lora"]))
    decoding = DecodingSettings(max_tokens=8)
    prompts = [row[:6] for row in writing.sequences(5, seed=2)]
    before = generate(assembled, prompts, decoding)
    held_out_score(assembled, writing.examples(assembled, 6))
    assert "packing" in vars(assembled)
    assert names_of_attention(assembled.backbone) == {"sdpa"}
    assert generate(assembled, prompts, decoding) == before
    fit(assembled, train_examples=writing.examples(assembled, 16), held_examples=writing.examples(assembled, 6, 1))
    after = generate(assembled, prompts, decoding)
    assert names_of_attention(assembled.backbone) == {"sdpa"}
    fresh = writing.on_base(llama_writer, shorter(VARIANTS["lora"]))
    fresh.method.load({key: weight.detach() for key, weight in assembled.method.parameters().items()})
    assert generate(fresh, prompts, decoding) == after


# ---------------------------------------------------------------------------------------------------------- the record


@pytest.fixture
def mpnet(bert: Path, tmp_path: Path) -> Path:
    """A base that cannot pack, with the tokenizer of the others."""
    folder = tmp_path / "mpnet"
    made("MPNetConfig", {**SMALL, "pad_token_id": 0}).save_pretrained(folder)
    for path in bert.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def run(method: str, data: Path, model: Path, out: Path, **settings: Any) -> dict[str, Any]:
    capotune.train(method, data=str(data), model=str(model), out=out, **settings)
    result: dict[str, Any] = json.loads((out / "run.json").read_text(encoding="utf-8"))["result"]
    return result


def test_the_record_says_how_sequences_were_read(bert: Path, tickets: Path, tmp_path: Path) -> None:
    assert run("lora", tickets, bert, tmp_path / "one", rank=2, epochs=1)["sequences"] == "packed"
    assert run("feature-extraction", tickets, bert, tmp_path / "two")["sequences"] == "packed"  # the test rows
    assert run("feature-extraction", tickets, bert, tmp_path / "three")["sequences"] == "none were read"


@pytest.mark.parametrize(("method", "settings"), [("lora", {"rank": 2, "epochs": 1}), ("feature-extraction", {})])
def test_the_record_says_why_not(
    method: str, settings: dict[str, Any], mpnet: Path, tickets: Path, tmp_path: Path
) -> None:
    result = run(method, tickets, mpnet, tmp_path / "out", **settings)
    assert result["sequences"] == "padded: the model's attention is eager"
    assert capotune.evaluate(tmp_path / "out" / "adapter", data=str(tickets))["accuracy"] == result["score"]


def test_a_writer_s_record_too(llama_writer: Path, colour_pairs: Path, tmp_path: Path) -> None:
    assert run("lora", colour_pairs, llama_writer, tmp_path / "out", rank=2, epochs=1)["sequences"] == "packed"


def test_a_text_without_tokens_is_refused() -> None:
    """Packed, such a row would take its neighbour's last token for its own."""
    words = Tokenizer(WordLevel({"late": 0, "[UNK]": 1}, "[UNK]"))
    base = Base("words", Path("words"))
    vars(base)["tokenizer"] = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    vars(base)["config"] = transformers.LlamaConfig(vocab_size=2)
    task = Classification(base, ("a", "b"), 8, "last")
    assert task.encode(["late", "other"]) == [[0], [1]]
    with pytest.raises(DataError, match=r"text 2 of 2: .* makes no token of the text ''\. Remove it\."):
        task.encode(["late", ""])


def test_error_of_a_zero_token_is_none_where_it_is_equal() -> None:
    """As of a token whose embedding is 0, which a model without padding token may have."""
    expected = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 4.0]])
    assert relative_error(expected.clone(), expected) == 0
    assert relative_error(expected + torch.tensor([[0.0], [0.5]]), expected) == pytest.approx(0.25)
    assert relative_error(expected + torch.tensor([[0.5], [0.0]]), expected) == float("inf")
    assert math.isnan(relative_error(expected + torch.tensor([[torch.nan], [0.0]]), expected))
