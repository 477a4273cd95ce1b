"""``capo merge``: the merged model answers as the adapter on its base does, and needs no adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import generation_helpers
import helpers
import pytest
import torch
from commands import capo, tree
from safetensors.torch import load_file, save_file

import capotune
from capotune.adapters.assemble import Assembled
from capotune.adapters.store import save_adapter
from capotune.errors import AdapterError, CapotuneError, DataError, OutputError, SettingError
from capotune.events import Event, Progress
from capotune.kernels.nf4 import Linear4bit, dequantize_4bit, quantize_4bit
from capotune.methods.base import LowRank
from capotune.methods.feature_extraction.settings import FeatureExtractionSettings
from capotune.methods.lora.method import LoraLinear
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.methods.qlora.settings import QloraSettings
from capotune.models.base import find
from capotune.models.load import load_causal_lm
from capotune.runs import merging
from capotune.settings import TrainingSettings

LORA: dict[str, Any] = {"rank": 4, "alpha": 8, "learning_rate": 1e-2, "epochs": 1}
VARIANTS = {
    "lora": LoraSettings(**LORA),
    "lora-dora": LoraSettings(dora=True, **LORA),
    "lora-rslora": LoraSettings(rslora=True, **LORA),
    "lora-one-block": LoraSettings(layers=(1,), target_modules=("all-linear",), **LORA),
}
TEXT = "What colour is the sky? blue\nWhat colour is grass? green\n"
IDS = torch.randint(8, 300, (2, 12), generator=torch.Generator().manual_seed(5))


def save(assembled: Assembled, folder: Path) -> Path:
    """As an adapter folder, its weights moved from where they start."""
    helpers.shake(assembled)
    save_adapter(folder, assembled, helpers.TRAINED | {"held_out_score": 2.0, "scores": {}})
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "mine.txt"
    path.write_text(TEXT)
    return path


def by_transformers(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(input_ids=IDS).logits  # type: ignore[no-any-return]


def answers(assembled: Assembled) -> torch.Tensor:
    with torch.no_grad():
        return assembled.model(input_ids=IDS).logits  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------------- full precision


@pytest.mark.parametrize("base", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_answers_as_the_adapter_does(
    variant: str, base: str, writers: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    before = helpers.folder_digest(writers[base])
    assembled = generation_helpers.on_base(writers[base], VARIANTS[variant])
    plain = answers(assembled)
    adapter = save(assembled, tmp_path / "adapter")
    result = capotune.merge(adapter, out=tmp_path / "merged", data=str(text))
    assert (answers(assembled) - plain).abs().max() > 1e-2
    torch.testing.assert_close(by_transformers(tmp_path / "merged"), answers(assembled), rtol=1e-4, atol=1e-4)
    assert result["answers"]["to_adapter"] < 1e-8
    assert result["answers"]["to_base"] > 1e-3
    assert result["answers"]["top1_agreement"] == 1
    assert result["changed_layers"] == len(assembled.method.layers)  # type: ignore[attr-defined]
    assert helpers.folder_digest(writers[base]) == before
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_a_classifier_keeps_its_head_beside_the_merged_model(bert: Path, tickets: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    adapter = save(helpers.on_base(bert, LoraSettings(**LORA)), tmp_path / "adapter")
    ran = capo("merge", adapter, "--out", tmp_path / "merged", "--data", tickets)
    assert ran.code == 0, ran.err
    assert "head" in ran.said
    texts = ["my parcel is late", "the lamp is broken", "I paid twice please refund"]
    expected = capotune.load(adapter).predict_proba(texts)
    merged = capotune.load(tmp_path / "merged" / "adapter")
    torch.testing.assert_close(torch.tensor(merged.predict_proba(texts)), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    plain, changed = (AutoModel.from_pretrained(folder) for folder in (bert, tmp_path / "merged"))
    assert not torch.equal(plain(IDS % 28)[0], changed(IDS % 28)[0])


def test_a_base_in_bf16_stays_in_bf16(writers: dict[str, Path], text: Path, tmp_path: Path) -> None:
    base = shutil.copytree(writers["llama"], tmp_path / "base")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assembled = generation_helpers.on_base(base, LoraSettings(**LORA))
    result = capotune.merge(save(assembled, tmp_path / "adapter"), out=tmp_path / "merged", data=str(text))
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert 0 < result["answers"]["to_adapter"] < 1e-3  # what the rounding to bf16 costs
    path, layer = next(iter(assembled.method.layers.items()))  # type: ignore[attr-defined]
    assert torch.equal(merged[f"{path}.weight"], layer.merged_weight().bfloat16())


@pytest.mark.parametrize("settings", [*VARIANTS.values(), QloraSettings(**LORA)], ids=[*VARIANTS, "qlora"])
def test_unmerge_in_memory_gives_base_and_adapter_back_bit_by_bit(
    settings: LoraSettings, writers: dict[str, Path], tmp_path: Path
) -> None:
    bare = helpers.contents(generation_helpers.on_base(writers["llama"], settings, attached=False).model)
    adapter = save(generation_helpers.on_base(writers["llama"], settings), tmp_path / "adapter")
    generator = capotune.load(adapter)
    before = helpers.contents(generator.model)
    with torch.no_grad():
        expected = generator.model(input_ids=IDS).logits
        assert generator.merge()
        assert not any(isinstance(module, LoraLinear) for module in generator.model.modules())
        torch.testing.assert_close(generator.model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
        generator.unmerge()
        assert torch.equal(generator.model(input_ids=IDS).logits, expected)
    helpers.assert_same_bits(helpers.contents(generator.model), before)
    generator.method.detach()
    helpers.assert_same_bits(helpers.contents(generator.model), bare)


# -------------------------------------------------------------------------------------------------------------- 4 bits


def test_qlora_goes_into_the_full_base_unless_told_otherwise(writers: dict[str, Path], tmp_path: Path) -> None:
    """W + scale·BA with the base's own W, although the adapter was trained over 4 bits; the difference is measured."""
    assembled = generation_helpers.on_base(writers["llama"], QloraSettings(**LORA))
    result = capotune.merge(save(assembled, tmp_path / "adapter"), out=tmp_path / "merged")
    base, merged = (load_file(folder / "model.safetensors") for folder in (writers["llama"], tmp_path / "merged"))
    for path, layer in assembled.method.layers.items():  # type: ignore[attr-defined]
        expected = base[f"{path}.weight"] + layer.scale * layer.lora_B @ layer.lora_A
        torch.testing.assert_close(merged[f"{path}.weight"], expected.detach())
    assert not find(str(tmp_path / "merged")).is_quantized
    assert result["answers"]["to_adapter"] < 1e-8
    assert result["answers"]["over_4_bits"] > 1e-5


@pytest.mark.parametrize("stored", ["full", "packed"])
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_dequantised_added_requantised(
    base: str, stored: str, writers: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    """Into a base in full precision and into one that is stored in 4 bits; layers without a change keep their codes."""
    folder = writers[base]
    if stored == "packed":
        folder = tmp_path / "packed"
        capotune.quantize(str(writers[base]), out=folder)
    assembled = generation_helpers.on_base(folder, QloraSettings(layers=(0, 2), **LORA))
    adapter = save(assembled, tmp_path / "adapter")
    ran = capo("merge", adapter, "--out", tmp_path / "merged", "--requantize", "--data", text)
    assert ran.code == 0, ran.err
    assert "nats from the adapter's" in ran.said
    assert "quantized again" in ran.said
    merged = load_causal_lm(find(str(tmp_path / "merged")))
    for path, layer in assembled.model.named_modules():
        if isinstance(layer, LoraLinear):
            expected = quantize_4bit(layer.merged_weight())
        elif isinstance(layer, Linear4bit) and not path.endswith("base_layer"):
            expected = layer.quantized
        else:
            continue
        found = merged.get_submodule(path).quantized
        assert torch.equal(found.codes, expected.codes), path
        assert torch.equal(dequantize_4bit(found), dequantize_4bit(expected)), path
    assert find(str(tmp_path / "merged")).quantization == find(str(folder)).quantization or stored == "full"


def test_what_the_merge_cost_is_what_is_printed(writers: dict[str, Path], text: Path, tmp_path: Path) -> None:
    assembled = generation_helpers.on_base(writers["llama"], QloraSettings(**LORA))
    adapter = save(assembled, tmp_path / "adapter")
    ran = capo("merge", adapter, "--out", tmp_path / "merged", "--requantize", "--data", text, "--json")
    printed = json.loads(ran.out)["answers"]
    (row,) = assembled.task.rows_to_compare(str(text), 32)
    ids = torch.tensor([row.ids])
    merged = load_causal_lm(find(str(tmp_path / "merged")))
    with torch.no_grad():
        p, q = (model(input_ids=ids).logits[0].double().log_softmax(1) for model in (assembled.model, merged))
    assert printed["to_adapter"] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-4)
    assert printed["top1_agreement"] == pytest.approx(float((p.argmax(1) == q.argmax(1)).double().mean()))
    assert printed["compared"] == ids.shape[1]


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("factor", "said"), [(0.0, "answers as the base does"), (1.01, "answers otherwise")])
def test_model_that_answers_otherwise_is_not_left(
    factor: float, said: str, writers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A delta that does not arrive, and one that is a hundredth too large."""
    adapter = save(generation_helpers.on_base(writers["llama"], LoraSettings(**LORA)), tmp_path / "adapter")
    right = LowRank.merged

    def wrong(self: LowRank, weight: torch.Tensor) -> torch.Tensor:
        return weight + factor * (right(self, weight) - weight)

    monkeypatch.setattr(merging, "write_merged", with_wrong(wrong, monkeypatch))
    refuse(adapter, AdapterError, said, tmp_path / "merged")


def with_wrong(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``write_merged`` with deltas of another kind, which the adapter itself does not have."""
    write = merging.write_merged

    def written(*given: Any, **options: Any) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(LowRank, "merged", wrong)
            return write(*given, **options)

    return written


def refuse(adapter: Path, error: type[CapotuneError], said: str, out: Path, **options: Any) -> None:
    before = tree(out.parent)
    with pytest.raises(error, match=said):
        capotune.merge(adapter, out=out, **options)
    assert tree(out.parent) == before


@pytest.mark.parametrize("settings", [PromptTuningSettings(num_virtual_tokens=3), FeatureExtractionSettings()], ids=str)
def test_methods_without_a_change_of_weights(settings: TrainingSettings, bert: Path, tmp_path: Path) -> None:
    adapter = save(helpers.on_base(bert, settings), tmp_path / "adapter")
    refuse(adapter, SettingError, f"{settings.method} has no change.*Adapters of lora, qlora", tmp_path / "merged")


def test_bad_input_leaves_nothing(
    writers: dict[str, Path], bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "merged"
    lora = save(generation_helpers.on_base(writers["llama"], LoraSettings(**LORA)), tmp_path / "lora")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "there").mkdir()
    refuse(lora, SettingError, "`requantize`: it is for adapters that were trained over 4 bits", out, requantize=True)
    refuse(lora, AdapterError, "belongs to another base", out, model=str(writers["gpt2"]))
    with monkeypatch.context() as patch:  # said before anything is written
        patch.setattr(merging, "write_merged", None)
        refuse(lora, DataError, "no text|no row|empty", out, data=str(tmp_path / "empty.txt"))
    refuse(lora, OutputError, "exists already", tmp_path / "there")
    refuse(tmp_path / "nothing", AdapterError, "no such adapter folder", out)
    refuse(bert, AdapterError, "capotune.json is missing", out)


def test_a_packed_base_needs_requantize(writers: dict[str, Path], tmp_path: Path) -> None:
    capotune.quantize(str(writers["llama"]), out=tmp_path / "packed")
    for settings in (QloraSettings(**LORA), LoraSettings(**LORA)):
        adapter = save(generation_helpers.on_base(tmp_path / "packed", settings), tmp_path / settings.method)
        refuse(adapter, SettingError, "is stored in 4 bits.*`requantize=True`", tmp_path / "merged")


def test_a_base_that_is_gone(writers: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(writers["llama"], tmp_path / "base")
    adapter = save(generation_helpers.on_base(base, LoraSettings(**LORA)), tmp_path / "adapter")
    shutil.rmtree(base)
    refuse(adapter, AdapterError, "cannot be used from here.*`model`", tmp_path / "merged")
    assert capotune.merge(adapter, out=tmp_path / "merged", model=str(writers["llama"]))["changed_layers"]


def lose_b(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(next(name for name in tensors if ".lora_B." in name))


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def rename(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "q_proj" in name]:
        tensors[name.replace("q_proj", "z_proj")] = tensors.pop(name)


def cut(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if ".lora_A." in name:
            tensors[name] = tensors[name][:, :-1].clone()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lose_b, "adapter is damaged"),
        (spoil, "NaN or infinite"),
        (rename, "z_proj"),
        (cut, "do not fit together"),
    ],
)
def test_a_damaged_adapter(damage: Any, said: str, writers: dict[str, Path], tmp_path: Path) -> None:
    adapter = save(generation_helpers.on_base(writers["llama"], LoraSettings(**LORA)), tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    damage(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    helpers.unsigned(adapter)
    refuse(adapter, AdapterError, said, tmp_path / "merged")


def test_stopped_halfway_leaves_nothing(writers: dict[str, Path], tmp_path: Path) -> None:
    adapter = save(generation_helpers.on_base(writers["llama"], LoraSettings(**LORA)), tmp_path / "adapter")
    before = tree(tmp_path)

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.done > event.total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capotune.merge(adapter, out=tmp_path / "merged", progress=stop)
    assert tree(tmp_path) == before
