"""What every method promises, on every kind of base: one contract, asked of each variant of the settings."""

from __future__ import annotations

import errno
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    LABELS,
    TRAINED,
    assert_same_bits,
    contents,
    fit,
    folder_digest,
    logits,
    on_base,
    shake,
    trained_count,
    weights,
)
from safetensors.torch import load_file

import capotune
from capotune.adapters.assemble import Assembled, attach
from capotune.adapters.store import read_adapter, save_adapter
from capotune.engine import loop as loop_module
from capotune.engine.checkpoint import load_checkpoint, save_checkpoint
from capotune.engine.optimizer import set_learning_rate
from capotune.engine.state import TrainingState
from capotune.errors import AdapterError, OutputError
from capotune.events import Event, StepTaken, TrainingStarted
from capotune.methods.base import Start
from capotune.methods.feature_extraction.settings import FeatureExtractionSettings
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.prompt_tuning.method import PromptEmbedding
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.methods.qlora.settings import QloraSettings
from capotune.run_folder import checkpoints
from capotune.runs import run as run_module
from capotune.settings import TrainingSettings
from capotune.tasks.loading import load_adapter
from capotune.tasks.text_targets.run import TextTargetRun

QUICK: dict[str, Any] = {"epochs": 4, "patience": 4, "batch_size": 8, "head_learning_rate": 2e-2}
LORA: dict[str, Any] = {"rank": 4, "alpha": 8, "learning_rate": 5e-3, **QUICK}
PROMPT: dict[str, Any] = {"num_virtual_tokens": 5, "learning_rate": 5e-2, **QUICK}
VARIANTS: dict[str, TrainingSettings] = {
    "features": FeatureExtractionSettings(**QUICK),
    "features-k1": FeatureExtractionSettings(trainable_layers=1, learning_rate=5e-3, **QUICK),
    "features-k2": FeatureExtractionSettings(trainable_layers=2, learning_rate=5e-3, **QUICK),
    "lora": LoraSettings(**LORA),
    "lora-rslora": LoraSettings(rslora=True, **LORA),
    "lora-dora": LoraSettings(dora=True, **LORA),
    "lora-dora-dropout": LoraSettings(dora=True, dropout=0.2, **LORA),
    "lora-dropout": LoraSettings(dropout=0.2, **LORA),
    "lora-layers": LoraSettings(layers=(1,), **LORA),
    "lora-plus": LoraSettings(lora_plus_ratio=8, **LORA),
    "qlora": QloraSettings(**LORA),
    "qlora-fp4": QloraSettings(quant_type="fp4", **LORA),
    "qlora-plain": QloraSettings(double_quant=False, block_size=32, **LORA),
    "qlora-dora": QloraSettings(dora=True, **LORA),
    "prompt-labels": PromptTuningSettings(deep=False, **PROMPT),
    "prompt-text": PromptTuningSettings(deep=False, init="text", init_text="my parcel is late", **PROMPT),
    "prompt-vocabulary": PromptTuningSettings(deep=False, init="vocabulary", **PROMPT),
    "prompt-deep": PromptTuningSettings(deep=True, **PROMPT | {"learning_rate": 0.3}),
}
BASES = ("bert", "llama", "gpt2")
PAIRS = [(variant, base) for variant in VARIANTS for base in BASES]
EVERYWHERE = ("features-k1", "lora", "lora-dora", "lora-dropout", "qlora", "prompt-labels", "prompt-deep")
STEPPED = [  # the head alone is solved, not trained in steps; the rarer variants train on one base
    (variant, base) for variant, base in PAIRS if variant != "features" and (base == "bert" or variant in EVERYWHERE)
]
LORA_FAMILY = [pair for pair in PAIRS if "lora" in pair[0]]

SHAPES = {
    "bert": 3 * [(32, 32), (32, 32), (32, 32), (32, 32), (32, 64), (64, 32)],
    "llama": 2 * [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)],
    "gpt2": 2 * [(32, 96), (32, 32), (32, 128), (128, 32)],
}
"""(in, out) of every linear layer of the small models' blocks, in order."""
BLOCKS = {"bert": 3, "llama": 2, "gpt2": 2}
KEY_WIDTH = {"bert": 32, "llama": 16, "gpt2": 32}
BLOCK_EXTRA = {
    "bert": 5 * 32 + 64 + 4 * 32,  # biases of six linears, two layer norms
    "llama": 2 * 32,  # two RMS norms; no biases
    "gpt2": (96 + 32 + 128 + 32) + 4 * 32,
}
"""Weights of one block that are not in a linear layer's matrix."""
NORM_ABOVE = {"bert": 0, "llama": 32, "gpt2": 2 * 32}
"""Weights of the norm above the last block, which trains with it."""


@pytest.fixture
def models(bert: Path, llama: Path, gpt2: Path) -> dict[str, Path]:
    return {"bert": bert, "llama": llama, "gpt2": gpt2}


def trainable_by_hand(variant: str, base: str) -> int:
    """The method's own weights, counted from the table of shapes."""
    settings, per_block = VARIANTS[variant], len(SHAPES[base]) // BLOCKS[base]
    if isinstance(settings, PromptTuningSettings):
        return 4 * BLOCKS[base] * 2 * KEY_WIDTH[base] if settings.deep else 5 * 32
    if isinstance(settings, FeatureExtractionSettings):
        block = sum(into * out for into, out in SHAPES[base][:per_block]) + BLOCK_EXTRA[base]
        return (settings.trainable_layers or 0) * block + (NORM_ABOVE[base] if settings.trainable_layers else 0)
    targets = SHAPES[base] if settings.layers is None else SHAPES[base][:per_block]
    return sum(4 * into + out * 4 + (out if settings.dora else 0) for into, out in targets)


# ------------------------------------------------------------------------------------------------- one model in memory


@pytest.mark.parametrize(("variant", "base"), PAIRS)
def test_trainable_count_is_the_formula(variant: str, base: str, models: dict[str, Path]) -> None:
    assembled = on_base(models[base], VARIANTS[variant])
    head = 3 * ((BLOCKS[base] + 1) * 32 + 1 if variant == "features" else 32 + 1)
    assert trained_count(assembled) == trainable_by_hand(variant, base) + head
    assert assembled.expected_trainable() == trainable_by_hand(variant, base) + head
    frozen = [
        parameter
        for parameter in assembled.model.parameters()
        if not any(parameter is one for one in assembled.trainable().values())
    ]
    assert not any(parameter.requires_grad for parameter in frozen)


@pytest.mark.parametrize(("variant", "base"), PAIRS)
def test_identity_at_the_start(variant: str, base: str, models: dict[str, Path]) -> None:
    before = logits(on_base(models[base], VARIANTS[variant], attached=False))
    assembled = on_base(models[base], VARIANTS[variant])
    after = logits(assembled)
    if assembled.method.identity_at_start:
        torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    else:
        assert (after - before).abs().max() > 1e-4


@dataclass(frozen=True)
class Whole:
    """One uninterrupted training and what is compared with it."""

    losses: list[float]
    state: TrainingState
    weights: dict[str, torch.Tensor]
    early: dict[str, torch.Tensor]
    """The weights after ``EARLY`` steps."""


EARLY = 8


@pytest.fixture(scope="module")
def whole_trainings() -> dict[tuple[str, str], Whole]:
    return {}


@pytest.fixture
def whole(variant: str, base: str, models: dict[str, Path], whole_trainings: dict[tuple[str, str], Whole]) -> Whole:
    """The pair's training from seed 0, done once for all tests that look at it."""
    if (variant, base) not in whole_trainings:
        assembled = on_base(models[base], VARIANTS[variant])
        early: dict[str, torch.Tensor] = {}

        def on_step(state: TrainingState, *_: Any) -> bool:
            if state.step == EARLY:
                early.update(weights(assembled))
            return False

        state, losses = fit(assembled, on_step=on_step)
        whole_trainings[variant, base] = Whole(losses, state, weights(assembled), early)
    return whole_trainings[variant, base]


@pytest.mark.parametrize(("variant", "base"), STEPPED)
def test_loss_falls(variant: str, base: str, whole: Whole, models: dict[str, Path]) -> None:
    losses = whole.losses
    assert losses[0] == pytest.approx(math.log(3), abs=0.15)
    assert sum(losses[-3:]) / 3 < 0.75 * losses[0], losses
    start = weights(on_base(models[base], VARIANTS[variant]))
    assert whole.weights.keys() == start.keys()
    assert not [key for key in start if torch.equal(whole.weights[key], start[key])]


@pytest.mark.parametrize(("variant", "base"), PAIRS)
def test_base_is_bitwise_unchanged(variant: str, base: str, models: dict[str, Path]) -> None:
    on_disk = folder_digest(models[base])
    assembled = on_base(models[base], VARIANTS[variant], attached=False)
    before = contents(assembled.model.backbone)
    attach(assembled, Start(torch.Generator().manual_seed(0), [9, 10]))
    fit(assembled, on_step=lambda state, *_: state.step == 2)
    shake(assembled)
    logits(assembled)
    assembled.method.detach()
    assert_same_bits(contents(assembled.model.backbone), before)
    assert folder_digest(models[base]) == on_disk


@pytest.mark.parametrize(("variant", "base"), PAIRS)
def test_saved_and_loaded_gives_equal_outputs(variant: str, base: str, models: dict[str, Path], tmp_path: Path) -> None:
    assembled = on_base(models[base], VARIANTS[variant])
    shake(assembled)
    save_adapter(tmp_path / "adapter", assembled, TRAINED)
    loaded = load_adapter(read_adapter(tmp_path / "adapter"), model=None, device=torch.device("cpu"))
    assert torch.equal(logits(loaded), logits(assembled))
    assert_same_bits(weights(loaded), weights(assembled))


@pytest.mark.parametrize(("variant", "base"), LORA_FAMILY)
def test_merged_is_unmerged(variant: str, base: str, models: dict[str, Path]) -> None:
    assembled = on_base(models[base], VARIANTS[variant])
    before = contents(assembled.model.backbone)
    start = logits(assembled)
    shake(assembled)
    unmerged = logits(assembled)
    assert (unmerged - start).abs().max() > 1e-3
    assert assembled.method.merge()
    assert not any("lora" in name for name, _ in assembled.model.named_modules())
    torch.testing.assert_close(logits(assembled), unmerged, rtol=1e-5, atol=1e-5)
    assembled.method.detach()
    kept = contents(assembled.model.backbone)
    assert_same_bits(kept, {name.replace(".base_layer", ""): before[name] for name in before if "lora_" not in name})


@pytest.mark.parametrize("variant", ["features", "features-k1", "prompt-labels"])
def test_nothing_to_merge_is_said(variant: str, bert: Path) -> None:
    assert not on_base(bert, VARIANTS[variant]).method.merge()


@pytest.mark.parametrize(("variant", "base"), STEPPED)
def test_same_seed_same_bits(variant: str, base: str, whole: Whole, models: dict[str, Path]) -> None:
    def trained(seed: int) -> dict[str, torch.Tensor]:
        assembled = on_base(models[base], VARIANTS[variant])
        fit(assembled, seed=seed, on_step=lambda state, *_: state.step == EARLY)
        return weights(assembled)

    torch.rand(17)  # what the process drew before does not matter
    assert_same_bits(trained(0), whole.early)
    other = trained(1)  # the same start, another order of the rows
    assert all(not torch.equal(other[key], whole.early[key]) for key in other)


@pytest.mark.parametrize("variant", ["lora", "lora-dora", "qlora", "prompt-vocabulary"])
def test_the_seed_decides_the_start(variant: str, bert: Path) -> None:
    one, same, other = (on_base(bert, VARIANTS[variant], seed=seed).method.parameters() for seed in (0, 0, 1))
    drawn = [key for key in one if "lora_A" in key or "prompt" in key]
    assert drawn
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert all(not torch.equal(one[key], other[key]) for key in drawn)


@pytest.mark.parametrize(("variant", "base"), STEPPED)
def test_interrupted_is_uninterrupted(
    variant: str, base: str, whole: Whole, models: dict[str, Path], tmp_path: Path
) -> None:
    losses: list[float] = []
    for stop in (3, 12, None):  # in the middle of the first epoch, at the last batch of the second, not again
        assembled = on_base(
            models[base], VARIANTS[variant], seed=0 if stop == 3 else 5
        )  # a resumed one starts anywhere
        torch.manual_seed(len(losses))
        state = load_checkpoint(tmp_path) if losses else None
        state, part = fit(assembled, state=state, on_step=lambda state, *_, stop=stop: state.step == stop)
        losses += part
        if stop:
            save_checkpoint(tmp_path, state)
    assert losses == whole.losses
    assert_same_bits(weights(assembled), whole.weights)
    for name in ("epoch", "step", "best_epoch", "best_score"):
        assert getattr(state, name) == getattr(whole.state, name), name


@pytest.mark.parametrize("variant", ["features-k1", "lora", "lora-dropout", "lora-layers", "prompt-labels"])
def test_dropout_is_on_for_steps_alone(variant: str, bert: Path) -> None:
    """From the lowest trainable block on while training, nowhere while scoring and afterwards."""
    assembled = on_base(bert, VARIANTS[variant])
    lowest = assembled.method.first_trainable_block()

    def active() -> set[int | None]:
        found = {path for path, module in assembled.model.named_modules() if module.training}
        return {assembled.architecture.block_of(path) for path in found if "ropout" in path or "lora" in path}

    seen: list[set[int | None]] = []

    def on_epoch(*_: Any) -> None:
        assert active() == set()

    assert active() == set()
    fit(assembled, on_step=lambda *_: bool(seen.append(active())), on_epoch=on_epoch)
    expected: set[int | None] = {*range(lowest, 3)} | ({None} if lowest == 0 else set())
    assert all(blocks == expected for blocks in seen)
    assert active() == set()


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("linear", [1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("constant", [1 / 3, 2 / 3] + 8 * [1]),
        ("cosine", [1 / 3, 2 / 3] + [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]),
    ],
)
def test_learning_rate_rises_and_falls(
    schedule: str, factors: list[float], bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten steps, two of them warm-up: what every group of the optimiser has at each."""
    settings = LoraSettings(
        **LORA | {"epochs": 2, "patience": 2, "batch_size": 10, "warmup": 0.2, "schedule": schedule}
    )
    seen: list[set[float]] = []

    def note(optimizer: torch.optim.Optimizer, factor: float) -> None:
        set_learning_rate(optimizer, factor)
        seen.append({round(group["lr"], 9) for group in optimizer.param_groups})

    monkeypatch.setattr(loop_module, "set_learning_rate", note)
    fit(on_base(bert, settings))
    assert seen == [{round(5e-3 * factor, 9), round(2e-2 * factor, 9)} for factor in factors]


def test_lora_plus_gives_b_its_own_rate(bert: Path) -> None:
    rates = on_base(bert, VARIANTS["lora-plus"]).method.learning_rates()
    assert {rate for key, rate in rates.items() if "lora_A" in key} == {5e-3}
    assert {rate for key, rate in rates.items() if "lora_B" in key} == {4e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_is_more_rows_of_the_embedding(dtype: torch.dtype) -> None:
    """In value to the bit, and in gradient: each vector's is the sum over its places, in the prompt's own fp32."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.nn.Embedding(11, 6).to(dtype).requires_grad_(False)
    prompt = torch.randn(3, 6, generator=generator)
    layer = PromptEmbedding(embedding, prompt.clone())
    ids = torch.tensor([[11, 12, 13, 0, 4, 10], [13, 11, 11, 10, 2, 0]])
    rows = torch.cat([embedding.weight, prompt.to(dtype)])
    vectors = layer(ids)
    assert vectors.dtype == dtype
    assert torch.equal(vectors, rows[ids])
    grad = torch.randn(vectors.shape, generator=generator).to(dtype)
    (found,) = torch.autograd.grad(vectors, [layer.prompt], grad)
    assert found.dtype == torch.float32
    expected = torch.stack([grad[ids == 11 + number].double().sum(0) for number in range(3)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("base", BASES)
def test_prompt_starts_where_it_says(base: str, models: dict[str, Path]) -> None:
    def prompt(variant: str, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        assembled = on_base(models[base], VARIANTS[variant], tokens=tokens)
        layer: Any = assembled.model.get_submodule(assembled.architecture.embedding)
        return layer.prompt.detach(), layer.base_layer.weight

    vectors, vocabulary = prompt("prompt-vocabulary", [7, 8, 20])
    assert all(any(torch.equal(vector, vocabulary[token]) for token in (7, 8, 20)) for vector in vectors)
    vectors, vocabulary = prompt("prompt-labels", [7, 8, 20])  # fewer tokens than vectors: they repeat
    assert torch.equal(vectors, vocabulary[[7, 8, 20, 7, 8]])
    vectors, vocabulary = prompt("prompt-text", list(range(4, 14)))  # more: each vector is the mean of a share
    assert torch.equal(vectors[1], vocabulary[6:8].mean(0))


# ------------------------------------------------------------------------------------------- the whole way, from a file

WHOLE = ["features", "features-k1", "lora", "lora-dora-dropout", "qlora", "prompt-labels", "prompt-text"]
WHOLE_PAIRS = [(variant, "bert") for variant in WHOLE] + [("lora-dora", "gpt2"), ("prompt-vocabulary", "llama")]


def whole_run(variant: str, data: Path, model: Path, out: Path, **options: Any) -> dict[str, Any]:
    settings = VARIANTS[variant]
    own = settings.model_dump() | {"epochs": 2, "patience": 2, "batch_size": 24}
    return capotune.train(settings.method, data=str(data), model=str(model), out=out, **own, **options)


def adapter_bytes(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(("variant", "base"), WHOLE_PAIRS)
def test_whole_run_repeats(
    variant: str, base: str, models: dict[str, Path], tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk = folder_digest(models[base])
    record = whole_run(variant, tickets, models[base], tmp_path / "one")
    monkeypatch.setenv("CAPOTUNE_CACHE", str(tmp_path / "cache"))
    whole_run("features", tickets, models[base], tmp_path / "features")  # leaves its activations to the next
    whole_run(variant, tickets, models[base], tmp_path / "shared")
    assert adapter_bytes(tmp_path / "shared") == adapter_bytes(tmp_path / "one")
    if variant != "features":  # its head is solved: no random number but the split, which the file gives here
        whole_run(variant, tickets, models[base], tmp_path / "seed", seed=1)
        assert adapter_bytes(tmp_path / "seed") != adapter_bytes(tmp_path / "one")
    assert folder_digest(models[base]) == on_disk
    head = 3 * ((BLOCKS[base] + 1) * 32 + 1 if variant == "features" else 32 + 1)
    assert record["result"]["trainable_parameters"] == trainable_by_hand(variant, base) + head
    assert record["result"]["score"] > 0.6  # three equal labels
    stored = load_file(tmp_path / "one" / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == record["result"]["trainable_parameters"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(
        ["adapter", "predictions.jsonl", "run.json", "test_rows.json"]
        + ([] if variant == "features" else ["metrics.jsonl"])
    )
    again = capotune.evaluate(tmp_path / "one" / "adapter", data=str(tickets))
    assert again["accuracy"] == record["result"]["score"]


class StoppedError(Exception):
    """Stands for a crash."""


@pytest.mark.parametrize(
    ("variant", "how"),
    [("lora-dropout", StoppedError), ("features-k1", KeyboardInterrupt), ("qlora", KeyboardInterrupt),
     ("prompt-labels", KeyboardInterrupt)],
)  # fmt: skip
def test_whole_run_resumes(variant: str, how: type[BaseException], bert: Path, tickets: Path, tmp_path: Path) -> None:
    """From the last epoch after a crash, from the last step after Ctrl-C."""
    whole_run(variant, tickets, bert, tmp_path / "whole")

    def crash(event: Event) -> None:
        if isinstance(event, StepTaken) and event.step == 5:
            raise how

    out = tmp_path / "stopped"
    with pytest.raises(how):
        whole_run(variant, tickets, bert, out, report=crash)
    newest = checkpoints(out / "checkpoints")[-1]
    assert newest.name == f"step-{4 if how is StoppedError else 5}-epoch-1"
    assert not (out / "adapter").exists()
    capotune.resume(out)
    assert adapter_bytes(out) == adapter_bytes(tmp_path / "whole")
    assert not (out / "checkpoints").exists()
    assert logged(out) == logged(tmp_path / "whole")


def logged(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("moment", ["result", "adapter"])
def test_a_crash_after_training_resumes_too(
    moment: str, bert: Path, tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while testing, or between the finished adapter and the end."""
    whole_run("lora", tickets, bert, tmp_path / "whole")
    where, name = (TextTargetRun, "test") if moment == "result" else (run_module, "_write_scored")

    def crash(*_: Any) -> None:
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(where, name, crash)
        with pytest.raises(StoppedError):
            whole_run("lora", tickets, bert, tmp_path / "stopped")
    assert (tmp_path / "stopped" / "adapter").exists() == (moment == "adapter")
    capotune.resume(tmp_path / "stopped")
    assert adapter_bytes(tmp_path / "stopped") == adapter_bytes(tmp_path / "whole")


def test_a_crash_before_the_first_checkpoint_leaves_nothing(bert: Path, tickets: Path, tmp_path: Path) -> None:
    def crash(event: Event) -> None:
        if isinstance(event, TrainingStarted):
            raise StoppedError

    with pytest.raises(StoppedError):
        whole_run("lora", tickets, bert, tmp_path / "run", report=crash)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------- complete or absent


@pytest.mark.parametrize("failing", range(4))
def test_adapter_is_complete_or_absent(
    failing: int, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No space left at each of the four files in turn."""
    assembled: Assembled = on_base(bert, VARIANTS["lora"])
    written: list[Path] = []
    real = Path.open

    def full(path: Path, mode: str = "r", **options: Any) -> Any:
        if "x" in mode:
            written.append(path)
            if len(written) == failing + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, mode, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OutputError, match="no space left"):
        save_adapter(tmp_path / "runs" / "adapter", assembled, TRAINED)
    assert len(written) == failing + 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "capotune.json"])
@pytest.mark.parametrize("damage", ["missing", "half"])
def test_incomplete_adapter_is_refused(name: str, damage: str, bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_adapter(folder, on_base(bert, VARIANTS["lora"]), TRAINED)
    whole = (folder / name).read_bytes()
    (folder / name).unlink() if damage == "missing" else (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AdapterError, match=name):
        capotune.load(folder)


@pytest.mark.parametrize("scores", [[math.nan] * 3, [math.nan, 0.5, math.nan]])
def test_a_held_out_score_that_is_no_number_is_the_worst(
    scores: list[float], bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assembled = on_base(bert, VARIANTS["lora"])
    given = itertools.chain(scores, itertools.repeat(math.nan))
    monkeypatch.setattr(type(assembled.task.objective), "score", lambda *_: (next(given),))
    before = weights(assembled)
    state, _ = fit(assembled)
    assert state.best_epoch == (1 if 0.5 in scores else 0)
    assert state.best_score == (0.5 if 0.5 in scores else -math.inf,)
    assert all(torch.equal(value, weights(assembled)[key]) for key, value in before.items()) == (0.5 not in scores)


def test_an_adapter_of_another_base_is_refused(bert: Path, llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_adapter(folder, on_base(bert, VARIANTS["lora"]), TRAINED)
    with pytest.raises(AdapterError, match="belongs to another base"):
        capotune.load(folder, model=str(llama))
    assert capotune.load(folder).labels == LABELS
