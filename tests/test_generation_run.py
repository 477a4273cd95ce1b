"""A whole run that learns to write: from a file to a run folder, stopped and gone on with, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generation_helpers import (
    CHATML,
    COLOURS,
    END,
    as_examples,
    change_config,
    conversation,
    make_tokenizer,
    on_base,
    pairs,
    turn,
    with_tokenizer,
    write_jsonl,
)
from helpers import CPU, folder_digest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import capotune
from capotune import methods
from capotune.adapters.assemble import Assembled
from capotune.adapters.files import RECORD
from capotune.adapters.store import read_adapter
from capotune.data.batches import TokenRows
from capotune.data.generation import load_samples, read_samples_to_score
from capotune.data.samples import Pair
from capotune.engine.loop import train
from capotune.errors import AdapterError, CapotuneError, DataError, ModelError, OutputError, SettingError
from capotune.evaluation.forward import Examples, held_out_score
from capotune.events import DataInspected, EpochEnded, Event, Finished, StepTaken, TrainingStarted, ignore
from capotune.methods.feature_extraction.settings import FeatureExtractionSettings
from capotune.methods.lora.settings import LoraSettings
from capotune.run_folder import checkpoints
from capotune.runs import run as run_module
from capotune.runs.resume import resume
from capotune.runs.run import prepare, run
from capotune.settings import Context, TrainingSettings, TrainSettings
from capotune.tasks.base import held_out_fraction
from capotune.tasks.generation.run import GenerationRun
from capotune.tasks.loading import load_adapter

QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 8}
METHODS: dict[str, TrainingSettings] = {
    name: methods.get(name).Settings(**QUICK, **own)
    for name, own in {
        "feature-extraction": {"learning_rate": 1e-2},
        "lora": {"rank": 4, "dropout": 0.1, "learning_rate": 3e-2},
        "qlora": {"rank": 4, "learning_rate": 3e-2},
        "prompt-tuning": {"num_virtual_tokens": 5, "deep": False, "learning_rate": 0.1},
    }.items()
}


@pytest.fixture
def data(colour_pairs: Path, colour_chats: Path, story: Path) -> dict[str, Path]:
    return {"pairs": colour_pairs, "chats": colour_chats, "story": story}


def start(
    method: str | TrainingSettings, data: Path, model: Path, out: Path, *, report: Any = None,
    base_score: bool = False, **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train one technique; ``settings`` are those of ``TrainSettings``."""
    chosen = TrainSettings(data=str(data), model=str(model), out=out, **{"answers": 4, **settings})
    own = METHODS[method] if isinstance(method, str) else method
    return run(chosen, own, report or (lambda _: None), base_score=base_score)


def adapter_bytes(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def logged(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------- what is left out


@pytest.mark.parametrize(("given", "held"), [(None, 16), (0.25, 50)])
def test_few_rows_of_text_are_held_out_unless_a_part_is_given(
    llama_writer: Path, tmp_path: Path, given: float | None, held: int
) -> None:
    data = tmp_path / "pairs.jsonl"
    lines = (json.dumps({"prompt": f"{number}:", "completion": "yes"}) + "\n" for number in range(200))
    data.write_text("".join(lines), encoding="utf-8")
    settings = TrainSettings(data=str(data), model=str(llama_writer), test_fraction=0, validation_fraction=given)
    task_run: Any = prepare(settings, LoraSettings(), ignore).task_run
    assert (len(task_run.held_rows), len(task_run.fit_rows)) == (held, 200 - held)


@pytest.mark.parametrize(("rows", "part"), [(20, 2), (300, 16), (5_000, 50), (100_000, 500)])
def test_rows_held_out_suffice_and_stay_few(rows: int, part: int) -> None:
    assert held_out_fraction(None, rows) * rows == pytest.approx(part)
    assert held_out_fraction(0.1, rows) * rows == pytest.approx(min(rows // 10, 500))


@pytest.mark.parametrize(("rows", "size"), [(20, 4), (300, 4), (640, 10), (100_000, 32), (None, 32)])
def test_batch_size_left_out_grows_with_the_rows_of_text(rows: int | None, size: int) -> None:
    for name in METHODS:
        settings = methods.get(name).Settings()
        assert settings.completed(Context(64, has_head=False, train_rows=rows)).batch_size == size
        assert settings.completed(Context(64, has_head=True, train_rows=rows)).batch_size == 32
        given = methods.get(name).Settings(batch_size=7)
        assert given.completed(Context(64, has_head=False, train_rows=rows)).batch_size == 7


def test_run_records_the_batch_size_that_its_rows_decide(
    data: dict[str, Path], writers: dict[str, Path], tmp_path: Path
) -> None:
    record = start(LoraSettings(rank=2, epochs=1), data["pairs"], writers["llama"], tmp_path / "one")
    rows, steps = record["result"]["train_rows"], sum("step" in line for line in logged(tmp_path / "one"))
    assert rows < 256
    assert record["lora"]["batch_size"] == 4
    assert steps == -(-(rows - round(0.1 * rows)) // 4)


# ----------------------------------------------------------------------------------------------------- the whole way

WHOLE = [
    ("feature-extraction", "pairs", "gpt2"),
    ("feature-extraction", "chats", "qwen2"),
    ("lora", "pairs", "qwen2"),
    ("lora", "chats", "gpt2"),
    ("lora", "story", "llama"),
    ("qlora", "chats", "llama"),
    ("qlora", "story", "gpt2"),
    ("prompt-tuning", "pairs", "llama"),
    ("prompt-tuning", "story", "qwen2"),
]


@pytest.mark.parametrize(("method", "kind", "base"), WHOLE)
def test_a_whole_run(
    method: str, kind: str, base: str, data: dict[str, Path], writers: dict[str, Path], tmp_path: Path
) -> None:
    on_disk, events = folder_digest(writers[base]), []
    out = tmp_path / "one"
    in_fours = METHODS[method].model_copy(update={"batch_size": 4})  # twice the steps: the loss falls far enough
    record = start(in_fours, data[kind], writers[base], out, report=events.append, base_score=True)
    result = record["result"]
    assert json.loads((out / "run.json").read_text(encoding="utf-8")) == json.loads(json.dumps(record))
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter", "metrics.jsonl", "predictions.jsonl", "run.json", "test_rows.json"
    ]  # fmt: skip
    assert folder_digest(writers[base]) == on_disk

    loss = result["scores"]["loss"]
    assert 1 < loss < record["base_scores"]["loss"] - (0 if method == "prompt-tuning" else 0.5)
    assert result["scores"]["perplexity"] == pytest.approx(math.exp(loss))
    assert result["metric"] == ("exact_match" if result.get("held_out_exact_match", 0) >= 0.05 else "perplexity")
    assert ("held_out_exact_match" in result) == (kind != "story")
    assert result["score"] == result["scores"][result["metric"]]
    low, high = result["interval"]
    assert low <= result["score"] <= high
    assert 0 <= result["best_epoch"] <= result["epochs"] == 2
    stored = load_file(out / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == result["trainable_parameters"]
    assert record["settings"]["task"] == "generation"
    assert (result["forward_rows"] > 0) == (method == "feature-extraction")

    # the loss once more, by Transformers, from the stored adapter
    loaded = load_adapter(read_adapter(out / "adapter"), model=None, device=CPU)
    assert by_transformers(loaded, data[kind], kind) == pytest.approx(loss, rel=1e-4)

    written = [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(written) == (5 if kind == "story" else 4)
    assert all((row["expected"] is None) == (kind == "story") for row in written)
    assert [row["prompt"] for row in written] == [row["prompt"] for row in record["base_answers"]]

    kinds = [type(event) for event in events]
    assert [kinds.count(one) for one in (DataInspected, TrainingStarted, EpochEnded, Finished)] == [1, 1, 2, 1]
    report = data_report(events)
    assert report["loss_tokens"] > 0
    assert report["train_without_loss"]["count"] == 0
    chat = loaded.task
    assert chat.chat == (kind == "chats")
    assert (chat.chat_template is None) == (base == "gpt2" and kind != "chats")
    assert chat.separator == ""


def data_report(events: list[Event]) -> dict[str, Any]:
    """What the run said of its data."""
    (report,) = (event.report for event in events if isinstance(event, DataInspected))
    assert report is not None
    return report


def by_transformers(loaded: Assembled, source: Path, kind: str) -> float:
    """Mean loss of the test rows' learned tokens, one row at a time."""
    task, total, learned = loaded.task, 0.0, 0
    if kind == "story":
        windows = task.encode(load_samples(str(source)).train)[0]
        rows = windows[len(windows) - round(0.2 * len(windows)) :]
        assert 5 <= len(rows) < len(windows)
    else:
        rows = [one for of_row in task.encode(load_samples(str(source)).test) for one in of_row]
    virtual = list(loaded.method.virtual_token_ids)
    for row in rows:
        ids, labels = torch.tensor([virtual + row.ids]), torch.tensor([[-100] * len(virtual) + row.labels])
        with torch.no_grad():
            total += float(loaded.model(input_ids=ids, labels=labels).loss) * row.tokens_in_loss
        learned += row.tokens_in_loss
    return total / learned


def test_evaluating_the_adapter_gives_the_runs_numbers(colour_pairs: Path, qwen2_writer: Path, tmp_path: Path) -> None:
    result = start("lora", colour_pairs, qwen2_writer, tmp_path / "run", answers=200)["result"]
    again = capotune.evaluate(tmp_path / "run" / "adapter", data=str(colour_pairs))
    assert again["rows"] == result["test_rows"] == 8
    for name in ("loss", "exact_match", "rouge_l"):
        assert again[name] == pytest.approx(result["scores"][name], rel=1e-6)


@pytest.mark.parametrize(
    ("method", "kind", "base"),
    [("feature-extraction", "pairs", "llama"), ("lora", "chats", "gpt2"), ("prompt-tuning", "story", "qwen2")],
)
def test_a_whole_run_repeats(
    method: str, kind: str, base: str, data: dict[str, Path], writers: dict[str, Path], tmp_path: Path
) -> None:
    records = [start(method, data[kind], writers[base], tmp_path / name, answers=0) for name in ("one", "two")]
    assert adapter_bytes(tmp_path / "one") == adapter_bytes(tmp_path / "two")  # the second has the cache of the first
    assert records[0]["result"]["scores"] == records[1]["result"]["scores"]
    assert records[1]["result"]["forward_rows"] == 0
    start(method, data[kind], writers[base], tmp_path / "other", seed=1, answers=0)
    assert adapter_bytes(tmp_path / "other") != adapter_bytes(tmp_path / "one")
    start(method, data[kind], writers[base], tmp_path / "uncached", cache=False, answers=0)
    assert adapter_bytes(tmp_path / "uncached") == adapter_bytes(tmp_path / "one")


class StoppedError(Exception):
    """Stands for a crash."""


@pytest.mark.parametrize(
    ("method", "base", "how"),
    [("feature-extraction", "llama", StoppedError), ("lora", "gpt2", KeyboardInterrupt),
     ("qlora", "qwen2", KeyboardInterrupt), ("prompt-tuning", "llama", KeyboardInterrupt)],
)  # fmt: skip
def test_a_stopped_run_resumes_to_the_same_bits(
    method: str, base: str, how: type[BaseException], colour_pairs: Path, writers: dict[str, Path], tmp_path: Path
) -> None:
    """From the last epoch after a crash, from the last step after Ctrl-C."""
    own = METHODS[method].model_copy(update=QUICK)  # five steps an epoch
    start(own, colour_pairs, writers[base], tmp_path / "whole", answers=0)

    def crash(event: Event) -> None:
        if isinstance(event, StepTaken) and event.step == 7:
            raise how

    out = tmp_path / "stopped"
    with pytest.raises(how):
        start(own, colour_pairs, writers[base], out, answers=0, report=crash)
    newest = checkpoints(out / "checkpoints")[-1]
    assert newest.name == f"step-{5 if how is StoppedError else 7}-epoch-1"
    assert not (out / "adapter").exists()
    resume(out)
    assert adapter_bytes(out) == adapter_bytes(tmp_path / "whole")
    assert logged(out) == logged(tmp_path / "whole")
    assert not (out / "checkpoints").exists()


def test_a_crash_while_testing_resumes_too(
    colour_pairs: Path, llama_writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = start("lora", colour_pairs, llama_writer, tmp_path / "whole")

    def crash(*_: Any) -> None:
        raise StoppedError

    for where, name in ((GenerationRun, "test"), (run_module, "_write_scored")):
        out = tmp_path / name
        with monkeypatch.context() as patch:
            patch.setattr(where, name, crash)
            with pytest.raises(StoppedError):
                start("lora", colour_pairs, llama_writer, out)
        resumed = resume(out)
        assert adapter_bytes(out) == adapter_bytes(tmp_path / "whole")
        assert resumed["result"]["scores"] == whole["result"]["scores"]
        assert (out / "predictions.jsonl").read_bytes() == (tmp_path / "whole" / "predictions.jsonl").read_bytes()


def test_a_crash_before_the_first_checkpoint_leaves_nothing(
    colour_pairs: Path, llama_writer: Path, tmp_path: Path
) -> None:
    def crash(event: Event) -> None:
        if isinstance(event, TrainingStarted):
            raise StoppedError

    with pytest.raises(StoppedError):
        start("lora", colour_pairs, llama_writer, tmp_path / "deep" / "run", report=crash)
    assert list(tmp_path.iterdir()) == []


def test_label_smoothing_is_for_training_alone(colour_pairs: Path, llama_writer: Path, tmp_path: Path) -> None:
    """Another adapter, and its test loss is the plain one."""
    losses = []
    for smoothing in (0.0, 0.2):
        method = METHODS["lora"].model_copy(update={"label_smoothing": smoothing, "dropout": 0.0})
        out = tmp_path / str(smoothing)
        result = start(method, colour_pairs, llama_writer, out, answers=0)["result"]
        loaded = load_adapter(read_adapter(out / "adapter"), model=None, device=CPU)
        assert by_transformers(loaded, colour_pairs, "pairs") == pytest.approx(result["scores"]["loss"], rel=1e-4)
        losses.append([row["loss"] for row in logged(out)])
    assert losses[0][0] != losses[1][0]
    assert losses[1][-1] < losses[1][0] - 0.5
    assert adapter_bytes(tmp_path / "0.0") != adapter_bytes(tmp_path / "0.2")


def test_learning_the_last_answers_alone(colour_chats: Path, qwen2_writer: Path, tmp_path: Path) -> None:
    learned = {}
    for learn in ("all", "last"):
        events: list[Event] = []
        start(
            "prompt-tuning", colour_chats, qwen2_writer, tmp_path / learn, report=events.append, learn=learn, answers=0
        )
        learned[learn] = data_report(events)["loss_tokens"]
        assert read_adapter(tmp_path / learn / "adapter").record["learn"] == learn
    assert learned["last"] < learned["all"]


# ------------------------------------------------------------------------------------------------------ hard prompts

GOOD, BAD = "my friend, what colour?", "please now"


@pytest.fixture(scope="module")
def primed_writer(llama_writer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that answers right after one prompt, and says nothing of the kind after another."""
    settings = FeatureExtractionSettings(trainable_layers=3, learning_rate=1e-2, epochs=8, patience=8, batch_size=16)
    assembled = on_base(llama_writer, settings)
    task, rows, targets = assembled.task, [], []
    for prompt, answers in ((GOOD, COLOURS), (BAD, dict.fromkeys(COLOURS, "parcel parcel parcel"))):
        before = task.tokenizer(prompt)["input_ids"]
        for number, pair in enumerate(pairs(48)):
            thing = next(thing for thing in COLOURS if f" {thing}?" in pair.prompt)
            given = as_examples(assembled, [Pair(f"{number}: {pair.prompt}", answers[thing])])
            rows.append(before + given.rows.sequences[0])
            targets.append([-100] * len(before) + given.targets[0])
    learned = Examples(TokenRows(rows, task.pad_id), targets)
    train(assembled, learned, assembled.method.settings, seed=0, evaluate=lambda: held_out_score(assembled, learned))
    folder = tmp_path_factory.mktemp("models") / "primed"
    assembled.model.save_pretrained(folder)
    make_tokenizer(chat_template=CHATML).save_pretrained(folder)
    return folder


def candidates(folder: Path, *prompts: str) -> str:
    path = folder / "prompts.txt"
    path.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    return str(path)


def hard(**settings: Any) -> TrainingSettings:
    return methods.get("prompt-tuning").Settings(**{"hard": True, **settings})


def embeddings_of(model: Path, text: str) -> torch.Tensor:
    ids = make_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return load_file(model / "model.safetensors")["model.embed_tokens.weight"][ids]


def test_the_best_hard_prompt_is_kept_and_nothing_trains(
    colour_pairs: Path, primed_writer: Path, tmp_path: Path
) -> None:
    method = hard(candidates=candidates(tmp_path, BAD, "tell me", "", GOOD, GOOD, "on day 1:\\n"))
    out = tmp_path / "run"
    events: list[Event] = []
    record = start(method, colour_pairs, primed_writer, out, report=events.append, base_score=True)
    result = record["result"]
    tried = {row["prompt"]: row["held_out_loss"] for row in result["candidates"]}
    assert list(tried) == [BAD, "tell me", GOOD, "on day 1:\n"]  # each once; a typed \n is a line break
    assert min(tried, key=tried.__getitem__) == GOOD
    assert tried[GOOD] < min(loss for prompt, loss in tried.items() if prompt != GOOD) - 0.5
    assert result["held_out_score"] == pytest.approx(math.exp(tried[GOOD]))
    assert result["scores"]["loss"] < record["base_scores"]["loss"] - 0.5
    assert result["epochs"] == 0
    assert not (out / "metrics.jsonl").exists()
    assert not [event for event in events if isinstance(event, EpochEnded)]

    (vectors,) = load_file(out / "adapter" / "adapter_model.safetensors").values()
    assert torch.equal(vectors, embeddings_of(primed_writer, GOOD))
    kept = read_adapter(out / "adapter").settings
    assert (kept.hard, kept.init_text, kept.num_virtual_tokens) == (True, GOOD, len(vectors))
    loaded = load_adapter(read_adapter(out / "adapter"), model=None, device=CPU)
    assert by_transformers(loaded, colour_pairs, "pairs") == pytest.approx(result["scores"]["loss"], rel=1e-4)
    assert by_words(loaded, colour_pairs) == pytest.approx(result["scores"]["loss"], rel=1e-4)
    assert capotune.info(out / "adapter")["hard_prompt"] == GOOD


@torch.no_grad()
def by_words(loaded: Assembled, source: Path) -> float:
    """The loss of the test rows on the base itself, with the prompt's words before each row."""
    model = AutoModelForCausalLM.from_pretrained(loaded.base.folder)
    words = make_tokenizer()(GOOD)["input_ids"]
    encoded = loaded.task.encode(read_samples_to_score(str(source)))
    rows = [one for of_row in encoded for one in of_row]
    total = 0.0
    for row in rows:
        labels = torch.tensor([[-100] * len(words) + row.labels])
        total += float(model(input_ids=torch.tensor([words + row.ids]), labels=labels).loss) * row.tokens_in_loss
    return total / sum(row.tokens_in_loss for row in rows)


def test_soft_vectors_start_from_the_best_hard_prompt(colour_pairs: Path, primed_writer: Path, tmp_path: Path) -> None:
    names = candidates(tmp_path, BAD, GOOD)
    method = hard(hard=False, deep=False, candidates=names, learning_rate=1e-2, epochs=1)
    result = start(method, colour_pairs, primed_writer, tmp_path / "run", answers=0)["result"]
    loss = {row["prompt"]: row["held_out_loss"] for row in result["candidates"]}[GOOD]
    assert result["held_out_score"] <= math.exp(loss) + 1e-9  # the start is among what is chosen from
    (vectors,) = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors").values()
    start_vectors = embeddings_of(primed_writer, GOOD)
    assert vectors.shape == start_vectors.shape
    if result["best_epoch"]:
        assert 0 < (vectors - start_vectors).abs().max() < 0.5
    (one,) = [row["loss"] for row in logged(tmp_path / "run") if row.get("step") == 1]
    assert one == pytest.approx(loss, abs=0.4)


def test_a_hard_prompt_of_ones_own(colour_pairs: Path, primed_writer: Path, tmp_path: Path) -> None:
    method = hard(init="text", init_text=GOOD)
    result = start(method, colour_pairs, primed_writer, tmp_path / "run", answers=0)["result"]
    (vectors,) = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors").values()
    assert torch.equal(vectors, embeddings_of(primed_writer, GOOD))
    assert [row["prompt"] for row in result["candidates"]] == [GOOD]


def test_init_text_starts_from_its_words(colour_pairs: Path, llama_writer: Path, tmp_path: Path) -> None:
    method = hard(
        hard=False, init="text", init_text=GOOD, num_virtual_tokens=3, learning_rate=1e-9, epochs=1, deep=False
    )
    start(method, colour_pairs, llama_writer, tmp_path / "run", answers=0)
    (vectors,) = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors").values()
    words = embeddings_of(llama_writer, GOOD)
    shares = torch.stack([share.mean(0) for share in words.tensor_split(3)])
    torch.testing.assert_close(vectors, shares, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- bad input


def refused(error: type[CapotuneError], words: str, folder: Path, *arguments: Any, **settings: Any) -> None:
    """The run ends with one such error and leaves nothing behind."""
    out = folder / "results" / "run"
    with pytest.raises(error, match=words):
        start(*arguments, out, **settings)
    assert not (folder / "results").exists()
    assert not [path for path in folder.rglob("*") if "partial" in path.name]


def test_a_tokenizer_without_an_end(colour_pairs: Path, llama_writer: Path, tmp_path: Path) -> None:
    endless = with_tokenizer(llama_writer, tmp_path / "endless", eos=None)
    change_config(endless, eos_token_id=None)
    refused(ModelError, "names no end-of-text token", tmp_path, "lora", colour_pairs, endless)


@pytest.mark.parametrize("method", METHODS)
def test_an_encoder_does_not_write(method: str, colour_pairs: Path, bert: Path, tmp_path: Path) -> None:
    refused(ModelError, "a bert model reads text and does not write it", tmp_path, method, colour_pairs, bert)


def long_rows(folder: Path, long: int, short: int) -> Path:
    text = "please tell me now my friend " * 40
    rows = [{"prompt": f"{number} {text}", "completion": "green"} for number in range(long)]
    rows += [{"prompt": f"{number} what?", "completion": "white"} for number in range(short)]
    return write_jsonl(folder / "long.jsonl", rows)


def test_prompts_longer_than_the_context_are_counted_and_left_out(llama_writer: Path, tmp_path: Path) -> None:
    source = long_rows(tmp_path, 4, 16)
    events: list[Event] = []
    record = start("lora", source, llama_writer, tmp_path / "run", report=events.append, test_fraction=0)
    report = data_report(events)
    assert report["train_without_loss"]["count"] == 4
    assert report["train_without_loss"]["first"] == [1, 2, 3, 4]
    assert record["result"]["train_rows"] == 16
    assert record["result"]["test_rows"] == 0
    assert record["result"]["score"] is None


def test_no_prompt_within_the_context(llama_writer: Path, tmp_path: Path) -> None:
    source = long_rows(tmp_path, 12, 0)
    refused(DataError, "no row has a token to train on within 96 tokens", tmp_path, "lora", source, llama_writer)


def test_a_long_prompt_among_the_test_rows_is_not_scored(llama_writer: Path, tmp_path: Path) -> None:
    test = write_jsonl(
        tmp_path / "test.jsonl", [{"prompt": "What " * 200, "completion": "a"}, {"prompt": "b", "completion": "c"}]
    )
    record = start("lora", long_rows(tmp_path, 0, 16), llama_writer, tmp_path / "run", test=str(test))
    assert record["result"]["test_rows"] == 1
    assert record["result"]["interval"] is None or record["result"]["metric"] == "exact_match"


MISFITS: dict[str, tuple[type[CapotuneError], str, dict[str, Any], dict[str, Any]]] = {
    "text column": (
        SettingError,
        "`text_column=prompt`: does not apply",
        {"text_column": "prompt"},
        {},
    ),
    "label column": (
        SettingError,
        "`label_column=.*not apply",
        {"label_column": "completion"},
        {},
    ),
    "head alone": (SettingError, "`trainable_layers=0`: trains a head alone", {}, {"trainable_layers": 0}),
    "too many blocks": (SettingError, "`trainable_layers=4`: this model has 3 blocks", {}, {"trainable_layers": 4}),
    "labels": (SettingError, "`init=labels`", {}, {"init": "labels"}),
    "long prompt": (SettingError, "`num_virtual_tokens=60`: leaves few tokens", {}, {"num_virtual_tokens": 60}),
    "no candidates": (SettingError, "`candidates=.*cannot be read", {}, {"candidates": "missing.txt"}),
    "too long": (SettingError, "`max_length=5000`", {"max_length": 5000}, {}),
    "rank": (SettingError, "`rank=40`", {}, {"rank": 40}),
    "a test of text": (DataError, "Give both in one format", {"test": "story"}, {}),
}
OWNERS = {"trainable_layers": "feature-extraction", "rank": "lora"}


@pytest.mark.parametrize("case", MISFITS)
def test_settings_that_do_not_fit_text(
    case: str, colour_pairs: Path, story: Path, llama_writer: Path, tmp_path: Path
) -> None:
    error, words, shared, own = MISFITS[case]
    shared = {name: str(story) if value == "story" else value for name, value in shared.items()}
    name = next((OWNERS.get(setting, "prompt-tuning") for setting in own), "lora")
    method = METHODS[name].model_copy(update={"num_virtual_tokens": None} if "candidates" in own else {})
    method = type(method)(**method.model_dump() | own)
    refused(error, words, tmp_path, method, colour_pairs, llama_writer, **shared)


def test_conversations_have_no_labels(colour_chats: Path, llama_writer: Path, tmp_path: Path) -> None:
    refused(DataError, "label", tmp_path, "lora", colour_chats, llama_writer, task="classification")


def test_candidates_without_a_prompt(colour_pairs: Path, llama_writer: Path, tmp_path: Path) -> None:
    method = hard(candidates=candidates(tmp_path, "", "   "))
    refused(SettingError, "holds no prompt", tmp_path, method, colour_pairs, llama_writer)


def test_a_candidate_too_long_for_the_context(colour_pairs: Path, llama_writer: Path, tmp_path: Path) -> None:
    method = hard(candidates=candidates(tmp_path, GOOD, "please tell me " * 40))
    refused(SettingError, "tokens", tmp_path, method, colour_pairs, llama_writer)


@pytest.mark.parametrize(
    ("shared", "own", "words"),
    [
        (
            {"task": "classification", "prompt_template": "{text}"},
            {},
            "`prompt_template=.*does not apply",
        ),
        (
            {"task": "classification", "completion_column": "label"},
            {},
            "`completion_column=.*does not apply",
        ),
        ({}, {"hard": True, "init": "text", "init_text": "a"}, "hard prompts are for text"),
        ({}, {"candidates": "prompts.txt"}, "hard prompts are for text"),
    ],
)
def test_settings_that_do_not_fit_labels(
    shared: dict[str, Any], own: dict[str, Any], words: str, tickets: Path, llama_writer: Path, tmp_path: Path
) -> None:
    method = methods.get("prompt-tuning").Settings(**own)
    refused(CapotuneError, words, tmp_path, method, tickets, llama_writer, **shared)


def test_text_too_short_to_hold_any_out(llama_writer: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Once upon a time.", encoding="utf-8")
    refused(DataError, "too short for a test", tmp_path, "lora", tmp_path / "short.txt", llama_writer)
    source = tmp_path / "short.txt"
    refused(DataError, "one row is not enough", tmp_path, "lora", source, llama_writer, test_fraction=0)


def test_a_template_that_refuses_a_row(llama_writer: Path, tmp_path: Path) -> None:
    strict = (
        "{% if messages[-1].role == 'user' and not add_generation_prompt %}{{ raise_exception('answer!') }}{% endif %}"
        + CHATML
    )
    base = with_tokenizer(llama_writer, tmp_path / "strict", chat_template=strict)
    rows: list[dict[str, Any]] = [{"messages": conversation(number).messages[1:]} for number in range(9)]
    rows[6]["messages"] = [*rows[6]["messages"], turn("user", "And now?")]
    source = write_jsonl(tmp_path / "chats.jsonl", rows)
    refused(DataError, r"chats\.jsonl:7: the chat template refuses", tmp_path, "lora", source, base)


def test_an_existing_folder_is_not_touched(colour_pairs: Path, llama_writer: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="exists already"):
        start("lora", colour_pairs, llama_writer, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


# ----------------------------------------------------------------------------------------------- adapters of each task


@pytest.fixture(scope="module")
def both_adapters(
    colour_pairs: Path, tickets: Path, llama_writer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """An adapter that writes and one that labels, on the same base."""
    folder = tmp_path_factory.mktemp("both")
    start("lora", colour_pairs, llama_writer, folder / "writer", answers=0, cache=False)
    start("lora", tickets, llama_writer, folder / "classifier", cache=False)
    return lambda name: folder / name / "adapter"


def test_an_adapter_of_the_other_task_is_refused(both_adapters: Callable[[str], Path], llama_writer: Path) -> None:
    with pytest.raises(AdapterError, match=r"writes text and knows no labels.*capo generate"):
        capotune.predict(both_adapters("writer"), ["a text"])
    with pytest.raises(AdapterError, match=r"gives labels and writes no text.*capo predict"):
        capotune.generate(both_adapters("classifier"), ["a prompt"])
    running = capotune.load_model(llama_writer)
    with pytest.raises(AdapterError, match=r"gives labels and writes no text"):
        running.use(both_adapters("classifier"))
    assert capotune.generate(both_adapters("writer"), ["a prompt"], max_tokens=3)
    assert capotune.predict(both_adapters("classifier"), ["a text"])


@pytest.mark.parametrize("name", ["chat_template", "separator", "learn", "max_length", "task"])
def test_a_record_that_lacks_something_is_refused(
    name: str, both_adapters: Callable[[str], Path], tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "adapter"
    shutil.copytree(both_adapters("writer"), folder)
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    del record[name]
    (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(AdapterError, match=rf"{RECORD}: '{name}' is"):
        capotune.info(folder)


def test_the_adapter_writes_what_the_run_has_written(colour_pairs: Path, gpt2_writer: Path, tmp_path: Path) -> None:
    start("lora", colour_pairs, gpt2_writer, tmp_path / "run", answers=3)
    text = (tmp_path / "run" / "predictions.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    longest = max(len(make_tokenizer()(colour)["input_ids"]) for colour in COLOURS.values()) + 1  # and the end
    answers = capotune.generate(
        tmp_path / "run" / "adapter", [row["prompt"] for row in rows], max_tokens=int(1.25 * longest) + 8
    )
    assert answers == [row["written"] for row in rows]
    assert END not in "".join(answers)
    assert np.unique(answers).size >= 1
