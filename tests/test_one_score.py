"""One score: ``evaluate`` on a run's own test file gives the run's own values, each to the last digit.

A run and ``evaluate`` share the code that scores, and the adapter stores what else decides it: how answers are decoded,
how many are written, which are drawn.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import capo
from conftest import FILLER
from generation_helpers import conversation, pairs, write_jsonl

import capotune


@dataclass(frozen=True)
class Files:
    """Data to train on and a file to test on alone."""

    base: Path
    train: Path
    test: Path


@pytest.fixture(scope="module")
def labels(bert: Path, tickets: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("labels")
    header, *rows = tickets.read_text("utf-8").splitlines()
    header = header.removesuffix(",split")
    for part in ("train", "test"):
        chosen = [row.rpartition(",")[0] for row in rows if row.endswith(f",{part}")]
        (folder / f"{part}.csv").write_text("\n".join([header, *chosen]) + "\n", "utf-8")
    return Files(bert, folder / "train.csv", folder / "test.csv")


@pytest.fixture(scope="module")
def text(llama_writer: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("pairs")
    rows = [
        {"prompt": f"{number}: {pair.prompt}", "completion": pair.completion} for number, pair in enumerate(pairs(44))
    ]
    train, test = write_jsonl(folder / "train.jsonl", rows[:32]), write_jsonl(folder / "test.jsonl", rows[32:])
    return Files(llama_writer, train, test)


@pytest.fixture(scope="module")
def chats(qwen2_writer: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("chats")
    rows = [{"messages": conversation(number, 1 + number % 2).messages} for number in range(30)]
    train, test = write_jsonl(folder / "train.jsonl", rows[:22]), write_jsonl(folder / "test.jsonl", rows[22:])
    return Files(qwen2_writer, train, test)


@pytest.fixture(scope="module")
def tags(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder, chooser = tmp_path_factory.mktemp("tags"), random.Random(0)
    rows = []
    for _ in range(60):
        filler, thing = chooser.choices(FILLER, k=chooser.randint(1, 5)), chooser.choice(["lamp", "card"])
        rows.append({"tokens": [*filler, thing], "tags": ["O"] * len(filler) + [f"B-{thing.upper()}"]})
    train, test = write_jsonl(folder / "train.jsonl", rows[:44]), write_jsonl(folder / "test.jsonl", rows[44:])
    return Files(bert, train, test)


def run_and_evaluate(method: str, files: Files, out: Path, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The run's result, and what ``evaluate`` says of its adapter on the run's test file."""
    record = capotune.train(
        method, data=str(files.train), test=str(files.test), model=str(files.base), out=out, **settings
    )
    return record["result"], capotune.evaluate(out / "adapter", data=str(files.test))


def assert_one_score(result: dict[str, Any], scored: dict[str, Any], *metrics: str) -> None:
    """Equal, not near: every metric, every interval, the compared one and the rows behind it."""
    assert set(metrics) == set(result["scores"])
    assert {name: scored[name] for name in metrics} == result["scores"]
    ends = {name: list(interval) for name, interval in result["intervals"].items()}
    assert ends
    assert scored["intervals"] == ends
    assert (scored["metric"], scored["rows"]) == (result["metric"], result["test_rows"])
    assert set(scored["measured_on"]) == set(metrics)


FEW = {"epochs": 1, "learning_rate": 0.02}
SOME_RIGHT = {"epochs": 4, "patience": 4, "learning_rate": 0.02, "batch_size": 8}
"""After which lora gives some answers right and others wrong: then it shows which rows were drawn."""


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
def test_feature_extraction_of_labels_with_and_without_the_cache(labels: Files, tmp_path: Path, cache: bool) -> None:
    result, scored = run_and_evaluate("feature-extraction", labels, tmp_path / "run", cache=cache)
    assert_one_score(result, scored, "accuracy", "macro_f1", "loss", "calibration_error")


def test_feature_extraction_from_a_cache_that_another_run_filled(labels: Files, tmp_path: Path) -> None:
    run_and_evaluate("feature-extraction", labels, tmp_path / "first")
    result, scored = run_and_evaluate("feature-extraction", labels, tmp_path / "second")
    assert result["forward_rows"] == 0
    assert_one_score(result, scored, "accuracy", "macro_f1", "loss", "calibration_error")


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("feature-extraction", {"trainable_layers": 1}),
        ("lora", {"seed": 3}),
        ("qlora", {}),
        ("prompt-tuning", {"num_virtual_tokens": 4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_labels(labels: Files, tmp_path: Path, method: str, settings: dict[str, Any]) -> None:
    result, scored = run_and_evaluate(method, labels, tmp_path / "run", **FEW, **settings)
    assert_one_score(result, scored, "accuracy", "macro_f1", "loss", "calibration_error")


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("feature-extraction", {"cache": True}),
        ("feature-extraction", {"cache": False}),
        ("lora", {"seed": 3}),
        ("qlora", {}),
        ("prompt-tuning", {"num_virtual_tokens": 4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tags(tags: Files, tmp_path: Path, method: str, settings: dict[str, Any]) -> None:
    result, scored = run_and_evaluate(method, tags, tmp_path / "run", **FEW, **settings)
    assert_one_score(result, scored, "f1", "precision", "recall", "loss")


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("feature-extraction", {"trainable_layers": 1}),
        ("lora", {"seed": 3, "answers": 5}),
        ("qlora", {}),
        ("prompt-tuning", {"num_virtual_tokens": 4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_answers(text: Files, tmp_path: Path, method: str, settings: dict[str, Any]) -> None:
    result, scored = run_and_evaluate(method, text, tmp_path / "run", **SOME_RIGHT, **settings)
    assert_one_score(result, scored, "exact_match", "rouge_l", "loss", "perplexity")
    assert scored["answered"] == settings.get("answers", 12)
    assert method != "lora" or 0 < scored["exact_match"] < 1


def test_a_hard_prompt(text: Files, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("tell me\nmy friend\n", "utf-8")
    result, scored = run_and_evaluate("prompt-tuning", text, tmp_path / "run", candidates=str(prompts), hard=True)
    assert_one_score(result, scored, "exact_match", "rouge_l", "loss", "perplexity")


def test_conversations(chats: Files, tmp_path: Path) -> None:
    result, scored = run_and_evaluate("lora", chats, tmp_path / "run", **FEW, seed=3, answers=3)
    assert_one_score(result, scored, "exact_match", "rouge_l", "loss", "perplexity")


def test_a_run_without_answers(text: Files, tmp_path: Path) -> None:
    result, scored = run_and_evaluate("lora", text, tmp_path / "run", **FEW, answers=0)
    assert_one_score(result, scored, "loss", "perplexity")


def test_plain_text(gpt2_writer: Path, story: Path, tmp_path: Path) -> None:
    lines = story.read_text("utf-8").splitlines()
    train, test = (
        write_jsonl(tmp_path / name, [{"text": line} for line in chosen])
        for name, chosen in (("train.jsonl", lines[:40]), ("test.jsonl", lines[40:52]))
    )
    result, scored = run_and_evaluate("lora", Files(gpt2_writer, train, test), tmp_path / "run", **FEW)
    assert_one_score(result, scored, "loss", "perplexity")


def test_test_rows_of_a_split_column_are_those_that_evaluate_scores(bert: Path, tickets: Path, tmp_path: Path) -> None:
    record = capotune.train("lora", data=str(tickets), model=str(bert), out=tmp_path / "run", **FEW)
    scored = capotune.evaluate(tmp_path / "run" / "adapter", data=str(tickets))
    assert_one_score(record["result"], scored, "accuracy", "macro_f1", "loss", "calibration_error")


def test_the_command_line_prints_the_same_values(text: Files, tmp_path: Path) -> None:
    made = capo(
        "train", "lora", "--data", text.train, "--test", text.test, "--model", text.base, "--out", tmp_path / "run",
        "--epochs", 1, "--answers", 4, "--seed", 3,
    )  # fmt: skip
    assert made.code == 0, made.err
    result = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["result"]
    said = capo("evaluate", tmp_path / "run" / "adapter", "--data", text.test, "--json")
    assert said.code == 0, said.err
    assert_one_score(result, json.loads(said.out), "exact_match", "rouge_l", "loss", "perplexity")


def test_predictions_are_the_answers_that_the_run_stored(text: Files, tmp_path: Path) -> None:
    """Exact match can agree by chance where no answer is right; the texts themselves do not."""
    run_and_evaluate("lora", text, tmp_path / "run", **FEW, seed=3)
    stored = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text("utf-8").splitlines()]
    record = json.loads((tmp_path / "run" / "adapter" / "capotune.json").read_text("utf-8"))
    loaded = capotune.load(tmp_path / "run" / "adapter")
    written = loaded.generate([row["prompt"] for row in stored], **record["scored_as"]["decoding"])
    assert written == [row["written"] for row in stored]
    assert any(written)


def test_an_adapter_that_stores_no_decoding_is_scored_by_the_defaults(text: Files, tmp_path: Path) -> None:
    """As those were that earlier versions wrote."""
    result, _ = run_and_evaluate("lora", text, tmp_path / "run", **FEW)
    path = tmp_path / "run" / "adapter" / "capotune.json"
    record = json.loads(path.read_text("utf-8"))
    del record["scored_as"]
    path.write_text(json.dumps(record), "utf-8")
    scored = capotune.evaluate(path.parent, data=str(text.test))
    assert {name: scored[name] for name in ("loss", "perplexity")} == {
        name: result["scores"][name] for name in ("loss", "perplexity")
    }
    assert {"exact_match", "rouge_l"} <= set(scored["measured_on"])
