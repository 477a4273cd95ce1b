"""Records are relative: no file says where its folder is, and a folder that was moved works and reads right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from commands import capo, tree

import capotune
from capotune.events import Event, StepTaken

KINDS = {"labels": ("bert", "tickets", {}), "text": ("llama_writer", "colour_pairs", {"answers": 2})}
SETTINGS = {"epochs": 2, "patience": 2, "batch_size": 8}


class StoppedError(Exception):
    """What a test stops a run with."""


@pytest.fixture(params=KINDS)
def given(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Data and base, which stand outside the folders that move."""
    base, data, more = KINDS[request.param]
    return {
        "data": str(request.getfixturevalue(data)), "model": str(request.getfixturevalue(base)), "cache": False, **more
    }  # fmt: skip


def texts(folder: Path) -> Iterable[tuple[Path, str]]:
    """Every file below, as text; what is binary byte by byte."""
    return ((path, path.read_bytes().decode("latin-1")) for path in folder.rglob("*") if path.is_file())


def assert_knows_no_place(folder: Path) -> None:
    """No file holds the folder's path, a part of it that tells, or that of a temporary folder beside it."""
    found = {
        str(path.relative_to(folder)): word
        for path, text in texts(folder)
        for word in (str(folder), str(folder.parent), ".partial")
        if word in text
    }
    assert not found
    assert len(list(texts(folder))) >= 4


def moved(folder: Path, place: Path) -> Path:
    """The folder at another place; nothing stays where it was."""
    place.mkdir()
    shutil.move(folder, place / "here")
    folder.mkdir()  # what still looked there would find an empty folder, not the old one
    return place / "here"


def test_a_run_folder_may_move(given: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "first" / "run"
    record = capotune.train("lora", out=out, **SETTINGS, **given)
    assert_knows_no_place(out)
    facts = {**capotune.info(out / "adapter"), "adapter": ""}
    question = ("predict" if "answers" not in given else "generate", "What colour is grass?")
    asked = capo(question[0], out / "adapter", question[1])
    here = moved(out, tmp_path / "elsewhere")
    assert {**capotune.info(here / "adapter"), "adapter": ""} == facts
    assert capotune.info(here / "adapter")["adapter"] == str(here / "adapter")
    scored = capotune.evaluate(here / "adapter", data=given["data"])
    assert {name: scored[name] for name in record["result"]["scores"]} == record["result"]["scores"]
    card = (here / "adapter" / "README.md").read_text("utf-8")
    assert "With `ADAPTER` the folder of this file" in card
    shown = capo(question[0], here / "adapter", question[1])
    assert shown.code == asked.code == 0, shown.err
    assert shown.out == asked.out


def test_a_comparison_may_move(given: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "first" / "compared"
    compared = capo(
        "compare", "--data", given["data"], "--model", given["model"], "--out", out, "--methods", "lora",
        "--lora.epochs", 1, "--lora.rank", 2, "--no-cache", *(("--answers", 2) if "answers" in given else ()),
    )  # fmt: skip
    assert compared.code == 0, compared.err
    assert_knows_no_place(out)
    here = moved(out, tmp_path / "elsewhere")
    record = json.loads((here / "compare.json").read_text("utf-8"))
    (row,) = record["rows"]
    assert (here / row["adapter"] / "capotune.json").is_file()  # by the record alone
    page = (here / "compare.html").read_text("utf-8")
    assert f"{row['adapter']}" in page
    scored = capotune.evaluate(here / row["adapter"], data=given["data"])
    assert scored[record["metric"]] == row["score"]


def test_a_stopped_run_is_gone_on_with_where_it_was_moved_to(given: dict[str, Any], tmp_path: Path) -> None:
    whole = capotune.train("lora", out=tmp_path / "whole", **SETTINGS, **given)

    def stop(event: Event) -> None:
        if isinstance(event, StepTaken) and event.step == event.total // 2 + 1:
            raise StoppedError

    with pytest.raises(StoppedError):
        capotune.train("lora", out=tmp_path / "first" / "run", report=stop, **SETTINGS, **given)
    assert_knows_no_place(tmp_path / "first" / "run")
    here = moved(tmp_path / "first" / "run", tmp_path / "elsewhere")
    steps: list[int] = []
    resumed = capotune.resume(
        here, report=lambda event: steps.append(event.step) if isinstance(event, StepTaken) else None
    )
    assert steps[0] > 1
    assert resumed["result"]["scores"] == whole["result"]["scores"]
    weights = "adapter/adapter_model.safetensors"
    assert tree(here)[weights] == tree(tmp_path / "whole")[weights]
    assert_knows_no_place(here)


def test_a_relative_out_and_an_absolute_one_leave_the_same_files(
    bert: Path, tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for times and the memory that was measured."""
    given = {"data": str(tickets), "model": str(bert), "cache": False}
    monkeypatch.chdir(tmp_path)
    capotune.train("feature-extraction", out="relative", **given)
    capotune.train("feature-extraction", out=tmp_path / "absolute", **given)
    names = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "predictions.jsonl", "test_rows.json")
    relative, absolute = tree(tmp_path / "relative"), tree(tmp_path / "absolute")
    assert relative.keys() == absolute.keys()
    assert [relative[name] for name in names] == [absolute[name] for name in names]
    records = [json.loads((tmp_path / name / "run.json").read_text("utf-8")) for name in ("relative", "absolute")]
    assert records[0]["settings"] == records[1]["settings"]
    assert records[0]["result"]["adapter"] == records[1]["result"]["adapter"] == "adapter"
