"""What a tagger's head reads: hidden states of words, (words, layers·hidden) fp32 on the CPU."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from itertools import accumulate

import torch

from capotune.adapters.assemble import Assembled
from capotune.data.batches import IGNORE_INDEX
from capotune.engine.activation_cache import ActivationCache
from capotune.evaluation.forward import Examples, batches
from capotune.events import OnProgress
from capotune.kernels.execution import reduced_precision, reusing_memory
from capotune.tasks.linear_head import spread_layers


def words_in(examples: Examples) -> list[int]:
    """Words of each row that are read."""
    return [sum(label != IGNORE_INDEX for label in row) for row in examples.targets]


def targets_in(examples: Examples) -> torch.Tensor:
    """The targets of all words that are read, row after row, (words,) int64."""
    labels = [label for row in examples.targets for label in row if label != IGNORE_INDEX]
    return torch.tensor(labels, dtype=torch.long)


def all_features(
    assembled: Assembled,
    examples: Examples,
    cache: ActivationCache,
    progress: OnProgress | None = None,
    *,
    reduced: bool = False,
) -> torch.Tensor:
    """The head's features, from the cache or by one forward pass; ``reduced``: in training's reduced precision.

    Where the method changes nothing at the start, every layer that a head may read is computed and stored, so that all
    such methods share one entry.
    """
    own = assembled.model.feature_layers
    most = assembled.task.layers if assembled.method.identity_at_start else len(own)
    layers = spread_layers(assembled.model.depth, most)

    def compute() -> torch.Tensor:
        return compute_features(assembled, layers, examples, progress, reduced=reduced)

    where = [[label != IGNORE_INDEX for label in row] for row in examples.targets]
    digest = hashlib.sha256(json.dumps(where).encode()).hexdigest()
    features = cache.features(examples.rows, compute, words=digest, layers=layers, reduced=reduced)
    if len(own) == len(layers):
        return features
    return features[:, -assembled.model.width_of((-1,)) :].clone()  # so that the other layers' memory is free again


@torch.no_grad()
def compute_features(
    assembled: Assembled,
    layers: tuple[int, ...],
    examples: Examples,
    progress: OnProgress | None = None,
    *,
    reduced: bool = False,
) -> torch.Tensor:
    """One forward pass over all rows: features (words, len(layers)·hidden), row after row. A word stands where its row
    has a target; ``reduced``: in training's reduced precision."""
    model = assembled.model
    starts = [0, *accumulate(words_in(examples))]
    features = torch.empty(starts[-1], model.width_of(layers))
    with ExitStack() as contexts:
        contexts.enter_context(reusing_memory())
        if reduced:
            contexts.enter_context(reduced_precision())
        for chosen, batch in batches(assembled, examples, progress):
            found = model.features(batch, layers).float().cpu()
            of_rows = found.split([starts[row + 1] - starts[row] for row in chosen])
            for row, states in zip(chosen, of_rows, strict=True):
                features[starts[row] : starts[row + 1]] = states
    return features
