"""What every method promises when a model learns to write, on every family: one contract, asked of each variant."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_helpers import CHATML, as_examples, change_config, examples, logits, on_base, pairs, with_tokenizer
from helpers import CPU, TRAINED, assert_same_bits, contents, fit, folder_digest, shake, trained_count, weights
from safetensors.torch import load_file, save_file
from torch import nn

import capotune
from capotune.adapters.assemble import Assembled, attach
from capotune.adapters.store import read_adapter, save_adapter
from capotune.engine.checkpoint import load_checkpoint, save_checkpoint
from capotune.engine.state import TrainingState
from capotune.errors import AdapterError, SettingError
from capotune.evaluation.forward import held_out_score
from capotune.kernels.nf4 import Linear4bit
from capotune.methods.base import Start
from capotune.methods.feature_extraction.settings import FeatureExtractionSettings
from capotune.methods.lora.method import LoraLinear
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.methods.qlora.settings import QloraSettings
from capotune.settings import TrainingSettings
from capotune.tasks.loading import load_adapter

QUICK: dict[str, Any] = {"epochs": 3, "patience": 3, "batch_size": 8, "warmup": 0.0}
LORA: dict[str, Any] = {"rank": 4, "alpha": 8, "learning_rate": 3e-2, **QUICK}
PROMPT: dict[str, Any] = {"num_virtual_tokens": 5, "learning_rate": 0.1, **QUICK}
VARIANTS: dict[str, TrainingSettings] = {
    "features-k1": FeatureExtractionSettings(trainable_layers=1, learning_rate=1e-2, **QUICK),
    "features-k2": FeatureExtractionSettings(trainable_layers=2, learning_rate=1e-2, **QUICK),
    "lora": LoraSettings(**LORA),
    "lora-dropout": LoraSettings(dropout=0.2, **LORA),
    "lora-dora": LoraSettings(dora=True, **LORA),
    "lora-rslora": LoraSettings(rslora=True, **LORA),
    "lora-layers": LoraSettings(layers=(2,), **LORA),
    "qlora": QloraSettings(**LORA),
    "qlora-fp4": QloraSettings(quant_type="fp4", **LORA),
    "qlora-plain": QloraSettings(double_quant=False, block_size=32, **LORA),
    "prompt-vocabulary": PromptTuningSettings(init="vocabulary", deep=False, **PROMPT),
    "prompt-text": PromptTuningSettings(deep=False, init="text", init_text="my friend, what colour is it?", **PROMPT),
    "prompt-deep": PromptTuningSettings(deep=True, **PROMPT | {"learning_rate": 0.3}),
    "prompt-hard": PromptTuningSettings(hard=True, init="text", init_text="my friend, what colour is it?", **PROMPT),
}
BASES = ("llama", "gpt2", "qwen2")
PAIRS = [(variant, base) for variant in VARIANTS for base in BASES]
EVERYWHERE = ("features-k1", "lora-dropout", "qlora", "prompt-vocabulary", "prompt-deep")
STEPPED = [  # a hard prompt does not train; the rarer variants train on one base
    (variant, base)
    for variant, base in PAIRS
    if variant != "prompt-hard" and (base == "llama" or variant in EVERYWHERE)
]
STOPPED = [
    pair for pair in STEPPED if pair[1] == "llama" and pair[0] not in ("qlora-fp4", "qlora-plain", "prompt-text")
]
STOPPED += [("features-k1", "gpt2"), ("qlora", "gpt2"), ("lora-dropout", "qwen2")]
LORA_FAMILY = [pair for pair in PAIRS if "lora" in pair[0]]
BLOCKS = 3
KEY_WIDTH = {"llama": 16, "gpt2": 32, "qwen2": 16}

LLAMA_SHAPES = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
SHAPES = {"llama": LLAMA_SHAPES, "gpt2": [(32, 96), (32, 32), (32, 128), (128, 32)], "qwen2": LLAMA_SHAPES}
"""(in, out) of every linear layer of a block, in order."""
BLOCK_EXTRA = {
    "llama": 2 * 32,  # two RMS norms; no biases
    "gpt2": (96 + 32 + 128 + 32) + 4 * 32,  # biases, two layer norms with theirs
    "qwen2": 2 * 32 + (32 + 16 + 16),  # biases of queries, keys and values
}
"""Weights of one block that are not in a linear layer's matrix."""
NORM_ABOVE = {"llama": 32, "gpt2": 2 * 32, "qwen2": 32}
BLOCK_PATH = {"llama": "model.layers", "gpt2": "transformer.h", "qwen2": "model.layers"}
NORM_PATH = {"llama": "model.norm", "gpt2": "transformer.ln_f", "qwen2": "model.norm"}


def trainable_by_hand(variant: str, base: str) -> int:
    """The method's own weights, counted from the table of shapes."""
    settings = VARIANTS[variant]
    if isinstance(settings, PromptTuningSettings):
        return 4 * BLOCKS * 2 * KEY_WIDTH[base] if settings.deep else 5 * 32
    if isinstance(settings, FeatureExtractionSettings):
        block = sum(into * out for into, out in SHAPES[base]) + BLOCK_EXTRA[base]
        return (settings.trainable_layers or 0) * block + NORM_ABOVE[base]
    blocks = BLOCKS if settings.layers is None else len(settings.layers)
    return blocks * sum(4 * into + out * 4 + (out if settings.dora else 0) for into, out in SHAPES[base])


# ------------------------------------------------------------------------------------------------- one model in memory


@pytest.mark.parametrize(("variant", "base"), PAIRS)
def test_trainable_count_is_the_formula(variant: str, base: str, writers: dict[str, Path]) -> None:
    assembled = on_base(writers[base], VARIANTS[variant])
    assert trained_count(assembled) == trainable_by_hand(variant, base)
    assert assembled.expected_trainable() == trainable_by_hand(variant, base)
    trained = {id(weight) for weight in assembled.trainable().values()}
    assert all(weight.requires_grad for weight in assembled.trainable().values())
    assert not [
        name for name, one in assembled.model.named_parameters() if one.requires_grad and id(one) not in trained
    ]


@pytest.mark.parametrize(("variant", "base"), PAIRS)
def test_identity_at_the_start(variant: str, base: str, writers: dict[str, Path]) -> None:
    before = logits(on_base(writers[base], VARIANTS[variant], attached=False)) if "prompt" not in variant else None
    assembled = on_base(writers[base], VARIANTS[variant])
    if before is None:
        assert not assembled.method.identity_at_start
        before = logits(on_base(writers[base], None))
        assert (logits(assembled) - before).abs().max() > 1e-2
    else:
        assert assembled.method.identity_at_start
        torch.testing.assert_close(logits(assembled), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "base"), [pair for pair in PAIRS if "prompt-" in pair[0] and pair[0] != "prompt-deep"]
)
def test_a_prompt_of_words_is_those_words(variant: str, base: str, writers: dict[str, Path]) -> None:
    """At the start the vectors are embeddings; they stand right before the text, wherever the row is padded."""
    words = "my friend, what colour is it?"
    assembled = on_base(writers[base], VARIANTS[variant], words=words)
    layer: Any = assembled.model.get_submodule(assembled.architecture.embedding)
    ids = assembled.task.tokenizer(words)["input_ids"]
    known = layer.base_layer.weight[ids]
    if variant == "prompt-vocabulary":
        assert all(any(torch.equal(vector, row) for row in known) for vector in layer.prompt.detach())
        return
    shares = [share.mean(0) for share in known.tensor_split(5)]
    assert torch.equal(layer.prompt.detach(), torch.stack(shares))


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_a_soft_prompt_of_as_many_words_reads_as_they_do(base: str, deep: bool, writers: dict[str, Path]) -> None:
    words, plain = "my friend", on_base(writers[base], None)
    ids = plain.task.tokenizer(words)["input_ids"]
    settings = PromptTuningSettings(num_virtual_tokens=len(ids), init="text", init_text=words, deep=deep)
    rows = [[7, 8, 9], [10, 11, 12, 13, 14, 15]]
    found = logits(on_base(writers[base], settings, words=words), rows)
    expected = [logits(plain, [ids + row])[len(ids) :] for row in rows]
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["features-k1", "lora", "qlora", "prompt-vocabulary", "prompt-deep"])
@pytest.mark.parametrize("base", BASES)
def test_a_row_does_not_depend_on_the_rows_beside_it(variant: str, base: str, writers: dict[str, Path]) -> None:
    assembled = on_base(writers[base], VARIANTS[variant])
    shake(assembled)
    rows = [[7, 8, 9], list(range(20, 60)), [5], list(range(100, 112))]
    alone = torch.cat([logits(assembled, [row]) for row in rows])
    torch.testing.assert_close(logits(assembled, rows), alone, rtol=0, atol=1e-5)


@dataclass(frozen=True)
class Whole:
    """One uninterrupted training and what is compared with it."""

    losses: list[float]
    state: TrainingState
    weights: dict[str, torch.Tensor]
    early: dict[str, torch.Tensor]
    """The weights after ``EARLY`` steps."""
    held: list[float]
    """The held-out loss before and after."""


EARLY = 4


def taught(assembled: Assembled, **options: Any) -> tuple[TrainingState, list[float]]:
    """Train on the small questions with the method's own settings."""
    given, held = examples(assembled), examples(assembled, 12, seed=1)
    return fit(assembled, train_examples=given, held_examples=held, **options)


@pytest.fixture(scope="module")
def whole_trainings() -> dict[tuple[str, str], Whole]:
    return {}


@pytest.fixture
def whole(variant: str, base: str, writers: dict[str, Path], whole_trainings: dict[tuple[str, str], Whole]) -> Whole:
    """The pair's training from seed 0, done once for all tests that look at it."""
    if (variant, base) not in whole_trainings:
        assembled = on_base(writers[base], VARIANTS[variant])
        held, early = examples(assembled, 12, seed=1), {}

        def on_step(state: TrainingState, *_: Any) -> bool:
            if state.step == EARLY:
                early.update(weights(assembled))
            return False

        before = -held_out_score(assembled, held)[0]
        state, losses = taught(assembled, on_step=on_step)
        after = -held_out_score(assembled, held)[0]
        whole_trainings[variant, base] = Whole(losses, state, weights(assembled), early, [before, after])
    return whole_trainings[variant, base]


@pytest.mark.parametrize(("variant", "base"), STEPPED)
def test_the_held_out_loss_falls(variant: str, base: str, whole: Whole, writers: dict[str, Path]) -> None:
    before, after = whole.held
    assert 5.5 < before < 7  # log 360 = 5.9: random weights know nothing
    assert after < before - (0.1 if "prompt" in variant else 0.7)
    assert whole.state.best_score == (-after,)
    start = weights(on_base(writers[base], VARIANTS[variant]))
    assert not [key for key in start if torch.equal(whole.weights[key], start[key])]


@pytest.mark.parametrize("variant", ["features-k1", "lora", "prompt-vocabulary"])
def test_the_best_weights_are_kept(variant: str, llama_writer: Path) -> None:
    """Held-out rows with answers that training makes less likely: of all epochs an early one comes back."""
    assembled = on_base(llama_writer, VARIANTS[variant].model_copy(update={"epochs": 4, "patience": 4}))
    held = as_examples(assembled, [replace(pair, completion="parcel parcel parcel") for pair in pairs(12)])
    after, scores = [weights(assembled)], list(held_out_score(assembled, held))

    def on_epoch(_state: TrainingState, _loss: float, perplexity: float) -> None:
        after.append(weights(assembled))
        scores.append(-math.log(perplexity))

    state, _ = fit(assembled, train_examples=examples(assembled), held_examples=held, on_epoch=on_epoch)
    best = max(range(5), key=scores.__getitem__)
    assert state.epoch == 4
    assert state.best_epoch == best < 4
    assert state.best_score == pytest.approx((scores[best],))
    assert_same_bits(weights(assembled), after[best])


@pytest.mark.parametrize(("variant", "base"), PAIRS)
def test_base_is_bitwise_unchanged(variant: str, base: str, writers: dict[str, Path]) -> None:
    on_disk = folder_digest(writers[base])
    assembled = on_base(writers[base], VARIANTS[variant], attached=False)
    before, parts = contents(assembled.model), dict(assembled.model.named_modules())
    attach(assembled, Start(torch.Generator().manual_seed(0), [9, 10]))
    taught(assembled, on_step=lambda state, *_: state.step == 2)
    shake(assembled)
    logits(assembled)
    assembled.method.detach()
    assert_same_bits(contents(assembled.model), before)
    assert {name: id(part) for name, part in assembled.model.named_modules()} == {n: id(p) for n, p in parts.items()}
    assert folder_digest(writers[base]) == on_disk


@pytest.mark.parametrize(("variant", "base"), PAIRS)
def test_saved_and_loaded_gives_equal_outputs(
    variant: str, base: str, writers: dict[str, Path], tmp_path: Path
) -> None:
    assembled = on_base(writers[base], VARIANTS[variant])
    shake(assembled)
    save_adapter(tmp_path / "adapter", assembled, TRAINED)
    loaded = load_adapter(read_adapter(tmp_path / "adapter"), model=None, device=CPU)
    assert torch.equal(logits(loaded), logits(assembled))
    assert_same_bits(weights(loaded), weights(assembled))
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    resting = 2 * BLOCKS * KEY_WIDTH[base] if variant == "prompt-deep" else 0  # a deep prompt's first vector stays
    assert sum(tensor.numel() for tensor in stored.values()) == trainable_by_hand(variant, base) + resting
    for name in ("chat_template", "template_from", "separator", "learn", "max_length", "end_ids", "objective", "chat"):
        assert getattr(loaded.task, name) == getattr(assembled.task, name), name


@pytest.mark.parametrize(("variant", "base"), LORA_FAMILY)
def test_merged_is_unmerged(variant: str, base: str, writers: dict[str, Path]) -> None:
    assembled = on_base(writers[base], VARIANTS[variant])
    before, start = contents(assembled.model), logits(assembled)
    shake(assembled)
    unmerged = logits(assembled)
    assert (unmerged - start).abs().max() > 1e-2
    assert assembled.method.merge()
    assert not [name for name, _ in assembled.model.named_modules() if "lora" in name]
    torch.testing.assert_close(logits(assembled), unmerged, rtol=1e-5, atol=2e-5)
    assembled.method.detach()
    kept = {name.replace(".base_layer", ""): before[name] for name in before if "lora_" not in name}
    assert_same_bits(contents(assembled.model), kept)


@pytest.mark.parametrize(("variant", "base"), STEPPED)
def test_same_seed_same_bits(variant: str, base: str, whole: Whole, writers: dict[str, Path]) -> None:
    def trained(seed: int) -> dict[str, torch.Tensor]:
        assembled = on_base(writers[base], VARIANTS[variant])
        taught(assembled, seed=seed, on_step=lambda state, *_: state.step == EARLY)
        return weights(assembled)

    torch.rand(17)  # what the process drew before does not matter
    assert_same_bits(trained(0), whole.early)
    other = trained(1)  # the same start, another order of the rows
    assert not [key for key in other if torch.equal(other[key], whole.early[key])]


@pytest.mark.parametrize(("variant", "base"), STOPPED)
def test_interrupted_is_uninterrupted(
    variant: str, base: str, whole: Whole, writers: dict[str, Path], tmp_path: Path
) -> None:
    losses: list[float] = []
    for stop in (3, 10, None):  # in the middle of the first epoch, at the last batch of the second, not again
        assembled = on_base(writers[base], VARIANTS[variant], seed=0 if stop == 3 else 5)  # resumed from anywhere
        torch.manual_seed(len(losses))
        state = load_checkpoint(tmp_path) if losses else None
        state, part = taught(assembled, state=state, on_step=lambda state, *_, stop=stop: state.step == stop)
        losses += part
        if stop:
            save_checkpoint(tmp_path, state)
    assert losses == whole.losses
    assert_same_bits(weights(assembled), whole.weights)
    for name in ("epoch", "step", "best_epoch", "best_score"):
        assert getattr(state, name) == getattr(whole.state, name), name


# ------------------------------------------------------------------------------------------ what an adapter consists of


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("layers", [1, 2])
def test_feature_extraction_keeps_the_last_blocks_and_the_norm(
    layers: int, base: str, writers: dict[str, Path], tmp_path: Path
) -> None:
    assembled = on_base(writers[base], VARIANTS[f"features-k{layers}"])
    taught(assembled)
    save_adapter(tmp_path / "adapter", assembled, TRAINED)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    places = [f"{BLOCK_PATH[base]}.{number}." for number in range(BLOCKS - layers, BLOCKS)] + [NORM_PATH[base] + "."]
    places = ["base_model.model." + place for place in places]
    assert {place for place in places for key in stored if key.startswith(place)} == set(places)
    assert not [key for key in stored if not key.startswith(tuple(places))]
    original = load_file(writers[base] / "model.safetensors")
    for key, tensor in stored.items():
        assert tensor.shape == original[key.removeprefix("base_model.model.")].shape
        assert not torch.equal(tensor, original[key.removeprefix("base_model.model.")]), key


@pytest.mark.parametrize("variant", ["features-k2", "lora", "lora-dora", "qlora", "prompt-vocabulary"])
@pytest.mark.parametrize("base", [*BASES, "untied"])
def test_the_output_layer_stays_as_it_is(
    variant: str, base: str, writers: dict[str, Path], untied_writer: Path
) -> None:
    """No LoRA beside it, not in 4 bits, no gradient; where it is the embedding it stays the very tensor."""
    folder = {**writers, "untied": untied_writer}[base]
    assembled = on_base(folder, VARIANTS[variant])
    stored = load_file(folder / "model.safetensors")
    embedding: Any = assembled.model.get_submodule(assembled.architecture.embedding)
    embedding = getattr(embedding, "base_layer", embedding)
    taught(assembled, on_step=lambda state, *_: state.step == 2)
    head = assembled.model.lm_head
    assert type(head) is nn.Linear
    assert head.weight.grad is None
    assert embedding.weight.grad is None
    assert (head.weight is embedding.weight) == (base != "untied")
    name = "lm_head.weight" if base == "untied" else f"{assembled.architecture.embedding}.weight"
    assert torch.equal(head.weight, stored[name])
    adapted = [path for path, part in assembled.model.named_modules() if isinstance(part, LoraLinear)]
    assert len(adapted) == (len(SHAPES[base if base != "untied" else "llama"]) * BLOCKS if "lora" in variant else 0)
    packed = [path for path, part in assembled.model.named_modules() if isinstance(part, Linear4bit)]
    assert len(packed) == (len(adapted) if variant == "qlora" else 0)


def test_even_a_named_output_layer_gets_no_lora(untied_writer: Path) -> None:
    with pytest.raises(SettingError, match="'lm_head' matches no linear layer"):
        on_base(untied_writer, LoraSettings(rank=4, target_modules=("lm_head",)))


@pytest.mark.parametrize("base", [*BASES, "untied"])
def test_a_packed_base_is_the_plain_one_within_its_codes(
    base: str, writers: dict[str, Path], untied_writer: Path
) -> None:
    """Streamed from disk, every tensor arrives: with the linear layers unpacked the logits are the plain model's of
    the same values. A file that also holds the tied output layer reads the same."""
    folder = {**writers, "untied": untied_writer}[base]
    packed, plain = on_base(folder, VARIANTS["qlora"], attached=False), on_base(folder, None)
    for path in packed.architecture.linears:
        layer, target = packed.model.get_submodule(path), plain.model.get_submodule(path)
        weight = layer.dense_weight(torch.float32)
        target.weight = nn.Parameter(weight.t().contiguous() if base == "gpt2" else weight, requires_grad=False)
        assert layer.bias is None or torch.equal(layer.bias, target.bias)
    torch.testing.assert_close(logits(packed), logits(plain), rtol=0, atol=1e-5)


def test_a_stored_copy_of_a_tied_output_layer_changes_nothing(llama_writer: Path, tmp_path: Path) -> None:
    folder = with_tokenizer(llama_writer, tmp_path / "both", chat_template=CHATML)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    one, other = (on_base(path, VARIANTS["qlora"]) for path in (llama_writer, folder))
    assert torch.equal(logits(one), logits(other))
    assert other.model.lm_head.weight is other.model.model.embed_tokens.weight


# --------------------------------------------------------------------------------------------- one base, many tunings


@pytest.mark.parametrize("base", BASES)
def test_adapters_change_places_on_one_base(base: str, writers: dict[str, Path], tmp_path: Path) -> None:
    expected = {}
    for number, variant in enumerate(("features-k1", "lora", "prompt-vocabulary")):
        assembled = on_base(writers[base], VARIANTS[variant])
        shake(assembled, seed=number)
        expected[variant] = logits(assembled)
        save_adapter(tmp_path / variant, assembled, TRAINED)
    generator = capotune.load_model(writers[base])
    plain, model = logits(generator._assembled), generator.model
    for variant in ("lora", "prompt-vocabulary", "features-k1", "lora"):
        generator.use(tmp_path / variant)
        assert torch.equal(logits(generator._assembled), expected[variant])
    generator.use(None)
    assert torch.equal(logits(generator._assembled), plain)
    assert generator.model is model


def test_an_adapter_of_another_base_or_packing_is_refused_and_the_model_is_as_it_was(
    writers: dict[str, Path], untied_writer: Path, tmp_path: Path
) -> None:
    for name, folder, variant in (
        ("other", untied_writer, "lora"),
        ("packed", writers["llama"], "qlora"),
        ("mine", writers["llama"], "lora"),
    ):
        assembled = on_base(folder, VARIANTS[variant])
        shake(assembled)
        save_adapter(tmp_path / name, assembled, TRAINED)
    running = capotune.load(tmp_path / "mine")
    before = logits(running._assembled)
    for name, words in (("other", "belongs to another base"), ("packed", "trained over nf4")):
        with pytest.raises(AdapterError, match=words):
            running.use(tmp_path / name)
        assert torch.equal(logits(running._assembled), before)
    with pytest.raises(AdapterError, match="belongs to another base"):
        load_adapter(read_adapter(tmp_path / "other"), model=str(writers["llama"]), device=CPU)


@pytest.mark.usefixtures("all_bits")
def test_a_tokenizer_without_padding_trains_the_same(llama_writer: Path, tmp_path: Path) -> None:
    """What fills short rows is never read."""
    other = with_tokenizer(llama_writer, tmp_path / "other", pad=None, chat_template=CHATML)
    change_config(other, pad_token_id=None)
    results = []
    for folder in (llama_writer, other):
        assembled = on_base(folder, VARIANTS["lora"])
        given = as_examples(assembled, pairs(16))
        fit(assembled, train_examples=given, held_examples=given, on_step=lambda state, *_: state.step == 2)
        results.append((assembled.task.pad_id, weights(assembled)))
    assert [pad for pad, _ in results] == [1, 0]
    for key, weight in results[0][1].items():
        torch.testing.assert_close(results[1][1][key], weight, rtol=1e-5, atol=1e-6)
