"""What every method promises, with token classification as the task; and PEFT's reading of its adapters."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from helpers import (
    CPU,
    TRAINED,
    assert_same_bits,
    complete,
    contents,
    fit,
    folder_digest,
    sequences,
    shake,
    trained_count,
    weights,
)
from safetensors.torch import load_file

import capotune
from capotune.adapters.assemble import Assembled, assemble, attach
from capotune.adapters.store import read_adapter, save_adapter
from capotune.data.batches import IGNORE_INDEX, TokenRows
from capotune.engine.checkpoint import load_checkpoint, save_checkpoint
from capotune.evaluation.forward import Examples
from capotune.methods.base import Start
from capotune.methods.feature_extraction.settings import FeatureExtractionSettings
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.methods.qlora.settings import QloraSettings
from capotune.models.base import find
from capotune.settings import TrainingSettings
from capotune.tasks.loading import load_adapter
from capotune.tasks.token_classification import TokenClassification
from capotune.tasks.token_classification.score import logits_of

TYPES = ("A", "B")
LABELS = ("O", "B-A", "I-A", "B-B", "I-B")
QUICK: dict[str, Any] = {"epochs": 4, "patience": 4, "batch_size": 8, "head_learning_rate": 2e-2}
LORA: dict[str, Any] = {"rank": 4, "alpha": 8, "learning_rate": 5e-3, **QUICK}
VARIANTS: dict[str, TrainingSettings] = {
    "features": FeatureExtractionSettings(**QUICK),
    "features-k1": FeatureExtractionSettings(trainable_layers=1, learning_rate=5e-3, **QUICK),
    "lora": LoraSettings(**LORA),
    "lora-dropout": LoraSettings(dropout=0.2, **LORA),
    "qlora": QloraSettings(**LORA),
    "prompt": PromptTuningSettings(num_virtual_tokens=5, deep=False, learning_rate=5e-2, **QUICK),
    "prompt-deep": PromptTuningSettings(num_virtual_tokens=5, deep=True, learning_rate=0.3, **QUICK),
}
BASES = ("bert", "llama", "gpt2")
PAIRS = [(variant, base) for variant in VARIANTS for base in BASES]
STEPPED = [pair for pair in PAIRS if pair[0] != "features"]
BLOCKS = {"bert": 3, "llama": 2, "gpt2": 2}


@pytest.fixture
def models(bert: Path, llama: Path, gpt2: Path) -> dict[str, Path]:
    return {"bert": bert, "llama": llama, "gpt2": gpt2}


def on_base(folder: Path, settings: TrainingSettings, *, seed: int = 0, attached: bool = True, layers: int = 99) -> Any:
    """A fresh copy of the base with the method on it and a head drawn from ``seed``."""
    base = find(str(folder))
    assembled = assemble(TokenClassification(base, LABELS, 64, layers), complete(settings, base), device=CPU)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in assembled.model.classifier.parameters():
            weight.normal_(0, 0.02, generator=generator)
    if attached:
        attach(assembled, Start(generator, [9, 10, 14, 15]))
    return assembled


def examples(assembled: Assembled, count: int = 48, seed: int = 0) -> Examples:
    """Rows in which the token decides the tag; every third token is no first sub-word."""
    rows = sequences(count, seed)
    targets = [
        [IGNORE_INDEX if at % 3 == 2 or token < 4 else token % len(LABELS) for at, token in enumerate(row)]
        for row in rows
    ]
    return Examples(TokenRows(rows, assembled.task.pad_id, assembled.method.virtual_token_ids), targets)


def trained(assembled: Assembled, **options: Any) -> Any:
    held = examples(assembled, 12, seed=1)
    return fit(assembled, train_examples=examples(assembled), held_examples=held, **options)


def logits(assembled: Assembled) -> torch.Tensor:
    """(words, labels) of rows that nothing was trained on."""
    return logits_of(assembled, examples(assembled, 11, seed=3))


@pytest.mark.parametrize(("variant", "base"), PAIRS)
def test_head_is_counted_by_formula(variant: str, base: str, models: dict[str, Path]) -> None:
    assembled = on_base(models[base], VARIANTS[variant])
    head = 5 * ((BLOCKS[base] + 1) * 32 + 1 if variant == "features" else 32 + 1)
    assert trained_count(assembled) == assembled.expected_trainable() == assembled.method.expected_parameters() + head


@pytest.mark.parametrize(("variant", "base"), [pair for pair in PAIRS if "prompt" not in pair[0]])
def test_identity_at_the_start(variant: str, base: str, models: dict[str, Path]) -> None:
    before = logits(on_base(models[base], VARIANTS[variant], attached=False))
    torch.testing.assert_close(logits(on_base(models[base], VARIANTS[variant])), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("variant", "base"), STEPPED)
def test_loss_falls(variant: str, base: str, models: dict[str, Path]) -> None:
    assembled = on_base(models[base], VARIANTS[variant])
    start = weights(assembled)
    state, losses = trained(assembled)
    assert losses[0] == pytest.approx(math.log(5), abs=0.2)
    assert sum(losses[-3:]) / 3 < 0.8 * losses[0], losses
    assert not [key for key, weight in weights(assembled).items() if torch.equal(weight, start[key])]
    assert state.best_score[0] > 0


@pytest.mark.parametrize(("variant", "base"), PAIRS)
def test_base_is_bitwise_unchanged(variant: str, base: str, models: dict[str, Path]) -> None:
    on_disk = folder_digest(models[base])
    assembled = on_base(models[base], VARIANTS[variant], attached=False)
    before = contents(assembled.model.backbone)
    attach(assembled, Start(torch.Generator().manual_seed(0), [9, 10]))
    trained(assembled, on_step=lambda state, *_: state.step == 2)
    shake(assembled)
    logits(assembled)
    assembled.method.detach()
    assert_same_bits(contents(assembled.model.backbone), before)
    assert folder_digest(models[base]) == on_disk


@pytest.mark.parametrize(
    ("variant", "base", "layers"),
    [(*pair, 99) for pair in PAIRS] + [("features", base, layers) for base in BASES for layers in (2, 1)],
)
def test_saved_and_loaded_gives_equal_outputs(
    variant: str, base: str, layers: int, models: dict[str, Path], tmp_path: Path
) -> None:
    assembled = on_base(models[base], VARIANTS[variant], layers=layers)
    shake(assembled)
    save_adapter(tmp_path / "adapter", assembled, TRAINED)
    loaded = load_adapter(read_adapter(tmp_path / "adapter"), model=None, device=CPU)
    assert torch.equal(logits(loaded), logits(assembled))
    assert_same_bits(weights(loaded), weights(assembled))


@pytest.mark.parametrize(("variant", "base"), [pair for pair in PAIRS if "lora" in pair[0]])
def test_merged_is_unmerged(variant: str, base: str, models: dict[str, Path]) -> None:
    assembled = on_base(models[base], VARIANTS[variant])
    start = logits(assembled)
    shake(assembled)
    unmerged = logits(assembled)
    assert (unmerged - start).abs().max() > 1e-3
    assert assembled.method.merge()
    torch.testing.assert_close(logits(assembled), unmerged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "features"])
def test_same_seed_same_bits_whether_interrupted_or_not(variant: str, bert: Path, tmp_path: Path) -> None:
    whole = on_base(bert, VARIANTS[variant])
    state, losses = trained(whole)
    found: list[float] = []
    for stop in (3, 12, None):  # in the middle of the first epoch, at the last batch of the second, not again
        assembled = on_base(bert, VARIANTS[variant], seed=0 if stop == 3 else 5)
        torch.manual_seed(len(found))
        again = load_checkpoint(tmp_path) if found else None
        again, part = trained(assembled, state=again, on_step=lambda state, *_, stop=stop: state.step == stop)
        found += part
        if stop:
            save_checkpoint(tmp_path, again)
    assert found == losses
    assert_same_bits(weights(assembled), weights(whole))
    assert again.best_score == state.best_score


# PEFT


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", ["lora", "qlora", "prompt", "prompt-deep"])
@torch.no_grad()
def test_peft_loads_it_and_agrees(variant: str, base: str, models: dict[str, Path], tmp_path: Path) -> None:
    assembled = on_base(models[base], VARIANTS[variant])
    shake(assembled)
    save_adapter(tmp_path / "adapter", assembled, TRAINED)
    loaded = peft.PeftModel.from_pretrained(capotune.load_base(tmp_path / "adapter"), tmp_path / "adapter").eval()
    rows = examples(assembled, 10, seed=5)
    own = logits_of(assembled, rows)
    batch = rows.after(()).rows.batch(np.arange(10), rows.targets)
    theirs = loaded(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    theirs = theirs[:, theirs.shape[1] - batch.input_ids.shape[1] :]  # a prompt's own
    torch.testing.assert_close(batch.flat(theirs)[batch.in_loss], own, rtol=0, atol=1e-5)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", ["lora", "qlora", "prompt", "prompt-deep"])
def test_keys_are_pefts_own(variant: str, base: str, models: dict[str, Path], tmp_path: Path) -> None:
    """A model that PEFT makes from the same config has the same keys and shapes, and no others."""
    save_adapter(tmp_path / "adapter", on_base(models[base], VARIANTS[variant]), TRAINED)
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert config.task_type == "TOKEN_CLS"
    config.inference_mode, config.base_model_name_or_path = False, None
    made = peft.get_peft_model(capotune.load_base(tmp_path / "adapter"), config)
    theirs = peft.get_peft_model_state_dict(made)
    ours = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: t.shape for key, t in theirs.items()}


def test_record_names_tags_and_layers(bert: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", on_base(bert, VARIANTS["features"], layers=2), TRAINED)
    record = json.loads((tmp_path / "adapter" / "capotune.json").read_text(encoding="utf-8"))
    assert (record["task"], record["labels"]) == ("token-classification", list(LABELS))
    assert (record["feature_layers"], record["max_length"]) == ([0, 3], 64)
    assert "finds entities of 2 types" in (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8").lower()
