"""What ``report_to`` sends to other programs, read back from what they wrote.

MLflow, wandb and trackio are tested where they are installed (``pip install mlflow-skinny wandb trackio``): they are
large, and nothing else needs them.
"""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from commands import capo

import capotune
from capotune.api import trackers
from capotune.api.trackers import Tracker, tracked
from capotune.engine.metrics_log import read_metrics
from capotune.errors import MissingLibraryError, SettingError
from capotune.events import EpochEnded, Event, Finished, Reporter, StepTaken, TrainingStarted, Warned

CONFIG = {"method": "lora", "rank": 4, "learning_rate": 1e-3}
STEPS = [StepTaken(step=step, total=4, loss=1 / step, learning_rate=0.1 * step) for step in (1, 2, 3, 4)]
LOSSES = [(step.step, pytest.approx(step.loss)) for step in STEPS]
END = EpochEnded(epoch=1, loss=0.5, score=0.75, metric="accuracy")
RESULT = Finished(result={"scores": {"accuracy": 0.9}})


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder; the trackers' own files go beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def report_run(name: str, out: Path, report: Reporter = lambda _: None) -> None:
    with tracked((name,), out, {None: CONFIG}, report) as told:
        for event in (TrainingStarted(trainable=3, total=5), *STEPS, END, RESULT):
            told(event)


def test_tensorboards_files_hold_a_run(out: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report_run("tensorboard", out)
    found = EventAccumulator(str(out.parent / "tensorboard" / "run"))
    found.Reload()
    assert [(one.step, one.value) for one in found.Scalars("train/loss")] == LOSSES
    assert [one.step for one in found.Scalars("train/learning_rate")] == [1, 2, 3, 4]
    assert [(one.step, one.value) for one in found.Scalars("held_out/accuracy")] == [(4, 0.75)]
    assert [one.value for one in found.Scalars("test/accuracy")] == [pytest.approx(0.9)]
    text = found.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "rank: 4" in text


def test_mlflows_files_hold_a_run(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (out.parent / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    report_run("mlflow", out)
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("capotune").experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params == {name: str(value) for name, value in CONFIG.items()}
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((one.step, one.value) for one in losses) == LOSSES
    assert (run.data.metrics["held_out/accuracy"], run.data.metrics["test/accuracy"]) == (0.75, 0.9)


def test_wandb_writes_an_offline_run(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(out.parent))
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    report_run("wandb", out)
    wandb.teardown()
    (stored,) = (out.parent / "wandb").glob("offline-run-*/run-*.wandb")
    content = stored.read_bytes()
    for words in (b"train/loss", b"held_out/accuracy", b"test/accuracy", b"capotune"):
        assert words in content
    (stored_id,) = json.loads((out / "trackers.json").read_text()).values()
    assert stored.name == f"run-{stored_id}.wandb"
    for path in out.parent.rglob("*"):  # of anything written here, none has the key
        assert not path.is_file() or b"0123456789" * 4 not in path.read_bytes(), path


def test_trackio_stores_a_run_on_this_machine(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(out.parent / "trackio"))
    pytest.importorskip("trackio")
    report_run("trackio", out)
    with closing(sqlite3.connect(out.parent / "trackio" / "capotune.db")) as stored:
        rows = [(step, json.loads(values)) for step, values in stored.execute("select step, metrics from metrics")]
    assert sorted((step, values["train/loss"]) for step, values in rows if "train/loss" in values) == LOSSES
    assert rows[-1][1] == {"test/accuracy": 0.9}


# What is the same for all


class Recorded(Tracker):
    """A tracker in memory."""

    made: list[Recorded]
    broken = ""

    def __init__(self, folder: Path, config: Mapping[str, Any], known_as: str | None) -> None:
        self.id, self.folder, self.config, self.known_as = f"{folder.name}-1", folder, config, known_as
        self.told: list[tuple[int, Mapping[str, float]]] = []
        self.ended: bool | None = None
        if self.broken == "start":
            raise OSError("no such host")
        self.made.append(self)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self.broken == "log" and step == 2:
            raise OSError("connection lost")
        self.told.append((step, values))

    def close(self, *, finished: bool) -> None:
        self.ended = finished


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[Recorded]:
    """In TensorBoard's place."""
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Recorded)
    monkeypatch.setattr(trackers, "_check_installed", lambda _name: None)
    monkeypatch.setattr(Recorded, "made", [], raising=False)
    monkeypatch.setattr(Recorded, "broken", "")
    return Recorded


def test_run_reports_and_goes_on_in_its_tracker_when_it_is_resumed(
    recorded: type[Recorded], bert: Path, tickets: Path, tmp_path: Path
) -> None:
    """What was told before the stop is not told twice."""

    def stop(event: Event) -> None:
        if isinstance(event, StepTaken) and event.step == 12:
            raise KeyboardInterrupt

    given: dict[str, Any] = {"data": str(tickets), "model": str(bert), "rank": 2, "epochs": 2, "batch_size": 8}
    with pytest.raises(KeyboardInterrupt):
        capotune.train("lora", out=tmp_path / "run", report_to=("tensorboard",), report=stop, cache=False, **given)
    capotune.resume(tmp_path / "run")
    first, second = recorded.made
    assert (first.known_as, first.ended) == (None, False)
    assert (second.known_as, second.ended) == ("run-1", True)
    assert (first.config["rank"], second.config["rank"], first.config["method"]) == (2, 2, "lora")
    told = [
        (step, values["train/loss"]) for one in (first, second) for step, values in one.told if "train/loss" in values
    ]
    assert [step for one in (first, second) for step, _ in one.told].count(0) == 1
    lines = [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "run") if "step" in line]
    assert told == [line for line in lines if line[0] != 12]  # which the stop came before
    assert "test/accuracy" in second.told[-1][1]


def test_techniques_of_a_comparison_are_runs_of_their_own(recorded: type[Recorded], out: Path) -> None:
    configs: dict[str | None, dict[str, Any]] = {"lora": {"rank": 1}, "qlora": {"rank": 2}}
    with tracked(("tensorboard",), out, configs, lambda _: None) as told:
        for method in ("lora", "qlora"):
            told(TrainingStarted(method=method, trainable=1, total=2))
            told(StepTaken(method=method, step=1, loss=0.5))
            told(Finished(method=method, result={"scores": {}}))
    assert [(one.folder, one.config["rank"], one.ended) for one in recorded.made] == [
        (out / "lora", 1, True), (out / "qlora", 2, True)
    ]  # fmt: skip


def test_tracker_that_fails_is_left_out_and_the_run_goes_on(recorded: type[Recorded], out: Path) -> None:
    recorded.broken = "log"
    said: list[str] = []
    report_run("tensorboard", out, lambda event: said.append(event.text) if isinstance(event, Warned) else None)
    assert [step for step, _ in recorded.made[0].told] == [0, 1]
    assert said == ["tensorboard gets no more of this run (connection lost); metrics.jsonl has all of it."]


def test_tracker_that_cannot_start_ends_the_run_before_its_first_step(recorded: type[Recorded], out: Path) -> None:
    recorded.broken = "start"
    with pytest.raises(SettingError, match="cannot start: no such host"):
        report_run("tensorboard", out)


def test_missing_tracker_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setattr("importlib.import_module", lambda name: __import__(name))
    with (
        pytest.raises(MissingLibraryError, match=r"pip install 'capotune\[trackio\]'"),
        tracked(("trackio",), Path(), {}, lambda _: None),
    ):
        pass
    refused = capo("train", "lora", "--data", "x.csv", "--report-to", "tensorbord")
    assert "Allowed: tensorboard, wandb, mlflow, trackio, one or more" in refused.err


def test_no_tracker_is_imported_unless_asked_for() -> None:
    program = (
        "import sys, capotune.api, capotune.cli, capotune.api.trackers\n"
        "print(sorted({'wandb', 'mlflow', 'trackio', 'tensorboard', 'torch.utils.tensorboard'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
