"""One technique from settings to a run folder.

    data → base → method attached → head solved → training → test score → adapter, run.json

``python -m capotune.training.run`` does the same in a process of its own, for ``compare``: each technique's peak memory
is then its own. It reads one JSON object of settings and writes one JSON object per event.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from capotune.adapters.assemble import Assembled, assemble, attach, classification_task, readable_layers
from capotune.adapters.fingerprint import fingerprint
from capotune.adapters.store import read_adapter, save_adapter
from capotune.config import MethodSettings, PromptTuningSettings, TrainSettings, build, method_class
from capotune.data.batches import Rows
from capotune.data.labelled import LabelledData, hold_out, load_labelled, normalised
from capotune.data.report import inspect_data
from capotune.device import environment, peak_memory_bytes, pick_device, reset_peak_memory
from capotune.errors import CapotuneError, ModelError, OutputError, SettingError
from capotune.evaluation.metrics import classification_scores, nearest_mean_logits
from capotune.files import growing_folder, write_atomic
from capotune.methods import Start
from capotune.models.load import Source, find, pooling
from capotune.tasks.classification import Classification
from capotune.training.activation_cache import ActivationCache, default_folder
from capotune.training.checkpoint import load_checkpoint, save_checkpoint
from capotune.training.linear_head import LinearHead, choose_regularization, solve
from capotune.training.loop import Examples, TrainingState, finished, predict_logits, start, train

MOST_HELD_OUT = 500
_CHECKPOINT_SECONDS = 300.0
_EASY_START = 30.0  # times the best λ: a head that knows the rows by heart leaves the method nothing to learn

Event = dict[str, Any]
"""``kind`` and its values: stage(text), data(report), start(trainable, total), step(step, total, loss),
epoch(epoch, loss, score), result(…)."""
Reporter = Callable[[Event], None]


@dataclass(frozen=True)
class Prepared:
    """Data and task, tokenised and split."""

    data: LabelledData
    source: Source
    task: Classification
    train: Examples
    test: Examples
    fit_rows: torch.Tensor
    """Training rows that weights are fitted to."""
    held_rows: torch.Tensor
    """Training rows held out to choose the regularisation and when to stop."""

    def subset(self, rows: torch.Tensor) -> Examples:
        """Some of the training rows."""
        tokens = self.train.rows
        chosen = Rows([tokens.sequences[row] for row in rows.tolist()], tokens.pad_id, tokens.prefix)
        return Examples(chosen, self.train.targets[rows])


@dataclass(frozen=True)
class Fitted:
    """What training reports about itself."""

    epochs: float
    best_epoch: int
    regularization: float
    held_out_score: float | None


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


def prepare(settings: TrainSettings, method: MethodSettings, report: Reporter) -> Prepared:
    """Read and check the data, tokenise it for the base, hold rows out, and report what was found."""
    data = load_labelled(
        settings.data,
        test=settings.test,
        text_column=settings.text_column,
        label_column=settings.label_column,
        test_fraction=settings.test_fraction,
        seed=settings.seed,
    )
    source = find(settings.model)
    virtual = method.num_virtual_tokens if isinstance(method, PromptTuningSettings) else 0
    task = classification_task(
        source, tuple(data.label_names), pooling(source), settings.max_length, virtual, settings.trust_remote_code
    )
    lengths = task.token_lengths(data.train.texts), task.token_lengths(data.test.texts)
    report({"kind": "data", "report": asdict(inspect_data(data, *lengths, task.max_length))})
    train_targets = task.targets(data.train.labels)
    fraction = min(settings.validation_fraction, MOST_HELD_OUT / len(train_targets))
    groups = [normalised(text) for text in data.train.texts]  # equal texts must not stand on both sides
    fit, held = hold_out(train_targets.tolist(), fraction, settings.seed, groups)
    return Prepared(
        data,
        source,
        task,
        Examples(Rows(task.encode(data.train.texts), task.pad_id), train_targets),
        Examples(Rows(task.encode(data.test.texts), task.pad_id), task.targets(data.test.labels)),
        torch.as_tensor(fit),
        torch.as_tensor(held),
    )


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
        record["base_score"] = _base_score(assembled, prepared, cache)
    cache.reused_seconds, started = 0.0, time.perf_counter()
    # before the method is on: what it leaves equal must be equal to the bit, whoever filled the cache
    features = _features(prepared, assembled, cache, report) if assembled.method.identity_at_start else None
    prepared = _attach(settings, prepared, assembled, cache)
    if features is None:
        features = _features(prepared, assembled, cache, report)
    trainable = assembled.expected_trainable()
    report({"kind": "start", "trainable": trainable, "total": assembled.base_parameters})
    fitted = _fit(settings, prepared, assembled, features, cache, report, state)
    seconds = time.perf_counter() - started + cache.reused_seconds
    report({"kind": "stage", "text": "testing"})
    logits = _test_logits(assembled, prepared, cache)
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
        "data_sha256": _data_hash(prepared.data),
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
    attach(assembled, Start(generator, _start_tokens(assembled.method.settings, prepared)))
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


def _features(prepared: Prepared, assembled: Assembled, cache: ActivationCache, report: Reporter) -> torch.Tensor:
    """The training rows' features, for solving the head."""
    report({"kind": "stage", "text": "computing features"})
    features = _pooled(assembled, prepared.train.rows, cache, _progress(report))
    if not features.isfinite().all():
        raise ModelError(f"--model {prepared.source.name}: it computes infinite values or NaN. Are its weights whole?")
    return features


def _fit(
    settings: TrainSettings,
    prepared: Prepared,
    assembled: Assembled,
    features: torch.Tensor,
    cache: ActivationCache,
    report: Reporter,
    state: TrainingState | None,
) -> Fitted:
    """Solve the head on what the start model computes; then train in steps when the method has weights of its own."""
    report({"kind": "stage", "text": "solving the head"})
    fit, held, targets = prepared.fit_rows, prepared.held_rows, prepared.train.targets
    labels = len(prepared.task.labels)
    head, regularization = choose_regularization(features[fit], targets[fit], features[held], targets[held], labels)
    if not assembled.method.parameters():
        held_score = float((head.logits(features[held]).argmax(1) == targets[held]).float().mean())
        _set_head(assembled, solve(features, targets, labels, regularization))
        return Fitted(1.0, 1, regularization, held_score)
    _set_head(assembled, head)
    unfinished = solve(features[fit], targets[fit], labels, _EASY_START * regularization)
    del features
    state = _train(settings, prepared, assembled, unfinished, cache, report, state)
    return Fitted(float(state.epoch), state.best_epoch, regularization, state.best_score[0])


def _train(
    settings: TrainSettings,
    prepared: Prepared,
    assembled: Assembled,
    unfinished: LinearHead,
    cache: ActivationCache,
    report: Reporter,
    state: TrainingState | None,
) -> TrainingState:
    """Train in steps from the ``unfinished`` head; the solved one, in the model now, is the best so far."""
    report({"kind": "stage", "text": "training"})
    fit, held = (
        _with_boundary(prepared.subset(rows), assembled, cache) for rows in (prepared.fit_rows, prepared.held_rows)
    )
    if state is None:
        state = start(assembled, held, settings.seed)
        _set_head(assembled, unfinished)
    checkpoints, saved = settings.out / "checkpoints", time.monotonic()
    log = _open_log(settings.out / "metrics.jsonl", state)

    def on_step(state: TrainingState, total: int, loss: float) -> bool:
        report({"kind": "step", "step": state.step, "total": total, "loss": loss})
        log.write(json.dumps({"step": state.step, "loss": loss}) + "\n")
        if not math.isfinite(loss):
            raise SettingError(f"the loss is {loss} at step {state.step}: training diverged. Lower --learning-rate.")
        return time.monotonic() - saved > _CHECKPOINT_SECONDS

    def on_epoch(state: TrainingState, loss: float, score: float) -> None:
        report({"kind": "epoch", "epoch": state.epoch, "loss": loss, "score": score})
        log.write(json.dumps({"epoch": state.epoch, "loss": loss, "held_out_score": score}) + "\n")
        log.flush()  # the log is never behind the checkpoint
        save_checkpoint(checkpoints, state)

    method = assembled.method.settings
    with log:
        while True:
            state = train(
                assembled, fit, held, method, seed=settings.seed, state=state, on_step=on_step, on_epoch=on_epoch
            )
            if finished(state, method):
                return state
            log.flush()
            save_checkpoint(checkpoints, state)  # the loop stopped in the middle of an epoch to be saved
            saved = time.monotonic()


def _open_log(path: Path, state: TrainingState | None) -> TextIO:
    """The log to add to; of a run that was stopped, only what the checkpoint has seen stays in it."""
    kept: list[str] = []
    if state and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n") or json.loads(line).get("step", 0) > state.step:
                break
            kept.append(line)
    write_atomic(path, "".join(kept))
    return path.open("a", encoding="utf-8")


def _with_boundary(examples: Examples, assembled: Assembled, cache: ActivationCache) -> Examples:
    """Compute once what is below the lowest trainable block, when something is."""
    block = assembled.method.first_trainable_block()
    if block == 0:
        return examples
    states = cache.boundary(assembled.model, assembled.architecture, block, examples.rows)
    return Examples(examples.rows, examples.targets, states)


def _pooled(
    assembled: Assembled,
    rows: Rows,
    cache: ActivationCache,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """The head's features. Every readable layer is computed and kept, so that all methods share one cache entry."""
    hidden = assembled.architecture.hidden_size
    layers = readable_layers(len(assembled.architecture.blocks), hidden)
    features = cache.pooled(assembled.model, layers, rows, progress)
    return features if len(assembled.model.feature_layers) == len(layers) else features[:, -hidden:]


def _base_score(assembled: Assembled, prepared: Prepared, cache: ActivationCache) -> float:
    """Accuracy of the nearest class mean on the last layer's features, before anything is trained."""
    hidden = assembled.architecture.hidden_size
    train_features = _pooled(assembled, prepared.train.rows, cache)[:, -hidden:]
    test_features = _pooled(assembled, prepared.test.rows, cache)[:, -hidden:]
    labels = len(prepared.task.labels)
    logits = nearest_mean_logits(train_features, prepared.train.targets, test_features, labels)
    return float((logits.argmax(1) == prepared.test.targets).float().mean())


def _test_logits(assembled: Assembled, prepared: Prepared, cache: ActivationCache) -> torch.Tensor:
    """(rows, labels); a head on frozen features needs no forward pass when the features are kept."""
    if assembled.method.parameters():
        return predict_logits(assembled, prepared.test.rows)
    with torch.no_grad():
        logits: torch.Tensor = assembled.model.classifier(_pooled(assembled, prepared.test.rows, cache)).cpu()
    return logits


def _set_head(assembled: Assembled, head: LinearHead) -> None:
    with torch.no_grad():
        assembled.model.classifier.weight.copy_(head.weight)
        assembled.model.classifier.bias.copy_(head.bias)


def _start_tokens(method: MethodSettings, prepared: Prepared) -> list[int]:
    """Tokens whose embeddings a soft prompt starts from."""
    if not isinstance(method, PromptTuningSettings):
        return []
    if method.init == "vocabulary":
        return sorted({token for sequence in prepared.train.rows.sequences for token in sequence})
    text = method.init_text or ", ".join(label.replace("_", " ") for label in prepared.task.labels)
    tokens = prepared.task.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    if not tokens:
        raise SettingError(f"--init-text {text!r}: the tokenizer makes no token of it. Give words.")
    return list(tokens)


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


def _data_hash(data: LabelledData) -> str:
    content = [data.train.texts, data.train.labels, data.test.texts, data.test.labels]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


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


def _progress(report: Reporter) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        report({"kind": "step", "step": done, "total": total, "loss": None})

    return progress


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
