"""One technique from settings to a run folder.

data → base → method attached → training → test score → adapter, run.json

Nothing in the folder knows where the folder is: it can be moved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from capotune import tasks
from capotune.adapters.assemble import Assembled, assemble, attach
from capotune.adapters.fingerprint import config_hash, fingerprint
from capotune.adapters.store import read_adapter, save_adapter
from capotune.device import peak_memory_bytes, pick_device, reset_peak_memory
from capotune.engine.activation_cache import ActivationCache
from capotune.engine.recorded import Clock, Recording
from capotune.engine.state import TrainingState
from capotune.events import Finished, Reporter, Stage, TrainingStarted, Warned, alive, bytes_as_progress, ignore
from capotune.files import check_there, growing_folder, remove_folder, write_atomic
from capotune.interval import interval
from capotune.methods import make
from capotune.methods.base import Start
from capotune.models.base import EMBEDDED, Base, embedded_file, find
from capotune.run_folder import RUN, as_json, check_nothing_there, is_worth_keeping, tidy
from capotune.runs.cached import activation_cache
from capotune.runs.circumstances import circumstances, gone_on, now, settings_from
from capotune.runs.memory import telling_what_to_lower
from capotune.settings import Context, TrainingSettings, TrainSettings
from capotune.tasks.base import Fitted, Scored, Task, TaskRun
from capotune.tasks.golden import golden_answers

SCORES_BASE = "scores_base"
"""In the record: whether the run also measures the base without fine-tuning."""
_NOT_RECORDED = {"out"}  # a folder does not know where it is


@dataclass(frozen=True)
class Prepared:
    """A run before its base is loaded: every setting resolved, the data read, checked and tokenised."""

    settings: TrainSettings
    method: TrainingSettings
    base: Base
    task_run: TaskRun
    stored_states: bool | None = None
    """Of a run that is gone on with or made again, whether its steps began above the frozen layers."""


def run(
    settings: TrainSettings,
    method: TrainingSettings,
    report: Reporter = ignore,
    *,
    base_score: bool = False,
    given: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Train one technique and write its run folder ``settings.out``; returns what ``run.json`` holds.

    ``base_score`` also measures the base without fine-tuning. ``given`` says for the record where settings that are no
    defaults came from, by their names (``flag``, ``file``, ``argument``). On a user's error or an interruption before
    the first checkpoint nothing is left behind; after it, ``runs.resume`` goes on.

    Raises ``CapotuneError`` subclasses for everything the user can mend.
    """
    out = settings.out
    check_nothing_there(out)
    report(Stage(text="reading data"))
    prepared = prepare(settings, method, report)
    record = record_of(prepared, base_score, report)
    record |= {"started": now(), "settings_from": settings_from(settings, method, given or {})}
    with growing_folder(out, {RUN: as_json(record)}, keep=lambda: is_worth_keeping(out)):
        return complete(prepared, record, None, report)


def complete(
    prepared: Prepared, record: dict[str, Any], state: TrainingState | None, report: Reporter
) -> dict[str, Any]:
    """From a run folder that holds ``record``, and maybe the checkpoint ``state``, to one with the result."""
    with telling_what_to_lower(prepared.method, prepared.base, "before training or after it"):
        record = _Run(prepared, record, report).finish(state)
    tidy(prepared.settings.out)
    report(Finished(result=record["result"]))
    return record


def prepare(settings: TrainSettings, method: TrainingSettings, report: Reporter) -> Prepared:
    """Resolve what was left out of the settings, find the base, and read the data for it."""
    settings, task, base, context = found(settings, report)
    task_run = task.prepare(settings, method.completed(context), base, report)
    context = replace(context, train_rows=task_run.train_rows, few_rows=task_run.few_rows)
    return Prepared(settings, method.completed(context), base, task_run)


def inspect(settings: TrainSettings, method: TrainingSettings, report: Reporter) -> None:
    """Read and check the data and report on it, as ``prepare`` does; nothing more is to come."""
    settings, task, base, context = found(settings, report)
    task.inspect(settings, method.completed(context), base, report)


def found(settings: TrainSettings, report: Reporter) -> tuple[TrainSettings, type[Task], Base, Context]:
    """The settings with task and base filled in, both of them, and what the defaults of a method depend on."""
    settings = resolve(settings, report)
    task = tasks.recognise(settings)
    assert settings.model is not None
    base = find(settings.model, trust_remote_code=settings.trust_remote_code, report=report)
    return settings, task, base, Context(base.hidden_size, task.has_head)


def resolve(settings: TrainSettings, report: Reporter) -> TrainSettings:
    """The settings with the task that the data is for and a base. ``SettingError`` for one that the task lacks."""
    task = tasks.recognise(settings)
    task.check_settings(settings.model_dump(), str(settings.data))
    left_out = {
        "task": task.name,
        "model": settings.model or _default(task, report),
        "validation_fraction": settings.validation_fraction or task.validation_fraction,
    }
    return settings.model_copy(update=left_out)


def _default(task: type[Task], report: Reporter) -> str:
    """The base where none is named; says so when a better one is not installed."""
    best, last = task.default_models[0], task.default_models[-1]
    chosen = next((name for name in task.default_models if embedded_file(name) is not None), last)
    if chosen != best:
        command = EMBEDDED[best].command
        report(Warned(text=f"the model is {chosen}; {best} writes better, and is not installed. Run: {command}"))
    return chosen


class _Run:
    """The part of a run that needs the loaded base."""

    def __init__(self, prepared: Prepared, record: dict[str, Any], report: Reporter) -> None:
        self.settings, self.method, self.base = prepared.settings, prepared.method, prepared.base
        self.task_run, self.record, self.report = prepared.task_run, record, report
        self.stored_states = prepared.stored_states

    def finish(self, state: TrainingState | None) -> dict[str, Any]:
        """Everything from loading the base to the last file."""
        reset_peak_memory()
        device = pick_device()
        here = circumstances(device)
        self.record |= here if state is None else gone_on(self.record, here, state.step, self.report)
        write_atomic(self.settings.out / RUN, as_json(self.record))
        assembled, dtype = self._load(device)
        cache = self._cache(assembled, dtype)
        base = self._score_base(assembled, cache) if self.record[SCORES_BASE] else None
        self.task_run.measure_base(assembled, self._cache(assembled, dtype), self.report)
        clock = Clock(cache)
        assembled = self.task_run.choose_prompt(assembled, self.report)
        self.task_run.before_attach(assembled, cache, self.report)
        self._attach(assembled, cache)
        trainable = assembled.expected_trainable()
        self.report(TrainingStarted(trainable=trainable, total=assembled.base_parameters))
        recording = Recording(self.settings.out, clock, interval(self.settings.save_every), state)
        with telling_what_to_lower(assembled.method.settings, self.base, "in training", assembled):
            fitted = self.task_run.fit(recording, assembled, cache, self.report)
            assembled = self.task_run.decide(assembled, cache, self.report)
        seconds = clock.seconds()
        self.report(Stage(text="testing"))
        scored = self.task_run.test(assembled, cache, self.report)
        trained = self._trained(assembled, cache, fitted, scored, seconds, dtype)
        return self._write(assembled, trained, trainable, scored, base)

    def _load(self, device: torch.device) -> tuple[Assembled, torch.dtype]:
        """The base on the device, in the dtype it computes in."""
        stored, task = self.base.quantization, self.task_run.task
        quantized = stored is not None or make(self.method).quantization is not None
        dtype = task.compute_dtype(device, quantized)
        how = f", in the 4 bits that it is stored in ({stored})" if stored else ""
        self.report(Stage(text=f"loading base{how}, to compute in {_name(dtype)} on {device}"))
        progress = bytes_as_progress(self.report)
        return assemble(task, self.method, device=device, dtype=dtype, progress=progress), dtype

    def _cache(self, assembled: Assembled, dtype: torch.dtype) -> ActivationCache:
        return activation_cache(
            self.settings, self.record["base"], assembled, dtype, self.report, stores=self.stored_states
        )

    def _score_base(self, assembled: Assembled, cache: ActivationCache) -> Scored:
        self.report(Stage(text="scoring the base"))
        base = self.task_run.score_base(assembled, cache, self.report)
        self.record |= {"base_score": base.score, "base_scores": base.scores, "base_answers": base.predictions}
        return base

    def _attach(self, assembled: Assembled, cache: ActivationCache) -> None:
        """Attach the method; where it changes what the base computes, make the cache's identity its own."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        attach(assembled, Start(generator, self.task_run.start_tokens(assembled.method.settings)))
        for text in assembled.method.notices():
            self.report(Warned(text=text))
        if not assembled.method.identity_at_start:
            start = hashlib.sha256()
            for weight in assembled.method.parameters().values():
                start.update(weight.detach().cpu().numpy().tobytes())
            cache.identity = {**cache.identity, "start": start.hexdigest()}

    def _trained(
        self,
        assembled: Assembled,
        cache: ActivationCache,
        fitted: Fitted,
        scored: Scored,
        seconds: float,
        dtype: torch.dtype,
    ) -> dict[str, Any]:
        """How it was trained and how it scored, for the run's record and the adapter's."""
        read = assembled.how_it_reads() if assembled.method.parameters() or cache.forward_rows else None
        return {
            "metric": scored.metric,
            "score": scored.score,
            "interval": scored.interval,
            "scores": scored.scores,
            "intervals": scored.intervals,
            "train_rows": self.task_run.train_rows,
            "test_rows": scored.rows,
            "train_seconds": seconds,
            "reused_seconds": cache.reused_seconds,
            "forward_rows": cache.forward_rows,
            "epochs": fitted.epochs,
            "best_epoch": fitted.best_epoch,
            "held_out_score": fitted.held_out_score,
            "held_out_metric": assembled.task.objective.metric,
            **fitted.extra,
            **scored.recorded,
            "dtype": _name(dtype),
            **(read or {"sequences": "none were read"}),
            "data_sha256": self.task_run.data_sha256,
        }

    def _write(
        self, assembled: Assembled, trained: dict[str, Any], trainable: int, scored: Scored, base: Scored | None
    ) -> dict[str, Any]:
        out, record = self.settings.out, self.record
        check_there(out)
        remove_folder(out / "adapter")  # of a run that was killed after writing it
        save_adapter(out / "adapter", assembled, trained, golden_answers(assembled))
        _write_scored(out, scored, base)
        record[self.method.method] = assembled.method.settings.model_dump(mode="json")
        record["result"] = trained | {
            "trainable_parameters": trainable,
            "total_parameters": assembled.base_parameters,
            "adapter_bytes": read_adapter(out / "adapter").nbytes,
            "peak_memory_bytes": peak_memory_bytes(),
            "adapter": "adapter",
        }
        write_atomic(out / RUN, as_json(record))
        return record


def _write_scored(out: Path, scored: Scored, base: Scored | None) -> None:
    """``predictions.jsonl``, one line per test row, and ``test_rows.json``, what each adds to the compared score and to
    ``others``; the same of the base, where it was scored."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in scored.predictions)
    write_atomic(out / "predictions.jsonl", "".join(lines))
    if scored.counts is not None:
        of_base = {"base": _counts(base)} if base and base.counts else {}
        write_atomic(out / "test_rows.json", json.dumps(_counts(scored) | of_base) + "\n")


def _counts(scored: Scored) -> dict[str, Any]:
    assert scored.counts is not None
    others = {"others": [one.to_dict() for one in scored.other_counts]} if scored.other_counts else {}
    return scored.counts.to_dict() | others


def record_of(prepared: Prepared, base_score: bool, report: Reporter) -> dict[str, Any]:
    """What decides the run's result."""
    base, method = prepared.base, prepared.method
    return {
        "settings": prepared.settings.model_dump(mode="json", exclude=_NOT_RECORDED),
        "method": method.method,
        method.method: method.model_dump(mode="json"),
        SCORES_BASE: base_score,
        "data_sha256": prepared.task_run.data_sha256,
        "files_sha256": dict(prepared.task_run.files_sha256),
        "base": base_record(base, report),
    }


def base_record(base: Base, report: Reporter) -> dict[str, str]:
    """Which base it is, by content."""
    return {
        "name": base.name,
        "fingerprint": fingerprint(base, alive(report)),
        "config": config_hash(base),
        "quantization": str(base.quantization or "full precision"),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
