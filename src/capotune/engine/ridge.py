"""A linear head for few rows: ridge regression on the labels, whose every choice is made by leaving one row out.

    min over W, b of  Σ ‖xWᵀ + b − y‖² + λ·‖W‖²        y one-hot, x centred, λ in units of the rows' mean ‖x‖²

With few rows none can be spared to choose λ by. But what each row would be answered had it been left out follows from
one solution. Among the rows, with K = xxᵀ, G = (K + λI)⁻¹ and s = 1ᵀG1:

    b = 1ᵀGy / s,    a = G(y − b),    y_i − answer_i without row i = a_i / (G_ii − (G1)_i² / s),    W = aᵀx

(G. Cawley and N. Talbot, "Preventing over-fitting during model selection via Bayesian regularisation of the
hyper-parameters", JMLR 8 (2007), §2.2, for one output.) The λ is taken at which such answers have the lowest
cross-entropy, each at the temperature that suits it best. The larger λ, the nearer is the head to the labels' means.

The features may be those of several layers side by side. Which layers tell the labels apart differs from data to data,
so they are read once with weights that rise towards the last, and once as the last alone; that is chosen alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from capotune.engine.linear_head import LinearHead
from capotune.evaluation.calibration import fit_temperature

_PATH = (1.0, 3.0, 10.0)  # below 1, what leaving out wins is less than what choosing by few rows loses
_SHARPNESS = 10.0  # answers lie about 0 and 1; times this they are log-odds, but for a temperature near 1
_LOWEST, _HIGHEST = 0.3, 1.5  # the scales of the first and the last layer


@dataclass(frozen=True)
class RidgeHead:
    """The head that was chosen."""

    head: LinearHead
    """Its outputs are calibrated log-odds, for features as they come."""
    left_out: torch.Tensor
    """(judged rows, labels), the outputs for each row by the head that was solved without it."""


def solve_leaving_one_out(
    features: torch.Tensor, targets: torch.Tensor, labels: int, judged: int, layers: int = 1
) -> RidgeHead:
    """The head with the lowest cross-entropy of left-out rows, over the path of λ and the ways to read the layers.

    Args:
        features: (rows, layers·hidden) fp32.
        targets: (rows,) int64.
        labels: how many there are.
        judged: the first so many rows are left out in turn; the others, such as the labels' names, are fitted alone.
        layers: how many stand side by side in the features.
    """
    mean = features[:judged].mean(0)
    x, y = features - mean, functional.one_hot(targets, labels).to(features.dtype)
    best, least = None, float("inf")
    for scale in _scales(x[:judged], layers):
        for regularization, a, b, answers in _path(x * scale, y):
            left_out = _SHARPNESS * answers[:judged]
            sharpness = 1 / fit_temperature(left_out, targets[:judged])
            loss = float(functional.cross_entropy(sharpness * left_out, targets[:judged]))
            if best is None or loss < least:
                best, least = (scale, regularization, a, b, _SHARPNESS * sharpness, sharpness * left_out), loss
    assert best is not None
    scale, regularization, a, b, sharpness, left_out = best
    weight = sharpness * (a.t() @ x) * scale.square()
    return RidgeHead(LinearHead(weight, sharpness * b - weight @ mean, regularization), left_out)


def _scales(x: torch.Tensor, layers: int) -> Iterator[torch.Tensor]:
    """Factors (features,) of centred x (rows, features): rows of mean square 1, by each way to read the layers."""
    size = x.view(len(x), layers, -1).square().sum(2).mean(0).sqrt()
    unit = torch.where(size > 0, size.reciprocal(), 0.0)
    rising = torch.linspace(_LOWEST, _HIGHEST, layers, dtype=x.dtype, device=x.device)
    last = torch.zeros_like(rising)
    last[-1] = 1
    for weights in (rising, last) if layers > 1 else (last,):
        yield (unit * weights / weights.norm()).repeat_interleave(x.shape[1] // layers)


def _path(x: torch.Tensor, y: torch.Tensor) -> Iterator[tuple[float, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each λ: itself, a (rows, labels), b (labels,), and each row's answers (rows, labels) without it."""
    values, axes = torch.linalg.eigh((x @ x.t()).double())
    for regularization in _PATH:
        g = (axes / (values.clamp_min(0) + regularization)) @ axes.t()
        sums = g.sum(1)
        b = sums @ y.double() / sums.sum()
        a = g @ (y - b)
        left_out = y - a / (g.diagonal() - sums.square() / sums.sum())[:, None]
        yield regularization, a.to(x.dtype), b.to(x.dtype), left_out.to(x.dtype)
