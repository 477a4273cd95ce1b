"""A run that was stopped goes on by its folder alone, to the bytes of one that never was: every task, every moment."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import PATIENCE, tree
from helpers import assert_same_bits, fit, on_base, weights

import capotune
from capotune import api
from capotune.device import environment
from capotune.engine.checkpoint import load_checkpoint
from capotune.engine.state import TrainingState
from capotune.errors import DataError, OutputError, SettingError
from capotune.events import Event, Finished, StepTaken, Warned
from capotune.folder_lock import locked
from capotune.interrupts import asked_by_signal, uninterrupted
from capotune.methods.lora.settings import LoraSettings
from capotune.run_folder import checkpoints, is_requested, tidy
from capotune.runs import circumstances
from capotune.runs import resume as resume_module
from capotune.runs import run as run_module

SAME = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "predictions.jsonl", "metrics.jsonl")


class StoppedError(Exception):
    """Stands for a crash."""


@dataclass(frozen=True)
class Case:
    """What is trained."""

    method: str
    settings: dict[str, Any]

    def train(self, out: Path, report: Any = lambda _: None) -> dict[str, Any]:
        return capotune.train(self.method, out=out, report=report, **self.settings)


@pytest.fixture(scope="module")
def cases(
    bert: Path, tickets: Path, llama_writer: Path, colour_pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("data")
    words, drawn = ("late O", "broken O", "card O", "when O", "lamp B-A", "parcel B-A"), random.Random(0)
    rows = ("\n".join(drawn.choices(words, k=5)) for _ in range(30))
    (folder / "tagged.conll").write_text("\n\n".join(rows) + "\n", encoding="utf-8")
    (folder / "prompts.txt").write_text("friend one\nfriend two\n", encoding="utf-8")
    quick: dict[str, Any] = {"epochs": 3, "batch_size": 8, "learning_rate": 1e-3}
    labels = {"data": str(tickets), "model": str(bert), "validation_fraction": 0.1, **quick}
    text = {"data": str(colour_pairs), "model": str(llama_writer), "answers": 4, **quick}
    return {
        "labels, frozen blocks from the cache": Case("feature-extraction", {**labels, "trainable_layers": 1}),
        "labels, stopped early": Case("lora", {**labels, "rank": 2, "dropout": 0.1, "patience": 1, "epochs": 9}),
        "tokens": Case("lora", {**labels, "data": str(folder / "tagged.conll"), "rank": 2, "dropout": 0.1}),
        "text, hard prompts": Case(
            "prompt-tuning", {**text, "candidates": str(folder / "prompts.txt"), "learning_rate": 0.1}
        ),
    }  # fmt: skip


NAMES = ["labels, frozen blocks from the cache", "labels, stopped early", "tokens", "text, hard prompts"]


@pytest.fixture(scope="module")
def whole(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that nobody stopped."""
    made: dict[str, Path] = {}
    for name in NAMES:
        made[name] = tmp_path_factory.mktemp("whole") / "run"
        cases[name].train(made[name])
    return made


def stopping_at(step: int, how: type[BaseException] = KeyboardInterrupt) -> Any:
    def report(event: Event) -> None:
        if isinstance(event, StepTaken) and event.step == step:
            raise how

    return report


def assert_same(out: Path, whole: Path) -> None:
    for name in SAME:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert set(tree(out)) == set(tree(whole))


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_any_task_resumes_to_the_same_bytes(
    name: str, cases: dict[str, Case], whole: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        cases[name].train(out, stopping_at(5))
    assert checkpoints(out / "checkpoints")[-1].name.startswith("step-5-")
    resumed = capotune.resume(out)
    assert isinstance(resumed, dict)
    assert_same(out, whole[name])


def test_stopped_twice_and_with_a_damaged_checkpoint(
    cases: dict[str, Case], whole: dict[str, Path], tmp_path: Path
) -> None:
    name, out, said = "labels, stopped early", tmp_path / "run", []

    def report(event: Event) -> None:
        said.extend([event.text] if isinstance(event, Warned) else [])
        stopping_at(8)(event)

    with pytest.raises(KeyboardInterrupt):
        cases[name].train(out, stopping_at(5))
    with pytest.raises(KeyboardInterrupt):
        capotune.resume(out, report=stopping_at(7))
    newest = checkpoints(out / "checkpoints")[-1]
    with (newest / "state.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(KeyboardInterrupt):
        capotune.resume(out, report=report)
    assert said == [f"the checkpoint {newest} is damaged; the one before it is taken."]
    capotune.resume(out)
    assert_same(out, whole[name])


@pytest.mark.parametrize("moment", ["_write_scored", "tidy"])
def test_stopped_while_the_last_files_are_written(
    moment: str, cases: dict[str, Case], whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the adapter; and after the record, which then holds the best prompt in place of the candidates."""
    name, out = "text, hard prompts", tmp_path / "run"

    def crash(*_: object) -> None:
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(run_module, moment, crash)
        with pytest.raises(StoppedError):
            cases[name].train(out)
    assert checkpoints(out / "checkpoints")
    resumed = capotune.resume(out)
    assert json.loads(json.dumps(resumed)) == json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert_same(out, whole[name])


def test_ctrl_c_after_the_result_loses_nothing(cases: dict[str, Case], whole: dict[str, Path], tmp_path: Path) -> None:
    """While trackers are told of it, say."""
    name, out = "tokens", tmp_path / "run"

    def report(event: Event) -> None:
        if isinstance(event, Finished):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cases[name].train(out, report)
    assert_same(out, whole[name])


def test_killed_before_the_first_checkpoint_it_begins_anew(
    cases: dict[str, Case], whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, out = "labels, stopped early", tmp_path / "run"
    monkeypatch.setattr(run_module, "is_worth_keeping", lambda _: True)  # as if nobody could tidy up
    with pytest.raises(StoppedError):
        cases[name].train(out, stopping_at(2, StoppedError))
    assert not checkpoints(out / "checkpoints")
    (out / ".run.json.0.partial").write_text("half")
    capotune.resume(out)
    assert_same(out, whole[name])


# Elsewhere


def elsewhere(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    """As on a machine with another environment."""
    here = environment()
    monkeypatch.setattr(circumstances, "environment", lambda: here | values)


def warnings_of(out: Path, stop: int | None = None) -> list[str]:
    """Go on with the run in ``out``, to its end or to a step."""
    said: list[str] = []

    def report(event: Event) -> None:
        said.extend([event.text] if isinstance(event, Warned) else [])
        stopping_at(stop or 0)(event)

    with pytest.raises(KeyboardInterrupt) if stop else nullcontext():
        capotune.resume(out, report=report)
    return said


def test_going_on_elsewhere_is_said_once_and_recorded(
    cases: dict[str, Case], whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, out, began = "labels, stopped early", tmp_path / "run", environment()
    with pytest.raises(KeyboardInterrupt):
        cases[name].train(out, stopping_at(3))
    elsewhere(monkeypatch, memory="another that decides about nothing")
    assert warnings_of(out, stop=5) == []
    elsewhere(monkeypatch, torch="9.9", cpu="64 threads used")
    named = f"torch: {began['torch']} before, 9.9 now; cpu: {began['cpu']} before, 64 threads used now"
    last_bits = "the result may differ in the last bits from that of a run that was never stopped."
    assert warnings_of(out, stop=7) == [f"the run goes on elsewhere ({named}): {last_bits}"]
    assert warnings_of(out, stop=8) == []
    monkeypatch.undo()
    (back,) = warnings_of(out)
    assert f"torch: 9.9 before, {began['torch']} now" in back
    record = json.loads((out / "run.json").read_text())
    assert record["environment"] == json.loads((whole[name] / "run.json").read_text())["environment"]
    assert [(one["step"], one["environment"]["torch"]) for one in record["resumed_in"]] == [
        (5, "9.9"), (8, began["torch"]),
    ]  # fmt: skip
    differing = api.compare_runs(out, whole[name])["differing"]
    (first, second), nothing = differing["resumed"]["resumed_in"]
    assert (first, nothing) == (f"after step 5: {named}", [])
    assert second.startswith("after step 8: torch: 9.9 before")
    assert_same(out, whole[name])


def test_a_run_that_begins_anew_elsewhere_is_of_there(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr(run_module, "is_worth_keeping", lambda _: True)  # as if it was killed
    with pytest.raises(StoppedError):
        cases["tokens"].train(out, stopping_at(2, StoppedError))
    elsewhere(monkeypatch, torch="9.9")
    assert warnings_of(out) == []
    record = json.loads((out / "run.json").read_text())
    assert (record["environment"]["torch"], "resumed_in" in record) == ("9.9", False)


def test_a_run_that_had_no_room_in_the_cache_computes_anew_to_its_end(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the limit is when it goes on or is made again: where states come from decides about the last bits."""
    case, out, whole = cases["labels, frozen blocks from the cache"], tmp_path / "run", tmp_path / "whole"
    monkeypatch.setenv("CAPOTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CAPOTUNE_CACHE_LIMIT", "0")
    assert case.train(whole)["result"]["stored_states"] is False
    with pytest.raises(KeyboardInterrupt):
        case.train(out, stopping_at(5))
    monkeypatch.delenv("CAPOTUNE_CACHE_LIMIT")
    assert warnings_of(out) == []
    assert_same(out, whole)
    assert api.reproduce(whole)["same"]
    assert json.loads((out / "run.json").read_text())["result"]["stored_states"] is False


def test_a_run_whose_states_find_no_room_any_more_says_so(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, out = cases["labels, frozen blocks from the cache"], tmp_path / "run"
    monkeypatch.setenv("CAPOTUNE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(KeyboardInterrupt):
        case.train(out, stopping_at(5))
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setenv("CAPOTUNE_CACHE_LIMIT", "0")
    said = [text for text in warnings_of(out) if "last bits" in text]
    assert [text.partition(":")[0] for text in said] == ["what the frozen layers compute was stored before"]


def test_other_candidates_are_refused(cases: dict[str, Case], tmp_path: Path) -> None:
    case, prompts = cases["text, hard prompts"], tmp_path / "prompts.txt"
    prompts.write_text("friend one\n", encoding="utf-8")
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        Case(case.method, {**case.settings, "candidates": str(prompts)}).train(out, stopping_at(2))
    prompts.write_text("friend three\n", encoding="utf-8")
    with pytest.raises(DataError, match="`candidates`: its content is another than when the run"):
        capotune.resume(out)


# In the middle of a step


class Saver:
    """Holds the state that training was stopped in."""

    state = TrainingState()

    def due(self, _state: TrainingState) -> bool:
        return False

    def save(self, _state: TrainingState) -> None:
        raise AssertionError

    def save_now(self, state: TrainingState) -> None:
        self.state = replace(state)


@pytest.mark.parametrize("part", [1, 2])
def test_stopped_between_the_parts_of_a_step_nothing_is_lost(
    part: int, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after a gradient of the step is there: what is saved is the state after the step before."""
    quick = {"epochs": 2, "patience": 2, "batch_size": 8, "micro_batch_tokens": 40, "dropout": 0.3}
    settings = LoraSettings(rank=4, alpha=8, learning_rate=5e-3, **quick)
    whole = on_base(bert, settings)
    _, losses = fit(whole)
    assembled, saver = on_base(bert, settings), Saver()
    backward, calls = torch.Tensor.backward, 0

    def counted(loss: torch.Tensor, *given: Any) -> None:
        nonlocal calls
        calls += len(seen) == 7
        if calls == part:
            raise KeyboardInterrupt
        backward(loss, *given)

    seen: list[float] = []
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", counted)
        with pytest.raises(KeyboardInterrupt):
            fit(assembled, saver=saver, on_step=lambda _state, _total, loss: bool(seen.append(loss)))
    assert saver.state.step == len(seen) == 7
    again = on_base(bert, settings, seed=5)
    _, rest = fit(again, state=saver.state)
    assert seen + rest == losses
    assert_same_bits(weights(again), weights(whole))


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """As at a terminal: what a shell starts in the background is deaf to them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
def test_a_signal_waits_for_the_end_of_an_update() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("the update")
        done.append("what comes after")
    assert done == ["the update"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# On request


def test_a_signal_asks_for_a_checkpoint(cases: dict[str, Case], tmp_path: Path) -> None:
    out = tmp_path / "run"

    def report(event: Event) -> None:
        if isinstance(event, StepTaken) and event.step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        stopping_at(4, StoppedError)(event)

    with asked_by_signal(lambda: api.request_checkpoint(out)), pytest.raises(StoppedError):
        cases["labels, stopped early"].train(out, report)
    assert [path.name for path in checkpoints(out / "checkpoints")] == ["step-2-epoch-0"]
    assert not is_requested(out)


def test_another_terminal_asks_for_a_checkpoint_and_gets_its_folder(cases: dict[str, Case], tmp_path: Path) -> None:
    out, given = tmp_path / "run", []
    asking = threading.Thread(target=lambda: given.append(capotune.checkpoint(out)), daemon=True)

    def report(event: Event) -> None:
        if isinstance(event, StepTaken) and event.step == 2:
            asking.start()
            while is_requested(out) is None:
                asking.join(0.01)
                assert asking.is_alive(), "it has ended without asking"
        if isinstance(event, StepTaken) and event.step == 3:
            asking.join(PATIENCE)
        stopping_at(4, StoppedError)(event)

    with pytest.raises(StoppedError):
        cases["labels, stopped early"].train(out, report)
    assert given == [out / "checkpoints" / "step-2-epoch-0"]


def test_who_asks_a_run_that_ends_meanwhile_is_told_so(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        cases["tokens"].train(out, stopping_at(1))
    monkeypatch.setattr(api.resuming.time, "sleep", lambda _: tidy(out))
    with locked(out), pytest.raises(OutputError, match="ended before its next step"):
        capotune.checkpoint(out)


# Refused


def test_a_folder_in_which_another_process_works_is_refused(cases: dict[str, Case], tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        cases["tokens"].train(out, stopping_at(1))
    with locked(out), pytest.raises(OutputError, match=f"process {os.getpid()} on .* works in"):
        capotune.resume(out)


def test_a_run_of_another_kind_of_device_is_refused(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        cases["tokens"].train(out, stopping_at(1))
    state = load_checkpoint(out / "checkpoints")
    assert state is not None
    there = replace(state, rng=torch.zeros(16, dtype=torch.uint8))  # as long as CUDA's
    monkeypatch.setattr(resume_module, "load_checkpoint", lambda *_: there)
    with pytest.raises(OutputError, match="was started on another kind of device than cpu"):
        capotune.resume(out)


def test_a_run_of_an_earlier_version_resumes(cases: dict[str, Case], whole: dict[str, Path], tmp_path: Path) -> None:
    """Its record says neither which files it read nor whether the base is scored; its checkpoints have no checksums."""
    name, out = "tokens", tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        cases[name].train(out, stopping_at(5))
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    for key in ("files_sha256", "scores_base"):
        del record[key]
    del record["settings"]["save_every"]
    (out / "run.json").write_text(json.dumps(record), encoding="utf-8")
    checkpoint = checkpoints(out / "checkpoints")[-1]
    (checkpoint / "SHA256SUMS").unlink()
    counters = json.loads((checkpoint / "state.json").read_text())
    for key in ("seconds", "skipped", "skipped_in_epoch", "skipped_in_a_row", "micro_batch_tokens"):
        del counters[key]
    (checkpoint / "state.json").write_text(json.dumps(counters))
    capotune.resume(out)
    assert_same(out, whole[name])


def test_a_setting_that_this_version_does_not_know_is_refused_by_name(cases: dict[str, Case], tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    settings = {"data": cases["tokens"].settings["data"], "from_the_future": 1}
    record = {"settings": settings, "method": "lora", "lora": {}}
    (out / "run.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(SettingError, match=r"run\.json: unknown setting 'from_the_future'"):
        capotune.resume(out)
