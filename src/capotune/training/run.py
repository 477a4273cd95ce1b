"""One technique from settings to a run folder.

    data → base → method attached → head solved → training → test score → adapter, run.json

``python -m capotune.training.run`` does the same in a process of its own, for ``compare``: each technique's peak memory
is then its own. It reads one JSON object of settings and writes one JSON object per event.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from capotune.adapters.assemble import Assembled, assemble, attach
from capotune.adapters.fingerprint import fingerprint
from capotune.adapters.store import read_adapter, save_adapter
from capotune.config import MethodSettings, TrainSettings, build, method_class
from capotune.data.batches import Rows
from capotune.device import environment, peak_memory_bytes, pick_device, reset_peak_memory
from capotune.errors import CapotuneError, OutputError, SettingError
from capotune.evaluation.metrics import classification_scores
from capotune.files import growing_folder, write_atomic
from capotune.methods import Start
from capotune.training.activation_cache import ActivationCache, default_folder
from capotune.training.checkpoint import load_checkpoint
from capotune.training.fit import fit_method, score_of_base, start_features, test_logits
from capotune.training.loop import Examples, TrainingState
from capotune.training.prepare import Event, Prepared, Reporter, data_hash, prepare, start_tokens


def run(
    settings: TrainSettings,
    method: MethodSettings,
    report: Reporter = lambda _: None,
    *,
    resume: bool = False,
    base_score: bool = False,
) -> dict[str, Any]:
    """Train one technique and write its run folder ``settings.out``; returns what ``run.json`` holds.

    ``base_score`` also measures the base without fine-tuning: nearest class mean on frozen features. On a user's error
    or an interruption before the first checkpoint nothing is left behind.

    Raises ``CapotuneError`` subclasses for everything the user can mend.
    """
    out = settings.out
    if out.exists() and not resume:
        raise OutputError(f"the output folder {out} exists already: choose another --out, or remove it first.")
    state = load_checkpoint(out / "checkpoints") if resume else None
    record = {
        "settings": settings.model_dump(mode="json"),
        "method": method.method,
        method.method: method.model_dump(mode="json"),
    }
    if resume:
        _same_settings(out, record)
    report({"kind": "stage", "text": "reading data"})
    prepared = prepare(settings, method, report)
    with growing_folder(out, keep=lambda: any((out / "checkpoints").glob("step-*"))):
        result = _run(settings, method, prepared, record, report, state, base_score)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    report({"kind": "result", **result["result"]})
    return result


def _run(
    settings: TrainSettings,
    method: MethodSettings,
    prepared: Prepared,
    record: dict[str, Any],
    report: Reporter,
    state: TrainingState | None,
    base_score: bool,
) -> dict[str, Any]:
    report({"kind": "stage", "text": "loading base"})
    reset_peak_memory()
    record |= {
        "environment": environment(),
        "base": {"name": prepared.source.name, "fingerprint": fingerprint(prepared.source)},
    }
    write_atomic(settings.out / "run.json", _json(record))
    assembled = assemble(
        prepared.source, method, prepared.task, device=pick_device(), trust_remote_code=settings.trust_remote_code
    )
    cache = ActivationCache(default_folder() / "activations" if settings.cache else None, _identity(record, assembled))
    if base_score:
        report({"kind": "stage", "text": "scoring the base"})
        record["base_score"] = score_of_base(assembled, prepared, cache)
    cache.reused_seconds, started = 0.0, time.perf_counter()
    # before the method is on: what it leaves equal must be equal to the bit, whoever filled the cache
    features = start_features(prepared, assembled, cache, report) if assembled.method.identity_at_start else None
    prepared = _attach(settings, prepared, assembled, cache)
    if features is None:
        features = start_features(prepared, assembled, cache, report)
    trainable = assembled.expected_trainable()
    report({"kind": "start", "trainable": trainable, "total": assembled.base_parameters})
    fitted = fit_method(settings, prepared, assembled, features, cache, report, state)
    seconds = time.perf_counter() - started + cache.reused_seconds
    report({"kind": "stage", "text": "testing"})
    logits = test_logits(assembled, prepared, cache)
    scores = classification_scores(logits, prepared.test.targets) if len(logits) else None
    trained = {
        "score": scores and scores.accuracy,
        "macro_f1": scores and scores.macro_f1,
        "test_loss": scores and scores.loss,
        "train_rows": len(prepared.data.train),
        "test_rows": len(logits),
        "train_seconds": seconds,
        "reused_seconds": cache.reused_seconds,
        "forward_rows": cache.forward_rows,
        **asdict(fitted),
        "data_sha256": data_hash(prepared.data),
        "adapter": str(settings.out / "adapter"),
    }
    shutil.rmtree(settings.out / "adapter", ignore_errors=True)  # of a run that was killed after writing it
    save_adapter(settings.out / "adapter", assembled, trained)
    _write_predictions(settings.out / "predictions.jsonl", prepared, logits)
    record["result"] = trained | {
        "trainable_parameters": trainable,
        "total_parameters": assembled.base_parameters,
        "adapter_bytes": read_adapter(settings.out / "adapter").nbytes,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    write_atomic(settings.out / "run.json", _json(record))
    return record


def _attach(settings: TrainSettings, prepared: Prepared, assembled: Assembled, cache: ActivationCache) -> Prepared:
    """Attach the method; its virtual tokens, if any, go before every row, and make the cache's identity their own."""
    generator = torch.Generator().manual_seed(settings.seed)
    attach(assembled, Start(generator, start_tokens(assembled.method.settings, prepared)))
    virtual = assembled.method.virtual_token_ids
    if not assembled.method.identity_at_start:
        start = hashlib.sha256()
        for weight in assembled.method.parameters().values():
            start.update(weight.detach().cpu().numpy().tobytes())
        cache.identity = {**cache.identity, "start": start.hexdigest()}

    def prefixed(examples: Examples) -> Examples:
        return Examples(Rows(examples.rows.sequences, examples.rows.pad_id, virtual), examples.targets)

    return Prepared(
        prepared.data,
        prepared.source,
        prepared.task,
        prefixed(prepared.train),
        prefixed(prepared.test),
        prepared.fit_rows,
        prepared.held_rows,
    )


def _identity(record: dict[str, Any], assembled: Assembled) -> dict[str, Any]:
    packing = assembled.method.quantization
    device = assembled.model.classifier.weight.device.type
    return {"base": record["base"]["fingerprint"], "packing": asdict(packing) if packing else None, "device": device}


def _same_settings(out: Path, record: dict[str, Any]) -> None:
    try:
        before = json.loads((out / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"--resume: {out / 'run.json'} cannot be read ({error}).") from None
    for part, values in record.items():
        if before.get(part) != values:
            raise SettingError(
                f"--resume: the settings differ from those in {out / 'run.json'} ('{part}'). Give the same."
            )


def _write_predictions(path: Path, prepared: Prepared, logits: torch.Tensor) -> None:
    """One line per test row: text, label, predicted, probability."""
    probabilities, predicted = logits.softmax(1).max(1)
    labels, test = prepared.task.labels, prepared.data.test
    rows = zip(test.texts, test.labels, predicted.tolist(), probabilities.tolist(), strict=True)
    lines = [
        json.dumps(
            {"text": text, "label": label, "predicted": labels[number], "probability": round(p, 6)}, ensure_ascii=False
        )
        for text, label, number, p in rows
    ]
    write_atomic(path, "\n".join(lines) + "\n")


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def main() -> int:
    """The process of one technique: settings on standard input, events on standard output."""
    events, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix with the events

    def report(event: Event) -> None:
        print(json.dumps(event), file=events, flush=True)

    request = json.load(sys.stdin)
    try:
        method = build(method_class(request["method"]), request["method_settings"])
        run(build(TrainSettings, request["settings"]), method, report, base_score=request["base_score"])
    except CapotuneError as error:
        report({"kind": "error", "text": str(error)})
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
