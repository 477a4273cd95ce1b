"""Golden answers: what an adapter answered where it was trained is stored with it, and checked on demand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import generation_helpers
import helpers
import pytest
import torch
from commands import capo
from safetensors.torch import load_file, save_file

import capotune
from capotune.adapters.assemble import Assembled
from capotune.adapters.store import save_adapter
from capotune.errors import AdapterError
from capotune.methods.feature_extraction.settings import FeatureExtractionSettings
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.methods.qlora.settings import QloraSettings
from capotune.settings import TrainingSettings
from capotune.tasks.golden import TEXTS, golden_answers

TEXT: dict[str, TrainingSettings] = {
    "lora": LoraSettings(rank=4, rslora=True),
    "qlora": QloraSettings(rank=4),
    "prompt-tuning": PromptTuningSettings(num_virtual_tokens=3, init="vocabulary", learning_rate=0.1, epochs=1),
    "last-block": FeatureExtractionSettings(trainable_layers=1),
}


def saved(assembled: Assembled, folder: Path) -> Path:
    helpers.shake(assembled)
    trained = helpers.TRAINED | {"held_out_score": 2.0, "scores": {}, "train_seconds": 1.0}
    save_adapter(folder, assembled, trained, golden_answers(assembled))
    return folder


@pytest.mark.parametrize("method", TEXT)
def test_adapter_that_writes_answers_as_where_it_was_trained(method: str, llama_writer: Path, tmp_path: Path) -> None:
    adapter = saved(generation_helpers.on_base(llama_writer, TEXT[method]), tmp_path / "adapter")
    found = capotune.info(adapter, check=True)["check"]
    assert found["agrees"]
    assert found["distance"] < 1e-5
    assert found["compared"] == 15  # five next tokens after each of three texts


def test_stored_probabilities_are_those_of_the_model(llama_writer: Path, tmp_path: Path) -> None:
    assembled = generation_helpers.on_base(llama_writer, TEXT["lora"])
    adapter = saved(assembled, tmp_path / "adapter")
    stored = json.loads((adapter / "capotune.json").read_text("utf-8"))["golden"]
    assert [one["text"] for one in stored] == list(TEXTS)
    for one in stored:
        ids = torch.tensor([assembled.task.encode_prompt(one["text"])])
        with torch.no_grad():
            p = assembled.model(input_ids=ids).logits[0, -1].softmax(0)
        (row,) = one["rows"]
        assert [choice for choice, _ in row] == p.topk(5).indices.tolist()
        torch.testing.assert_close(torch.tensor([one for _, one in row]), p.topk(5).values, rtol=0, atol=1e-6)


def test_trained_adapters_hold_golden_answers_and_pass_the_check(bert: Path, tickets: Path, tmp_path: Path) -> None:
    capotune.train("lora", data=str(tickets), model=str(bert), out=tmp_path / "run", epochs=1)
    adapter = tmp_path / "run" / "adapter"
    ran = capo("info", adapter, "--check")
    assert ran.code == 0, ran.err
    assert "answers as where it was trained" in ran.out
    classifier = capotune.load(adapter)
    for one in json.loads((adapter / "capotune.json").read_text("utf-8"))["golden"]:
        p = dict(map(tuple, one["rows"][0]))
        expected = classifier.predict_proba([one["text"]])[0].tolist()
        assert [p[number] for number in range(len(expected))] == pytest.approx(expected, abs=1e-5)


def test_tags_of_each_word_are_stored_and_checked(bert: Path, tmp_path: Path) -> None:
    rows = [{"words": ["ann", "paid", str(number)], "tags": ["B-PER", "O", "O"]} for number in range(40)]
    capotune.train("lora", data=rows, model=str(bert), out=tmp_path / "run", epochs=1)
    assert capotune.info(tmp_path / "run" / "adapter", check=True)["check"]["agrees"]
    stored = json.loads((tmp_path / "run" / "adapter" / "capotune.json").read_text("utf-8"))["golden"]
    assert all(len(one["rows"]) == min(8, len(one["text"].split())) for one in stored)


def test_changed_weights_fail_the_check(llama_writer: Path, tmp_path: Path) -> None:
    adapter = saved(generation_helpers.on_base(llama_writer, TEXT["lora"]), tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    changed = {name: tensor * 1.5 for name, tensor in tensors.items()}
    save_file(changed, adapter / "adapter_model.safetensors")
    helpers.unsigned(adapter)
    ran = capo("info", adapter, "--check", "--json")
    assert ran.code == 1
    assert not json.loads(ran.out)["check"]["agrees"]
    assert "answers otherwise" in capo("info", adapter, "--check").out


def test_adapters_without_golden_answers_or_with_wrong_ones_are_refused(llama_writer: Path, tmp_path: Path) -> None:
    adapter = saved(generation_helpers.on_base(llama_writer, TEXT["lora"]), tmp_path / "adapter")
    path = adapter / "capotune.json"
    record = json.loads(path.read_text("utf-8"))
    wrong: list[tuple[Any, str]] = [
        ([], "no golden answers"),
        ([{"text": "a", "rows": [[[10**9, 0.5]]]}], "of another form"),
        ([{"text": "a", "rows": [[[1, 0.5]], [[1, 0.5]]]}], "of another form"),
        ([{"text": "a", "rows": [[[-1, 0.5]]]}], "'golden.*not as capotune writes it"),
        ([{"text": "a"}], "'golden.*not as capotune writes it"),
    ]
    for golden, said in wrong:
        path.write_text(json.dumps(record | {"golden": golden}))
        with pytest.raises(AdapterError, match=said):
            capotune.info(adapter, check=True)
