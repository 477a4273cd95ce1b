"""Fit a method: solve the head on what the start model computes, then train in steps what else there is to train."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from capotune.adapters.assemble import Assembled, readable_layers
from capotune.config import TrainSettings
from capotune.data.batches import Rows
from capotune.errors import ModelError, SettingError
from capotune.evaluation.metrics import nearest_mean_logits
from capotune.files import write_atomic
from capotune.training.activation_cache import ActivationCache
from capotune.training.checkpoint import save_checkpoint
from capotune.training.linear_head import LinearHead, choose_regularization, solve
from capotune.training.loop import Examples, TrainingState, finished, predict_logits, start, train
from capotune.training.prepare import Prepared, Reporter

_CHECKPOINT_SECONDS = 300.0
_EASY_START = 30.0  # times the best λ: a head that knows the rows by heart leaves the method nothing to learn


@dataclass(frozen=True)
class Fitted:
    """What training reports about itself."""

    epochs: float
    best_epoch: int
    regularization: float
    held_out_score: float | None


def start_features(prepared: Prepared, assembled: Assembled, cache: ActivationCache, report: Reporter) -> torch.Tensor:
    """The training rows' features, for solving the head."""
    report({"kind": "stage", "text": "computing features"})
    features = _pooled(assembled, prepared.train.rows, cache, _progress(report))
    if not features.isfinite().all():
        raise ModelError(f"--model {prepared.source.name}: it computes infinite values or NaN. Are its weights whole?")
    return features


def fit_method(
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
    if len(assembled.model.feature_layers) == len(layers):
        return features
    return features[:, -hidden:].clone()  # a copy, so that the other layers' memory is free again


def score_of_base(assembled: Assembled, prepared: Prepared, cache: ActivationCache) -> float:
    """Accuracy of the nearest class mean on the last layer's features, before anything is trained."""
    hidden = assembled.architecture.hidden_size
    train_features = _pooled(assembled, prepared.train.rows, cache)[:, -hidden:]
    test_features = _pooled(assembled, prepared.test.rows, cache)[:, -hidden:]
    labels = len(prepared.task.labels)
    logits = nearest_mean_logits(train_features, prepared.train.targets, test_features, labels)
    return float((logits.argmax(1) == prepared.test.targets).float().mean())


def test_logits(assembled: Assembled, prepared: Prepared, cache: ActivationCache) -> torch.Tensor:
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


def _progress(report: Reporter) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        report({"kind": "step", "step": done, "total": total, "loss": None})

    return progress
