"""What a head on texts reads: pooled hidden states, (rows, layers·hidden) fp32 on the CPU."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from capotune.adapters.assemble import Assembled
from capotune.data.batches import TokenRows
from capotune.engine.activation_cache import ActivationCache
from capotune.evaluation.forward import Examples, batches
from capotune.events import OnProgress
from capotune.kernels.execution import reduced_precision, reusing_memory
from capotune.tasks.text_targets.model import readable_layers


def all_features(
    assembled: Assembled,
    rows: TokenRows,
    cache: ActivationCache,
    progress: OnProgress | None = None,
    *,
    reduced: bool = False,
) -> torch.Tensor:
    """The head's features, from the cache or by one forward pass; ``reduced``: in training's reduced precision.

    Every readable layer is computed and stored, so that all methods share one entry.
    """
    hidden = assembled.model.width_of((-1,))
    layers = readable_layers(assembled.model.depth, hidden)

    def compute() -> torch.Tensor:
        return compute_features(assembled, layers, rows, progress, reduced=reduced)

    parts = {"pooling": assembled.model.pooling, "layers": layers, "reduced": reduced}
    features = cache.features(rows, compute, **parts)
    if len(assembled.model.feature_layers) == len(layers):
        return features
    return features[:, -hidden:].clone()  # a copy, so that the other layers' memory is free again


def head_features(assembled: Assembled, rows: TokenRows, progress: OnProgress | None = None) -> torch.Tensor:
    """The features of the head's own layers, at full precision."""
    return compute_features(assembled, assembled.model.feature_layers, rows, progress, reduced=False)


@torch.no_grad()
def compute_features(
    assembled: Assembled, layers: tuple[int, ...], rows: TokenRows, progress: OnProgress | None, *, reduced: bool
) -> torch.Tensor:
    """One forward pass over all rows: features (rows, len(layers)·hidden) in the order of the rows."""
    model = assembled.model
    features = torch.empty(len(rows.sequences), model.width_of(layers))
    unknown = Examples(rows, torch.zeros(len(rows.sequences), dtype=torch.long))
    with ExitStack() as contexts:
        contexts.enter_context(reusing_memory())
        if reduced:
            contexts.enter_context(reduced_precision())
        for chosen, batch in batches(assembled, unknown, progress):
            features[torch.as_tensor(chosen)] = model.features(batch, layers).float().cpu()
    return features
