"""How well a classifier labels texts: the same code for a run's test rows and for ``evaluate``."""

from __future__ import annotations

from typing import Any

import torch

from capotune.adapters.assemble import Assembled
from capotune.data.batches import TokenRows
from capotune.data.labelled import LabelledText
from capotune.engine.activation_cache import ActivationCache
from capotune.evaluation.metrics import classification_scores, metric, wilson_interval
from capotune.evaluation.pairs import RowCounts
from capotune.events import OnProgress
from capotune.tasks.base import Scored
from capotune.tasks.classification.features import all_features, head_features


def score_texts(
    assembled: Assembled, texts: LabelledText, cache: ActivationCache | None = None, progress: OnProgress | None = None
) -> Scored:
    """Accuracy with its Wilson interval, macro F1 and cross-entropy in nats, and each text's prediction.

    Every label must be one of the task's.
    """
    task: Any = assembled.task
    rows = TokenRows(task.encode(texts.texts, texts.where), task.pad_id, assembled.method.virtual_token_ids)
    targets = task.targets(texts.labels)
    if not len(targets):
        return Scored("accuracy", {}, {}, 0)
    logits = task.logits(assembled, rows, cache, progress)
    found = classification_scores(logits, targets)
    return Scored(
        "accuracy",
        {"accuracy": found.accuracy, "macro_f1": found.macro_f1, "loss": found.loss},
        {"accuracy": wilson_interval(found.accuracy, found.rows)},
        found.rows,
        dict.fromkeys(("accuracy", "macro_f1", "loss"), f"{found.rows:,} rows"),
        _predictions(task.labels, texts, logits),
        right_or_wrong(logits, targets),
    )


def right_or_wrong(logits: torch.Tensor, targets: torch.Tensor) -> RowCounts:
    """What each row adds to the accuracy; logits (rows, labels), targets (rows,)."""
    right = (logits.argmax(1) == targets).long()
    return RowCounts.of(metric("accuracy"), torch.stack([right, torch.ones_like(right)], 1).numpy())


@torch.no_grad()
def logits_of(
    assembled: Assembled, rows: TokenRows, cache: ActivationCache | None = None, progress: OnProgress | None = None
) -> torch.Tensor:
    """Logits (rows, labels) on the CPU, in the order of the rows: one product of the head with all features.

    A head on frozen features needs no forward pass when ``cache`` holds them.
    """
    if cache is not None and not assembled.method.parameters():
        features = all_features(assembled, rows, cache, progress)
    else:
        features = head_features(assembled, rows, progress)
    logits: torch.Tensor = assembled.model.classifier(features.to(assembled.model.device))
    return logits.float().cpu()


def _predictions(labels: tuple[str, ...], texts: LabelledText, logits: torch.Tensor) -> list[dict[str, Any]]:
    probabilities, predicted = logits.softmax(1).max(1)
    rows = zip(texts.texts, texts.labels, texts.lines, predicted.tolist(), probabilities.tolist(), strict=True)
    return [
        {"text": text, "label": label, "predicted": labels[number], "probability": round(p, 6), "line": line}
        for text, label, line, number, p in rows
    ]
