"""A ``CancelToken`` from another thread stops long work before its next step, and leaves nothing half-done.

What is counted is work, not time: each test waits until a piece of work (a step, a batch, a tensor, a token) is done,
cancels from another thread, and sees at most one more.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import PATIENCE, tree
from transformers.models.bert.modeling_bert import BertEmbeddings

import capotune
from capotune.adapters import fingerprint
from capotune.engine import linear_head, loop
from capotune.engine.checkpoint import load_checkpoint
from capotune.engine.state import TrainingState
from capotune.errors import CapotuneError
from capotune.evaluation import forward
from capotune.evaluation import generate as generation
from capotune.events import CancelToken, Event, Failed, Stage, StepTaken

WEIGHTS = "adapter/adapter_model.safetensors"


class Stop:
    """Cancels from another thread after ``after`` calls of a function, or at an event, and counts the calls since."""

    def __init__(self, after: int = 2) -> None:
        self.token, self.left, self.since = CancelToken(), after, 0
        self.events: list[Event] = []

    def cancel(self) -> None:
        thread = threading.Thread(target=self.token.cancel)
        thread.start()
        thread.join()

    def counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function; it cancels when it has been called often enough."""

        def counted(*given: Any, **named: Any) -> Any:
            if self.token.cancelled:
                self.since += 1
            result = function(*given, **named)
            self.left -= 1
            if self.left == 0:
                self.cancel()
            return result

        return counted

    def stopped(self, work: Callable[..., Any], *given: Any, **named: Any) -> None:
        """The work ends by the token, with at most one call more."""
        with pytest.raises(KeyboardInterrupt):
            work(*given, cancel=self.token, **named)
        assert self.token.cancelled
        assert self.since <= 1


def training(base: Path, data: Path, **settings: Any) -> dict[str, Any]:
    few = {"epochs": 3, "patience": 3, "batch_size": 4, "learning_rate": 1e-3, "validation_fraction": 0.1}
    return {"data": str(data), "model": str(base), "cache": False, **few, **settings}


# What a run on labels goes through


UNITS: dict[str, tuple[Any, str, str, dict[str, Any]]] = {
    "computing features": (forward, "batch_of", "feature-extraction", {}),
    "solving the head": (linear_head, "_gradient", "feature-extraction", {}),
    "computing the frozen layers": (forward, "batch_of", "feature-extraction", {"trainable_layers": 1}),
    "training": (loop, "_update", "lora", {}),
}


@pytest.mark.parametrize("stage", UNITS)
def test_a_run_on_labels_stops_in(
    stage: str, bert: Path, tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name, method, settings = UNITS[stage]
    monkeypatch.setattr(forward, "tokens_at_once", lambda _device: 64)  # many batches
    stop = Stop()
    counted = stop.counting(getattr(module, name))
    seen: list[str] = []

    def report(event: Event) -> None:
        if isinstance(event, Stage):
            seen.append(event.text)
            if event.text.startswith(stage):  # the same work is done in earlier stages
                monkeypatch.setattr(module, name, counted)

    stop.stopped(
        capotune.train, method, out=tmp_path / "new" / "run", report=report, **training(bert, tickets, **settings)
    )
    assert seen[-1].startswith(stage)
    if stage != "training":
        assert tree(tmp_path) == {}
    else:
        assert last_state(tmp_path / "new" / "run").step == 2


def last_state(run: Path) -> TrainingState:
    state = load_checkpoint(run / "checkpoints")
    assert state is not None
    return state


def test_a_run_stops_while_held_out_rows_are_scored(
    bert: Path, tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "tokens_at_once", lambda _device: 16)
    stop, steps = Stop(), []

    def report(event: Event) -> None:
        if isinstance(event, StepTaken):
            steps.append(event)
            if event.step == event.total // 3:  # the epoch's last one: what comes next is scoring
                monkeypatch.setattr(forward, "batch_of", stop.counting(forward.batch_of))

    stop.stopped(capotune.train, "lora", out=tmp_path / "run", report=report, **training(bert, tickets))
    assert steps[-1].step == steps[-1].total // 3
    state = last_state(tmp_path / "run")
    assert (state.step, state.epoch) == (steps[-1].step, 0)


def test_a_run_stops_while_its_test_rows_are_scored_and_keeps_its_checkpoint(
    bert: Path, tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "tokens_at_once", lambda _device: 16)
    stop = Stop()

    def report(event: Event) -> None:
        if isinstance(event, Stage) and event.text == "testing":
            monkeypatch.setattr(forward, "batch_of", stop.counting(forward.batch_of))

    given = training(bert, tickets, epochs=1)
    stop.stopped(capotune.train, "lora", out=tmp_path / "run", report=report, **given)
    monkeypatch.undo()
    assert last_state(tmp_path / "run").epoch == 1
    assert not (tmp_path / "run" / "adapter").exists()
    resumed = capotune.resume(tmp_path / "run")
    assert resumed["result"]["test_rows"] == 24


def test_a_cancelled_run_resumes_to_the_same_bytes(bert: Path, tickets: Path, tmp_path: Path) -> None:
    given = training(bert, tickets, dropout=0.1)
    whole = capotune.train("lora", out=tmp_path / "whole", **given)
    token, steps = CancelToken(), []

    def report(event: Event) -> None:
        if isinstance(event, StepTaken):
            steps.append(event.step)
            if event.step > event.total // 3 + 2:  # in the middle of the second epoch
                thread = threading.Thread(target=token.cancel)
                thread.start()
                thread.join()

    with pytest.raises(KeyboardInterrupt):
        capotune.train("lora", out=tmp_path / "run", report=report, cancel=token, **given)
    before = steps[-1]
    assert not [name for name in tree(tmp_path / "run") if ".partial" in name]
    resumed = capotune.resume(tmp_path / "run", report=report)
    assert steps[steps.index(before) + 1] == before + 2  # the token stops it at the event after the next step
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert resumed["result"]["scores"] == whole["result"]["scores"]


# Text


def test_a_run_stops_while_it_answers_test_rows(
    llama_writer: Path, colour_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = Stop(3)
    monkeypatch.setattr(generation._Alive, "__call__", stop.counting(generation._Alive.__call__))
    given = training(llama_writer, colour_pairs, epochs=1)
    seen = []
    stop.stopped(
        capotune.train, "lora", out=tmp_path / "run", **given,
        report=lambda event: seen.append(event.text) if isinstance(event, Stage) else None,
    )  # fmt: skip
    assert seen[-1] == "answering test rows"
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_run_stops_between_the_candidates_of_a_hard_prompt(
    llama_writer: Path, colour_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"friend {number}\n" for number in range(5)), "utf-8")
    monkeypatch.setattr(forward, "tokens_at_once", lambda _device: 32)
    stop = Stop(1)

    def report(event: Event) -> None:
        if isinstance(event, Stage) and "hard prompts" in event.text:
            monkeypatch.setattr(forward, "batch_of", stop.counting(forward.batch_of))

    given = training(llama_writer, colour_pairs, candidates=str(tmp_path / "prompts.txt"))
    stop.stopped(capotune.train, "prompt-tuning", out=tmp_path / "run", report=report, **given)
    assert not (tmp_path / "run").exists()


# Evaluate


@pytest.fixture(scope="module")
def adapters(
    bert: Path, tickets: Path, llama_writer: Path, colour_pairs: Path, tmp_path_factory: Any
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    capotune.train("lora", out=folder / "labels", **training(bert, tickets, epochs=1))
    capotune.train("lora", out=folder / "text", answers=0, **training(llama_writer, colour_pairs, epochs=1))
    return {"labels": folder / "labels" / "adapter", "text": folder / "text" / "adapter"}


@pytest.mark.parametrize("kind", ["labels", "text"])
def test_evaluate_stops_while_rows_are_scored(
    kind: str, adapters: dict[str, Path], tickets: Path, colour_pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "tokens_at_once", lambda _device: 32)
    stop = Stop()
    monkeypatch.setattr(forward, "batch_of", stop.counting(forward.batch_of))
    data = tickets if kind == "labels" else colour_pairs
    stop.stopped(capotune.evaluate, adapters[kind], data=str(data))


def test_evaluate_stops_while_it_answers(
    adapters: dict[str, Path], colour_pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = Stop(3)
    monkeypatch.setattr(generation._Alive, "__call__", stop.counting(generation._Alive.__call__))
    stop.stopped(capotune.evaluate, adapters["text"], data=str(colour_pairs), answers=8)


@pytest.mark.parametrize("command", ["train", "evaluate", "merge"])
def test_a_command_stops_while_the_base_is_fingerprinted(
    command: str, adapters: dict[str, Path], bert: Path, tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "remembered", lambda _kind, _paths, compute: compute())
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    stop = Stop()
    monkeypatch.setattr(fingerprint, "_digest", stop.counting(fingerprint._digest))
    if command == "train":
        stop.stopped(capotune.train, "lora", out=tmp_path / "out", **training(bert, tickets))
    elif command == "evaluate":
        stop.stopped(capotune.evaluate, adapters["labels"], data=str(tickets))
    else:
        stop.stopped(capotune.merge, adapters["labels"], out=tmp_path / "out")
    assert tree(tmp_path) == {}


# Checkpoints written anew


def test_quantize_stops_after_the_tensor_in_hand(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from capotune.models import quantize as module

    stop = Stop()
    monkeypatch.setattr(module, "quantize_weight", stop.counting(module.quantize_weight))
    stop.stopped(capotune.quantize, str(bert), out=tmp_path / "new" / "out")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("command", ["quantize", "merge"])
def test_a_model_written_anew_stops_while_answers_are_compared(
    command: str, bert: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("".join(f"the parcel was late {number}\n" for number in range(20)), "utf-8")
    stop = Stop()

    def report(event: Event) -> None:
        if isinstance(event, Stage) and event.text.startswith("comparing"):
            monkeypatch.setattr(BertEmbeddings, "forward", stop.counting(BertEmbeddings.forward))

    given = {"out": tmp_path / "out", "progress": report}
    if command == "quantize":
        stop.stopped(capotune.quantize, str(bert), report=True, text=str(tmp_path / "text.txt"), **given)
    else:
        stop.stopped(capotune.merge, adapters["labels"], **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["labels", "text"])
def test_merge_stops_after_the_tensor_in_hand(
    kind: str, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from capotune.adapters.merge import _Merging

    stop = Stop()
    monkeypatch.setattr(_Merging, "write", stop.counting(_Merging.write))
    stop.stopped(capotune.merge, adapters[kind], out=tmp_path / "new" / "merged")
    assert tree(tmp_path) == {}


# Comparisons


def test_a_cancelled_comparison_ends_its_process_even_where_that_does_not_answer(
    bert: Path, tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from capotune.runs import compare as module

    processes: list[Any] = []

    class Popen(module.subprocess.Popen):  # type: ignore[name-defined,misc]
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            processes.append(self)

    monkeypatch.setattr(module.subprocess, "Popen", Popen)
    monkeypatch.setattr(module, "_SECONDS_TO_SAVE", 0.1)
    token, working, released = CancelToken(), threading.Event(), threading.Event()
    events: list[Event] = []

    def report(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepTaken):
            working.set()

    def cancel() -> None:
        working.wait()
        processes[0].send_signal(signal.SIGSTOP)  # it is in the middle of something long, and says nothing
        seen = -1
        while seen != len(events):
            seen = len(events)
            time.sleep(0.5)
        token.cancel()
        released.wait(PATIENCE)
        processes[0].kill()  # where the token did not end it, so that the test ends

    thread = threading.Thread(target=cancel, daemon=True)
    thread.start()
    lora = {"epochs": 100_000, "patience": 100_000}
    with pytest.raises(KeyboardInterrupt):
        capotune.compare(
            data=str(tickets), model=str(bert), methods=("lora", "qlora"), out=tmp_path / "new" / "out", lora=lora,
            report=report, cancel=token,
        )  # fmt: skip
    assert thread.is_alive()  # it is the token that ended the process
    released.set()
    thread.join()
    assert len(processes) == 1  # the second technique did not begin
    assert processes[0].returncode == -9
    assert not (tmp_path / "new" / "out" / "compare.json").exists()


def test_a_process_that_ends_before_it_has_read_what_to_do_is_a_technique_that_failed(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is killed by a token, or for memory, while rows in memory are written to it."""
    from capotune.runs import compare as module

    start = module.subprocess.Popen
    monkeypatch.setattr(module.subprocess, "Popen", lambda _, **how: start([sys.executable, "-c", "exit(3)"], **how))
    rows = [{"text": "the parcel was late " * 40, "label": "ab"[number % 2]} for number in range(400)]
    failed: list[Event] = []
    with pytest.raises(CapotuneError, match="no technique finished"):
        capotune.compare(data=rows, model=str(bert), methods=("lora",), out=tmp_path / "out", report=failed.append)
    (event,) = failed
    assert isinstance(event, Failed)
    assert "code 3" in event.text
    assert tree(tmp_path) == {}


def test_a_token_that_is_cancelled_before_the_work_begins_stops_it(bert: Path, tickets: Path, tmp_path: Path) -> None:
    token = CancelToken()
    token.cancel()
    for work, given in (
        (capotune.train, {"method": "lora", **training(bert, tickets)}),
        (capotune.compare, {"data": str(tickets), "model": str(bert)}),
        (capotune.quantize, {"model": str(bert)}),
    ):
        with pytest.raises(KeyboardInterrupt):
            work(out=tmp_path / "out", cancel=token, **given)
    assert tree(tmp_path) == {}
