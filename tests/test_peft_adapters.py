"""Adapters that PEFT wrote are read: equal logits, one message for what is damaged, and the base as it was."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapter_matrix
import peft
import peft_cases
import planted
import pytest
import torch
from commands import capo
from helpers import assert_same_bits, contents
from peft_cases import FEATURES, MADE_BY_PEFT, MADE_HERE, Cell, make_adapter, make_base
from safetensors.torch import load_file, save_file

import capotune
from capotune.cli.chat import Session
from capotune.errors import AdapterError, CapotuneError, ModelError, SettingError
from capotune.events import Event, Warned
from capotune.methods.peft.parts import read_parts

TOLERANCE = 1e-5
CELLS = [
    *(Cell(MADE_BY_PEFT, "CAUSAL_LM", feature, "Llama") for feature in FEATURES),
    Cell(MADE_BY_PEFT, "CAUSAL_LM", "DoRA", "GPT-2"),
    Cell(MADE_BY_PEFT, "CAUSAL_LM", "IA3", "GPT-2"),
    Cell(MADE_BY_PEFT, "CAUSAL_LM", "embedding", "Qwen3"),
    Cell(MADE_BY_PEFT, "CAUSAL_LM", "trained tokens", "Qwen3"),
    Cell(MADE_BY_PEFT, "SEQ_CLS", "LoRA", "Gemma 3"),
    Cell(MADE_BY_PEFT, "SEQ_CLS", "bias all", "GPT-2"),
    Cell(MADE_BY_PEFT, "SEQ_CLS", "IA3", "DistilBERT"),
    Cell(MADE_BY_PEFT, "SEQ_CLS", "modules_to_save", "RoBERTa"),
    Cell(MADE_BY_PEFT, "SEQ_CLS", "DoRA", "DeBERTa-v3"),
    Cell(MADE_BY_PEFT, "SEQ_CLS", "patterns", "ModernBERT"),
    Cell(MADE_BY_PEFT, "SEQ_CLS", "prompt", "BERT"),
    Cell(MADE_BY_PEFT, "SEQ_CLS", "prefix", "BERT"),
    Cell(MADE_BY_PEFT, "SEQ_CLS", "prefix", "RoBERTa"),
    Cell(MADE_HERE, "CAUSAL_LM", "LoRA", "Phi-3"),
    Cell(MADE_HERE, "CAUSAL_LM", "QLoRA", "Qwen3"),
    Cell(MADE_HERE, "CAUSAL_LM", "prefix", "Gemma 3"),
    Cell(MADE_HERE, "SEQ_CLS", "DoRA", "ModernBERT"),
]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",  # PEFT asks Transformers by the old name
    "ignore::UserWarning",  # PEFT's, of what it guesses
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.direction}: {cell.feature}, {cell.family}")
def test_logits_here_are_pefts(cell: Cell, bases: Path, tmp_path: Path) -> None:
    if (cell.feature, cell.family) == ("prefix", "Gemma 3") and peft.__version__.startswith("0.18."):
        pytest.skip("PEFT 0.18 reads a prefix otherwise where attention slides; ours has the same bits")
    assert cell.measure(make_base(cell.family, bases / cell.family), tmp_path / "adapter") < TOLERANCE


def test_page_holds_every_cell_and_none_differs() -> None:
    written = adapter_matrix.written(adapter_matrix.PAGE.read_text(encoding="utf-8"))
    expected = adapter_matrix.tables(dict.fromkeys(peft_cases.cells(), 0.0))
    number = re.compile(r"\de[+-]\d\d")
    assert number.sub("", written) == number.sub("", expected)
    assert all(float(one) <= TOLERANCE for one in number.findall(written))


@pytest.fixture(scope="module")
def written(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of PEFT's on a Llama."""
    folder = tmp_path_factory.mktemp("written") / "adapter"
    make_adapter(make_base("Llama", bases / "Llama"), folder, FEATURES["LoRA"], "CAUSAL_LM")
    return folder


def test_base_is_as_it_was_when_the_adapter_is_taken_off(bases: Path, tmp_path: Path) -> None:
    base = make_base("Qwen3", bases / "Qwen3")
    make_adapter(base, tmp_path / "adapter", FEATURES["modules_to_save"], "CAUSAL_LM")
    loaded = capotune.load(tmp_path / "adapter", model=str(base))
    loaded.method.detach()
    plain = peft_cases.load_plain(base, "CAUSAL_LM").state_dict()
    found = loaded.model.state_dict()
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


MERGED = [
    *(Cell(MADE_BY_PEFT, "CAUSAL_LM", feature, "Qwen3") for feature in ("modules_to_save", "trained tokens", "IA3")),
    Cell(MADE_BY_PEFT, "SEQ_CLS", "DoRA", "GPT-2"),
    Cell(MADE_BY_PEFT, "SEQ_CLS", "bias of B", "RoBERTa"),
]


def called_a_classifier(base: Path, folder: Path) -> Path:
    """A copy whose configuration names its family's classifier."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["architectures"] = [re.sub(r"For\w+|LMHead\w+", "ForSequenceClassification", config["architectures"][0])]
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def notices_of_merge(adapter: Path, base: Path, out: Path) -> list[str]:
    said = list[str]()

    def note(event: Event) -> None:
        if isinstance(event, Warned):
            said.append(event.text)

    capotune.merge(adapter, model=str(base), out=out, progress=note)
    return said


@pytest.mark.parametrize("cell", MERGED, ids=lambda cell: f"{cell.feature}, {cell.family}")
def test_merged_model_gives_pefts_logits_in_transformers(cell: Cell, bases: Path, tmp_path: Path) -> None:
    """Conv1D, trained biases and heads; an output layer that shared the embedding's weight, and no longer does."""
    base = make_base(cell.family, bases / cell.family)
    if cell.task_type == "SEQ_CLS":
        base = called_a_classifier(base, tmp_path / "base")
    made = make_adapter(base, tmp_path / "adapter", FEATURES[cell.feature], cell.task_type)
    (said,) = notices_of_merge(tmp_path / "adapter", base, tmp_path / "merged")
    assert "no fingerprint" in said
    merged = peft_cases.load_plain(tmp_path / "merged", cell.task_type)
    ids = torch.tensor([[9, 8, 7, 40, 41, 6]])
    with torch.no_grad():
        assert (merged(input_ids=ids).logits - made(input_ids=ids).logits).abs().max() < TOLERANCE
    output, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    if output is not None:
        assert merged.config.tie_word_embeddings == torch.equal(output.weight, embedding.weight)


def test_bias_that_the_base_lacks_is_not_merged(bases: Path, tmp_path: Path) -> None:
    base = make_base("Llama", bases / "Llama")
    make_adapter(base, tmp_path / "adapter", FEATURES["bias of B"], "CAUSAL_LM")
    with pytest.raises(AdapterError, match=r"a bias of 'model\.layers\.0\.mlp\.down_proj', "):
        capotune.merge(tmp_path / "adapter", model=str(base), out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_several_are_switched_in_place(bases: Path, tmp_path: Path) -> None:
    """Deltas, trained parameters and vectors alike; deltas alone stand in one batch with rows of other adapters."""
    base = make_base("Qwen3", bases / "Qwen3")
    features = ("LoRA", "DoRA", "bias all", "trained tokens", "IA3", "prompt")
    made = {name: make_adapter(base, tmp_path / name, FEATURES[name], "CAUSAL_LM") for name in features}
    adapters = capotune.load_adapters({name: tmp_path / name for name in features}, model=str(base))
    adapters.use(None)
    weights = contents(adapters.model)
    for name in [*features, *reversed(features)]:
        assert peft_cases.difference(made[name], adapters.use(name), "CAUSAL_LM") < TOLERANCE
    adapters.use(None)
    assert_same_bits(contents(adapters.model), weights)
    ids = torch.tensor([[9, 8, 7, 6]] * 3)
    with torch.no_grad(), adapters.rows(["DoRA", None, "LoRA"]) as model:
        mixed = model(input_ids=ids).logits
    apart = [made["DoRA"], peft_cases.load_plain(base, "CAUSAL_LM"), made["LoRA"]]
    for row, alone in zip(mixed, apart, strict=True):
        assert (alone(input_ids=ids[:1]).logits[0] - row).abs().max() < TOLERANCE
    with pytest.raises(SettingError, match="more than linear layers"), adapters.rows(["IA3", None, None]):
        pass


def test_adapters_by_name_are_read_from_their_folders(bases: Path, tmp_path: Path) -> None:
    import peft

    base = make_base("Llama", bases / "Llama")
    model = peft.get_peft_model(peft_cases.load_plain(base, "CAUSAL_LM"), peft.LoraConfig(), adapter_name="one")
    model.add_adapter("two", peft.LoraConfig(r=2))
    model.save_pretrained(tmp_path / "both")
    assert capotune.info(tmp_path / "both" / "two")["settings"]["r"] == 2
    with pytest.raises(AdapterError, match=r"Did you mean .*both/one or .*both/two\?"):
        capotune.load(tmp_path / "both")


def test_commands_take_it(written: Path, bases: Path) -> None:
    told = capo("info", str(written))
    assert told.code == 0, told.err
    assert "no fingerprint" in " ".join(told.out.split())
    assert "megatron_config" not in told.out  # which is null
    wrote = capo("generate", str(written), "now", "--model", str(bases / "Llama"), "--max-tokens", 3)
    assert wrote.code == 0, wrote.err
    assert "not checked" in wrote.err


@pytest.fixture(scope="module")
def labelling(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, str]:
    """PEFT's model on a DistilBERT, its adapter, whose configuration names no head, and the base."""
    folder = tmp_path_factory.mktemp("labelling") / "adapter"
    base = make_base("DistilBERT", bases / "DistilBERT")
    made = make_adapter(base, folder, FEATURES["LoRA"], "SEQ_CLS")
    config(modules_to_save=None)(folder)
    return made, folder, str(base)


def test_head_is_read_by_its_tensors_whatever_the_configuration_names(labelling: tuple[Any, Path, str]) -> None:
    """PEFT takes ``pre_classifier`` for a ``classifier`` and stores both; some write a head and name none."""
    made, folder, base = labelling
    assert peft_cases.difference(made, capotune.load(folder, model=base), "SEQ_CLS") < TOLERANCE


def test_numbers_in_data_are_positions_of_labels(labelling: tuple[Any, Path, str]) -> None:
    _, folder, base = labelling
    answers = capotune.predict(folder, peft_cases.TEXTS, model=base)
    rows = [
        {"text": text, "label": int(answer.label.removeprefix("LABEL_"))}
        for text, answer in zip(peft_cases.TEXTS, answers, strict=True)
    ]
    assert capotune.evaluate(folder, data=rows, model=base)["accuracy"] == 1


def test_weights_lost_by_peft_are_not_drawn_at_random(bases: Path, tmp_path: Path) -> None:
    """PEFT stores ``classifier`` of a DeBERTa and leaves its pooler out, which no pretrained one has."""
    import peft

    base = make_base("DeBERTa-v3", bases / "DeBERTa-v3")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query_proj"])
    peft.get_peft_model(peft_cases.load_plain(base, "SEQ_CLS"), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"pooler.*by chance"):
        capotune.load(tmp_path / "adapter", model=str(base))


# --------------------------------------------------------------------------------------------------------- bad input


def config(**values: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def text(content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "adapter_config.json").write_text(content)


def tensors(change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor] | None]) -> Callable[[Path], object]:
    def changed(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        found = [change(*one) for one in load_file(path).items()]
        save_file(dict(one for one in found if one is not None), path)

    return changed


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def linked(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.unlink()
    path.symlink_to("/etc/hostname")


def lying(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])


def twice(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    names = ("base_model.model.lm_head.weight", "base_model.model.lm_head.modules_to_save.weight")
    save_file(load_file(path) | {name: torch.full((360, 32), float(at)) for at, name in enumerate(names)}, path)


def spelled_twice(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    found = load_file(path)
    key = next(key for key in found if key.endswith("lora_B.weight"))
    save_file(found | {key.replace("lora_B.weight", "lora_B.default.weight"): found[key] + 1}, path)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "deep JSON": (text("[" * 10_000 + "]" * 10_000), "nested too deep|not readable JSON"),
    "a name twice": (text('{"peft_type": "LORA", "peft_type": "IA3"}'), "'peft_type' stands in it twice"),
    "no object": (text("[]"), "expected an object"),
    "unknown kind": (config(peft_type="VERA"), "peft_type is 'VERA'"),
    "changed base": (config(init_lora_weights="pissa"), "changed the base's weights"),
    "huge rank": (config(r=10**9), "do not fit together"),
    "no alpha": (config(lora_alpha=None), "lora_alpha above 0"),
    "few tensors for a prompt": (config(num_virtual_tokens=10**9), "1000000000 virtual tokens, and 0 are stored"),
    "slow pattern": (config(alpha_pattern={"(a+)+b": 3}), "may take for ever"),
    "pickle": (pickled, "weights_only=True"),
    "link": (linked, "a link that leaves the folder"),
    "lying header": (lying, "damaged or incomplete"),
    "NaN": (tensors(lambda key, one: (key, one * float("nan"))), "NaN or infinite"),
    "a half is missing": (tensors(lambda key, one: None if "lora_B" in key else (key, one)), "the other is missing"),
    "wrong shape": (tensors(lambda key, one: (key, one[:, 1:].clone() if "lora_A" in key else one)), "fits the base"),
    "a weight twice": (twice, "stored twice, with other values"),
    "a half twice": (spelled_twice, "lora_B is stored twice, with other values"),
    "endless repeat": (config(rank_pattern={"a{99999999999}": 1}), "not a valid pattern"),
    "huge table": (config(rank_pattern={f"no_{number}": 1 for number in range(1001)}), "1,001 entries"),
    "huge alpha": (config(lora_alpha=10**400), "lora_alpha above 0"),
    "no magnitudes": (config(use_dora=True), "no lora_magnitude_vector"),
    "no bias of B": (config(lora_bias=True), "no lora_B.bias"),
    "extra tensor": (tensors(lambda key, one: (key.replace("layers.1", "layers.7"), one)), "does not have"),
    "path upwards": (tensors(lambda key, one: (key.replace("layers", "../x"), one)), "does not have"),
}


@pytest.mark.parametrize("name", BAD)
def test_damage_is_one_message(name: str, written: Path, bases: Path, tmp_path: Path) -> None:
    damage, message = BAD[name]
    folder = tmp_path / "adapter"
    shutil.copytree(written, folder)
    damage(folder)
    with pytest.raises(CapotuneError, match=message) as error:
        capotune.load(folder, model=str(bases / "Llama"))
    assert isinstance(error.value, AdapterError)
    assert str(folder) in str(error.value)
    assert os.linesep not in str(error.value)


def test_pickles_in_an_adapters_folder_are_not_opened(
    written: Path, bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside its weights, in their place, and under their name."""
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(written, tmp_path / "adapter"))
    planted.pickled("adapter_model.bin", "training_args.bin", "optimizer.pt", "lora.pkl")(folder)
    capotune.load(folder, model=str(bases / "Llama"))
    weights = folder / "adapter_model.safetensors"
    weights.unlink()
    with pytest.raises(AdapterError, match="weights_only=True"):
        capotune.load(folder, model=str(bases / "Llama"))
    torch.save({"a": planted.Exploit()}, weights)
    with pytest.raises(AdapterError, match="damaged or incomplete"):
        capotune.load(folder, model=str(bases / "Llama"))
    assert not Path(planted.MARKER).exists()


def test_adapter_of_zeros_is_described_and_ids_beyond_all_are_refused(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(written, folder)
    tensors(lambda key, one: (key, one * ("lora_B" not in key)))(folder)
    (folder / "README.md").write_text("x" * 2**21)
    assert capotune.info(folder)["delta"]["norm"] == 0
    rows = {"base_model.model.embed.trainable_tokens_delta": torch.ones(1, 4)}
    with pytest.raises(AdapterError, match="must state the ids"):
        read_parts({"token_indices": [10**30]}, rows)


def also(**more: torch.Tensor) -> Callable[[Path], object]:
    def changed(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        added = {f"base_model.model.{key.replace('__', '.')}": tensor for key, tensor in more.items()}
        save_file(load_file(path) | added, path)

    return changed


A, B = torch.ones(4, 32), torch.zeros(32, 4)
IDLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a delta of zeros": (
        also(model__layers__7__q_proj__lora_A__weight=A, model__layers__7__q_proj__lora_B__weight=B),
        r"'model\.layers\.7\.q_proj\.weight'",
    ),
    "a buffer": (also(model__rotary_emb__inv_freq=torch.ones(4)), r"'model\.rotary_emb\.inv_freq'"),
    "the base's own": (also(model__norm__original_module__weight=torch.ones(32)), "a copy of the base's own"),
}


@pytest.mark.parametrize("name", IDLE)
def test_what_does_nothing_is_passed_over_and_named(name: str, written: Path, bases: Path, tmp_path: Path) -> None:
    change, message = IDLE[name]
    folder, said = tmp_path / "adapter", list[str]()
    shutil.copytree(written, folder)
    change(folder)
    loaded = capotune.load(folder, model=str(bases / "Llama"), report=lambda event: said.append(str(event)))
    assert re.search(message, " ".join(said))
    plain = capotune.load(written, model=str(bases / "Llama"))
    assert_same_bits(contents(loaded.model), contents(plain.model))


def test_chat_names_what_does_nothing(
    written: Path, bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = IDLE["a delta of zeros"]
    folder = tmp_path / "adapter"
    shutil.copytree(written, folder)
    change(folder)
    Session(capotune.load(written, model=str(bases / "Llama")), str(written), {}).take(f"/adapter {folder}")
    assert re.search(message + ".*\nnow .* answers", capsys.readouterr().err)


def test_merge_names_what_does_nothing(written: Path, bases: Path, tmp_path: Path) -> None:
    change, message = IDLE["a delta of zeros"]
    folder = tmp_path / "adapter"
    shutil.copytree(written, folder)
    change(folder)
    _, said = notices_of_merge(folder, bases / "Llama", tmp_path / "merged")
    assert re.search(message, said)


def test_unknown_settings_and_absent_targets_are_named(written: Path, bases: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(written, folder)
    config(of_tomorrow=3, target_modules=["q_proj", "none_such"])(folder)
    notices = " ".join(capotune.info(folder)["notices"])
    assert "'of_tomorrow'" in notices
    assert "'none_such'" in notices
    capotune.load(folder, model=str(bases / "Llama"))
