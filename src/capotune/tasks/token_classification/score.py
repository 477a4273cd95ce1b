"""How well a tagger finds entities: the same code for a run's test rows and for ``evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from capotune.adapters.assemble import Assembled
from capotune.engine.activation_cache import ActivationCache
from capotune.evaluation.forward import Examples
from capotune.evaluation.metrics import Metric, f1_interval, metric, register
from capotune.evaluation.pairs import RowCounts
from capotune.events import OnProgress
from capotune.tasks.base import Scored
from capotune.tasks.token_classification.alignment import NOWHERE, Aligned
from capotune.tasks.token_classification.data import TaggedRows
from capotune.tasks.token_classification.features import all_features, compute_features, targets_in
from capotune.tasks.token_classification.spans import OUTSIDE, EntityCounts, as_iob2, count

for _metric in (
    Metric("precision", "precision", "the share of the predicted entities that are right", kind="percentage"),
    Metric("recall", "recall", "the share of the entities in the data that were found", kind="percentage"),
):
    register(_metric)


@dataclass(frozen=True)
class RowTags:
    """One sentence's predicted tags."""

    tags: list[str]
    """In IOB2; O where a word was not read."""
    probabilities: list[float | None]
    """Of each tag; None for a word that was not read."""


def score_rows(
    assembled: Assembled, rows: TaggedRows, cache: ActivationCache | None = None, progress: OnProgress | None = None
) -> Scored:
    """Precision, recall and F1 of entities, each over all words of all sentences, and the loss in nats a word read.

    A word that the model does not read, since its sentence is too long or no token comes of it, counts as ``O``.
    """
    if not len(rows):
        return Scored("f1", {}, {}, 0)
    task: Any = assembled.task
    aligned = task.align_rows(rows)
    examples = task.examples(aligned, rows.tags, assembled.method.virtual_token_ids)
    logits = logits_of(assembled, examples, cache, progress)
    targets = targets_in(examples)
    loss = float(functional.cross_entropy(logits, targets)) if len(targets) else 0.0
    return of_predictions(rows, tags_of(task.labels, aligned, logits), {"loss": loss})


def of_predictions(rows: TaggedRows, predicted: Sequence[RowTags], further: dict[str, float]) -> Scored:
    """The score of predicted tags, with ``further`` metrics."""
    counts = [count(true, row.tags) for true, row in zip(rows.tags, predicted, strict=True)]
    total = sum(counts, EntityCounts())
    scores = {"f1": total.f1, "precision": total.precision, "recall": total.recall, **further}
    by_row = [(one.tp, one.fp, one.fn) for one in counts]
    interval = f1_interval(by_row)
    return Scored(
        "f1",
        scores,
        {"f1": interval} if interval else {},
        len(rows),
        {name: f"{len(rows):,} sentences" for name in scores},
        _predictions(rows, predicted, counts),
        RowCounts.of(metric("f1"), by_row),
    )


@torch.no_grad()
def logits_of(
    assembled: Assembled, examples: Examples, cache: ActivationCache | None = None, progress: OnProgress | None = None
) -> torch.Tensor:
    """Logits (words, labels) on the CPU, row after row: one product of the head with all features.

    A head on frozen features needs no forward pass when ``cache`` holds them.
    """
    if cache is not None and not assembled.method.parameters():
        features = all_features(assembled, examples, cache, progress)
    else:
        features = compute_features(assembled, assembled.model.feature_layers, examples, progress)
    logits: torch.Tensor = assembled.model.classifier(features.to(assembled.model.device))
    return logits.float().cpu()


def tags_of(labels: Sequence[str], aligned: Sequence[Aligned], logits: torch.Tensor) -> list[RowTags]:
    """The most probable tag of every word; logits are those of the words that are read, row after row."""
    probabilities, best = logits.softmax(1).max(1)
    words = iter(zip(best.tolist(), probabilities.tolist(), strict=True))
    found = []
    for one in aligned:
        own = [(OUTSIDE, None) if at == NOWHERE else _tag(labels, *next(words)) for at in one.first]
        found.append(RowTags(as_iob2([tag for tag, _ in own]), [probability for _, probability in own]))
    return found


def _tag(labels: Sequence[str], label: int, probability: float) -> tuple[str, float]:
    return labels[label], probability


def _predictions(
    rows: TaggedRows, predicted: Sequence[RowTags], counts: Sequence[EntityCounts]
) -> list[dict[str, Any]]:
    return [
        {
            "words": words, "tags": tags, "predicted": own.tags, "tp": one.tp, "fp": one.fp, "fn": one.fn, "line": line,
        }
        for words, tags, line, own, one in zip(rows.words, rows.tags, rows.lines, predicted, counts, strict=True)
    ]  # fmt: skip
