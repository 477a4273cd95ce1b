"""AdamW and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from capotune.config import TrainingSettings


def make_optimizer(weights: dict[str, nn.Parameter], rates: dict[str, float], decay: float) -> torch.optim.AdamW:
    """AdamW with one group per learning rate, in the order of ``weights``; ``rates`` holds the peak of each."""
    groups: dict[float, list[nn.Parameter]] = {}
    for key, weight in weights.items():
        groups.setdefault(rates[key], []).append(weight)
    return torch.optim.AdamW(
        [{"params": params, "lr": rate, "peak": rate} for rate, params in groups.items()],
        weight_decay=decay,
        fused=True,
    )


def learning_rate_factor(step: int, total: int, settings: TrainingSettings) -> float:
    """Part of the peak learning rate at ``step`` (from 0) of ``total``: a linear rise, then the chosen fall."""
    rise = settings.warmup * total
    if step < rise:
        return (step + 1) / (rise + 1)
    done = (step - rise) / max(1.0, total - rise)
    if settings.schedule == "linear":
        return 1 - done
    return 0.5 * (1 + math.cos(math.pi * done)) if settings.schedule == "cosine" else 1.0


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale every group's peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
