"""Training that goes wrong: a loss or gradient that is not finite, and memory that runs out."""

from __future__ import annotations

import json
import math
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same_bits, examples, fit, on_base, weights
from torch import nn

import capotune
from capotune.adapters.assemble import Assembled
from capotune.data.batches import epoch_order
from capotune.device import is_out_of_memory
from capotune.engine import loop, skipped
from capotune.engine.optimizer import FlatAdamW
from capotune.engine.skipped import MOST_IN_A_ROW
from capotune.engine.state import TrainingState, start
from capotune.errors import DataError, OutOfMemoryError, SettingError
from capotune.evaluation.forward import Examples
from capotune.events import Event, Warned
from capotune.methods.lora.settings import LoraSettings
from capotune.models.base import find

ROWS = [
    (f"the {word} {label}", label)
    for word in ("parcel", "order", "lamp", "card", "when", "here", "paid", "twice", "refund", "lost")
    for label in ("late", "broken")
]
QUICK: dict[str, Any] = {"rank": 2, "batch_size": 2, "epochs": 2, "target_modules": ("query",)}
CANNOT = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
Spoil = Callable[[Callable[[Examples, np.ndarray], bool]], None]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS), encoding="utf-8")
    return path


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """``spoil(is_bad)``: loss and gradients are NaN where ``is_bad`` is true of the examples and the chosen rows."""
    real = loop.accumulate

    def install(is_bad: Callable[[Examples, np.ndarray], bool]) -> None:
        def accumulate(assembled: Assembled, given: Examples, chosen: np.ndarray, settings: Any) -> torch.Tensor:
            loss = real(assembled, given, chosen, settings)
            if not is_bad(given, chosen):
                return loss
            for weight in assembled.trainable().values():
                if weight.grad is not None:
                    weight.grad.mul_(math.nan)
            return loss * math.nan

        for module in (loop, skipped):
            monkeypatch.setattr(module, "accumulate", accumulate)

    return install


def train(data: Path, base: Path, out: Path, **options: Any) -> tuple[dict[str, Any], list[str]]:
    """The record of a LoRA run and its warnings about training."""
    said: list[str] = []

    def report(event: Event) -> None:
        if isinstance(event, Warned) and ("step" in event.text):
            said.append(event.text)

    given = QUICK | {"data": str(data), "model": str(base), "out": out, "cache": False, "report": report} | options
    return capotune.train("lora", **given), said


@pytest.mark.parametrize("mixed", [False, True])
def test_batches_are_those_that_the_state_says(mixed: bool, spoil: Spoil, bert: Path) -> None:
    assembled = on_base(bert, LoraSettings(epochs=1, batch_size=8, rank=2))
    state = start(assembled, (0.0,), 0)
    assert not state.mixed_lengths  # each text has one label
    state.mixed_lengths = mixed
    seen: list[list[int]] = []
    spoil(lambda _given, chosen: bool(seen.append(chosen.tolist())))
    fit(assembled, state=state)
    lengths = examples(assembled).rows.lengths
    assert seen == [batch.tolist() for batch in epoch_order(lengths, 8, 0, 0, mixed=mixed)]


# ------------------------------------------------------------------------------------------------------ not finite


@pytest.mark.parametrize("fault", ["loss", "gradient", "overflow"])
def test_a_step_that_is_not_finite_changes_nothing(fault: str) -> None:
    own = {key: nn.Parameter(torch.randn(4)) for key in "ab"}

    def give_gradients() -> None:
        for weight in own.values():
            weight.grad = torch.ones(4)

    with FlatAdamW(own, {"a": 0.1, "b": 0.2}, 0.1) as optimizer:
        give_gradients()
        assert bool(optimizer.step(1.0, torch.tensor(1.0)))
        before, moments = {key: weight.detach().clone() for key, weight in own.items()}, optimizer.moments()
        give_gradients()
        if fault != "loss":
            own["b"].grad[2] = math.nan if fault == "gradient" else 1e30  # type: ignore[index]
        assert not bool(optimizer.step(1.0, torch.tensor(math.inf if fault == "loss" else 1.0)))
        assert_same_bits(before, {key: weight.detach() for key, weight in own.items()})
        for key, one in optimizer.moments().items():
            assert_same_bits(moments[key], one)


def test_a_skipped_step_is_counted_said_once_and_not_in_the_mean(
    spoil: Spoil, bert: Path, data: Path, tmp_path: Path
) -> None:
    bad: set[int] = set()
    in_the_second: list[int] = []

    def is_bad(given: Examples, chosen: np.ndarray) -> bool:
        if not bad:
            first, second = (epoch_order(given.rows.lengths, QUICK["batch_size"], 0, epoch) for epoch in (0, 1))
            bad.add(int(first[2][0]))
            in_the_second.extend(at for at, batch in enumerate(second, start=1) if bad & set(batch.tolist()))
        return bool(bad & set(chosen.tolist()))

    spoil(is_bad)
    record, said = train(data, bert, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step" in line]
    assert (steps[2]["step"], steps[2]["loss"], steps[2]["skipped"]) == (3, None, True)
    half = len(steps) // 2
    (place,) = in_the_second
    assert [line["step"] for line in steps if "skipped" in line] == [3, half + place]
    assert record["result"]["skipped_steps"] == 2  # the row comes up once an epoch
    assert said == [
        "step 3 is skipped: its loss or gradient is not finite. The weights stay as they were.",
        f"2 of {len(steps)} steps were skipped.",
    ]
    for epoch, part in zip((one for one in lines if "epoch" in one), (steps[:half], steps[half:]), strict=True):
        losses = [step["loss"] for step in part if "skipped" not in step]
        assert len(losses) == half - 1
        assert epoch["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-12)


def test_training_goes_on_from_a_skipped_step_to_the_same_bits(spoil: Spoil, bert: Path) -> None:
    assembled = on_base(bert, LoraSettings(epochs=1, batch_size=8, rank=2, dropout=0.2))
    wrong = epoch_order(examples(assembled).rows.lengths, 8, 0, 0)[1]
    spoil(lambda _given, chosen: bool(np.array_equal(chosen, wrong)))
    seen: list[dict[str, torch.Tensor]] = []
    whole, _ = fit(assembled, on_step=lambda *_: bool(seen.append(weights(assembled))))
    assert_same_bits(seen[0], seen[1])
    assert any(not torch.equal(seen[1][key], seen[2][key]) for key in seen[1])
    again = on_base(bert, LoraSettings(epochs=1, batch_size=8, rank=2, dropout=0.2))
    state, _ = fit(again, on_step=lambda state, *_: state.step == 2)
    assert (state.skipped, state.skipped_in_epoch, state.skipped_in_a_row) == (1, 1, 1)
    state, _ = fit(again, state=state)
    assert_same_bits(weights(again), weights(assembled))
    assert (state.skipped, state.skipped_in_a_row) == (whole.skipped, 0) == (1, 0)


def test_rows_at_fault_are_named_and_training_can_go_on_after_them(
    spoil: Spoil, bert: Path, data: Path, tmp_path: Path
) -> None:
    bad: dict[int, list[int]] = {}

    def is_bad(given: Examples, chosen: np.ndarray) -> bool:
        if not bad:
            order = epoch_order(given.rows.lengths, QUICK["batch_size"], 0, 0)
            bad.update({int(batch[0]): given.rows.sequences[batch[0]] for batch in order[1 : 1 + MOST_IN_A_ROW]})
        return bool(bad.keys() & set(chosen.tolist()))

    spoil(is_bad)
    with pytest.raises(DataError, match="start anew, or go on after them with `resume`") as caught:
        train(data, bert, tmp_path / "run", epochs=1, validation_fraction=0.1)
    named = [int(line) for line in re.findall(r"rows\.csv:(\d+)", str(caught.value))]
    assert "5 steps in a row were skipped, the last is step 6." in str(caught.value)
    assert len(named) == MOST_IN_A_ROW
    tokenized = find(str(bert)).tokenizer([ROWS[line - 2][0] for line in named])["input_ids"]
    assert sorted(tokenized) == sorted(bad.values())
    record = capotune.resume(tmp_path / "run")
    assert record["result"]["skipped_steps"] == MOST_IN_A_ROW


def test_weights_that_have_diverged_are_told_from_rows_at_fault(
    spoil: Spoil, bert: Path, data: Path, tmp_path: Path
) -> None:
    spoil(lambda *_: True)
    for batch_size, many in ((2, 5), (6, 3)):  # the second has three steps in all
        words = rf"the loss is nan, and training diverged: {many} steps in a row .* Lower `learning_rate`"
        with pytest.raises(SettingError, match=words):
            train(data, bert, tmp_path / "run", batch_size=batch_size, epochs=1)
        assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------ out of memory


@pytest.fixture
def little_memory() -> Iterator[None]:
    """No more than 256 MiB more for this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**28, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux how much memory a process has")
@pytest.mark.parametrize("allocate", [bytearray, torch.empty, np.ones])
@pytest.mark.usefixtures("little_memory")
def test_memory_that_runs_out_is_recognised(allocate: Callable[[int], Any]) -> None:
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        allocate(2**31)
    assert is_out_of_memory(caught.value)


def test_other_errors_are_not_memory_that_ran_out() -> None:
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), OSError(28, "No space left on device")):
        assert not is_out_of_memory(error)


@pytest.fixture
def room_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """``room_for(tokens)``: larger parts do not fit; the sizes of those that were tried."""

    def install(most: int) -> list[int]:
        tried: list[int] = []
        real = loop.batch_of

        def batch_of(assembled: Assembled, given: Examples, chosen: np.ndarray, give: Any) -> Any:
            tried.append(len(chosen) * max(given.rows.lengths[row] for row in chosen))
            if tried[-1] > most:
                raise RuntimeError(CANNOT)
            return real(assembled, given, chosen, give)

        monkeypatch.setattr(loop, "batch_of", batch_of)
        return tried

    return install


def gradients(assembled: Assembled, state: TrainingState, **settings: Any) -> dict[str, torch.Tensor]:
    given, chosen = examples(assembled), np.arange(48)
    own = assembled.method.settings.model_copy(update=settings)
    with assembled.reading():
        loop._accumulate_in_memory(assembled, given, chosen, own, state)
    found = {key: one.grad for key, one in assembled.trainable().items() if one.grad is not None}
    for weight in assembled.trainable().values():
        weight.grad = None
    return found


@pytest.mark.usefixtures("all_bits")
def test_a_smaller_micro_batch_gives_the_same_gradient(bert: Path, room_for: Callable[[int], list[int]]) -> None:
    assembled = on_base(bert, LoraSettings(rank=2))
    expected, state = gradients(assembled, TrainingState()), TrainingState()
    tried = room_for(100)  # shorter rows fit: it runs out in the middle of the step
    found = gradients(assembled, state, auto_micro_batch=True, micro_batch_tokens=300)
    assert min(tried) <= 100 < max(tried)
    assert state.micro_batch_tokens is not None
    assert state.micro_batch_tokens <= 100
    assert found.keys() == expected.keys()
    for key, one in found.items():
        torch.testing.assert_close(one, expected[key], rtol=1e-5, atol=1e-5 * float(expected[key].abs().max()))


def test_a_run_goes_on_with_a_smaller_micro_batch_and_records_it(
    bert: Path, data: Path, tmp_path: Path, room_for: Callable[[int], list[int]]
) -> None:
    room_for(16)
    record, said = train(data, bert, tmp_path / "run", auto_micro_batch=True, batch_size=8, dropout=0.1)
    tokens = record["result"]["micro_batch_tokens"]
    assert tokens <= 20
    assert said == [
        f"memory ran out at step 1: from there on {tokens} tokens at a time, at the same batch and gradient."
    ]
    again, _ = train(data, bert, tmp_path / "again", auto_micro_batch=True, batch_size=8, dropout=0.1)
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("run", "again")]
    assert logs[0] == logs[1]
    assert again["result"]["score"] == record["result"]["score"]


def test_what_to_lower_is_said_with_what_helps_most_first(
    bert: Path, data: Path, tmp_path: Path, room_for: Callable[[int], list[int]]
) -> None:
    room_for(3)
    with pytest.raises(
        OutOfMemoryError, match=r"^memory ran out in training \([\d.]+ .B were in use at most\)\."
    ) as caught:
        train(data, bert, tmp_path / "run")
    advice = [
        "gradient_checkpointing=True",
        "micro_batch_tokens=2048` (now 4,096)",
        "auto_micro_batch",
        "qlora",
        "a smaller",
    ]
    places = [str(caught.value).index(one) for one in advice]
    assert places == sorted(places)
    assert not (tmp_path / "run").exists()
    options: dict[str, Any] = {"gradient_checkpointing": True, "micro_batch_tokens": 8, "auto_micro_batch": True}
    with pytest.raises(OutOfMemoryError) as caught:  # not even one row fits
        train(data, bert, tmp_path / "run", **options)
    assert "`max_length=32` (now 64)" in str(caught.value)
    assert "micro_batch" not in str(caught.value)
    assert "checkpointing" not in str(caught.value)
