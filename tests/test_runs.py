"""What a run's record holds, what ``capo runs`` says of runs that ended in every way, and ``capo reproduce``."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from commands import capo

import capotune
from capotune import api
from capotune.cli.flags import given_by
from capotune.errors import DataError, OutputError, SettingError
from capotune.events import Event, StepTaken
from capotune.folder_lock import locked
from capotune.runs.circumstances import repository
from capotune.runs.listing import loss_curve

WEIGHTS = "adapter/adapter_model.safetensors"
SETTINGS = {"rank": 2, "epochs": 2, "patience": 2, "batch_size": 8, "learning_rate": 1e-3, "cache": False}


class StoppedError(Exception):
    """What a test stops a run with."""


@pytest.fixture(scope="module")
def runs(bert: Path, tickets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: one of flags and a file, one of Python in a folder below, and one that was stopped."""
    folder = tmp_path_factory.mktemp("runs")
    config = folder / "settings.yaml"
    config.write_text("batch-size: 8\nrank: 2\nseed: 1\n", encoding="utf-8")
    flags = ["--config", config, "--data", tickets, "--model", bert, "--epochs", 1, "--seed", 3, "--no-cache"]
    made = capo("train", "lora", *flags, "--out", folder / "flags")
    assert made.code == 0, made.err
    given: dict[str, Any] = {"data": str(tickets), "model": str(bert), **SETTINGS}
    capotune.train("lora", out=folder / "below" / "python", **given)

    def stop(event: Event) -> None:
        if isinstance(event, StepTaken) and event.step == event.total // 2 + 1:
            raise StoppedError

    with pytest.raises(StoppedError):
        capotune.train("lora", out=folder / "stopped", report=stop, **given)
    return folder


def record(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return found


def test_record_says_where_each_setting_came_from(runs: Path) -> None:
    found = record(runs / "flags")
    told = found["settings_from"]
    assert {name for name, source in told.items() if source == "flag"} == {"data", "model", "epochs", "seed", "cache"}
    assert {name for name, source in told.items() if source == "file"} == {"batch_size", "rank"}
    assert set(told.values()) == {"flag", "file", "default"}
    assert set(told) == set(found["settings"]) | set(found["lora"])
    in_python = record(runs / "below" / "python")["settings_from"]
    assert {name for name, source in in_python.items() if source == "argument"} == {"data", "model", *SETTINGS}


def test_record_says_which_machine_and_versions(runs: Path) -> None:
    machine = record(runs / "flags")["environment"]
    named = {
        "capotune",
        "torch",
        "transformers",
        "numpy",
        "python",
        "processor",
        "cpu_level",
        "memory",
        "gpu",
        "kernels",
    }
    assert named <= machine.keys()
    assert all(isinstance(value, str) and value for value in machine.values())


def test_flags_of_settings_inside_others_are_told_where_they_say_no() -> None:
    flags = ["--lora.no-gradient-checkpointing", "--no-cache", "--lora.rank=4", "--notes"]
    told = given_by(flags, None)
    assert told == dict.fromkeys(["lora.gradient_checkpointing", "cache", "lora.rank", "notes"], "flag")


# The user's repository


def git(folder: Path, *arguments: str) -> str:
    named = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    done = subprocess.run(["git", *named, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    folder = tmp_path / "repo"
    (folder / "below").mkdir(parents=True)
    (folder / "code.py").write_text("x = 1\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@needs_git
def test_commit_of_the_users_repository_and_whether_it_was_dirty(repo: Path, tmp_path: Path) -> None:
    clean = {"commit": git(repo, "rev-parse", "HEAD"), "dirty": False}
    assert repository(repo) == repository(repo / "below") == clean
    (repo / "a run").mkdir()
    (repo / "a run" / "run.json").write_text("{}")
    assert repository(repo) == clean, "what is not tracked is no change: runs themselves stand there"
    (repo / "code.py").write_text("x = 2\n")
    assert repository(repo) == {**clean, "dirty": True}
    (tmp_path / "none").mkdir()
    assert repository(tmp_path / "none") is None


@needs_git
@pytest.mark.parametrize("key", ["core.fsmonitor", "filter.own.clean", "filter.own.process"])
def test_repository_of_a_stranger_runs_nothing(key: str, repo: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (repo / ".gitattributes").write_text("*.py filter=own\n")
    git(repo, "config", key, f"touch '{ran}'; cat")
    (repo / "code.py").write_text("x = 3\n")
    found = repository(repo)
    assert found is not None
    assert found["dirty"] in (True, None)
    assert not ran.exists()
    subprocess.run(["git", "status", "--porcelain"], cwd=repo, check=False, capture_output=True)
    assert ran.exists(), "git itself runs it: else this test would prove nothing"


# Lists


def test_runs_are_listed_with_status_score_and_time(runs: Path) -> None:
    shown = capo("runs", runs, "--json")
    listed = {Path(run["folder"]).name: run for run in map(json.loads, shown.out.splitlines())}
    assert list(listed) == ["python", "flags", "stopped"]
    complete, stopped = listed["flags"], listed["stopped"]
    result = record(runs / "flags")["result"]
    assert (complete["status"], complete["details"]) == ("complete", "")
    assert (complete["metric"], complete["score"]) == ("accuracy", result["score"])
    assert complete["train_seconds"] == result["train_seconds"] > 0
    steps = record(runs / "stopped")["lora"]["epochs"] * 10
    assert (stopped["status"], stopped["details"]) == ("stopped", f"at step {steps // 2} of {steps}")
    assert stopped["score"] is None
    table = capo("runs", runs).said
    for words in ("below/python", "complete", f"accuracy {result['score']:.2%}", "stopped"):
        assert words in table


def test_status_is_what_is_found_in_the_folder(runs: Path, tmp_path: Path) -> None:
    """Not what some flag says: a damaged adapter or checkpoint is told, and what is wrong with it."""
    for name in ("stopped", "flags"):
        shutil.copytree(runs / name, tmp_path / name)
    with locked(tmp_path / "stopped"):
        (running,) = api.list_runs(tmp_path / "stopped")
    assert running.status == "running"
    assert "at step" in running.details
    (weights,) = (tmp_path / "stopped").rglob("state.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    adapter = tmp_path / "flags" / WEIGHTS
    adapter.write_bytes(adapter.read_bytes()[:100])
    complete, stopped = api.list_runs(tmp_path)
    assert (complete.status, stopped.status) == ("broken", "broken")
    assert WEIGHTS in complete.details
    assert "damaged" in stopped.details
    shutil.rmtree(tmp_path / "stopped" / "checkpoints")
    (tmp_path / "flags" / "run.json").write_text('{"settings": ')
    unreadable, begun = api.list_runs(tmp_path)
    assert (unreadable.status, begun.status, begun.details) == ("broken", "stopped", "before its first checkpoint")
    assert "run.json" in unreadable.details


def test_comparison_is_listed_by_what_its_techniques_came_to(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "compared"
    shutil.copytree(runs / "flags", out / "lora")
    shutil.copytree(runs / "stopped", out / "qlora")
    settings = {
        "settings": {"methods": ["lora", "qlora", "prompt-tuning"]},
        "command": "",
        "files_sha256": {},
        "data": {},
    }
    (out / "settings.json").write_text(json.dumps(settings))
    compared, lora, qlora = api.list_runs(tmp_path)
    assert (compared.status, compared.details) == ("stopped", "1 of 3 techniques are complete")
    assert (lora.status, qlora.status) == ("complete", "stopped")
    table = {"rows": [{"method": "lora", "score": 0.5}], "recommended": "lora", "metric": "accuracy"}
    (out / "compare.json").write_text(json.dumps(table))
    compared = api.list_runs(tmp_path)[0]
    assert (compared.status, compared.details) == ("complete", "lora is recommended")
    assert compared.as_json()["score"] == 0.5
    assert compared.as_json()["started"] == lora.as_json()["started"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"settings": {}, "method": ["x"]}', "method: Input should be a valid string"),
        ('{"settings": {}, "method": "x", "result": 3}', "result: "),
        ('{"settings": {}, "method": "x", "result": {"train_seconds": 1.0, "score": "1"}}', "result.score: "),
        ('{"settings": {}, "method": "x", "result": {"train_seconds": 1.0, "adapter": "../x"}}', "no such adapter"),
        (r'{"settings": {}, "method": "\u001b[2Jx"}', "before its first checkpoint"),
        ('{"settings": {}, "method": "x", "environment": 3}', "environment: "),
    ],
)
def test_record_of_a_stranger_is_listed_in_words(content: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    (run,) = api.list_runs(tmp_path)
    assert run.status == ("stopped" if "checkpoint" in why else "broken")
    assert why in run.details
    shown = capo("runs", tmp_path)
    assert shown.code == 0
    assert "\x1b" not in shown.out


@pytest.mark.parametrize("name", ["run.json", "settings.json"])
@pytest.mark.parametrize("content", ["[]", '{"editor": 1}', "// no JSON", '{"settings": {}}'])
def test_files_of_other_programs_are_no_runs(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "run.json").write_text('{"settings": {}, "method": "x"}')
    assert [run.folder.name for run in api.list_runs(tmp_path)] == ["below"]
    (tmp_path / "checkpoints").mkdir()
    assert api.list_runs(tmp_path)[0].status == "broken"


def test_folder_without_runs_is_said(tmp_path: Path) -> None:
    assert capo("runs", tmp_path).out == f"no run in {tmp_path}.\n"
    assert "no such folder" in capo("runs", tmp_path / "none").err


def test_what_differs_between_two_runs_is_shown(runs: Path) -> None:
    one, other = runs / "flags", runs / "below" / "python"
    found = json.loads(capo("runs", "--compare", one, other, "--json").out)
    settings = found["differing"]["settings"]
    assert {"seed", "epochs"} <= settings.keys()
    assert settings["epochs"] == [1, 2]
    assert not {"data", "model", "rank", "cache"} & settings.keys()
    assert "environment" not in found["differing"]
    assert found["adapters"] is False
    assert found["losses"]["differs_from"] == 1
    shown = capo("runs", "--compare", one, other).said
    for words in ("settings", "epochs 1 against 2", "adapter other weights", "losses from the first step on"):
        assert words in shown
    equal = api.compare_runs(one, one)
    assert (equal["differing"], equal["adapters"]) == ({}, True)
    assert equal["losses"]["equal"]


def test_loss_curves_are_compared_step_by_step(tmp_path: Path) -> None:
    for name, losses in (("one", [3.0, 2.0, None, 1.0]), ("other", [3.0, 2.5, 1.0])):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in enumerate(losses, start=1)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(lines))
    found = loss_curve(tmp_path / "one", tmp_path / "other")
    assert found == {"steps": 3, "equal": False, "differs_from": 2, "largest": 0.5}
    assert loss_curve(tmp_path / "one", tmp_path) is None


# Once more


def test_run_is_reproduced_to_the_bit_from_its_record_alone(runs: Path, tmp_path: Path) -> None:
    shown = capo("reproduce", runs / "flags", "--out", tmp_path / "again")
    assert shown.code == 0, shown.err
    assert "The run is reproduced to the bit." in shown.out
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (runs / "flags" / WEIGHTS).read_bytes()
    assert record(tmp_path / "again")["settings_from"] == record(runs / "flags")["settings_from"]


def test_what_differs_is_said_where_a_run_is_not_reproduced(runs: Path, tmp_path: Path) -> None:
    """As if it had been made with another PyTorch, whose sums end otherwise."""
    shutil.copytree(runs / "flags", tmp_path / "run")
    changed = record(tmp_path / "run")
    changed["environment"]["torch"] = "2.1.0"
    changed["result"]["scores"]["loss"] += 1e-7
    (tmp_path / "run" / "run.json").write_text(json.dumps(changed))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | {"loss": 9.0})
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    shown = capo("reproduce", tmp_path / "run")
    assert shown.code == 1
    for words in ("weights equal to the bit", "losses equal up to step 2, then up to", "loss", "torch 2.1.0 there"):
        assert words in shown.said
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_run_is_not_reproduced_on_other_data_or_unfinished(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is not complete"):
        api.reproduce(runs / "stopped")
    shutil.copytree(runs / "flags", tmp_path / "run")
    changed = record(tmp_path / "run")
    changed["data_sha256"] = "0"
    (tmp_path / "run" / "run.json").write_text(json.dumps(changed))
    with pytest.raises(DataError, match="data is another"):
        api.reproduce(tmp_path / "run")
    changed["settings"]["trust_remote_code"] = True
    (tmp_path / "run" / "run.json").write_text(json.dumps(changed))
    with pytest.raises(SettingError, match="lets its model run its own Python code"):
        api.reproduce(tmp_path / "run")
