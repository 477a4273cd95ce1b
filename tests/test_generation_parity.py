"""Learning to write against what others compute: PEFT's adapters and losses, Transformers' loss, one pass over a batch
instead of many, and everything that only saves memory or time against the same without it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from generation_helpers import (
    as_examples,
    examples,
    logits,
    make_tokenizer,
    on_base,
    pairs,
    sequences,
    with_plain_head,
)
from helpers import CPU, TRAINED, accumulate, assert_same_bits, fit, shake, weights
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, Gemma2Config

import capotune
from capotune.adapters.assemble import Assembled, attach
from capotune.adapters.store import read_adapter, save_adapter
from capotune.data.batches import IGNORE_INDEX, Batch, TokenRows, collate, parts_of
from capotune.engine.activation_cache import ActivationCache
from capotune.engine.loop import train
from capotune.engine.recorded import with_boundary
from capotune.errors import SettingError
from capotune.evaluation.forward import Examples, held_out_score, outputs
from capotune.methods import make
from capotune.methods.base import Start
from capotune.methods.feature_extraction.settings import FeatureExtractionSettings
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.methods.qlora.settings import QloraSettings
from capotune.models.fusion import Fusing
from capotune.settings import TrainingSettings
from capotune.tasks.loading import load_adapter

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's

LORA: dict[str, Any] = {"rank": 4, "alpha": 12}
PARITY: dict[str, TrainingSettings] = {
    "lora": LoraSettings(**LORA),
    "rslora": LoraSettings(rslora=True, **LORA),
    "dora": LoraSettings(dora=True, **LORA),
    "layers": LoraSettings(layers=(1,), **LORA),
    "qlora": QloraSettings(**LORA),
    "prompt-tuning": PromptTuningSettings(num_virtual_tokens=5, deep=False),
    "prefix-tuning": PromptTuningSettings(num_virtual_tokens=5, deep=True),
}
BASES = ("llama", "gpt2", "qwen2")


# ---------------------------------------------------------------------------------------- PEFT


def stored(folder: Path, assembled: Assembled, **trained: Any) -> Path:
    save_adapter(folder, assembled, TRAINED | trained)
    return folder


def base_for_peft(folder: Path, model: Path) -> Any:
    """Transformers' own model; of a packed base, its values in plain layers."""
    if "QLORA" in json.loads((folder / "capotune.json").read_text(encoding="utf-8"))["method"].upper():
        return capotune.load_base(folder)
    return AutoModelForCausalLM.from_pretrained(model).eval()


@torch.no_grad()
def peft_logits(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """Logits (tokens of all rows, vocabulary), rows padded on the right; a soft prompt's are left out."""
    found = []
    for start in range(0, len(rows), 4):
        part = rows[start : start + 4]
        batch = collate(part, np.arange(len(part)), 1)
        out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        out = out[:, out.shape[1] - batch.input_ids.shape[1] :]
        found += [one[: len(row)] for one, row in zip(out, part, strict=True)]
    return torch.cat(found)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", PARITY)
def test_peft_loads_it_and_agrees(variant: str, base: str, writers: dict[str, Path], tmp_path: Path) -> None:
    assembled = on_base(writers[base], PARITY[variant])
    start = logits(assembled, sequences(10, seed=5))
    shake(assembled)
    folder = stored(tmp_path / "adapter", assembled)
    loaded = peft.PeftModel.from_pretrained(base_for_peft(folder, writers[base]), folder).eval()
    expected = logits(assembled, sequences(10, seed=5))
    assert (expected - start).abs().max() > 1e-2
    torch.testing.assert_close(peft_logits(loaded, sequences(10, seed=5)), expected, rtol=0, atol=1e-5)


def test_a_deep_prompt_is_refused_where_attention_cannot_be_looked_into(all_writers: dict[str, Path]) -> None:
    """Gemma 2's has a form of its own, which newer Transformers takes unasked. The base is then as it was."""
    plain = on_base(all_writers["gemma2"], PARITY["prefix-tuning"], attached=False)
    plain.model.set_attn_implementation("eager")
    parts = {name: id(part) for name, part in plain.model.named_modules()}
    with pytest.raises(SettingError, match=r"`deep=True`: Gemma2Model .*Leave it out"):
        attach(plain, Start(torch.Generator().manual_seed(0), [9, 10]))
    assert {name: id(part) for name, part in plain.model.named_modules()} == parts
    unasked = replace(plain, method=make(PARITY["prefix-tuning"].model_copy(update={"deep": None})))
    attach(unasked, Start(torch.Generator().manual_seed(0), [9, 10]))
    assert unasked.method.settings.deep is False
    assert unasked.method.settings.learning_rate < 0.2
    assert "they stand before the input alone" in " ".join(unasked.method.notices())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", PARITY)
def test_keys_are_pefts_own(variant: str, base: str, writers: dict[str, Path], tmp_path: Path) -> None:
    """A model that PEFT makes from the same configuration has the same keys and shapes, and no others."""
    folder = stored(tmp_path / "adapter", on_base(writers[base], PARITY[variant]))
    config = peft.PeftConfig.from_pretrained(str(folder))
    assert config.to_dict().keys() >= json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).keys()
    assert config.task_type == "CAUSAL_LM"
    made = made_by_peft(folder, writers[base])
    theirs = peft.get_peft_model_state_dict(made)
    ours = load_file(folder / "adapter_model.safetensors")
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: one.shape for key, one in theirs.items()}
    trainable = sum(parameter.numel() for parameter in made.parameters() if parameter.requires_grad)
    assert trainable == sum(tensor.numel() for tensor in ours.values())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", ["lora", "prompt-tuning", "prefix-tuning"])
def test_peft_saves_what_it_read(variant: str, base: str, writers: dict[str, Path], tmp_path: Path) -> None:
    assembled = on_base(writers[base], PARITY[variant])
    shake(assembled)
    folder = stored(tmp_path / "ours", assembled)
    peft.PeftModel.from_pretrained(base_for_peft(folder, writers[base]), folder).save_pretrained(tmp_path / "theirs")
    assert_same_bits(
        load_file(tmp_path / "theirs" / "adapter_model.safetensors"), load_file(folder / "adapter_model.safetensors")
    )


def made_by_peft(folder: Path, model: Path) -> Any:
    """A trainable model that PEFT makes on the same base from the adapter's configuration, with its own weights."""
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode, config.base_model_name_or_path = False, None
    return peft.get_peft_model(base_for_peft(folder, model), config)


STEPS: dict[str, Any] = {
    "epochs": 4, "patience": 4, "batch_size": 10, "warmup": 0.1, "schedule": "linear", "learning_rate": 1e-2,
}  # fmt: skip
TRAINING: dict[str, TrainingSettings] = {
    "lora": LoraSettings(**LORA, **STEPS),
    "dora": LoraSettings(dora=True, **LORA, **STEPS),
    "qlora": QloraSettings(**LORA, **STEPS),
    "prompt-tuning": PromptTuningSettings(num_virtual_tokens=5, deep=False, **STEPS | {"learning_rate": 0.1}),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", TRAINING)
def test_twenty_steps_have_pefts_losses(variant: str, base: str, writers: dict[str, Path], tmp_path: Path) -> None:
    """Equal first weights and batches, AdamW, a warm-up of two steps and a linear fall, gradients clipped at norm 1."""
    settings = TRAINING[variant]
    assembled = on_base(writers[base], settings)
    folder = stored(tmp_path / "adapter", assembled)
    theirs = made_by_peft(folder, writers[base]).eval()  # no dropout: the random masks are not comparable
    peft.set_peft_model_state_dict(theirs, load_file(folder / "adapter_model.safetensors"))
    for module in assembled.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    given = examples(assembled, 50)
    batches, ours = steps_of(assembled, given)

    parameters = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (step + 1) / 3 if step < 2 else 1 - (step - 2) / 18
    )
    losses, norms = [], []
    for rows in batches:
        batch = collate(given.rows.sequences, rows, given.rows.pad_id, (), given.targets)
        loss = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=padded_labels(batch)).loss
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(parameters, 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        losses.append(loss.item())
    assert len(ours) == len(losses) == 20
    assert ours[-1] < ours[0] - (0.05 if variant == "prompt-tuning" else 0.3)
    assert variant == "prompt-tuning" or max(norms) > 1  # something was clipped
    assert ours == pytest.approx(losses, rel=1e-4)


def padded_labels(batch: Batch) -> torch.Tensor:
    """(rows, longest), as Transformers takes them."""
    assert batch.targets is not None
    return batch.laid_out(batch.targets - IGNORE_INDEX) + IGNORE_INDEX


def steps_of(assembled: Assembled, given: Examples) -> tuple[list[np.ndarray], list[float]]:
    """Train on ``given``; the rows of each step and its loss."""
    batches: list[np.ndarray] = []
    losses: list[float] = []

    class Noted(TokenRows):
        def batch(self, rows: Any, *how: Any, **more: Any) -> Any:
            batches.append(rows)
            return super().batch(rows, *how, **more)

    noted = Examples(Noted(given.rows.sequences, given.rows.pad_id, given.rows.prefix), given.targets)
    held = examples(assembled, 6, seed=1)
    train(
        assembled, noted, assembled.method.settings, seed=0, evaluate=lambda: held_out_score(assembled, held),
        on_step=lambda _state, _total, loss: bool(losses.append(loss)),
    )  # fmt: skip
    return batches, losses


# ---------------------------------------------------------------------------------------- the loss


@pytest.fixture(scope="module")
def gemma2_writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 2 of two blocks: its logits are capped, and what its embedding gives is scaled."""
    config = Gemma2Config(
        vocab_size=360, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, max_position_embeddings=96, initializer_range=0.1, final_logit_softcapping=1.5,
        bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "gemma2-writer"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def all_writers(writers: dict[str, Path], untied_writer: Path, gemma2_writer: Path) -> dict[str, Path]:
    return {**writers, "untied": untied_writer, "gemma2": gemma2_writer}


def varied(assembled: Assembled) -> Examples:
    """Rows with very different numbers of learned tokens, and of tokens."""
    generator = torch.Generator().manual_seed(2)
    learned = [1, 30, 2, 3, 25, 1, 12, 1]
    read = [20, 2, 30, 5, 9, 1, 3, 40]
    rows, targets = [], []
    for before, after in zip(read, learned, strict=True):
        ids = torch.randint(5, 350, (before + after,), generator=generator).tolist()
        rows.append(ids)
        targets.append([IGNORE_INDEX] * before + ids[before:])
    targets[1][10] = targets[6][8] = IGNORE_INDEX  # in the middle too
    return Examples(TokenRows(rows, assembled.task.pad_id, assembled.method.virtual_token_ids), targets)


EVERY: dict[str, TrainingSettings] = {
    "features": FeatureExtractionSettings(trainable_layers=1),
    "lora": LoraSettings(**LORA),
    "qlora": QloraSettings(**LORA),
    "prompt-tuning": PromptTuningSettings(num_virtual_tokens=5, deep=False),
}


@pytest.mark.parametrize("base", [*BASES, "untied", "gemma2"])
@pytest.mark.parametrize("variant", EVERY)
def test_the_loss_is_transformers_own(variant: str, base: str, all_writers: dict[str, Path]) -> None:
    assembled = on_base(all_writers[base], EVERY[variant])
    shake(assembled)
    objective, given = assembled.task.objective, varied(assembled)
    assert objective.plain_head == (base != "gemma2")
    batch = given.rows.batch(np.arange(8), given.targets)
    learned = objective.units(given.targets, list(range(8)))
    assert learned == 75 - 2 == int((batch.targets != IGNORE_INDEX).sum())
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        theirs = float(assembled.model(**inputs, labels=padded_labels(batch)).loss) * learned
        all_logits = assembled.model(**inputs).logits
        ours = {smoothing: float(objective.loss(assembled.model, batch, smoothing)) for smoothing in (0.0, 0.3)}
        other = with_plain_head(assembled, False).task.objective
        long_way = {smoothing: float(other.loss(assembled.model, batch, smoothing)) for smoothing in (0.0, 0.3)}
    smoothed = functional.cross_entropy(
        all_logits[:, :-1].flatten(0, 1), padded_labels(batch)[:, 1:].flatten(), reduction="sum", label_smoothing=0.3
    )
    assert ours[0.0] == pytest.approx(theirs, rel=2e-6)
    assert ours[0.3] == pytest.approx(float(smoothed), rel=2e-6)
    assert abs(ours[0.3] - ours[0.0]) > 1e-2  # 1e-5 of it
    assert long_way == pytest.approx(ours, rel=2e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("base", [*BASES, "gemma2"])
@pytest.mark.parametrize("variant", EVERY)
def test_the_short_way_has_the_same_gradients(
    variant: str, base: str, smoothing: float, all_writers: dict[str, Path]
) -> None:
    """What goes from states to losses in one piece gives the gradient that plain PyTorch gives."""
    settings = EVERY[variant].model_copy(update={"label_smoothing": smoothing})
    assembled = on_base(all_writers[base], settings)
    shake(assembled)
    given = varied(assembled)
    batch = given.rows.batch(np.arange(8), given.targets)
    loss = accumulate(assembled, given, np.arange(8), settings)
    ours = gradients(assembled)
    found = assembled.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    plain = functional.cross_entropy(
        found[:, :-1].flatten(0, 1), padded_labels(batch)[:, 1:].flatten(), label_smoothing=smoothing
    )
    assert loss == pytest.approx(plain.item(), rel=1e-5)
    plain.backward()
    assert_close(ours, gradients(assembled))


def test_each_row_has_its_own_loss(llama_writer: Path) -> None:
    """Sums and counts of single rows, in the rows' order, and their mean over all learned tokens as the score."""
    assembled = on_base(llama_writer, EVERY["lora"])
    given = varied(assembled)
    found = outputs(assembled, given)
    assert found[:, 1].tolist() == [1, 29, 2, 3, 25, 1, 11, 1]
    alone = [outputs(assembled, given.take(torch.tensor([row]))) for row in range(8)]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-5, atol=1e-5)
    (score,) = held_out_score(assembled, given)
    assert score == pytest.approx(-float(found[:, 0].sum()) / 73)
    assert assembled.task.objective.shown((score,)) == pytest.approx(math.exp(-score))


# ---------------------------------------------------------------------------------------- many passes, one gradient


def gradients(assembled: Assembled) -> dict[str, torch.Tensor]:
    """The gradients, which are taken away."""
    found = {}
    for key, weight in assembled.trainable().items():
        assert weight.grad is not None, key
        found[key], weight.grad = weight.grad, None
    return found


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], rtol: float = 1e-4) -> None:
    """Equal within rounding, measured by each tensor's largest number."""
    assert one.keys() == other.keys()
    for key in one:
        largest = float(other[key].abs().max())
        assert largest > 0, key
        torch.testing.assert_close(
            one[key], other[key], rtol=0, atol=rtol * largest, msg=lambda text, key=key: key + text
        )


def cached(assembled: Assembled, given: Examples) -> Examples:
    """With what enters the lowest trainable block computed beforehand."""
    (found,) = with_boundary([given], assembled, ActivationCache(None, {}), lambda _: None)
    assert found.boundary is not None
    return found


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("base", [*BASES, "gemma2"])
@pytest.mark.parametrize("variant", [*EVERY, "features, cached"])
def test_many_small_passes_give_the_gradient_of_one(
    variant: str, base: str, smoothing: float, all_writers: dict[str, Path]
) -> None:
    assembled = on_base(all_writers[base], EVERY[variant.partition(",")[0]])
    shake(assembled)
    given, rows = varied(assembled), np.arange(8)
    given = cached(assembled, given) if "cached" in variant else given
    settings = assembled.method.settings.model_copy(update={"label_smoothing": smoothing})
    whole_loss = accumulate(assembled, given, rows, settings)
    whole = gradients(assembled)
    for budget in (1, 60, 120):
        parts = parts_of(rows, given.rows.lengths, budget)
        assert len(parts) >= 3
        small = settings.model_copy(update={"micro_batch_tokens": budget})
        assert accumulate(assembled, given, rows, small) == pytest.approx(whole_loss, rel=1e-5)
        assert_close(gradients(assembled), whole)


def test_a_mean_of_means_would_be_another_gradient(llama_writer: Path) -> None:
    """That the rows above tell the right way from the usual mistake."""
    assembled = on_base(llama_writer, EVERY["lora"])
    shake(assembled)
    given, rows, objective = varied(assembled), np.arange(8), assembled.task.objective
    accumulate(assembled, given, rows, assembled.method.settings)
    whole = gradients(assembled)
    parts = parts_of(rows, given.rows.lengths, 60)
    for part in parts:
        learned = objective.units(given.targets, part.tolist())
        loss = objective.loss(assembled.model, given.rows.batch(part, given.targets), 0.0)
        (loss / learned / len(parts)).backward()
    naive = gradients(assembled)
    far = [key for key in whole if (naive[key] - whole[key]).abs().max() > 0.1 * whole[key].abs().max()]
    assert len(far) == len(whole)


@pytest.mark.parametrize("variant", ["features", "lora", "prompt-tuning"])
def test_training_in_small_passes_is_the_same_training(variant: str, qwen2_writer: Path) -> None:
    results = []
    for budget in (4096, 40):
        settings = EVERY[variant].model_copy(
            update={"micro_batch_tokens": budget, "epochs": 2, "batch_size": 16, "learning_rate": 1e-2}
        )
        assembled = on_base(qwen2_writer, settings)
        given = examples(assembled, 32)
        results.append(fit(assembled, train_examples=given, held_examples=given)[1])
    assert len(results[0]) == 4
    assert results[1] == pytest.approx(results[0], rel=1e-4)


# ---------------------------------------------------------------------------------------- less work, less memory

LESS: dict[str, Any] = {"epochs": 2, "patience": 2, "batch_size": 8, "learning_rate": 1e-2}


@pytest.mark.parametrize("base", [*BASES, "gemma2"])
@pytest.mark.parametrize("layers", [1, 2])
def test_training_above_cached_layers_is_training_above_them(
    layers: int, base: str, all_writers: dict[str, Path]
) -> None:
    losses = []
    for how in (lambda _, given: given, cached):
        assembled = on_base(all_writers[base], FeatureExtractionSettings(trainable_layers=layers, **LESS))
        if base == "gemma2" and layers == 2:  # all its blocks: nothing is below
            assert assembled.method.first_trainable_block() == 0
            return
        given, held = (how(assembled, examples(assembled, *of)) for of in ((24, 0), (8, 1)))
        state, found = fit(assembled, train_examples=given, held_examples=held)
        losses.append([*found, *state.best_score])
    assert losses[0][5] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.usefixtures("all_bits")
@pytest.mark.parametrize("base", ["gpt2", "qwen2"])
@pytest.mark.parametrize(
    "variant",
    ["features", "features, cached", "lora", "lora, dropout", "dora, dropout", "qlora", "prompt-tuning", "deep"],
)
def test_checkpointed_gradients_are_the_same(variant: str, base: str, writers: dict[str, Path]) -> None:
    """Each block is computed twice, with the same dropout; losses and weights are those without it, by the blocks' own
    code and by the kernels. GPT-2 has dropout of its own."""
    known: dict[str, TrainingSettings] = {
        "features": FeatureExtractionSettings(trainable_layers=2, **LESS),
        "lora": LoraSettings(**LORA, **LESS),
        "lora, dropout": LoraSettings(dropout=0.3, **LORA, **LESS),
        "dora, dropout": LoraSettings(dora=True, dropout=0.3, **LORA, **LESS),
        "qlora": QloraSettings(**LORA, **LESS),
        "prompt-tuning": PromptTuningSettings(num_virtual_tokens=5, deep=False, **LESS),
        "deep": PromptTuningSettings(num_virtual_tokens=5, deep=True, **LESS),
    }
    settings = known["features" if "features" in variant else variant]
    losses, ends, passes = [], [], []
    for on, plain in ((False, True), (True, True), (False, False), (True, False)):
        assembled = on_base(writers[base], settings.model_copy(update={"gradient_checkpointing": on}))
        if plain:  # the blocks' own code, whose parts are called
            vars(assembled)["fusing"] = Fusing(why_not="calls are counted")
        given, held = examples(assembled, 24), examples(assembled, 8, seed=1)
        if "cached" in variant:
            given, held = cached(assembled, given), cached(assembled, held)
        assert assembled.packing.first_position == 0  # found out by passes that do not count
        count = [0]
        part = next(assembled.model.get_submodule(assembled.architecture.blocks[-1]).children())
        part.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        found = fit(assembled, train_examples=given, held_examples=held)[1]
        losses.append(found)
        ends.append(weights(assembled))
        passes.append(count[0])
        assert not any("forward" in vars(module) for module in assembled.model.modules())
    # six steps; the held-out rows are scored at the start and after each epoch
    assert passes[:2] == [6 + 3, 2 * 6 + 3]
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)  # Adam makes more of it in weights with hardly a gradient
    for off, on in ((0, 1), (2, 3)):
        assert losses[on] == pytest.approx(losses[off], rel=1e-6)
        for key in ends[off]:
            torch.testing.assert_close(ends[on][key], ends[off][key], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------- bf16

HALF: dict[str, Any] = {"epochs": 3, "patience": 3, "batch_size": 8, "learning_rate": 2e-2}
IN_HALF: dict[str, TrainingSettings] = {
    "features": FeatureExtractionSettings(trainable_layers=2, **HALF),
    "lora": LoraSettings(**LORA, **HALF),
    "lora, dropout": LoraSettings(dropout=0.1, **LORA, **HALF),
    "dora": LoraSettings(dora=True, **LORA, **HALF),
    "qlora": QloraSettings(**LORA, **HALF),
    "prompt-tuning": PromptTuningSettings(num_virtual_tokens=5, deep=False, **HALF | {"learning_rate": 0.1}),
}


@pytest.mark.parametrize("base", ["gpt2", "qwen2", "gemma2"])
@pytest.mark.parametrize("variant", [*IN_HALF, "features, cached"])
def test_a_base_in_bf16_trains_and_is_stored(
    variant: str, base: str, all_writers: dict[str, Path], tmp_path: Path
) -> None:
    settings = IN_HALF[variant if variant in IN_HALF else "features"]
    if base == "gemma2" and "cached" in variant:  # with both of its blocks training, nothing is below them
        settings = settings.model_copy(update={"trainable_layers": 1})
    assembled = on_base(all_writers[base], settings, dtype=torch.bfloat16)
    given, held = examples(assembled, 40), examples(assembled, 8, seed=1)
    if "cached" in variant:
        given, held = cached(assembled, given), cached(assembled, held)
    trained = {id(weight) for weight in assembled.trainable().values()}
    assert {weight.dtype for weight in assembled.trainable().values()} == {torch.float32}
    assert {one.dtype for one in assembled.model.parameters() if id(one) not in trained} == {torch.bfloat16}
    before = held_out_score(assembled, held)[0]
    state, losses = fit(assembled, train_examples=given, held_examples=held)
    assert state.best_score[0] > before + (0.01 if variant == "prompt-tuning" else 0.2)
    assert sum(losses[-3:]) < sum(losses[:3])
    folder = stored(tmp_path / "adapter", assembled, dtype="bfloat16")
    loaded = load_adapter(read_adapter(folder), model=None, device=CPU)
    assert {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()} == {torch.float32}
    assert logits(loaded).dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(assembled))
    in_full = on_base(all_writers[base], settings)
    with torch.no_grad():
        for key, weight in in_full.trainable().items():
            weight.copy_(assembled.trainable()[key])
    assert (logits(in_full) - logits(assembled)).abs().max() < 0.3


def test_bf16_keeps_the_small_steps(llama_writer: Path) -> None:
    """Steps too small for bf16 add up in the fp32 weights."""
    settings = LoraSettings(**LORA, **HALF | {"learning_rate": 1e-6, "epochs": 1})
    assembled = on_base(llama_writer, settings, dtype=torch.bfloat16)
    before = weights(assembled)
    given = as_examples(assembled, pairs(40))
    fit(assembled, train_examples=given, held_examples=given)
    assert not [key for key, weight in weights(assembled).items() if torch.equal(weight, before[key])]
