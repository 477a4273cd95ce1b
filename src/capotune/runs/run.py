"""One technique from settings to a run folder.

data → base → method attached → training → test score → adapter, run.json
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from capotune.adapters.assemble import Assembled, assemble, attach, hidden_size
from capotune.adapters.fingerprint import config_hash, fingerprint
from capotune.adapters.store import read_adapter, save_adapter
from capotune.data.generation import looks_like_generation
from capotune.device import compute_dtype, environment, peak_memory_bytes, pick_device, reset_peak_memory
from capotune.engine.activation_cache import ActivationCache, default_folder
from capotune.engine.checkpoint import load_checkpoint
from capotune.engine.loop import TrainingState
from capotune.errors import OutputError, SettingError
from capotune.evaluation.pairs import RowCounts
from capotune.files import growing_folder, write_atomic
from capotune.kernels import described, policy
from capotune.methods import Start
from capotune.models.load import find
from capotune.models.stream import bytes_as_steps
from capotune.runs.classification import ClassificationRun
from capotune.runs.generation import GenerationRun
from capotune.runs.task_run import Reporter, TaskRun, Tested
from capotune.settings import MethodSettings, TaskName, TrainSettings

TASKS: dict[TaskName, type[TaskRun]] = {"classification": ClassificationRun, "generation": GenerationRun}
MODELS: dict[TaskName, str] = {"classification": "minilm", "generation": "capo-tiny"}
"""The embedded base of each task."""


def run(
    settings: TrainSettings,
    method: MethodSettings,
    report: Reporter = lambda _: None,
    *,
    resume: bool = False,
    base_score: bool = False,
) -> dict[str, Any]:
    """Train one technique and write its run folder ``settings.out``; returns what ``run.json`` holds.

    ``base_score`` also measures the base without fine-tuning. On a user's error or an interruption before the first
    checkpoint nothing is left behind.

    Raises ``CapotuneError`` subclasses for everything the user can mend.
    """
    out = settings.out
    _check_folder(out, resume)
    state = load_checkpoint(out / "checkpoints") if resume else None
    report({"kind": "stage", "text": "reading data"})
    settings, method, task_run = prepare(settings, method, report)
    record = {
        "settings": settings.model_dump(mode="json"),
        "method": method.method,
        method.method: method.model_dump(mode="json"),
        "data_sha256": task_run.data_sha256,
        "base": {
            "name": task_run.source.name,
            "fingerprint": fingerprint(task_run.source),
            "config": config_hash(task_run.source, with_code=settings.trust_remote_code),
            "packing": str(task_run.source.packing() or "full precision"),
        },
    }
    if resume:
        _same_settings(out, record)
    with growing_folder(out, keep=lambda: any((out / "checkpoints").glob("step-*"))):
        result = _run(settings, method, task_run, record, report, state, base_score)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    report({"kind": "result", **result["result"]})
    return result


def prepare(
    settings: TrainSettings, method: MethodSettings, report: Reporter
) -> tuple[TrainSettings, MethodSettings, TaskRun]:
    """The settings with task, model and all that was left out filled in; the data read, checked and tokenised."""
    task = settings.task
    if task == "auto":
        task = "generation" if looks_like_generation(settings.data, settings.prompt_template) else "classification"
    settings = settings.model_copy(update={"task": task, "model": settings.model or MODELS[task]})
    assert settings.model is not None
    method = method.completed(task, hidden_size(find(settings.model), settings.trust_remote_code))
    return settings, method, TASKS[task](settings, method, report)


def _run(
    settings: TrainSettings,
    method: MethodSettings,
    task_run: TaskRun,
    record: dict[str, Any],
    report: Reporter,
    state: TrainingState | None,
    base_score: bool,
) -> dict[str, Any]:
    reset_peak_memory()
    record["environment"] = environment() | {"kernels": described(pick_device())}
    write_atomic(settings.out / "run.json", _json(record))
    assembled, dtype = _load(settings, method, task_run, report)
    identity = _identity(record, assembled, dtype)
    cache = ActivationCache(default_folder() / "activations" if settings.cache else None, identity)
    base_counts = None
    if base_score:
        report({"kind": "stage", "text": "scoring the base"})
        base = task_run.score_base(assembled, cache, report)
        base_counts = base.counts
        record |= {"base_score": base.score, "base_scores": base.scores, "base_answers": base.predictions}
    cache.reused_seconds, started = 0.0, time.perf_counter()
    assembled = task_run.settle(assembled, report)
    task_run.before_attach(assembled, cache, report)
    _attach(settings, task_run, assembled, cache)
    trainable = assembled.expected_trainable()
    report({"kind": "start", "trainable": trainable, "total": assembled.base_parameters})
    fitted = task_run.fit(settings, assembled, cache, report, state)
    seconds = time.perf_counter() - started + cache.reused_seconds
    report({"kind": "stage", "text": "testing"})
    tested = task_run.test(assembled, cache, report)
    epochs = {"epochs": fitted.epochs, "best_epoch": fitted.best_epoch, "held_out_score": fitted.held_out_score}
    trainable_in_steps = bool(assembled.method.parameters())
    trained = {
        "metric": tested.metric,
        "score": tested.score,
        "interval": tested.interval,
        "scores": tested.scores,
        "intervals": tested.intervals,
        "train_rows": task_run.train_rows,
        "test_rows": tested.rows,
        "train_seconds": seconds,
        "reused_seconds": cache.reused_seconds,
        "forward_rows": cache.forward_rows,
        **epochs,
        **fitted.also,
        "dtype": str(dtype).removeprefix("torch."),
        **(assembled.how_it_reads() if trainable_in_steps or cache.forward_rows else {"sequences": "none were read"}),
        "data_sha256": task_run.data_sha256,
        "adapter": str(settings.out / "adapter"),
    }
    shutil.rmtree(settings.out / "adapter", ignore_errors=True)  # of a run that was killed after writing it
    save_adapter(settings.out / "adapter", assembled, trained)
    _write_predictions(settings.out, tested, base_counts)
    record[method.method] = assembled.method.settings.model_dump(mode="json")
    record["result"] = trained | {
        "trainable_parameters": trainable,
        "total_parameters": assembled.base_parameters,
        "adapter_bytes": read_adapter(settings.out / "adapter").nbytes,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    write_atomic(settings.out / "run.json", _json(record))
    return record


def _load(
    settings: TrainSettings, method: MethodSettings, task_run: TaskRun, report: Reporter
) -> tuple[Assembled, torch.dtype]:
    """The base on the device, in the dtype it computes in."""
    device = pick_device()
    source, packing = task_run.source, task_run.source.packing()
    wide = hidden_size(source, settings.trust_remote_code) >= policy.BF16_HIDDEN_SIZE
    packed = wide and (packing is not None or method.method == "qlora")
    dtype = compute_dtype(device, packed=packed) if task_run.task.name == "generation" else torch.float32
    kept = f", in the 4 bits that it is stored in ({packing})" if packing else ""
    text = f"loading base{kept}, to compute in {str(dtype).removeprefix('torch.')} on {device}"
    report({"kind": "stage", "text": text})
    assembled = assemble(
        source,
        method,
        task_run.task,
        device=device,
        dtype=dtype,
        trust_remote_code=settings.trust_remote_code,
        progress=bytes_as_steps(lambda event: report({**event, "loss": None})),
    )
    return assembled, dtype


def _attach(settings: TrainSettings, task_run: TaskRun, assembled: Assembled, cache: ActivationCache) -> None:
    """Attach the method; where it changes what the base computes, make the cache's identity its own."""
    generator = torch.Generator().manual_seed(settings.seed)
    attach(assembled, Start(generator, task_run.start_tokens(assembled.method.settings)))
    if not assembled.method.identity_at_start:
        start = hashlib.sha256()
        for weight in assembled.method.parameters().values():
            start.update(weight.detach().cpu().numpy().tobytes())
        cache.identity = {**cache.identity, "start": start.hexdigest()}


def _identity(record: dict[str, Any], assembled: Assembled, dtype: torch.dtype) -> dict[str, Any]:
    packing = assembled.method.quantization
    return {
        "base": record["base"]["fingerprint"],
        "config": record["base"]["config"],
        "packing": asdict(packing) if packing else None,
        "device": assembled.model.device.type,
        "dtype": str(dtype),
        "torch": torch.__version__,
        # these decide how sequences are read and what computes the blocks, and so the last bits
        "transformers": record["environment"]["transformers"],
        "kernels": described(assembled.model.device),
    }


def _check_folder(out: Path, resume: bool) -> None:
    """Refuse a folder that holds something else than what is asked for, with what can be done instead."""
    stopped = any((out / "checkpoints").glob("step-*"))
    if out.exists() and not resume:
        go_on = "go on with the run that was stopped there with --resume, or " if stopped else ""
        raise OutputError(f"the output folder {out} exists already: {go_on}choose another --out, or remove it first.")
    if resume and out.exists() and not stopped:
        is_complete = (out / "adapter").exists()
        why = "the run in it is complete" if is_complete else "the run in it was stopped before its first checkpoint"
        raise OutputError(
            f"--resume: no checkpoint in {out / 'checkpoints'}, {why}. Remove {out} or choose another --out, and start "
            "without --resume."
        )


def _same_settings(out: Path, record: dict[str, Any]) -> None:
    try:
        before = json.loads((out / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"--resume: {out / 'run.json'} cannot be read ({error}).") from None
    for part, values in record.items():
        if (there := before.get(part)) != values:
            raise SettingError(
                f"--resume: the settings differ from those in {out / 'run.json'}: {_difference(part, there, values)}. "
                "Give the same data, base and settings, or begin anew with another --out."
            )


def _difference(part: str, there: Any, here: Any) -> str:
    """The first value of a record's part that is another one now."""
    if not (isinstance(there, dict) and isinstance(here, dict)):
        return f"{part} is {here} now and was {there}"
    name = next(name for name in [*here, *there] if there.get(name) != here.get(name))
    return f"{part}.{name} is {here.get(name)} now and was {there.get(name)}"


def _write_predictions(out: Path, tested: Tested, base: RowCounts | None) -> None:
    """``predictions.jsonl``, one line per test row, and ``test_rows.json``, what each adds to the score."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in tested.predictions)
    write_atomic(out / "predictions.jsonl", lines)
    if tested.counts:
        content = tested.counts.to_dict() | ({"base": base.to_dict()} if base else {})
        write_atomic(out / "test_rows.json", json.dumps(content) + "\n")


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
