"""A comparison that was stopped goes on where it stopped, to what it would have come to."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import PATIENCE, capo, start, wait_until

import capotune
from capotune.api.comparison import compare_settings
from capotune.errors import DataError, ModelError, OutputError, SettingError
from capotune.events import Event, Failed, Finished, StepTaken, ignore
from capotune.folder_lock import holder, wait_for_its_end
from capotune.run_folder import checkpoints, has_checkpoint
from capotune.runs import __main__ as technique
from capotune.runs import compare as runs_compare
from capotune.settings import build

WEIGHTS = "adapter/adapter_model.safetensors"
METHODS = ("feature-extraction", "lora")
QUICK: dict[str, Any] = {"epochs": 3, "patience": 3, "batch_size": 8}
OWN: dict[str, Any] = {
    "lora": {"rank": 2, "dropout": 0.1, **QUICK},
}
TAKES = {"started", "train_seconds", "reused_seconds", "forward_rows", "peak_memory_bytes", "adapter_bytes"}
"""What a run took, which may differ; and what the cache had."""


def given(bert: Path, tickets: Path) -> dict[str, Any]:
    return {"data": str(tickets), "model": str(bert), "methods": METHODS, "cache": False, **OWN}


@pytest.fixture(scope="module")
def whole(bert: Path, tickets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("whole") / "out"
    capotune.compare(out=out, **given(bert, tickets))
    return out


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(one) for name, one in value.items() if name not in TAKES}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def content(path: Path) -> Any:
    """Of a file, without what it took to make it; weights byte by byte."""
    if path.suffix == ".json":
        found = without_times(json.loads(path.read_text()))
        found.pop("why", None)  # it says the times in words
        found.pop("sha256", None)  # of files that say them
        found.pop("recommended", None)  # the cheapest
        return found
    return path.read_bytes() if path.suffix in (".safetensors", ".jsonl") else None


def assert_equal(out: Path, whole: Path) -> None:
    files = {str(path.relative_to(whole)) for path in whole.rglob("*")}
    assert {str(path.relative_to(out)) for path in out.rglob("*")} == files
    for name in sorted(files):
        if (whole / name).is_file() and name != "compare.json":
            assert content(out / name) == content(whole / name), name
    rows, expected = (json.loads((folder / "compare.json").read_text())["rows"] for folder in (out, whole))
    assert without_times(rows) == without_times(expected)


def stopping_at(step: int, method: str = "lora") -> Any:
    def report(event: Event) -> None:
        if isinstance(event, StepTaken) and (event.method, event.step) == (method, step):
            raise KeyboardInterrupt

    return report


@pytest.fixture(scope="module")
def stopped(bert: Path, tickets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the middle of the second technique's second epoch."""
    out: Path = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.raises(KeyboardInterrupt):
        capotune.compare(out=out, report=stopping_at(13), **given(bert, tickets))
    return out


@pytest.fixture
def out(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the stopped comparison, elsewhere."""
    return Path(shutil.copytree(stopped, tmp_path / "out"))


def test_ctrl_c_saves_the_technique_in_hand_and_resume_finishes_it(out: Path, whole: Path) -> None:
    assert not (out / "compare.json").exists()
    assert (out / "feature-extraction" / "adapter").exists()
    assert int(checkpoints(out / "lora" / "checkpoints")[-1].name.split("-")[1]) >= 13
    assert holder(out) is holder(out / "lora") is None
    finished_before = (out / "feature-extraction" / "run.json").stat().st_mtime_ns
    events: list[Event] = []
    compared = capotune.resume(out, report=events.append)
    assert isinstance(compared, capotune.api.Comparison)
    assert [event.method for event in events if isinstance(event, Finished)] == [*METHODS]
    steps = [event.step for event in events if isinstance(event, StepTaken) and event.method == "lora"]
    assert steps[0] >= 14
    assert (out / "feature-extraction" / "run.json").stat().st_mtime_ns == finished_before
    assert_equal(out, whole)


def test_ctrl_c_when_a_technique_has_finished_loses_nothing(bert: Path, tickets: Path, tmp_path: Path) -> None:
    def report(event: Event) -> None:
        if isinstance(event, Finished):
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        capotune.compare(out=out, report=report, **{**given(bert, tickets), "methods": ("feature-extraction",)})
    assert "result" in json.loads((out / "feature-extraction" / "run.json").read_text())
    assert (out / "feature-extraction" / "adapter").exists()


def test_a_technique_whose_process_dies_after_its_result_is_finished(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out", ignore=shutil.ignore_patterns("lora", "compare.*")))

    def run_one(*_: object) -> str:
        shutil.copytree(whole / "lora", out / "lora")
        return "its process ended with code -11"

    monkeypatch.setattr(runs_compare, "_run_one", run_one)
    events: list[Event] = []
    capotune.resume(out, report=events.append)
    assert not [event for event in events if isinstance(event, Failed)]
    assert [event.method for event in events if isinstance(event, Finished)] == [*METHODS]
    assert_equal(out, whole)


def test_a_killed_comparison_ends_its_technique_and_resumes(out: Path, whole: Path) -> None:
    with start("resume", "out", cwd=out.parent) as process:
        wait_until(lambda: holder(out / "lora") is not None, process)
        process.kill()
    resumed = capo("resume", out)  # at once: it waits for what is left of the technique's process
    assert resumed.code == 0, resumed.err
    assert "feature-extraction" in resumed.out
    assert_equal(out, whole)


def test_a_comparison_stopped_while_its_last_files_are_written_resumes(whole: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    for name in ("compare.html", "compare.png", "compare.json"):
        (out / name).unlink()
        events: list[Event] = []
        capotune.resume(out, report=events.append)
        assert not [event for event in events if isinstance(event, StepTaken)]
        assert_equal(out, whole)


def test_a_technique_that_was_killed_is_kept_and_tried_once_more(out: Path, whole: Path) -> None:
    """As for want of memory: its checkpoint stays, and the comparison is complete without it."""

    def kill(event: Event) -> None:
        if isinstance(event, StepTaken) and event.method == "lora":
            process = re.search(r"process (\d+)", holder(out / "lora") or "")
            assert process
            os.kill(int(process[1]), signal.SIGKILL)

    failed: list[Event] = []

    def report(event: Event) -> None:
        failed.extend([event] if isinstance(event, Failed) else [])
        kill(event)

    compared = capotune.resume(out, report=report)
    assert isinstance(compared, capotune.api.Comparison)
    assert [row.method for row in compared.rows] == ["feature-extraction"]
    assert [event.method for event in failed] == ["lora"]
    assert has_checkpoint(out / "lora")
    capotune.resume(out)
    assert_equal(out, whole)


def test_a_comparison_is_reproduced_technique_by_technique(whole: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    found = capotune.api.reproduce(whole, report=events.append)
    assert found["same"]
    assert list(found["techniques"]) == [*METHODS]
    assert {event.method for event in events if isinstance(event, StepTaken)} == {"lora"}
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    record = json.loads((out / "lora" / "run.json").read_text())
    del record["result"]
    (out / "lora" / "run.json").write_text(json.dumps(record))
    (out / "feature-extraction" / WEIGHTS).write_bytes(b"other")
    shown = capo("reproduce", out, "--out", tmp_path / "again")
    assert shown.code == 1
    assert "lora did not finish" in shown.err
    assert "feature-extraction\nweights  other bits" in shown.out
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["feature-extraction"]
    shutil.rmtree(out / "feature-extraction")
    with pytest.raises(OutputError, match=r"no technique of the comparison in .* is complete"):
        capotune.api.reproduce(out)


def test_a_file_or_a_base_that_changed_meanwhile_is_refused(out: Path) -> None:
    record = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps({**record, "files_sha256": {"data": "0"}}))
    with pytest.raises(DataError, match="its content is another than when the comparison"):
        capotune.resume(out)
    (out / "settings.json").write_text(json.dumps(record))
    run = json.loads((out / "feature-extraction" / "run.json").read_text())
    changed = {**run, "base": {**run["base"], "fingerprint": "0"}}
    (out / "feature-extraction" / "run.json").write_text(json.dumps(changed))
    with pytest.raises(ModelError, match="the base is another than when the run"):
        capotune.resume(out)


def test_data_of_the_hub_is_read_and_compared_before_a_technique_goes_on(
    out: Path, tickets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    with tickets.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for path in (out / "settings.json", *out.glob("*/run.json")):
        record = json.loads(path.read_text())
        record["settings"]["data"] = "bank/tickets"
        path.write_text(json.dumps(record | {"files_sha256": {}}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": datasets.Dataset.from_list(rows)})
    begun: list[object] = []
    monkeypatch.setattr(runs_compare, "_run_one", lambda *given: begun.append(given) or "it is not run here")
    capotune.resume(out)
    assert len(begun) == 1
    rows[0]["text"] += " now"
    with pytest.raises(DataError, match="bank/tickets: the data is another than when the run in"):
        capotune.resume(out)
    assert len(begun) == 1


def test_candidates_of_a_technique_that_has_not_begun_are_compared(
    llama_writer: Path, colour_pairs: Path, tmp_path: Path
) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("friend one\n")
    settings = {"data": str(colour_pairs), "model": str(llama_writer), "out": out, "methods": ("prompt-tuning",)}
    given = build(compare_settings(), {**settings, "prompt_tuning": {"candidates": str(prompts)}})
    record = runs_compare.record_of(given, "", {})
    runs_compare.check_same(record, given, ignore)
    prompts.write_text("friend two\n")
    with pytest.raises(DataError, match=rf"`prompt_tuning.candidates={prompts}`: its content is another"):
        runs_compare.check_same(record, given, ignore)


def test_a_stopped_comparison_is_named_where_another_would_begin(out: Path, bert: Path, tickets: Path) -> None:
    refused = capo("compare", "--data", tickets, "--model", bert, "--out", out)
    assert refused.code == 2
    assert "exists already. Go on with what was stopped there (capo resume), or choose another --out" in refused.said


def test_rows_in_memory_are_given_again(bert: Path, tmp_path: Path) -> None:
    rows = [{"text": f"the {what} is {how} {n}", "label": how} for n in range(8) for what in ("card", "lamp")
            for how in ("late", "broken")]  # fmt: skip
    own: dict[str, Any] = {"model": str(bert), "methods": ("lora",), "cache": False, "lora": {"rank": 2, **QUICK}}
    with pytest.raises(KeyboardInterrupt):
        capotune.compare(data=rows, out=tmp_path / "out", report=stopping_at(2), **own)
    with pytest.raises(SettingError, match="Give the same rows again in Python"):
        capotune.resume(tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "early")
    shutil.rmtree(tmp_path / "early" / "lora")  # no technique is there that would tell
    for out in ("out", "early"):
        with pytest.raises(DataError, match="its content is another than when the comparison"):
            capotune.resume(tmp_path / out, data=rows[1:])
    compared = capotune.resume(tmp_path / "out", data=rows)
    assert isinstance(compared, capotune.api.Comparison)
    whole = capotune.compare(data=rows, out=tmp_path / "whole", **own)
    assert compared.rows[0].scores == whole.rows[0].scores


@pytest.mark.parametrize("settings", [{}, {"methods": "lora"}, {"methods": [1]}])
def test_settings_of_something_else_are_no_comparison(settings: dict[str, Any], tmp_path: Path) -> None:
    record = {"settings": settings, "command": "", "files_sha256": {}, "data": {}}
    (tmp_path / "settings.json").write_text(json.dumps(record))
    with pytest.raises(OutputError, match="is no record of a comparison"):
        capotune.api.methods_of(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="it has no such signal")
def test_a_comparison_is_asked_for_checkpoints_by_command_and_by_signal(bert: Path, tmp_path: Path) -> None:
    """Its technique in hand makes them; the epochs are long, so that they are not those of an epoch's end."""
    rows = [f"the {('lamp', 'card')[number % 2]} number {number},{number % 2}" for number in range(500)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]))
    given = ("--methods", "lora", "--lora.batch-size", 1, "--lora.epochs", 9, "--lora.patience", 9)
    made = tmp_path / "out" / "lora" / "checkpoints"
    with start("compare", "--data", "rows.csv", "--model", bert, *given, "--out", "out", cwd=tmp_path) as process:
        wait_until(lambda: holder(made.parent) is not None, process)
        asked = capo("checkpoint", tmp_path / "out")
        assert asked.code == 0, asked.err
        first = Path(asked.out.strip())
        assert first.parent == made
        process.send_signal(signal.SIGUSR1)
        wait_until(lambda: checkpoints(made)[-1] != first, process)
        process.kill()
    wait_for_its_end(made.parent, PATIENCE)


@pytest.mark.skipif(sys.platform == "win32", reason="it has no such signal")
def test_a_technique_that_starts_ignores_who_asks_for_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal would end it."""

    def started() -> None:
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(technique, "heed_sigterm", started)
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt):
            technique.main()
    finally:
        signal.signal(signal.SIGUSR1, before)
