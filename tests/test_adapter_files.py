"""An adapter's folder that somebody made wrong, by mistake or on purpose, is refused in one message."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generation_helpers
import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file

import capotune
from capotune.adapters.files import CONFIG, RECORD, WEIGHTS
from capotune.adapters.store import read_adapter, save_adapter
from capotune.errors import AdapterError, CapotuneError, ModelError, SettingError
from capotune.methods.lora.method import find_targets
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.patterns import path_pattern
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.models.architecture import Architecture
from capotune.models.gguf.file import open_gguf
from capotune.models.shards import Shards
from capotune.tasks.golden import golden_answers

A_KEY = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"


@pytest.fixture(scope="module")
def labels(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of rank 2 for labels."""
    folder = tmp_path_factory.mktemp("made") / "labels"
    assembled = helpers.on_base(bert, LoraSettings(rank=2))
    save_adapter(folder, assembled, helpers.TRAINED, golden_answers(assembled))
    helpers.unsigned(folder)  # or what is made wrong would not be read any further
    return folder


@pytest.fixture(scope="module")
def prompt(llama_writer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A soft prompt of 3 vectors for text."""
    folder = tmp_path_factory.mktemp("made") / "prompt"
    settings = PromptTuningSettings(num_virtual_tokens=3, deep=False, init="vocabulary", learning_rate=0.1)
    save_adapter(folder, generation_helpers.on_base(llama_writer, settings), helpers.TRAINED)
    helpers.unsigned(folder)
    return folder


Damage = Callable[[Path], object]


def of_json(name: str, **values: Any) -> Damage:
    """Values of a JSON file changed, within objects where they are objects."""

    def change(folder: Path) -> None:
        found = json.loads((folder / name).read_text("utf-8"))
        for key, value in values.items():
            found[key] = {**found[key], **value} if isinstance(value, dict) and found.get(key) else value
        (folder / name).write_text(json.dumps(found), "utf-8")

    return change


def content(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text, "utf-8")


def weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    return lambda folder: save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """The header of the safetensors file changed, its tensors left where they are."""

    def damage(folder: Path) -> None:
        old = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(old[:8], "little")
        values = json.loads(old[8 : 8 + length])
        text = change(values)
        new = (text if isinstance(text, str) else json.dumps(values)).encode()
        (folder / WEIGHTS).write_bytes(len(new).to_bytes(8, "little") + new + old[8 + length :])

    return damage


def linked(name: str, target: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return damage


def piped(folder: Path) -> None:
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)


def twice(values: dict[str, Any]) -> str:
    text = json.dumps(values)
    return f"{text[:-1]}, {text[1:-1]}}}"


def overlapping(values: dict[str, Any]) -> None:
    first, second, *_ = [value for name, value in values.items() if name != "__metadata__"]
    second["data_offsets"] = first["data_offsets"]


LABELS: dict[str, tuple[Damage, str]] = {
    # JSON
    "deep record": (content(RECORD, "[" * 10_000 + "]" * 10_000), "nested too deep"),
    "record as deep as Python reads": (content(RECORD, '{"a":' + "[" * 500 + "]" * 500 + "}"), "nested too deep"),
    "a name twice in the record": (content(RECORD, '{"format": 1, "format": 1}'), "'format' stands in it twice"),
    "a name twice in the configuration": (content(CONFIG, '{"r": 1, "r": 2}'), "'r' stands in it twice"),
    "an endless number": (content(CONFIG, '{"r": ' + "9" * 5000 + "}"), "not readable JSON"),
    "a huge record": (content(RECORD, " " * (16 * 2**20 + 1)), "too large"),
    "half of a character": (of_json(RECORD, task="\ud800"), "surrogates not allowed"),
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), f"{CONFIG} is missing"),
    # links
    "link to a file elsewhere": (linked(RECORD, "/etc/hostname"), "a link that leaves the folder"),
    "link upwards": (linked(WEIGHTS, "../../x.safetensors"), "a link that leaves the folder"),
    "link to itself": (linked(CONFIG, CONFIG), "leads nowhere|Too many levels|is missing"),
    "a pipe": (piped, "no file"),
    # the header
    "a header longer than the file": (
        lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + b"{}"),
        "its header is longer",
    ),
    "a header of no JSON": (header(lambda _: "{"), "not readable JSON"),
    "a deep header": (header(lambda _: '{"a":' * 10_000), "nested too deep"),
    "a tensor twice": (header(twice), "stands in it twice"),
    "tensors over each other": (header(overlapping), "damaged or incomplete"),
    "a shape of another size": (header(lambda all_: all_[A_KEY].update(shape=[2, 10**9])), "damaged or incomplete"),
    "a shape beyond numbers": (header(lambda all_: all_[A_KEY].update(shape=[2**63, 2**63])), "damaged or incomplete"),
    "a negative shape": (header(lambda all_: all_[A_KEY].update(shape=[-2, 32])), "damaged or incomplete"),
    "offsets backwards": (header(lambda all_: all_[A_KEY].update(data_offsets=[8, 0])), "damaged or incomplete"),
    "an unknown dtype": (header(lambda all_: all_[A_KEY].update(dtype="F3")), "damaged or incomplete"),
    # tensors
    "NaN": (weights(lambda all_: {**all_, A_KEY: all_[A_KEY] * float("nan")}), "NaN or infinite"),
    "integers": (weights(lambda all_: {**all_, A_KEY: all_[A_KEY].int()}), "holds int32"),
    "a tensor is missing": (weights(lambda all_: {k: v for k, v in all_.items() if k != A_KEY}), "lora_A.* is missing"),
    "a tensor too many": (weights(lambda all_: {**all_, "x.y": torch.ones(2)}), "'x.y' belongs to no part"),
    "a path upwards": (weights(lambda all_: {**all_, "../../x": torch.ones(2)}), r"'\.\./\.\./x' belongs to no part"),
    "another width": (weights(lambda all_: {**all_, A_KEY: torch.ones(2, 7)}), r"\(2, 7\), expected \(2, 32\)"),
    "another rank": (
        weights(lambda all_: {**all_, A_KEY: torch.ones(5, 32)}),
        r"\(5, 32\), and the settings say rank 2",
    ),
    # what the record says
    "a huge rank": (of_json(RECORD, settings={"rank": 10**9}), "say rank 1000000000"),
    "more labels than the head has": (of_json(RECORD, labels=["a"] * 10**5), r"expected \(100000, 32\)"),
    "a rank beyond numbers": (of_json(CONFIG, r=10**400), "must state r, lora_alpha|scale of|not readable JSON"),
    "no scale": (of_json(CONFIG, lora_alpha=float("nan")), "scale of nan"),
    "a number in quotes": (of_json(RECORD, trained={"train_rows": "48"}), "'trained.train_rows' is not as"),
    "a pattern that takes for ever": (of_json(RECORD, settings={"target_modules": ["(a+)+b"]}), "may take for ever"),
    "an unknown method": (of_json(RECORD, method="os.system"), "unknown method"),
    "an unknown task": (of_json(RECORD, task="../x"), "'task' is"),
    "a dtype that is a function": (of_json(RECORD, trained={"dtype": "load"}), "'trained.dtype'"),
    "rows that are words": (of_json(RECORD, trained={"train_rows": "many"}), "'trained.train_rows'"),
    "golden answers of words": (of_json(RECORD, golden=[{"text": 3, "rows": []}]), "'golden.0.text'"),
    "an endless text length": (of_json(RECORD, max_length=10**30), "max_length"),
    "no base": (of_json(RECORD, base={"name": ""}), "it names no base"),
    "a setting of another method": (of_json(RECORD, settings={"num_virtual_tokens": 3}), "unknown setting"),
}

PROMPT: dict[str, tuple[Damage, str]] = {
    "endlessly many vectors": (of_json(RECORD, settings={"num_virtual_tokens": 10**9}), "say 1000000000 vectors"),
    "no vectors": (weights(lambda _: {"x": torch.ones(2)}), "'prompt_embeddings' is missing"),
    "vectors of another width": (
        weights(lambda _: {"prompt_embeddings": torch.ones(3, 5)}),
        r"\(3, 5\), expected \(3, 32\)",
    ),
}


def spoiled(source: Path, damage: Damage, folder: Path) -> Path:
    shutil.copytree(source, folder)
    damage(folder)
    return folder


def refused(folder: Path, message: str) -> None:
    """In one line of ``AdapterError`` that names the folder."""
    with pytest.raises(AdapterError) as caught:
        capotune.load(folder)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", LABELS)
def test_damaged_adapter_for_labels_is_refused_in_one_message(name: str, labels: Path, tmp_path: Path) -> None:
    damage, message = LABELS[name]
    refused(spoiled(labels, damage, tmp_path / "adapter"), message)


@pytest.mark.parametrize("name", PROMPT)
def test_damaged_prompt_is_refused_in_one_message(name: str, prompt: Path, tmp_path: Path) -> None:
    damage, message = PROMPT[name]
    refused(spoiled(prompt, damage, tmp_path / "adapter"), message)


def test_template_of_nonsense_is_one_message_when_it_is_asked(prompt: Path, tmp_path: Path) -> None:
    damage = of_json(RECORD, chat_template="{% for %}{{ 'a' * 10**12 }}", chat=True)
    model = capotune.load(spoiled(prompt, damage, tmp_path / "adapter"))
    with pytest.raises(CapotuneError, match="chat template"):
        model.chat([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize(
    ("pattern", "is_tried"),
    [
        (r".*\.(q_proj|v_proj)$", True),
        (r"model\.layers\.(1[0-9]+|2)\.\w+\.(q|k|v|o)_proj", True),
        (r".*layers\.[0-3]+\..*_proj", True),
        ("(a+)+b", False),
        ("(a|aa)*b", False),
        ("(a+){9}b", False),
        (".*" * 9 + "x", False),
        (".*" * 4 + "x", False),
        ("(|||||)" * 4 + "x", False),
        ("(a|b|c|d|e|f|g|h|i|j)" * 6, False),
        ("a" * 201, False),
    ],
)
def test_patterns_that_may_take_for_ever_are_not_tried(pattern: str, is_tried: bool) -> None:
    if is_tried:
        path_pattern("rank_pattern", pattern)
        return
    with pytest.raises(AdapterError, match="may take for ever"):
        path_pattern("rank_pattern", pattern)


@pytest.mark.parametrize(
    ("pattern", "is_slow"),
    [
        (r".*layer.*attention.*q.*", False),
        (r".*\.(?:[0-9])\.(?:attention)\.(?:self)\.(?:query|key|value)(?:)", False),
        ("|".join(f"encoder.layer.{number}.attention.self.query" for number in range(200)), False),
        ("|".join(rf".*\.{number}\..*query" for number in range(48)), False),
        (rf".*\.({'|'.join(map(str, range(48)))})\.attention\.self\.(query|key|value)", False),
        ("(e+)+x", True),
        (".*" * 6 + "x", True),
    ],
)
def test_slow_targets_are_refused_where_they_are_chosen(pattern: str, is_slow: bool) -> None:
    path = "encoder.layer.0.attention.self.query"
    architecture = Architecture("", "", (), None, (path,), (), (), 1, 1, 1)
    if not is_slow:
        assert find_targets(architecture, (pattern,), None) == (path,)
        return
    with pytest.raises(SettingError, match="may take for ever"):
        find_targets(architecture, (pattern,), None)


def test_tensors_of_a_base_over_each_other_are_refused_before_they_are_read(labels: Path, tmp_path: Path) -> None:
    folder = spoiled(labels, header(overlapping), tmp_path / "adapter")
    with pytest.raises(ModelError, match="not a complete safetensors file"):
        Shards([folder / WEIGHTS])


@pytest.mark.parametrize(
    ("at", "value"), [("offset", 2**40), ("offset", 3), ("size", 2**40), ("tensors", 2**62), ("entries", 2**62)]
)
def test_gguf_adapter_that_lies_about_places_is_refused(at: str, value: int, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "adapter.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", torch.ones(2, 64).numpy())
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    content = path.read_bytes()
    end = content.index(b"lora_a") + len("lora_a")  # then dimensions, two sizes, type, offset
    place = {"offset": end + 4 + 16 + 4, "size": end + 4, "tensors": 8, "entries": 16}[at]
    path.write_bytes(content[:place] + struct.pack("<Q", value) + content[place + 8 :])
    with pytest.raises(ModelError, match=r"adapter\.gguf"):
        open_gguf(path, "adapter")


# ------------------------------------------------------------------------------------------------- checksums


@pytest.fixture
def signed(bert: Path, tmp_path: Path) -> Path:
    """An adapter as it is written now."""
    save_adapter(tmp_path / "signed", helpers.on_base(bert, LoraSettings(rank=1, layers=(0,))), helpers.TRAINED)
    return tmp_path / "signed"


def test_one_flipped_bit_in_the_weights_is_found_wherever_it_is(signed: Path) -> None:
    whole = (signed / WEIGHTS).read_bytes()
    for at in range(0, len(whole), 97):
        (signed / WEIGHTS).write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: damaged or incomplete: its SHA-256 is"):
            read_adapter(signed)
    (signed / WEIGHTS).write_bytes(whole)
    assert read_adapter(signed).notices == ()


@pytest.mark.parametrize("name", [RECORD, CONFIG])
def test_an_edited_description_is_read_and_said(name: str, signed: Path) -> None:
    path = signed / name
    values = json.loads(path.read_text())
    values |= {"labels": ["late", "broken", "cash"]} if name == RECORD else {"base_model_name_or_path": "elsewhere"}
    path.write_text(json.dumps(values))
    expected = f"{path} is not as it was written: it was edited, or is damaged."
    assert read_adapter(signed).notices == (expected,)
    said: list[str] = []
    classifier = capotune.load(signed, report=lambda event: said.append(getattr(event, "text", "")))
    assert classifier.labels == (("late", "broken", "cash") if name == RECORD else helpers.LABELS)
    assert expected in said


def test_the_layout_of_the_record_does_not_matter(signed: Path) -> None:
    record = json.loads((signed / RECORD).read_text())
    (signed / RECORD).write_text(json.dumps(dict(reversed(record.items())), indent=7))
    assert read_adapter(signed).notices == ()


def test_an_adapter_without_checksums_is_believed(signed: Path) -> None:
    helpers.unsigned(signed)
    assert read_adapter(signed).notices == ()
