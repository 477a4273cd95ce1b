"""A task is one folder: ``toy_task`` gives a number for each text, and every command knows it once it is registered."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import capo
from conftest import FILLER

import capotune
from capotune import api, tasks
from capotune.errors import DataError, SettingError

WORTH = {"late": 1.0, "broken": 3.0, "refund": -2.0}
"""What a word adds to the number of its text."""


@pytest.fixture(scope="module", autouse=True)
def _known_in_this_file_alone() -> Iterator[None]:
    """A user imports the module that registers it. Other tests, in the same process, are to know the built-in tasks."""
    import toy_task.task  # noqa: F401 - registers itself

    yield
    tasks._registered.clear()
    for name in [name for name in sys.modules if name.startswith("toy_task")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 texts whose words say their number, a quarter of them marked as test rows."""
    chooser = random.Random(0)
    rows = []
    for number in range(96):
        found = chooser.choices(list(WORTH), k=number % 4)
        words = chooser.sample(FILLER, 3) + found
        chooser.shuffle(words)
        split = "test" if number % 4 == chooser.randrange(4) else "train"
        rows.append({"text": " ".join(words), "score": sum(WORTH[word] for word in found), "split": split})
    path = tmp_path_factory.mktemp("numbers") / "scores.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


METHODS = {
    "feature-extraction": {},
    "lora": {"epochs": 2, "rank": 2},
    "qlora": {"epochs": 1, "rank": 2},
    "prompt-tuning": {"epochs": 1, "num_virtual_tokens": 3},
}


@pytest.fixture(scope="module", params=METHODS)
def made(
    request: pytest.FixtureRequest, scores: Path, bert: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """A finished run of a method: its record and its folder."""
    out = tmp_path_factory.mktemp("toy-numbers") / "run"
    record = capotune.train(request.param, data=str(scores), model=str(bert), out=out, **METHODS[request.param])
    return record, out


def test_train_recognises_the_data_and_beats_the_mean(made: tuple[dict[str, Any], Path], scores: Path) -> None:
    record, out = made
    assert record["settings"]["task"] == "toy-numbers"
    assert record["result"]["metric"] == "mae"
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text("utf-8").splitlines()]
    numbers = [row["score"] for row in rows]
    train = [row["score"] for row in map(json.loads, scores.read_text("utf-8").splitlines()) if row["split"] == "train"]
    mean = sum(train) / len(train)
    assert record["result"]["score"] < sum(abs(number - mean) for number in numbers) / len(numbers)


def test_evaluate_gives_the_score_of_the_run(made: tuple[dict[str, Any], Path], scores: Path) -> None:
    record, out = made
    scored = capotune.evaluate(out / "adapter", data=str(scores))
    assert scored["mae"] == record["result"]["score"]
    assert scored["intervals"]["mae"] == list(record["result"]["interval"])
    shown = capo("evaluate", out / "adapter", "--data", scores)
    assert "mean absolute error" in shown.said


def test_predict_in_python_and_on_the_command_line(made: tuple[dict[str, Any], Path]) -> None:
    _, out = made
    few, many = capotune.predict(out / "adapter", ["the refund refund", "broken broken the"])
    plain = capo("predict", out / "adapter", "the refund refund", "broken broken the")
    assert plain.code == 0, plain.err
    assert plain.out.splitlines() == [few.as_line(), many.as_line()]
    as_json = capo("predict", out / "adapter", "the refund refund", "--json")
    assert json.loads(as_json.out) == pytest.approx(few.as_json())
    assert [one.number for one in capotune.load(out / "adapter").predict(["the refund refund"])] == [few.number]


def test_info_and_card(made: tuple[dict[str, Any], Path]) -> None:
    record, out = made
    facts = capotune.info(out / "adapter")
    assert facts["task"] == "toy-numbers"
    assert facts["max_length"] == 64 - (3 if record["method"] == "prompt-tuning" else 0)
    shown = capo("info", out / "adapter")
    assert "max length" in shown.out
    assert "mean absolute error" in shown.said
    card = (out / "adapter" / "README.md").read_text("utf-8")
    assert "it gives numbers" in card
    assert "mean absolute error" in card
    assert "capo predict ADAPTER" in card


def test_capo_data_shows_what_was_found(scores: Path, bert: Path) -> None:
    shown = capo("data", scores, "--model", bert)
    assert shown.code == 0, shown.err
    assert "Train rows 69" in shown.said
    assert "Lowest -4 Highest 7" in shown.said
    assert "Read as texts with a number" in shown.said
    found = json.loads(capo("data", scores, "--model", bert, "--json").out)
    assert (found["task"], found["report"]["lowest"]) == ("toy-numbers", -4.0)


def test_compare_shows_it_in_the_table_and_on_the_page(scores: Path, bert: Path, tmp_path: Path) -> None:
    made = capo(
        "compare", "--data", scores, "--model", bert, "--methods", "feature-extraction", "lora", "--lora.epochs", 1,
        "--out", tmp_path / "compared",
    )  # fmt: skip
    assert made.code == 0, made.err
    assert "mean absolute error (lower is better)" in made.said
    assert "the mean of the" in made.out  # a column of the table is narrow
    record = json.loads((tmp_path / "compared" / "compare.json").read_text("utf-8"))
    assert (record["task"], record["metric"], record["higher_is_better"]) == ("toy-numbers", "mae", False)
    assert record["base_score"] > min(row["score"] for row in record["rows"])
    assert all(row["difference_interval"] for row in record["rows"] if row["method"] != record["best"])
    page = (tmp_path / "compared" / "compare.html").read_text("utf-8")
    assert "mean absolute error" in page
    assert "Every test row gets the mean number of the training rows." in page


def test_it_is_found_by_its_data_and_by_its_name(scores: Path, bert: Path, tickets: Path, tmp_path: Path) -> None:
    assert api.inspect(data=str(scores), model=str(bert))["task"] == "toy-numbers"
    assert api.inspect(data=str(scores), model=str(bert), task="toy-numbers")["task"] == "toy-numbers"
    assert api.inspect(data=str(tickets), model=str(bert))["task"] == "classification"
    with pytest.raises(DataError, match="'score' are needed"):
        capotune.train("lora", data=str(tickets), model=str(bert), task="toy-numbers", out=tmp_path / "run")
    with pytest.raises(SettingError, match=r"toy-numbrs.*toy-numbers"):
        api.inspect(data=str(scores), model=str(bert), task="toy-numbrs")
    assert not list(tmp_path.iterdir())


def test_a_setting_of_another_task_is_refused(scores: Path, bert: Path) -> None:
    with pytest.raises(SettingError, match="`label_column=score`: does not apply to texts with a number"):
        api.inspect(data=str(scores), model=str(bert), label_column="score")


def test_a_row_without_a_number_is_named_by_its_line(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "few.csv"
    path.write_text("text,score\nlate,1\nbroken,high\nrefund,2\n", "utf-8")
    with pytest.raises(DataError, match=r"few.csv:3: score is 'high'"):
        api.inspect(data=str(path), model=str(bert))


def test_a_run_that_was_stopped_resumes(scores: Path, bert: Path, tmp_path: Path) -> None:
    from capotune.events import EpochEnded, Event

    class StoppedError(Exception):
        pass

    def stop(event: Event) -> None:
        if isinstance(event, EpochEnded) and event.epoch == 2:
            raise StoppedError

    given = {"data": str(scores), "model": str(bert), "epochs": 3, "rank": 2, "patience": 3}
    whole = capotune.train("lora", out=tmp_path / "whole", **given)
    with pytest.raises(StoppedError):
        capotune.train("lora", out=tmp_path / "run", report=stop, **given)
    resumed = capotune.resume(tmp_path / "run")
    assert resumed["result"]["scores"] == whole["result"]["scores"]
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
