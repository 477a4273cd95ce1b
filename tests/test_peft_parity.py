"""Against the installed PEFT: its keys, its reading of our adapters, its logits, and its losses step by step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import TRAINED, assert_same_bits, examples, logits, on_base, sequences, shake
from safetensors.torch import load_file
from torch import nn

import capotune
from capotune.adapters.assemble import Assembled
from capotune.adapters.store import save_adapter
from capotune.data.batches import collate
from capotune.engine.loop import train
from capotune.errors import AdapterError
from capotune.evaluation.forward import held_out_score
from capotune.kernels.nf4 import Linear4bit
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.methods.qlora.settings import QloraSettings
from capotune.settings import TrainingSettings

LORA: dict[str, Any] = {"rank": 4, "alpha": 12}
VARIANTS: dict[str, TrainingSettings] = {
    "lora": LoraSettings(**LORA),
    "rslora": LoraSettings(rslora=True, **LORA),
    "dora": LoraSettings(dora=True, **LORA),
    "layers": LoraSettings(layers=(1,), **LORA),
    "dropout": LoraSettings(dropout=0.3, **LORA),
    "qlora": QloraSettings(**LORA),
    "prompt-tuning": PromptTuningSettings(num_virtual_tokens=5, deep=False),
    "prefix-tuning": PromptTuningSettings(num_virtual_tokens=5, deep=True),
}
BASES = ("bert", "llama", "gpt2")


@pytest.fixture
def models(bert: Path, llama: Path, gpt2: Path) -> dict[str, Path]:
    return {"bert": bert, "llama": llama, "gpt2": gpt2}


def stored(folder: Path, assembled: Assembled) -> Path:
    save_adapter(folder, assembled, TRAINED)
    return folder


def made_by_peft(folder: Path, settings: TrainingSettings) -> Any:
    """A trainable model that PEFT makes on the same base from the adapter's configuration, with its own weights.

    The stored configuration has rsLoRA's scale folded into B; to train as we do, PEFT is told of it.
    """
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode, config.base_model_name_or_path = False, None
    if isinstance(settings, LoraSettings):
        config.use_rslora, config.lora_alpha = settings.rslora, settings.alpha
    return peft.get_peft_model(capotune.load_base(folder), config)


def padded_batches(rows: list[list[int]]) -> Iterator[tuple[slice, dict[str, torch.Tensor]]]:
    for start in range(0, len(rows), 4):
        part = rows[start : start + 4]
        batch = collate(part, torch.arange(len(part)).numpy(), 0)
        yield slice(start, start + 4), {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


@torch.no_grad()
def peft_logits(model: nn.Module, rows: list[list[int]]) -> torch.Tensor:
    return torch.cat([model(**batch).logits for _, batch in padded_batches(rows)])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_loads_it_and_agrees(variant: str, base: str, models: dict[str, Path], tmp_path: Path) -> None:
    assembled = on_base(models[base], VARIANTS[variant])
    shake(assembled)
    folder = stored(tmp_path / "adapter", assembled)
    model = capotune.load_base(folder)
    loaded = peft.PeftModel.from_pretrained(model, folder).eval()
    rows = sequences(10, seed=5)
    torch.testing.assert_close(peft_logits(loaded, rows), logits(assembled, rows), rtol=0, atol=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_a_4_bit_base_is_given_to_peft_in_plain_layers(base: str, models: dict[str, Path], tmp_path: Path) -> None:
    """PEFT wraps no foreign 4-bit layer, so ``load_base`` unpacks them: the values are those of the codes."""
    assembled = on_base(models[base], VARIANTS["qlora"])
    folder = stored(tmp_path / "adapter", assembled)
    given = capotune.load_base(folder)
    assert not any(isinstance(layer, Linear4bit) for layer in given.modules())
    for path in assembled.architecture.linears:
        packed = assembled.model.get_submodule(path).base_layer
        assert torch.equal(given.get_submodule(path).weight, packed.dense_weight(torch.float32))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_are_pefts_own(variant: str, base: str, models: dict[str, Path], tmp_path: Path) -> None:
    """A model that PEFT makes from the same config has the same keys and shapes, and no others."""
    folder = stored(tmp_path / "adapter", on_base(models[base], VARIANTS[variant]))
    config = peft.PeftConfig.from_pretrained(str(folder))
    assert config.to_dict().keys() >= json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).keys()
    assert config.task_type == "SEQ_CLS"
    made = made_by_peft(folder, VARIANTS[variant])
    theirs = peft.get_peft_model_state_dict(made)
    ours = load_file(folder / "adapter_model.safetensors")
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: t.shape for key, t in theirs.items()}
    trainable = sum(parameter.numel() for parameter in made.parameters() if parameter.requires_grad)
    assert trainable == sum(tensor.numel() for tensor in ours.values())


@pytest.mark.parametrize("base", BASES)
def test_peft_saves_what_it_read(base: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Written again by PEFT, the adapter's tensors are the same bits under the same names."""
    assembled = on_base(models[base], VARIANTS["lora"])
    shake(assembled)
    folder = stored(tmp_path / "ours", assembled)
    peft.PeftModel.from_pretrained(capotune.load_base(folder), folder).save_pretrained(tmp_path / "theirs")
    assert_same_bits(
        load_file(tmp_path / "theirs" / "adapter_model.safetensors"), load_file(folder / "adapter_model.safetensors")
    )


@pytest.mark.parametrize(
    "settings", [VARIANTS["rslora"], LoraSettings(rank=4, alpha=6.5), LoraSettings(dora=True, rank=4, alpha=6.5)]
)
def test_scale_is_in_b_where_a_whole_alpha_cannot_say_it(settings: LoraSettings, llama: Path, tmp_path: Path) -> None:
    """Loaders that read r and lora_alpha alone, as whole numbers, compute what was trained."""
    assembled = on_base(llama, settings)
    shake(assembled)
    folder = stored(tmp_path / "adapter", assembled)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    assert '"lora_alpha": 4,' in (folder / "adapter_config.json").read_text(encoding="utf-8")
    tensors = load_file(folder / "adapter_model.safetensors")
    for path, layer in assembled.method.layers.items():  # type: ignore[attr-defined]
        b, a = (tensors[f"base_model.model.{path}.lora_{name}.weight"] for name in "BA")
        delta = settings.scale * layer.lora_B @ layer.lora_A
        torch.testing.assert_close(b @ a * config["lora_alpha"] / config["r"], delta, rtol=1e-5, atol=1e-6)
    loaded = capotune.load(folder)
    torch.testing.assert_close(logits(loaded._assembled), logits(assembled), rtol=0, atol=1e-6)
    assert loaded.method.settings == assembled.method.settings


def test_a_config_without_a_scale_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = stored(tmp_path / "adapter", on_base(llama, VARIANTS["lora"]))
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, "r": None}), encoding="utf-8")
    with pytest.raises(AdapterError, match="must state r, lora_alpha and use_rslora"):
        capotune.load(folder)


@pytest.mark.parametrize("base", BASES)
def test_only_the_head_ends_in_classifier(base: str, models: dict[str, Path]) -> None:
    """PEFT matches ``modules_to_save`` by suffix: any module whose name ends so would be trained and saved as well."""
    model = on_base(models[base], VARIANTS["lora"], attached=False).model
    assert [path for path, _ in model.named_modules() if path.endswith("classifier")] == ["classifier"]


def test_targets_named_like_others_are_written_as_full_paths(bert: Path) -> None:
    """``target_modules`` is matched by suffix too: short names only where they name just the targets."""
    short = on_base(bert, LoraSettings(target_modules=("query", "value"))).method.peft_config()["target_modules"]
    assert short == ["query", "value"]
    inner = LoraSettings(target_modules=("attention.output.dense",))
    full = on_base(bert, inner).method.peft_config()["target_modules"]
    assert full == [f"bert.encoder.layer.{number}.attention.output.dense" for number in range(3)]


# --------------------------------------------------------------------------------------------------------- step by step

STEPS: dict[str, Any] = {
    "epochs": 4, "patience": 4, "batch_size": 10, "warmup": 0.0, "schedule": "constant",
    "learning_rate": 5e-3, "head_learning_rate": 5e-3, "max_grad_norm": 1e9,
}  # fmt: skip
TRAINING: dict[str, TrainingSettings] = {
    "lora": LoraSettings(**LORA, **STEPS),
    "rslora": LoraSettings(rslora=True, **LORA, **STEPS),
    "dora": LoraSettings(dora=True, **LORA, **STEPS),
    "qlora": QloraSettings(**LORA, **STEPS),
    "prompt-tuning": PromptTuningSettings(num_virtual_tokens=5, deep=False, **STEPS),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", TRAINING)
def test_twenty_steps_have_pefts_losses(variant: str, base: str, models: dict[str, Path], tmp_path: Path) -> None:
    settings = TRAINING[variant]
    assembled = on_base(models[base], settings)
    folder = stored(tmp_path / "adapter", assembled)
    theirs = made_by_peft(folder, settings).eval()  # no dropout: the random masks are not comparable
    peft.set_peft_model_state_dict(theirs, load_file(folder / "adapter_model.safetensors"))
    for module in assembled.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    given = examples(assembled, 50)
    batches: list[torch.Tensor] = []
    ours: list[float] = []

    class Noted(type(given.rows)):  # type: ignore[misc]
        def batch(self, rows: Any, *how: Any, **more: Any) -> Any:
            batches.append(torch.as_tensor(rows))
            return super().batch(rows, *how, **more)

    noted = Noted(given.rows.sequences, given.rows.pad_id, given.rows.prefix)
    held = examples(assembled, 6, seed=1)
    train(
        assembled, type(given)(noted, given.targets), settings, seed=0,
        evaluate=lambda: held_out_score(assembled, held), on_step=lambda _state, _total, loss: bool(ours.append(loss)),
    )  # fmt: skip

    parameters = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=settings.weight_decay)
    losses = []
    for rows in batches:
        batch = collate(given.rows.sequences, rows.numpy(), given.rows.pad_id)
        loss = theirs(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=given.targets[rows]
        ).loss  # fmt: skip
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert len(ours) == len(losses) == 20
    assert ours[-1] < 0.8 * ours[0]
    assert ours == pytest.approx(losses, rel=1e-4)
