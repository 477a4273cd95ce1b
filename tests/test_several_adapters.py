"""Several adapters on one base: switched in place, taken off, and each row of a batch with its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import generation_helpers
import helpers
import pytest
import torch

import capotune
from capotune.adapters.assemble import Assembled, assemble, attach
from capotune.adapters.store import read_adapter, save_adapter
from capotune.errors import AdapterError, ModelError, SettingError
from capotune.methods.base import Start
from capotune.methods.feature_extraction.settings import FeatureExtractionSettings
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.methods.qlora.settings import QloraSettings
from capotune.models.base import find
from capotune.settings import TrainingSettings
from capotune.tasks.several import Adapters
from capotune.tasks.token_classification import TokenClassification

METHODS: dict[str, TrainingSettings] = {
    "lora": LoraSettings(rank=4, rslora=True),
    "one-block": LoraSettings(rank=2, layers=(1,)),
    "dora": LoraSettings(rank=3, dora=True),
    "prompt": PromptTuningSettings(num_virtual_tokens=3, deep=False, init="vocabulary", learning_rate=0.1, epochs=1),
    "last-block": FeatureExtractionSettings(trainable_layers=1),
    "deep": PromptTuningSettings(num_virtual_tokens=2, deep=True, init="vocabulary", learning_rate=0.1, epochs=1),
}
MIXED = ["dora", None, "lora", "one-block", "lora", None]
IDS = torch.randint(8, 300, (len(MIXED), 12), generator=torch.Generator().manual_seed(5))
MASK = torch.ones_like(IDS)
MASK[:, :4] = torch.arange(len(MIXED))[:, None] % 5 <= torch.arange(4)[None]


def saved(base: Path, settings: TrainingSettings, folder: Path, seed: int = 7) -> Path:
    assembled = generation_helpers.on_base(base, settings)
    helpers.shake(assembled, seed)
    save_adapter(folder, assembled, helpers.TRAINED | {"held_out_score": 2.0, "scores": {}})
    return folder


@pytest.fixture
def folders(llama_writer: Path, tmp_path: Path) -> dict[str, Path]:
    return {
        name: saved(llama_writer, settings, tmp_path / name, seed)
        for seed, (name, settings) in enumerate(METHODS.items())
    }


@torch.no_grad()
def logits(model: torch.nn.Module, rows: slice = slice(None)) -> torch.Tensor:
    return model(input_ids=IDS[rows], attention_mask=MASK[rows]).logits  # type: ignore[no-any-return]


def test_switching_gives_the_bits_of_each_adapter_alone_and_the_base_back(
    folders: dict[str, Path], llama_writer: Path
) -> None:
    adapters = capotune.load_adapters(folders)
    assert adapters.in_use == "lora"
    adapters.use(None)
    weights, modules = helpers.contents(adapters.model), dict(adapters.model.named_modules())
    plain = logits(capotune.load_model(llama_writer).model)
    for name in [*folders, *reversed(folders)]:
        facade = adapters.use(name)
        assert adapters.in_use == name
        expected = capotune.load(folders[name])
        assert torch.equal(logits(adapters.model), logits(expected.model))
        prompt = "What colour is the sky?"
        written = facade.generate([prompt], max_tokens=8)
        assert written == expected.generate([prompt], max_tokens=8)
    adapters.use(None)
    assert torch.equal(logits(adapters.model), plain)
    helpers.assert_same_bits(helpers.contents(adapters.model), weights)
    assert dict(adapters.model.named_modules()) == modules


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_rows_with_adapters_of_their_own_are_as_apart(base: str, writers: dict[str, Path], tmp_path: Path) -> None:
    used = sorted({name for name in MIXED if name is not None})
    folders = {name: saved(writers[base], METHODS[name], tmp_path / name, at) for at, name in enumerate(used)}
    adapters = capotune.load_adapters(folders)
    adapters.use("lora")
    with adapters.rows(MIXED) as model:
        found = logits(model)
    assert adapters.in_use == "lora"
    for row, name in enumerate(MIXED):
        adapters.use(name)
        torch.testing.assert_close(found[row], logits(adapters.model, slice(row, row + 1))[0], rtol=0, atol=1e-6)
    assert (found[2] - logits(adapters.use(None).model)[2]).abs().max() > 1e-2


def test_rows_over_4_bits_are_as_apart(llama_writer: Path, tmp_path: Path) -> None:
    folders = {str(seed): saved(llama_writer, QloraSettings(rank=4), tmp_path / str(seed), seed) for seed in range(2)}
    adapters = capotune.load_adapters(folders)
    names = ["0", "1", None, "1", "0", None]
    with adapters.rows(names) as model:
        found = logits(model)
    for row, name in enumerate(names):
        adapters.use(name)
        torch.testing.assert_close(found[row], logits(adapters.model, slice(row, row + 1))[0], rtol=0, atol=1e-6)


def test_removed_adapter_is_off_and_unknown(folders: dict[str, Path], llama_writer: Path) -> None:
    adapters = capotune.load_adapters(folders)
    adapters.use("lora")
    adapters.remove("lora")
    assert adapters.in_use is None
    assert torch.equal(logits(adapters.model), logits(capotune.load_model(llama_writer).model))
    with pytest.raises(SettingError, match="no adapter of that name"):
        adapters.use("lora")
    adapters.add("lora", read_adapter(folders["lora"]))
    with pytest.raises(SettingError, match="there is an adapter of that name"):
        adapters.add("lora", read_adapter(folders["lora"]))


@pytest.mark.parametrize("name", ["prompt", "last-block"])
def test_methods_that_cannot_share_a_batch_say_why(name: str, folders: dict[str, Path]) -> None:
    adapters = capotune.load_adapters(folders)
    with pytest.raises(SettingError, match="changes more than linear layers"), adapters.rows([name, None]):
        pass
    assert adapters.in_use == "lora"


def test_batch_of_another_size_and_other_bases_are_refused(
    folders: dict[str, Path], writers: dict[str, Path], bert: Path, tmp_path: Path
) -> None:
    adapters = capotune.load_adapters(folders)
    with adapters.rows(["lora", None]) as model, pytest.raises(ModelError, match="adapters of 2 rows are named"):
        logits(model, slice(3))
    refused(adapters, saved(writers["gpt2"], METHODS["lora"], tmp_path / "gpt2"), "belongs to another base")
    refused(adapters, saved(writers["llama"], QloraSettings(rank=2), tmp_path / "qlora"), "trained over nf4")
    classifier = helpers.on_base(bert, LoraSettings(rank=2))
    save_adapter(tmp_path / "labels", classifier, helpers.TRAINED | {"scores": {}})
    refused(adapters, tmp_path / "labels", "gives labels.*capo predict")


def refused(adapters: Adapters, folder: Path, said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        adapters.add("another", read_adapter(folder))
    assert "another" not in adapters.names


@pytest.mark.parametrize("name", ["lora", "deep"])
def test_refused_adapter_leaves_base_and_adapter_in_use_as_they_were(
    name: str, llama_writer: Path, tmp_path: Path
) -> None:
    adapters = capotune.load_adapters({"one": saved(llama_writer, METHODS["one-block"], tmp_path / "one")})
    adapters.use("one")
    before = logits(adapters.model)
    bad = read_adapter(saved(llama_writer, METHODS[name], tmp_path / "bad", 1))
    last = sorted(bad.tensors)[-1]
    with pytest.raises(AdapterError):
        adapters.add("bad", replace(bad, tensors=bad.tensors | {last: bad.tensors[last][:1, :1].clone()}))
    assert torch.equal(logits(adapters.model), before)
    adapters.use(None)
    assert torch.equal(logits(adapters.model), logits(capotune.load_model(llama_writer).model))


def test_report_that_raises_leaves_the_model_as_it_was(llama_writer: Path, tmp_path: Path) -> None:
    def stop(event: object) -> None:
        raise RuntimeError(event)

    adapters = capotune.load_adapters({"one": saved(llama_writer, METHODS["one-block"], tmp_path / "one")})
    before = logits(adapters.model)
    folder = saved(llama_writer, METHODS["lora"], tmp_path / "peft")
    (folder / "capotune.json").unlink()
    (folder / "README.md").unlink()
    with pytest.raises(RuntimeError):
        adapters.add("peft", read_adapter(folder), stop)
    assert torch.equal(logits(adapters.model), before)


LABELS: dict[str, TrainingSettings] = {
    "lora": LoraSettings(rank=4),
    "dora": LoraSettings(rank=3, dora=True),
    "head": FeatureExtractionSettings(),
    "last-block": FeatureExtractionSettings(trainable_layers=1),
    "prompt": PromptTuningSettings(num_virtual_tokens=3, deep=False, init="vocabulary"),
    "deep": PromptTuningSettings(num_virtual_tokens=2, deep=True, init="vocabulary"),
}


def test_adapters_for_labels_and_tags_stand_on_one_base(bert: Path, tmp_path: Path) -> None:
    """Each with a head of its own, on other features, for other labels."""
    for seed, (name, settings) in enumerate(LABELS.items()):
        labelled = helpers.on_base(bert, settings)
        helpers.shake(labelled, seed)
        save_adapter(tmp_path / name, labelled, helpers.TRAINED | {"scores": {}})
    save_adapter(tmp_path / "tags", tagger(bert), helpers.TRAINED | {"scores": {}})
    texts = ["my parcel is late", "the lamp is broken", "I paid twice please refund"]
    adapters = capotune.load_adapters({name: tmp_path / name for name in [*LABELS, "tags"]})
    for name in [*LABELS, *reversed(LABELS)]:
        found = adapters.use(name).predict_proba(texts)
        torch.testing.assert_close(
            torch.tensor(found), torch.tensor(capotune.load(tmp_path / name).predict_proba(texts)), rtol=0, atol=1e-7
        )
        assert adapters.use("tags").predict(texts) == capotune.load(tmp_path / "tags").predict(texts)
    with pytest.raises(SettingError, match="a base alone gives no labels"):
        adapters.use(None)
    names = ["lora", "tags", "dora", "lora"]
    ids, mask = IDS[:4] % 28, MASK[:4].flip(1)
    with torch.no_grad(), adapters.rows(names) as model:
        mixed = model(input_ids=ids, attention_mask=mask)
    for row, name in enumerate(names):
        adapters.use(name)
        with torch.no_grad():
            alone = adapters.model(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1]).logits[0]
        torch.testing.assert_close(mixed[row], alone, rtol=0, atol=1e-6)
    with pytest.raises(SettingError, match="a base alone gives no labels"), adapters.rows(["lora", None]):
        pass
    with pytest.raises(SettingError, match="more than linear layers"), adapters.rows(["lora", "prompt"]):
        pass
    adapters.use("tags")
    adapters.remove("tags")
    assert adapters.in_use is None
    plain = capotune.load(tmp_path / "head")._assembled.loaded
    helpers.assert_same_bits(helpers.contents(adapters.model), helpers.contents(plain))


def tagger(base: Path) -> Assembled:
    settings = helpers.complete(LoraSettings(rank=2), find(str(base)))
    task = TokenClassification.on(find(str(base)), ["PER", "LOC"], None, 0, 100)
    assembled = assemble(task, settings, device=helpers.CPU)
    attach(assembled, Start(torch.Generator().manual_seed(0)))
    helpers.shake(assembled, 9)
    return assembled


def test_example_of_the_docs_runs(llama_writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate(("polite", "terse")):
        (tmp_path / name).mkdir()
        saved(llama_writer, METHODS["lora"], tmp_path / name / "adapter", seed)
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "adapters.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    exec(text.partition("```python\n")[2].partition("```")[0], names)
    assert names["adapters"].names == ("polite",)  # type: ignore[attr-defined]
    assert not torch.equal(*names["logits"][:2])  # type: ignore[index]
