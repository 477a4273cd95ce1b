"""A merged model is the adapter: on every row the same tokens, losses and answers, here and in Transformers."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import generation_helpers
import helpers
import pytest
import torch
from commands import capo
from generation_helpers import BOS, CHATML, COLOURS, END, TURN_END, turn, with_tokenizer, write_jsonl
from safetensors.torch import load_file, save_file
from test_relative_records import assert_knows_no_place, moved

import capotune
from capotune.adapters.assemble import Assembled, assemble, attach
from capotune.adapters.store import save_adapter
from capotune.errors import AdapterError, ModelError
from capotune.events import Event, Warned
from capotune.methods.base import Start
from capotune.methods.feature_extraction.settings import FeatureExtractionSettings
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.qlora.settings import QloraSettings
from capotune.models.base import find
from capotune.settings import TrainingSettings
from capotune.tasks.generation import Generation
from capotune.tasks.generation.chat_template import PLAIN_TEMPLATE

LORA: dict[str, Any] = {"rank": 4, "alpha": 8}
METHODS: dict[str, TrainingSettings] = {
    "lora": LoraSettings(**LORA),
    "qlora": QloraSettings(**LORA),
    "last-block": FeatureExtractionSettings(trainable_layers=1),
}
TOOL = {"name": "look"}
QUESTIONS = [f"What colour is {thing}?" for thing in COLOURS]
CHATS: list[dict[str, Any]] = [
    {"messages": [turn("user", question), turn("assistant", answer)]}
    for question, answer in zip(QUESTIONS, COLOURS.values(), strict=True)
] + [
    {
        "messages": [
            turn("system", "hi"),
            turn("user", "a"),
            turn("assistant", "b"),
            turn("user", "c"),
            turn("assistant", "d"),
        ]
    }
]
CHAT_ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": CHATS,
    "conversations": [
        {"conversations": [{"from": "human", "value": one}, {"from": "gpt", "value": "green"}]} for one in QUESTIONS
    ],
    "instruction": [{"instruction": "Tell me.", "input": one, "output": "green"} for one in QUESTIONS],
    "question-answer": [{"question": one, "answer": "green"} for one in QUESTIONS],
}
PLAIN_ROWS: dict[str, list[dict[str, Any]]] = {
    "pairs": [{"prompt": f"{one}\n", "completion": "green"} for one in QUESTIONS],
    "documents": [{"text": f"{one} It is green."} for one in QUESTIONS],
}
WITH_TOOLS = [{**row, "tools": [TOOL]} for row in CHATS]


def adapter_on(
    base: Path,
    settings: TrainingSettings,
    folder: Path,
    *,
    chat: bool,
    max_length: int | None = None,
    separator: str = "",
) -> Path:
    """An adapter of ``base`` whose weights are moved from where they start; its answers are many tokens long."""
    source = find(str(base))
    complete = helpers.complete(settings, source, has_head=False)
    task = replace(Generation.on(source, max_length, 0, chat=chat), separator=separator)
    assembled = assemble(task, complete, device=helpers.CPU)
    attach(assembled, Start(torch.Generator()))
    return save(assembled, folder)


def save(assembled: Assembled, folder: Path) -> Path:
    helpers.shake(assembled)
    save_adapter(folder, assembled, helpers.TRAINED | {"held_out_score": 2.0, "scores": {}})
    return folder


def in_transformers(folder: Path, prompts: Sequence[list[int]]) -> list[str]:
    """What Transformers writes after each prompt with the folder's own settings and nothing else."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16)
        texts.append(tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True))
    return texts


def rendered(folder: Path, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
    """The ids of each conversation before its last answer, by the folder's own template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        tokenizer.apply_chat_template(
            row["messages"][:-1], tools=row.get("tools"), add_generation_prompt=True, return_dict=False
        )
        for row in rows
    ]


def encode(generator: Any, row: dict[str, Any]) -> list[int]:
    ids: list[int] = generator._assembled.task.encode_chat(row["messages"][:-1], row.get("tools", ()))
    return ids


def answer(generator: Any, row: dict[str, Any]) -> str:
    return str(generator.chat(row["messages"][:-1], row.get("tools", ()), max_tokens=16))


def warned(seen: Sequence[Event]) -> list[str]:
    return [event.text for event in seen if isinstance(event, Warned)]


def loss(adapter_or_model: Path, data: Path) -> float:
    found: float = capotune.evaluate(adapter_or_model, data=str(data), answers=0)["loss"]
    return found


CASES = [
    ("llama", "lora"), ("llama", "qlora"), ("llama", "last-block"), ("gpt2", "lora"), ("gpt2", "last-block"),
    ("qwen2", "lora"), ("bos-without-template", "lora"),
]  # fmt: skip
"""Bases with and without a template, an end of turn of its own, a first token, and a tied output layer."""


@pytest.fixture
def bases(writers: dict[str, Path], untied_writer: Path, tmp_path: Path) -> dict[str, Path]:
    """By name."""
    return {**writers, "bos-without-template": with_tokenizer(untied_writer, tmp_path / "bos", bos=True, pad=None)}


@pytest.mark.parametrize(("name", "method"), CASES)
def test_a_merged_model_asks_and_answers_as_the_adapter(
    name: str, method: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    """QLoRA's change goes into weights that it was not trained over: its tokens are equal, answers need not be."""
    base = bases[name]
    adapter = adapter_on(base, METHODS[method], tmp_path / "adapter", chat=True)
    merged = tmp_path / "merged"
    capotune.merge(adapter, out=merged)
    on_base, alone = capotune.load(adapter), capotune.load_model(merged)
    rows = WITH_TOOLS if find(str(base)).tokenizer.chat_template else CHATS
    asked = [encode(on_base, row) for row in rows]
    assert rendered(merged, rows) == asked == [encode(alone, row) for row in rows]
    assert len({tuple(ids) for ids in asked}) == len(rows)
    if method != "qlora":
        written = [answer(on_base, row) for row in rows]
        assert in_transformers(merged, asked) == written == [answer(alone, row) for row in rows]
        assert any(written)
    if method == "lora":
        assert_equal_losses(base, adapter, merged, CHAT_ROWS)


@pytest.mark.parametrize("name", ["gpt2", "bos-without-template"])
def test_a_merged_model_of_plain_text_has_the_adapters_losses(
    name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases[name]
    adapter = adapter_on(base, METHODS["lora"], tmp_path / "adapter", chat=False)
    capotune.merge(adapter, out=tmp_path / "merged")
    assert_equal_losses(base, adapter, tmp_path / "merged", PLAIN_ROWS)


def assert_equal_losses(base: Path, adapter: Path, merged: Path, formats: dict[str, list[dict[str, Any]]]) -> None:
    for name, rows in formats.items():
        data = write_jsonl(adapter.parent / f"{name}.jsonl", rows)
        expected = loss(adapter, data)
        assert loss(merged, data) == pytest.approx(expected, abs=1e-5), name
        assert abs(loss(base, data) - expected) > 1e-4, name


# ------------------------------------------------------------------------------------ what stands beside the weights


def test_a_template_of_its_own_is_what_the_merged_model_has(llama_writer: Path, tmp_path: Path) -> None:
    """Also where the base has come to hold others since, in each place where Transformers looks for one."""
    base = Path(shutil.copytree(llama_writer, tmp_path / "base"))
    adapter = adapter_on(base, METHODS["lora"], tmp_path / "adapter", chat=True)
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"chat_template": "{{ 'in the config' }}"}))
    (base / "chat_template.jinja").write_text("{{ 'in a file' }}")
    add_tool_template(base, "{{ 'for tools' }}")
    capotune.merge(adapter, out=tmp_path / "merged")
    on_base = capotune.load(adapter)
    assert rendered(tmp_path / "merged", WITH_TOOLS) == [encode(on_base, row) for row in WITH_TOOLS]
    assert find(str(tmp_path / "merged")).tokenizer.chat_template == CHATML


def test_the_template_for_tools_comes_along(llama_writer: Path, tmp_path: Path) -> None:
    """As the base has it, and as the adapter has it where the base has come to hold another since."""
    base = Path(shutil.copytree(llama_writer, tmp_path / "base"))
    add_tool_template(base, CHATML.replace("Tools:", "Call:"))
    adapter = adapter_on(base, METHODS["lora"], tmp_path / "adapter", chat=True)
    for number, other in enumerate((None, "{{ 'another' }}")):
        if other:
            add_tool_template(base, other)
        merged = tmp_path / f"merged-{number}"
        capotune.merge(adapter, out=merged)
        on_base, alone = capotune.load(adapter), capotune.load_model(merged)
        for rows in (WITH_TOOLS, CHATS):
            asked = [encode(on_base, row) for row in rows]
            assert rendered(merged, rows) == asked == [encode(alone, row) for row in rows]
    assert "Call:" in alone.tokenizer.decode(encode(alone, WITH_TOOLS[0]))


def add_tool_template(base: Path, template: str) -> None:
    (base / "additional_chat_templates").mkdir(exist_ok=True)
    (base / "additional_chat_templates" / "tool_use.jinja").write_text(template)


def test_the_plain_form_of_adapters_written_before_gets_its_first_token(untied_writer: Path, tmp_path: Path) -> None:
    """They hold the form without it; the tokenizer's own was put before."""
    base = with_tokenizer(untied_writer, tmp_path / "base", bos=True, pad=None)
    adapter = adapter_on(base, METHODS["lora"], tmp_path / "adapter", chat=True)
    record = json.loads((adapter / "capotune.json").read_text("utf-8"))
    assert record["chat_template"] == f"{BOS}{PLAIN_TEMPLATE}"
    (adapter / "capotune.json").write_text(json.dumps(record | {"chat_template": PLAIN_TEMPLATE}))
    capotune.merge(adapter, out=tmp_path / "merged")
    on_base = capotune.load(adapter)
    assert rendered(tmp_path / "merged", CHATS) == [encode(on_base, row) for row in CHATS]
    assert encode(on_base, CHATS[0])[0] == generation_helpers.SPECIAL.index(BOS)


def test_text_that_is_no_chat_gets_no_template(gpt2_writer: Path, tmp_path: Path) -> None:
    adapter = adapter_on(gpt2_writer, METHODS["lora"], tmp_path / "adapter", chat=False)
    capotune.merge(adapter, out=tmp_path / "merged")
    assert find(str(tmp_path / "merged")).tokenizer.chat_template is None
    assert not (tmp_path / "merged" / "chat_template.jinja").exists()


def test_a_merged_model_chats_after_training_on_chats_without_a_template(
    untied_writer: Path, colour_chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capotune.train(
        "lora", data=str(colour_chats), model=str(untied_writer), out=tmp_path / "run", epochs=1, answers=0, cache=False
    )
    merged = tmp_path / "merged"
    capotune.merge(tmp_path / "run" / "adapter", out=merged)
    said = [chat(folder, monkeypatch, QUESTIONS[0], "and then?") for folder in (tmp_path / "run" / "adapter", merged)]
    assert said[0] == said[1]


def test_what_was_put_between_prompt_and_completion_still_is(gpt2_writer: Path, tmp_path: Path) -> None:
    """As adapters written before have it: a line break, unless the prompt ends with white space."""
    adapter = adapter_on(gpt2_writer, METHODS["lora"], tmp_path / "adapter", chat=False, separator="\n", max_length=40)
    seen: list[Event] = []
    capotune.merge(adapter, out=tmp_path / "merged", progress=seen.append)
    assert any(r"'\n' between prompt and completion" in text for text in warned(seen))
    on_base, alone = capotune.load(adapter), capotune.load_model(tmp_path / "merged")
    asked = [*QUESTIONS, f"{QUESTIONS[0]}\n"]
    written = on_base.generate(asked, max_tokens=16)
    assert alone.generate(asked, max_tokens=16) == written
    prompts = [on_base.tokenizer(one.rstrip("\n") + "\n")["input_ids"] for one in asked]
    assert in_transformers(tmp_path / "merged", prompts) == written


def test_a_merged_model_is_scored_as_its_adapter_was(llama_writer: Path, story: Path, tmp_path: Path) -> None:
    """In windows of the same length, with the same decoding."""
    adapter = adapter_on(llama_writer, METHODS["lora"], tmp_path / "adapter", chat=False, max_length=24)
    capotune.merge(adapter, out=tmp_path / "merged")
    assert loss(tmp_path / "merged", story) == pytest.approx(loss(adapter, story), abs=1e-5)
    (tmp_path / "merged" / "capotune_model.json").write_text("{}")
    with pytest.raises(ModelError, match=r"capotune_model.json is not as capotune writes it.*Merge again"):
        capotune.load_model(tmp_path / "merged")


def chat(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    ran = capo("chat", folder, "--max-tokens", 8)
    assert ran.code == 0, ran.err
    return ran.out


@pytest.mark.parametrize("method", ["lora", "last-block"])
def test_answers_end_where_the_adapters_do(method: str, llama_writer: Path, tmp_path: Path) -> None:
    """The turn's end is in generation_config.json alone, in config.json alone, or in neither."""
    base = Path(shutil.copytree(llama_writer, tmp_path / "base"))
    ends = [generation_helpers.SPECIAL.index(one) for one in (END, TURN_END)]
    generation_helpers.change_config(base, eos_token_id=ends[1])
    (base / "generation_config.json").unlink()
    adapter = adapter_on(base, METHODS[method], tmp_path / "adapter", chat=True)
    capotune.merge(adapter, out=tmp_path / "merged")
    stored = json.loads((tmp_path / "merged" / "generation_config.json").read_text("utf-8"))
    assert stored["eos_token_id"] == ends
    assert stored["pad_token_id"] == find(str(base)).tokenizer.pad_token_id


def test_what_the_base_asks_of_decoding_is_left_out_and_said(llama_writer: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama_writer, tmp_path / "base"))
    asks = {"do_sample": True, "temperature": 0.6, "top_p": 1.0, "repetition_penalty": 3.0, "suppress_tokens": [9, 10]}
    path = base / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | asks | {"max_length": 90}))
    adapter = adapter_on(base, METHODS["lora"], tmp_path / "adapter", chat=True)
    seen: list[Event] = []
    capotune.merge(adapter, out=tmp_path / "merged", progress=seen.append)
    (said,) = warned(seen)
    assert "do_sample=True, temperature=0.6, repetition_penalty=3.0, suppress_tokens=[9, 10]" in said
    assert "top_p" not in said
    on_base = capotune.load(adapter)
    written = [answer(on_base, row) for row in CHATS]
    assert in_transformers(tmp_path / "merged", [encode(on_base, row) for row in CHATS]) == written
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text("utf-8"))["max_length"] == 90
    shown = capo("merge", adapter, "--out", tmp_path / "again")
    assert "generation_config.json: the base's asks for do_sample=True" in shown.said
    assert "do_sample" in json.loads((base / "generation_config.json").read_text("utf-8"))


# ----------------------------------------------------------------------------------------------- weights and their form


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["lora", "last-block"])
def test_the_bases_dtype_and_ties_stay(method: str, dtype: torch.dtype, llama_writer: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama_writer, tmp_path / "base"))
    stored = {name: tensor.to(dtype) for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    adapter = adapter_on(base, METHODS[method], tmp_path / "adapter", chat=True)
    result = capotune.merge(adapter, out=tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in merged.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()
    }
    config = json.loads((tmp_path / "merged" / "config.json").read_text("utf-8"))
    assert config == json.loads((base / "config.json").read_text("utf-8"))
    assert config["tie_word_embeddings"]
    assert 0 < result["answers"]["to_adapter"] < 1e-2  # what the rounding costs


def test_a_sum_that_the_dtype_cannot_hold_is_refused(llama_writer: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama_writer, tmp_path / "base"))
    stored = {name: tensor.half() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    adapter = adapter_on(base, METHODS["lora"], tmp_path / "adapter", chat=False)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: 1000 * one for name, one in weights.items()}, adapter / "adapter_model.safetensors")
    helpers.unsigned(adapter)
    with pytest.raises(AdapterError, match=r"NaN or infinite in float16.*in float32"):
        capotune.merge(adapter, out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("base", "method"), [("bert", "lora"), ("bert", "last-block"), ("gpt2", "last-block")])
def test_a_merged_classifier_is_the_adapter_wherever_it_is_moved(
    base: str, method: str, tickets: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    adapter = save(helpers.on_base(request.getfixturevalue(base), METHODS[method]), tmp_path / "adapter")
    out = tmp_path / "first" / "merged"
    result = capotune.merge(adapter, out=out)
    assert result["answers"]["to_adapter"] < 1e-8
    assert_knows_no_place(out)
    here = moved(out, tmp_path / "elsewhere")
    texts = [line.split(",")[0] for line in tickets.read_text("utf-8").splitlines()[1:]]
    expected, found = (capotune.load(one).predict_proba(texts) for one in (adapter, here / "adapter"))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert capotune.info(here / "adapter")["base"]["name"] == str(here)
    scores = [capotune.evaluate(one, data=str(tickets)) for one in (adapter, here / "adapter")]
    assert scores[0]["accuracy"] == scores[1]["accuracy"]
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], abs=1e-5)


def test_a_base_with_a_head_of_its_own_is_not_taken_for_what_was_trained(bert: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    base = Path(shutil.copytree(bert, tmp_path / "base"))
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).save_pretrained(base)
    adapter = save(helpers.on_base(base, METHODS["lora"]), tmp_path / "adapter")
    seen: list[Event] = []
    capotune.merge(adapter, out=tmp_path / "merged", progress=seen.append)
    (said,) = warned(seen)
    assert "own head (BertForSequenceClassification) comes along as it was" in said
    texts = ["my parcel is late", "the lamp is broken"]
    expected, found = (capotune.load(one).predict_proba(texts) for one in (adapter, tmp_path / "merged" / "adapter"))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_quantize_says_that_a_merged_classifiers_head_stays_behind(bert: Path, tmp_path: Path) -> None:
    adapter = save(helpers.on_base(bert, METHODS["lora"]), tmp_path / "adapter")
    capotune.merge(adapter, out=tmp_path / "merged")
    seen: list[Event] = []
    capotune.quantize(str(tmp_path / "merged"), out=tmp_path / "packed", progress=seen.append)
    assert warned(seen) == ["the head in adapter/ was trained on these weights as they are, and stays behind."]
    assert not (tmp_path / "packed" / "adapter").exists()


def test_a_quantized_model_and_its_report_know_no_place(bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "first" / "packed"
    assert capotune.quantize(str(bert), out=out, report=True)["out"] == str(out)
    assert_knows_no_place(out)
