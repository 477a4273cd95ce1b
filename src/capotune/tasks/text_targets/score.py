"""What a head on texts gives for rows, and its score: the same code for a run's test rows and for ``evaluate``."""

from __future__ import annotations

from typing import Any

import torch

from capotune.adapters.assemble import Assembled
from capotune.data.batches import TokenRows
from capotune.data.labelled import LabelledText
from capotune.engine.activation_cache import ActivationCache
from capotune.events import OnProgress
from capotune.tasks.base import Scored
from capotune.tasks.text_targets.features import all_features, head_features


def score_texts(
    assembled: Assembled,
    texts: LabelledText[Any],
    cache: ActivationCache | None = None,
    progress: OnProgress | None = None,
) -> Scored:
    """The score of the rows; every label must be one of the task's."""
    task: Any = assembled.task
    if not len(texts):
        return Scored(task.objective.metric, {}, {}, 0)
    rows = TokenRows(task.encode(texts.texts, texts.where), task.pad_id, assembled.method.virtual_token_ids)
    scored: Scored = task.scored(texts, task.logits(assembled, rows, cache, progress))
    return scored


@torch.no_grad()
def logits_of(
    assembled: Assembled, rows: TokenRows, cache: ActivationCache | None = None, progress: OnProgress | None = None
) -> torch.Tensor:
    """Outputs of the head (rows, outputs) on the CPU, in the order of the rows: one product of the head with all
    features.

    A head on frozen features needs no forward pass when ``cache`` holds them.
    """
    if cache is not None and not assembled.method.parameters():
        features = all_features(assembled, rows, cache, progress)
    else:
        features = head_features(assembled, rows, progress)
    logits: torch.Tensor = assembled.model.classifier(features.to(assembled.model.device))
    return logits.float().cpu()
