"""How long texts may be: a default that fits data and memory, and a word for every row that is longer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import Result, capo
from generation_helpers import change_config, make_task, pairs, with_tokenizer, write_jsonl
from safetensors.torch import load_file

import capotune
from capotune import api
from capotune.errors import SettingError
from capotune.events import Event, Warned
from capotune.tasks.generation import score

QUICK: dict[str, Any] = {"epochs": 1, "answers": 2, "cache": False}
POSITIONS = 1_000_000


@pytest.fixture
def long_writer(llama_writer: Path, tmp_path: Path) -> Path:
    """A model for a million tokens, whose tokenizer knows no limit."""
    folder = Path(shutil.copytree(llama_writer, tmp_path / "long-writer"))
    change_config(folder, max_position_embeddings=POSITIONS)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"model_max_length": 10**30}))
    return folder


def rows_of(*rows: tuple[str, str]) -> list[dict[str, str]]:
    return [{"prompt": prompt, "completion": completion} for prompt, completion in rows]


def short_rows(count: int) -> list[dict[str, str]]:
    return rows_of(*((f"{number}: {pair.prompt} ", pair.completion) for number, pair in enumerate(pairs(count))))


def inspected(path: Path, base: Path) -> dict[str, Any]:
    report: dict[str, Any] = api.inspect(data=str(path), model=str(base))["report"]
    return report


# --------------------------------------------------------------------------------------------------------- the default


def test_a_long_context_is_not_the_default_length(long_writer: Path, llama_writer: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", short_rows(20))
    report = inspected(data, long_writer)
    assert (report["max_length"], report["base_length"]) == (4096, POSITIONS)
    shown = capo("data", data, "--model", long_writer)
    assert "the model reads 4,096 (max_length) of the 1,000,000 that the base takes" in shown.said
    asked = api.inspect(data=str(data), model=str(long_writer), max_length=6000)["report"]
    assert asked["max_length"] == 6000
    own = inspected(data, llama_writer)
    assert (own["max_length"], own["base_length"]) == (96, 96)
    assert "the model reads 96" in capo("data", data, "--model", llama_writer).said


@pytest.mark.parametrize("form", ["txt", "jsonl"])
def test_a_book_is_read_in_windows_of_the_default_length(form: str, long_writer: Path, tmp_path: Path) -> None:
    """All of its tokens, in one row of a file or as plain text."""
    lines = [f"Once upon a time, on day {number}, snow was white.\n" for number in range(1200)]
    path = tmp_path / f"book.{form}"
    path.write_text("".join(lines) if form == "txt" else json.dumps({"text": "".join(lines)}) + "\n")
    report = inspected(path, long_writer)
    assert report["train_sequences"] == -(-report["sequence_tokens"] // 4096) > 3
    assert (
        report["sequence_tokens"] == report["train_tokens"]["max"] == report["loss_tokens"] + report["train_sequences"]
    )


# ------------------------------------------------------------------------------------------------- rows that are longer


@pytest.fixture
def adapter(llama_writer: Path, tmp_path: Path) -> Path:
    """For 30 tokens."""
    data = write_jsonl(
        tmp_path / "train.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    )
    capotune.train("lora", data=str(data), model=str(llama_writer), out=tmp_path / "run", max_length=30,
                   test_fraction=0, rank=2, **QUICK)  # fmt: skip
    return tmp_path / "run" / "adapter"


def test_evaluate_counts_what_is_too_long(adapter: Path, tmp_path: Path) -> None:
    long = "x " * 60
    rows = rows_of(("a", "green"), ("b", f"green {long}"), (long, "green"), ("d", "blue"))
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    seen: list[Event] = []
    scored = capotune.evaluate(adapter, data=str(data), answers=4, report=seen.append)
    assert [event.text for event in seen if isinstance(event, Warned)] == [
        "1 of 4 rows have nothing to score within 30 tokens and are left out (line 3).",
        "1 of 4 rows are longer than 30 tokens: the end of what is scored is lost (line 2).",
        "1 of 4 rows to answer are passed over: their question fills all that the model takes.",
    ]
    assert scored["answered"] == 3
    shown = capo("evaluate", adapter, "--data", data, "--answers", 0)
    assert "1 of 4 rows are longer than 30 tokens" in " ".join(shown.err.split())
    whole = capotune.evaluate(adapter, data=str(write_jsonl(tmp_path / "short.jsonl", rows[::3])), answers=0)
    assert whole["rows"] == 2


def test_prompts_that_are_too_long_are_counted(llama_writer: Path) -> None:
    writer = capotune.load_model(llama_writer)
    with pytest.raises(SettingError, match=r"prompt 2 is too long.*Shorten it, and 1 more of the 4 prompts\."):
        writer.generate(["a", "x " * 96, "b", "y " * 96])
    with pytest.raises(SettingError, match=r"prompt 1 is too long.*Shorten it\.$"):
        writer.generate(["x " * 96, "b"])


def test_an_interval_of_a_loss_does_not_reach_below_zero(
    llama_writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "_loss_counts", lambda *_: [[0.1, 100], [30.0, 3]])
    data = write_jsonl(tmp_path / "rows.jsonl", short_rows(2))
    intervals = capotune.evaluate(llama_writer, data=str(data), answers=0)["intervals"]
    assert intervals["loss"][0] == 0
    assert intervals["perplexity"][0] == 1


def test_rows_that_are_all_too_long_are_an_error_and_no_score(adapter: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", rows_of(*(("x " * 60, f"{number}") for number in range(3))))
    refused = capo("evaluate", adapter, "--data", data)
    assert refused.code == 2
    assert "rows.jsonl: no row has a token to score within 30 tokens" in refused.said
    assert not refused.out


def test_test_rows_that_are_all_too_long_are_refused_before_training(llama_writer: Path, tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", short_rows(12))
    test = write_jsonl(tmp_path / "test.jsonl", rows_of(("x " * 120, "green"), ("y " * 120, "blue")))
    given = ("--data", train, "--test", test, "--model", llama_writer, "--out", tmp_path / "run", "--no-cache")
    for command in (("train", "lora"), ("compare", "--methods", "lora")):
        refused = capo(*command, *given)
        assert refused.code == 2
        assert "test.jsonl: no test row has a token to score within 96 tokens" in refused.said
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["labels", "tags"])
def test_predict_and_evaluate_count_texts_that_are_too_long(
    kind: str, bert: Path, tickets: Path, tmp_path: Path
) -> None:
    long, data = "my parcel is late please help", str(tickets)
    if kind == "tags":
        tagged = "".join(f"the O\nparcel B-PART\nwas O\nlost O\n{number} O\n\n" for number in range(12))
        (tmp_path / "tags.txt").write_text(tagged)
        data = str(tmp_path / "tags.txt")
    out = tmp_path / "run"
    capotune.train("feature-extraction", data=data, model=str(bert), out=out, max_length=5, cache=False)
    assert capotune.load(out / "adapter").cut(["my parcel", long, ""]) == [1]
    shown = capo("predict", out / "adapter", "my parcel", long)
    assert said_once("1 of 2 texts are longer than what the adapter reads", shown)
    assert "longer" not in capo("predict", out / "adapter", "my parcel").err
    scored = capo("evaluate", out / "adapter", "--data", data)
    assert said_once("rows are longer than 5 tokens", scored)


def said_once(text: str, result: Result) -> bool:
    assert result.code == 0, result.err
    return " ".join(result.err.split()).count(text) == 1


# ------------------------------------------------------------------------------------------------------ next to nothing


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("kind", ["pairs", "chats", "story", "tickets"])
def test_a_length_of_next_to_nothing_trains_or_is_refused_in_words(
    kind: str, limit: int, llama_writer: Path, bert: Path, colour_pairs: Path, colour_chats: Path, story: Path,
    tickets: Path, tmp_path: Path,
) -> None:  # fmt: skip
    data = {"pairs": colour_pairs, "chats": colour_chats, "story": story, "tickets": tickets}[kind]
    ran = capo(
        "train", "feature-extraction", "--data", data, "--model", bert if kind == "tickets" else llama_writer,
        "--max-length", limit, "--epochs", 1, "--answers", 1, "--no-cache", "--out", tmp_path / "run",
    )  # fmt: skip
    if ran.code == 0:
        weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
        assert all(weight.isfinite().all() for weight in weights.values())
    else:
        assert ran.code == 2
        assert "--max-length" in ran.said
        assert "Allowed: " in ran.said or "a larger --max-length" in ran.said
        assert not (tmp_path / "run").exists()
    assert (ran.code == 0) == ((limit > 1 and kind == "story") or (limit > 2 and kind == "tickets"))


def test_conversations_for_a_model_without_a_template_are_scored_as_training_writes_them(
    gpt2_writer: Path, colour_chats: Path, tmp_path: Path
) -> None:
    seen: list[Event] = []
    scored = capotune.evaluate(gpt2_writer, data=str(colour_chats), answers=2, report=seen.append)
    assert any("written in a plain form" in event.text for event in seen if isinstance(event, Warned))
    template = make_task(gpt2_writer, chat=True).chat_template
    with_template = with_tokenizer(gpt2_writer, tmp_path / "with-template", pad=None, chat_template=template)
    assert capotune.evaluate(with_template, data=str(colour_chats), answers=2) == scored
