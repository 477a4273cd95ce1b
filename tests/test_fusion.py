"""Blocks computed by the kernels: which, that they compute what the model's own code does, and that nothing stays."""

from __future__ import annotations

import copy
import ctypes
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LABELS, on_base, sequences, shake
from test_sequence_packing import GPT2, GROUPED, SMALL, batch_of, made
from torch import Tensor, nn

import capotune
from capotune.adapters.assemble import Assembled, assemble, attach
from capotune.data.batches import Batch, TokenRows, collate
from capotune.engine import loop
from capotune.engine.loop import checkpointing
from capotune.evaluation.forward import Examples, held_out_score
from capotune.kernels import composed_block
from capotune.kernels import execution as execution_module
from capotune.kernels.execution import execution, reusing_memory
from capotune.kernels.lora_linear import LoraModule
from capotune.methods import make
from capotune.methods.base import Method, Start
from capotune.methods.feature_extraction.settings import FeatureExtractionSettings
from capotune.methods.lora.method import LoraLinear
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.methods.qlora.settings import QloraSettings
from capotune.models.architecture import describe
from capotune.models.base import Pooling, find
from capotune.models.fusion import Fusing, fused, try_fusing, why_not_fused
from capotune.models.sequence_packing import Packing, packed, try_packing
from capotune.settings import Context, TrainingSettings
from capotune.tasks.classification import Classification
from capotune.tasks.text_targets.model import pooled_positions

WINDOWS = {"use_sliding_window": True, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
SOMETHING_ELSE = "the model's blocks compute something else (by "
NOT_TAKEN = "the model's code does not take the kernels ("  # so Transformers 5.3 writes that block

FUSES: dict[str, tuple[str, dict[str, Any], tuple[int | None, int | None]]] = {
    "llama": ("LlamaConfig", GROUPED, (None, None)),
    "llama-heads-of-6": ("LlamaConfig", {**GROUPED, "head_dim": 6}, (None, None)),
    "llama-biases": ("LlamaConfig", {**SMALL, "attention_bias": True, "mlp_bias": True}, (None, None)),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 6}, (6, 6)),
    "qwen2": ("Qwen2Config", GROUPED, (None, None)),
    "qwen2-window": ("Qwen2Config", {**GROUPED, **WINDOWS}, (6, None)),
    "bert": ("BertConfig", SMALL, (None, None)),
    "bert-heads-of-4": ("BertConfig", {**SMALL, "num_attention_heads": 8}, (None, None)),
    "bert-reads-forward": ("BertConfig", {**SMALL, "is_decoder": True}, (None, None)),
    "roberta": ("RobertaConfig", SMALL, (None, None)),
    "xlm-r": ("XLMRobertaConfig", SMALL, (None, None)),
    "electra": ("ElectraConfig", {**SMALL, "embedding_size": 24}, (None, None)),
}
"""Configuration, its values, and the windows of its blocks."""
PLAIN: dict[str, tuple[str, dict[str, Any], str | tuple[str, ...]]] = {
    "gpt2": ("GPT2Config", GPT2, "its blocks are of another form"),
    "gemma": ("GemmaConfig", {**GROUPED, "head_dim": 8}, "its activation is GELUTanh"),
    "gemma-silu": ("GemmaConfig", {**GROUPED, "head_dim": 8, "hidden_act": "silu"}, "its norm is GemmaRMSNorm"),
    "phi": ("PhiConfig", SMALL, "its blocks are of another form"),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}, "a Qwen3Attention is of another form"),
    "granite": ("GraniteConfig", {**GROUPED, "residual_multiplier": 0.5}, (SOMETHING_ELSE, NOT_TAKEN)),
    "helium": ("HeliumConfig", {**GROUPED, "head_dim": 8}, SOMETHING_ELSE),  # turns neighbours, not halves
    "smollm3": ("SmolLM3Config", {**GROUPED, "no_rope_layers": [1, 0]}, SOMETHING_ELSE),  # the second block turns none
    "llama-gelu": ("LlamaConfig", {**GROUPED, "hidden_act": "gelu"}, "its activation is GELUActivation"),
    "bert-gelu-new": ("BertConfig", {**SMALL, "hidden_act": "gelu_new"}, "its activation is NewGELUActivation"),
    "bert-relu": ("BertConfig", {**SMALL, "hidden_act": "relu"}, "its activation is ReLU"),
    "mpnet": ("MPNetConfig", SMALL, "sequences are padded"),
}
"""Configuration, its values, and how the reason begins."""
PADDED = Packing(None, "for this test")


def blocks_of(model: Any) -> list[nn.Module]:
    return [model.get_submodule(path.partition(".")[2]) for path in parts_of(model).blocks]


def parts_of(model: nn.Module) -> Any:
    return describe(nn.ModuleDict({"base": model}), "base")


@dataclass(frozen=True)
class Base:
    """A model and how it reads."""

    model: Any
    packing: Packing
    fusing: Fusing

    @property
    def blocks(self) -> list[nn.Module]:
        return blocks_of(self.model)

    def batch(self) -> Batch:
        return batch_of(self.packing)

    def read(self, *, by_kernels: bool, wanted: Tensor | None = None) -> Tensor:
        """Flat states, or those wanted."""
        with ExitStack() as stack:
            stack.enter_context(packed(self.model, self.packing))
            if by_kernels:
                stack.enter_context(fused(self.blocks, self.fusing))
            return self.batch().states(self.model, wanted)


def base_of(model: Any) -> Base:
    packing = try_packing(model)
    return Base(model, packing, try_fusing(model, blocks_of(model), packing))


@cache
def family(name: str) -> Base:
    return base_of(made(*{**FUSES, **PLAIN}[name][:2]))


def with_method(name: str, settings: TrainingSettings) -> tuple[Base, Method]:
    """A copy of the family with the method on it, moved from its start, and how it was before."""
    base = family(name)
    model = copy.deepcopy(base.model)
    holder, method = nn.ModuleDict({"base": model}), make(settings.completed(Context(32, has_head=True)))
    method.attach(holder, parts_of(model), Start(torch.Generator().manual_seed(0), [9, 10]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in method.parameters().values():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return Base(model, base.packing, base.fusing), method


def with_gradients(read: Callable[[], Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """What is read, and the gradients of a sum in which every number has its own part."""
    states = read()
    parts = torch.linspace(-1, 1, states.numel()).view(states.shape)
    return [states.detach(), *torch.autograd.grad((states * parts).sum(), list(weights))]


def assert_alike(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    """The first, states, relative to their largest number; all others, gradients, to the largest of any of them."""
    assert len(found) == len(expected)
    for one, other in ((found[:1], expected[:1]), (found[1:], expected[1:])):
        largest = max((float(x.abs().max()) for x in other if x.numel()), default=0.0)
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=tolerance * largest)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For each time that linear layers are computed by a fused block: the rows of their input."""
    rows: list[int] = []
    real = composed_block.lora_linears

    def note(sources: Sequence[Tensor], *more: Any) -> tuple[Tensor, ...]:
        rows.append(len(sources[0]))
        return real(sources, *more)

    monkeypatch.setattr(composed_block, "lora_linears", note)
    return rows


# --------------------------------------------------------------------------------------------------------- which can


@torch.no_grad()
@pytest.mark.parametrize("name", FUSES)
def test_fused_blocks_match_the_models_own_code(name: str, calls: list[int]) -> None:
    """Sequences of many lengths, some longer than a window; every block by the kernels, four times linear layers."""
    base = family(name)
    assert base.fusing == Fusing(FUSES[name][2])
    expected = base.read(by_kernels=False)
    calls.clear()
    found = base.read(by_kernels=True)
    assert calls == [len(expected)] * 8
    assert float(expected.std()) > 0.3
    assert_alike([found], [expected])


@torch.no_grad()
@pytest.mark.parametrize("name", PLAIN)
def test_blocks_of_other_forms_stay_plain(name: str, calls: list[int]) -> None:
    """With a reason in words; and asked to fuse them nonetheless, nothing changes."""
    base = family(name)
    assert all(why.startswith(PLAIN[name][2]) for why in why_not_fused(base.blocks, base.fusing))
    assert why_not_fused(base.blocks, base.fusing)
    if base.packing.first_position is None:
        return
    calls.clear()
    assert torch.equal(base.read(by_kernels=True), base.read(by_kernels=False))
    assert calls == []


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_fused_blocks_give_all_hidden_states(name: str) -> None:
    """As a head that reads several layers does."""
    base = family(name)
    found = []
    for fusing in (base.fusing, Fusing(why_not="for this test")):
        with packed(base.model, base.packing), fused(base.blocks, fusing):
            found.append(base.model(**base.batch().inputs, output_hidden_states=True).hidden_states)
    assert len(found[0]) == 3
    assert_alike(found[0], found[1])


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_block_that_computes_something_else_stays_plain(name: str) -> None:
    """Though its parts have the right names."""
    model = copy.deepcopy(family(name).model)
    block = blocks_of(model)[0]
    real = type(block).forward

    class Other(type(block)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, *more: Any, **how: Any) -> Tensor:
            return 1.01 * real(self, hidden_states, *more, **how)  # type: ignore[no-any-return]

    block.__class__ = Other
    assert re.match(r"the model's blocks compute something else \(by 0\.0\d+\)", str(base_of(model).fusing.why_not))


def test_adapted_layer_is_recognised_by_its_class() -> None:
    """Since Python 3.12 ``isinstance`` with a protocol does not see a module's children; no block would be fused."""
    assert LoraModule in LoraLinear.__mro__
    assert not getattr(LoraModule, "_is_protocol", False)


def test_trial_leaves_the_model_unchanged() -> None:
    for name in ("llama", "bert", "granite"):
        base = family(name)
        assert not any("forward" in vars(block) for block in base.blocks)
        assert base.model.config._attn_implementation == "sdpa"


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "bert", "roberta"])
def test_padded_batches_run_the_models_own_code(name: str, calls: list[int]) -> None:
    base = family(name)
    batch = batch_of(PADDED)
    expected = batch.states(base.model, None)
    calls.clear()
    with fused(base.blocks, base.fusing):
        found = batch.states(base.model, None)
    assert torch.equal(found, expected)
    assert calls == []


# --------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    "targets", [("all-linear",), (r".*(k_proj|down_proj|key|output\.dense)",)], ids=["all", "some"]
)
@pytest.mark.parametrize("name", FUSES)
def test_lora_gradients_match_the_models_own_code(name: str, targets: tuple[str, ...], calls: list[int]) -> None:
    """Layers with and without a change side by side."""
    base, method = with_method(name, LoraSettings(rank=3, alpha=4, target_modules=targets))
    assert why_not_fused(base.blocks, base.fusing) == []
    weights = list(method.parameters().values())
    calls.clear()  # the family may have been tried just now
    expected = with_gradients(lambda: base.read(by_kernels=False), weights)
    assert calls == []
    found = with_gradients(lambda: base.read(by_kernels=True), weights)
    assert len(calls) == 8
    assert_alike(found, expected)
    assert not torch.equal(found[0], family(name).read(by_kernels=True))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_gradients_of_one_adapted_layer_match(name: str) -> None:
    """Where nothing below is trained: in the last block, and in the middle of it."""
    for target in (r".*\.1\..*(v_proj|value)", r".*\.1\..*(down_proj|intermediate\.dense)"):
        base, method = with_method(name, LoraSettings(rank=2, alpha=4, target_modules=(target,)))
        weights = list(method.parameters().values())
        assert len(weights) == 2
        found, expected = (
            with_gradients(lambda by=by, base=base: base.read(by_kernels=by), weights) for by in (True, False)
        )
        assert_alike(found, expected)


@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
def test_checkpointed_gradients_have_the_same_bits(name: str) -> None:
    """To the bit: blocks are computed again from what enters them."""
    base, method = with_method(name, LoraSettings(rank=3, alpha=4))
    weights = list(method.parameters().values())
    plain = with_gradients(lambda: base.read(by_kernels=True), weights)
    with fused(base.blocks, base.fusing), checkpointing(base.blocks), packed(base.model, base.packing):
        again = with_gradients(lambda: base.batch().states(base.model, None), weights)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@pytest.mark.parametrize("option", [{"dora": True}, {"dropout": 0.3}], ids=["dora", "dropout"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_dora_and_dropout_leave_their_blocks_plain(name: str, option: dict[str, Any], calls: list[int]) -> None:
    """What they change is left to their own code; blocks that they leave alone are fused."""
    why_not = (
        "DoRA's magnitudes is not among the kernels" if "dora" in option else "LoRA's dropout is not among the kernels"
    )
    base, method = with_method(name, LoraSettings(rank=3, alpha=4, **option))
    assert set(why_not_fused(base.blocks, base.fusing)) == {why_not}
    method.train_mode(True)
    weights = list(method.parameters().values())
    found = []
    for by_kernels in (True, False):
        torch.manual_seed(0)
        found.append(with_gradients(lambda by=by_kernels: base.read(by_kernels=by), weights))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert calls == []
    base, method = with_method(name, LoraSettings(rank=3, alpha=4, layers=(1,), **option))
    with torch.no_grad():
        assert_alike([base.read(by_kernels=True)], [base.read(by_kernels=False)])
    assert len(calls) == 4


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("which", ["bert", "llama"])
def test_quantized_layers_are_fused(
    which: str, quant_type: Any, request: pytest.FixtureRequest, calls: list[int]
) -> None:
    assembled = on_base(request.getfixturevalue(which), QloraSettings(rank=3, quant_type=quant_type))
    shake(assembled)
    assert assembled.how_it_reads() == {"sequences": "packed", "blocks": "fused"}
    calls.clear()
    found, expected = features_both_ways(assembled)
    assert len(calls) == 4 * len(assembled.blocks) * 2
    assert_alike(found, expected)


def features_both_ways(assembled: Assembled) -> tuple[list[Tensor], list[Tensor]]:
    """Pooled vectors and the gradients of the method's weights, by the kernels and by the model's own code. The kernels
    read twice: once more without gradients."""
    batch = packed_batch(assembled)
    weights = list(assembled.method.parameters().values())
    with assembled.reading():
        found = with_gradients(lambda: assembled.model.features(batch, (-1,)), weights)
        with torch.no_grad():
            assert_alike([assembled.model.features(batch, (-1,))], found[:1])
    with packed(assembled.backbone, assembled.packing):
        expected = with_gradients(lambda: assembled.model.features(batch, (-1,)), weights)
    return found, expected


def packed_batch(assembled: Assembled) -> Batch:
    rows = sequences(9, seed=3)
    prefix = assembled.method.virtual_token_ids
    return collate(rows, np.arange(9), 0, prefix, first_position=assembled.packing.first_position)


@pytest.mark.parametrize("which", ["bert", "llama"])
def test_trained_blocks_are_fused(which: str, request: pytest.FixtureRequest, calls: list[int]) -> None:
    """Like the frozen ones below them."""
    settings = FeatureExtractionSettings(trainable_layers=1)
    assembled = on_base(request.getfixturevalue(which), settings, attached=False)
    assert assembled.fusing.why_not is None
    attach(assembled, Start(torch.Generator().manual_seed(0), []))
    assert assembled.how_it_reads()["blocks"] == "fused"
    shake(assembled)
    calls.clear()
    found, expected = features_both_ways(assembled)
    assert len(calls) == 4 * len(assembled.blocks) * 2
    assert_alike(found, expected)


@pytest.mark.parametrize("which", ["bert", "llama"])
def test_trained_blocks_compute_in_fp32_above_a_base_of_16_bits(which: str, request: pytest.FixtureRequest) -> None:
    """What is handed to them beside the states, the angles of rotary embedding, is of 16 bits."""
    source = find(str(request.getfixturevalue(which)))
    task = Classification.on(source, LABELS, None, 0)
    settings = FeatureExtractionSettings(trainable_layers=1)
    assembled = assemble(task, settings, device=torch.device("cpu"), dtype=torch.bfloat16)
    attach(assembled, Start(torch.Generator().manual_seed(0), []))
    assert assembled.how_it_reads()["blocks"] == "fused"
    found, expected = features_both_ways(assembled)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        off = float((one.float() - other.float()).norm() / other.float().norm().clamp_min(1e-6))
        assert off < 2e-2, off


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("llama", "layers.1.self_attn.k_proj"),
        ("llama", "layers.1.post_attention_layernorm"),
        ("bert", "encoder.layer.1.output.dense"),
        ("bert", "encoder.layer.1.attention.output.LayerNorm"),
    ],
)
def test_gradient_of_one_trained_weight_matches(name: str, part: str, calls: list[int]) -> None:
    """A linear layer's weight or a norm's."""
    base = Base(copy.deepcopy(family(name).model), family(name).packing, family(name).fusing)
    weight = base.model.get_submodule(part).weight.requires_grad_()
    assert why_not_fused(base.blocks, base.fusing) == []
    calls.clear()
    found, expected = (with_gradients(lambda by=by: base.read(by_kernels=by), [weight]) for by in (True, False))
    assert len(calls) == 4 * len(base.blocks)
    assert_alike(found, expected)


def test_gradient_of_one_trained_bias_matches() -> None:
    base = Base(copy.deepcopy(family("bert").model), family("bert").packing, family("bert").fusing)
    bias = base.model.get_submodule("encoder.layer.1.output.dense").bias.requires_grad_()
    assert why_not_fused(base.blocks, base.fusing) == []
    found, expected = (with_gradients(lambda by=by: base.read(by_kernels=by), [bias]) for by in (True, False))
    assert_alike(found, expected)


def test_a_trained_weight_below_a_lora_delta_leaves_its_block_plain(llama: Path) -> None:
    assembled = on_base(llama, LoraSettings(rank=2))
    assembled.model.get_submodule(f"{assembled.architecture.blocks[1]}.mlp.up_proj").base_layer.weight.requires_grad_()
    why = "weights below a LoRA delta train"
    assert assembled.how_it_reads()["blocks"] == f"fused, 1 of 2 plain: {why}"


def test_approximate_gelu_stays_plain() -> None:
    """Though of the same type."""
    model = copy.deepcopy(family("bert").model)
    block = blocks_of(model)[1]
    block.intermediate.intermediate_act_fn = nn.GELU()  # type: ignore[union-attr]
    base = base_of(model)
    assert why_not_fused(base.blocks, base.fusing) == []
    block.intermediate.intermediate_act_fn = nn.GELU(approximate="tanh")  # type: ignore[union-attr]
    base = base_of(model)
    assert why_not_fused(base.blocks, base.fusing) == ["its activation is GELU"]


def test_fused_dropout_draws_as_the_models_own_code() -> None:
    """The same numbers fused and plain, for the same seed; and other ones for another."""
    model = made("BertConfig", {**SMALL, "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.0})
    base = base_of(model)
    assert base.fusing.why_not is None
    for part in model.modules():
        part.training = isinstance(part, nn.Dropout)
    found = {}
    for seed in (0, 1):
        for by_kernels in (True, False):
            torch.manual_seed(seed)
            found[seed, by_kernels] = base.read(by_kernels=by_kernels)
    for seed in (0, 1):
        assert_alike([found[seed, True]], [found[seed, False]])
    assert (found[0, True] - found[1, True]).abs().max() > 0.1


# ---------------------------------------------------------------------------------------------------- what was before


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_blocks_get_their_own_forward_back(name: str) -> None:
    """After, after an exception, and in the right order where blocks are checkpointed inside."""
    base = family(name)
    assert not any("forward" in vars(block) for block in base.blocks)
    inside: list[Any] = []

    def fail() -> None:
        inside[:] = [vars(block)["forward"] for block in base.blocks]
        raise ValueError("in here")

    with pytest.raises(ValueError, match="in here"), fused(base.blocks, base.fusing):
        fail()
    assert len(inside) == 2
    assert not any("forward" in vars(block) for block in base.blocks)
    with fused(base.blocks, base.fusing):
        before: Any = [block.forward for block in base.blocks]
        with pytest.raises(ValueError, match="in here"), checkpointing(base.blocks):
            fail()
        assert not any(one is other for one, other in zip(inside, before, strict=True))
        assert all(block.forward is one for block, one in zip(base.blocks, before, strict=True))
    assert not any("forward" in vars(block) for block in base.blocks)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_changed_lora_weights_are_seen(name: str) -> None:
    """The change that is trained is seen at once."""
    base, method = with_method(name, LoraSettings(rank=3, alpha=4))
    with packed(base.model, base.packing), fused(base.blocks, base.fusing):
        before = base.batch().states(base.model, None)
        for weight in method.parameters().values():
            weight *= 1.5
        after = base.batch().states(base.model, None)
    assert (before - after).abs().max() > 0.05
    assert_alike([after], [base.read(by_kernels=False)])


# ------------------------------------------------------------------------------------------------------------- wanted


def wanted_of(batch: Batch, which: str) -> Tensor:
    """As tasks ask for positions."""
    tokens = int(batch.starts[-1])
    if which == "learned":  # in generation: some of each sequence, of some none
        return torch.tensor([at for at in range(tokens) if at % 3 == 1 and not 20 < at < 60])
    if which in ("none", "all"):
        return torch.arange(tokens if which == "all" else 0)
    found = pooled_positions(batch.starts, which.partition("-")[0], 1 if "-" in which else 0)  # type: ignore[arg-type]
    assert found is not None
    return found


@pytest.mark.parametrize("which", ["learned", "none", "all", "cls", "last", "last-virtual"])
@pytest.mark.parametrize("name", ["llama", "mistral", "bert", "roberta", "gpt2"])
def test_wanted_positions_match_those_of_the_whole_output(name: str, which: str, calls: list[int]) -> None:
    """The same states and gradients, whoever computes the blocks; after its attention the last block leaves the others
    out."""
    base, method = with_method(name, LoraSettings(rank=3, alpha=4))
    weights = list(method.parameters().values())
    wanted = wanted_of(base.batch(), which)
    assert (which == "none") == (not len(wanted))
    expected = with_gradients(lambda: base.read(by_kernels=False)[wanted], weights)
    plain = with_gradients(lambda: base.read(by_kernels=False, wanted=wanted), weights)
    assert_alike(plain, expected, 1e-6)
    calls.clear()
    found = with_gradients(lambda: base.read(by_kernels=True, wanted=wanted), weights)
    assert_alike(found, expected)
    tokens = int(base.batch().starts[-1])
    assert calls == ([] if name == "gpt2" else [tokens] * 5 + [len(wanted)] * 3)


@pytest.mark.parametrize("pool", ["mean", "max", "cls", "last"])
@pytest.mark.parametrize("which", ["bert", "llama"])
def test_pooling_leaves_out_virtual_tokens(which: str, pool: Pooling, request: pytest.FixtureRequest) -> None:
    """The prompt's own positions are left out, by the kernels and by the model's own code."""
    settings = PromptTuningSettings(num_virtual_tokens=3, deep=False)
    assembled = on_base(request.getfixturevalue(which), settings, pool=pool)
    shake(assembled)
    found, expected = features_both_ways(assembled)
    assert_alike(found, expected)
    assert found[1].abs().max() > 1e-3
    with packed(assembled.backbone, assembled.packing), torch.no_grad():
        batch = packed_batch(assembled)
        rows = batch.split(batch.states(assembled.backbone, None))
    by_hand = {
        "mean": lambda x: x[3:].mean(0),
        "max": lambda x: x[3:].amax(0),
        "cls": lambda x: x[3],
        "last": lambda x: x[-1],
    }
    assert_alike([found[0]], [torch.stack([by_hand[pool](row) for row in rows])])


# ------------------------------------------------------------------------------------------------------------ the run


@pytest.mark.parametrize(
    ("which", "method", "options", "blocks"),
    [
        ("bert", "lora", {"rank": 2}, "fused"),
        ("llama", "lora", {"rank": 2}, "fused"),
        ("llama", "qlora", {"rank": 2}, "fused"),
        ("gpt2", "lora", {"rank": 2}, "plain: its blocks are of another form"),
        ("bert", "lora", {"rank": 2, "dora": True}, "plain: DoRA's magnitudes is not among the kernels"),
        ("llama", "feature-extraction", {"trainable_layers": 1}, "fused"),
        ("bert", "feature-extraction", {}, "fused"),
    ],
)
def test_record_says_which_blocks_were_fused(
    which: str, method: str, options: dict[str, Any], blocks: str, request: pytest.FixtureRequest, tickets: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    base = str(request.getfixturevalue(which))
    steps = {} if options == {} else {"epochs": 1}
    record = capotune.train(method, data=str(tickets), model=base, out=tmp_path / "run", **options, **steps)
    assert record["result"]["blocks"] == blocks
    assert record["result"]["sequences"] == "packed"


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.fixture
def small_steps() -> Callable[[], Tensor]:
    """Some work that allocates and frees tensors of many sizes."""

    def work() -> Tensor:
        x = torch.linspace(-1, 1, 2**18)
        for at in range(20):
            x = (x * 1.01)[: 2**18 - at].tanh()
        return x

    return work


@pytest.fixture
def keeps_memory() -> Iterator[None]:
    """The process as it was."""
    yield
    with reusing_memory():
        pass


@pytest.mark.usefixtures("keeps_memory")
def test_memory_is_reused_without_a_change_of_results(small_steps: Callable[[], Tensor]) -> None:
    """Once, inside itself, and after an exception."""
    expected = small_steps()
    with reusing_memory():
        assert torch.equal(small_steps(), expected)
        with reusing_memory():
            assert torch.equal(small_steps(), expected)
        assert torch.equal(small_steps(), expected)
        with pytest.raises(KeyError), reusing_memory():
            raise KeyError
        kept = small_steps()
    assert torch.equal(kept, expected)
    assert torch.equal(small_steps(), expected)


class Told:
    """A C library that notes what it is asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def mallopt(self, option: int, value: int) -> int:
        self.calls.append((option, value))
        return 1

    def malloc_trim(self, pad: int) -> int:
        self.calls.append((pad,))
        return 1


@pytest.mark.parametrize(("sparing", "mapped"), [(False, 2**23), (True, 2**20)])
def test_the_system_gets_memory_back_after_it(sparing: bool, mapped: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after an exception; thresholds of what is kept and what is mapped."""
    told = Told()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: told)
    with reusing_memory(sparing=sparing):
        inside = dict(told.calls)  # type: ignore[arg-type]
    assert inside == {execution_module._MMAP_THRESHOLD: mapped, execution_module._TRIM_THRESHOLD: 2**31 - 1}
    after = told.calls[2:]
    assert after[-1] == (0,)
    assert dict(after[:-1]) == {execution_module._MMAP_THRESHOLD: 2**25, execution_module._TRIM_THRESHOLD: 2**26}  # type: ignore[arg-type]
    told.calls.clear()
    with pytest.raises(KeyError), reusing_memory():
        raise KeyError
    assert told.calls[-1] == (0,)
    assert len(told.calls) == 5


@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_is_sparing_with_memory_where_it_is_asked_to_be(
    checkpointed: bool, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradient checkpointing nothing is kept for the next step; without it, what is lent."""
    asked: list[bool] = []

    @contextmanager
    def note(*, sparing: bool) -> Iterator[None]:
        asked.append(sparing)
        yield

    monkeypatch.setattr(execution_module, "reusing_memory", note)
    settings = LoraSettings(rank=2, gradient_checkpointing=checkpointed, epochs=1)
    assembled = on_base(llama, settings)
    examples = Examples(TokenRows(sequences(4, seed=0), 0), torch.tensor([0, 1, 0, 1]))
    lent: list[bool] = []
    loop.train(
        assembled, examples, assembled.method.settings, seed=0, evaluate=lambda: held_out_score(assembled, examples),
        on_step=lambda *_: lent.append(execution().memory is not None) or False,
    )  # fmt: skip
    assert asked == [checkpointed]
    assert lent
    assert set(lent) == {not checkpointed}
    assert execution().memory is None


class Empty:
    """A C library without those functions."""


@pytest.mark.parametrize("trouble", [OSError, TypeError, None])
def test_other_c_libraries_are_left_alone(
    trouble: type[Exception] | None, monkeypatch: pytest.MonkeyPatch, small_steps: Callable[[], Tensor]
) -> None:
    def load(_: object) -> Empty:
        if trouble is not None:
            raise trouble("no such library")
        return Empty()

    expected = small_steps()
    monkeypatch.setattr(ctypes, "CDLL", load)
    with reusing_memory():
        assert torch.equal(small_steps(), expected)
    with pytest.raises(KeyError), reusing_memory():
        raise KeyError
