"""Several LoRA adapters of one base made into one: their deltas Δ = scale·BA, (out, in) a layer, added or merged.

    linear      Σ w·Δ                       exact: A and B of all side by side, so that the ranks add up
    svd         Σ w·Δ                       the nearest of a given rank (Eckart and Young 1936)
    ties        trim, elect signs, mean     Yadav et al. 2023 (arXiv 2306.01708, §4.2)
    dare        Σ w·m⊙Δ/density             m is 1 with probability density, else 0: Yu et al. 2023
                                            (arXiv 2311.03099, §3.2)
    dare-ties   dare's m⊙Δ/density, then signs and mean as ties

The results of the last three have full rank; what is stored is the nearest of a given rank. All of it is of the deltas
themselves: A and B alone mean nothing, since A₁ and A₂ are of different bases, and (A₁ + A₂), (B₁ + B₂) would multiply
each with the other's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from capotune.conversion_settings import CombineSettings
from capotune.errors import AdapterError, SettingError
from capotune.methods.base import LowRank

Deltas = Mapping[str, LowRank]
"""An adapter's deltas by their layers' paths; none has a magnitude (DoRA)."""
_HALF = 15
"""A value of fp32 without its sign has 31 bits: as whole numbers they stand in the order of the values, and are looked
through in two halves of 16 and 15."""


@dataclass(frozen=True)
class Combined:
    """Several adapters' deltas as those of one, of one rank and scale 1."""

    layers: dict[str, LowRank]
    rank: int
    held: float
    """Part of the combined deltas' norm √Σ‖Δ‖² that the rank holds; 1 where it is exact."""


@dataclass(frozen=True)
class _Factors:
    """A delta BA: A (rank, in), B (out, rank)."""

    a: Tensor
    b: Tensor
    square: float
    """‖Δ‖² of the delta that BA is, or is nearest to."""
    lost: float = 0.0
    """‖Δ − BA‖²."""


def combine(
    adapters: Sequence[Deltas], settings: CombineSettings, alive: Callable[[], object] = lambda: None
) -> Combined:
    """One delta of each layer that any of the ``adapters`` has one of; who has none counts as zeros there.

    ``alive`` is called before each layer. Raises ``SettingError`` for a rank above what any layer has,
    ``AdapterError`` for deltas of one layer that differ in shape.
    """
    shapes = _shapes(adapters)
    rank = _rank(adapters, settings, max(min(shape) for shape in shapes.values()))
    merge = _merging(adapters, settings)
    found: dict[str, _Factors] = {}
    for path in shapes:
        alive()
        of_layer = [deltas.get(path) for deltas in adapters]
        if merge is None:
            found[path] = _nearest_sum(of_layer, settings.factors, rank)
        else:
            dense = torch.stack([_dense(one, shapes[path]) for one in of_layer])
            found[path] = _nearest(merge(dense), rank)
    square, lost = (sum(getattr(one, name) for one in found.values()) for name in ("square", "lost"))
    held = math.sqrt(max(0.0, 1 - lost / square)) if square else 1.0
    return Combined({path: _padded(one, rank) for path, one in found.items()}, rank, held)


def _shapes(adapters: Sequence[Deltas]) -> dict[str, tuple[int, int]]:
    """(out, in) of every layer, in the order in which the adapters name them."""
    shapes: dict[str, tuple[int, int]] = {}
    for deltas in adapters:
        for path, one in deltas.items():
            if shapes.setdefault(path, one.shape) != one.shape:
                raise AdapterError(f"{path} is {shapes[path]} in one adapter and {one.shape} in another.")
    return shapes


def _rank(adapters: Sequence[Deltas], settings: CombineSettings, widest: int) -> int:
    """What the result is stored with: as asked; for svd the largest of the adapters', else their sum, which linear
    needs and at which nothing is lost."""
    if settings.rank is not None:
        if settings.rank > widest:
            raise SettingError(
                "more than any layer has.", setting="rank", given=settings.rank, allowed=f"1 to {widest}"
            )
        return settings.rank
    ranks = [max(one.rank for one in deltas.values()) for deltas in adapters]
    return min(widest, max(ranks) if settings.method == "svd" else sum(ranks))


def _dense(delta: LowRank | None, shape: tuple[int, int]) -> Tensor:
    return torch.zeros(shape) if delta is None else delta.scale * (delta.b @ delta.a)


# ------------------------------------------------------------------------------------------------- from value to value


def _merging(adapters: Sequence[Deltas], settings: CombineSettings) -> Callable[[Tensor], Tensor] | None:
    """From a layer's deltas (adapters, out, in) to the merged one; None where the sum is all."""
    factors = torch.tensor(settings.factors)[:, None, None]
    generator = torch.Generator().manual_seed(settings.seed)
    if settings.method == "ties":
        least = [threshold(deltas, settings.density) for deltas in adapters]
        return lambda dense: elect_and_mean(factors * trim(dense, least))
    if settings.method == "dare":
        return lambda dense: (factors * drop(dense, settings.density, generator)).sum(0)
    if settings.method == "dare-ties":
        return lambda dense: elect_and_mean(factors * drop(dense, settings.density, generator))
    return None


def trim(dense: Tensor, least: Sequence[float]) -> Tensor:
    """TIES, step 1: zeros for the values of (adapters, out, in) whose magnitude is below their adapter's ``least``."""
    return dense * (dense.abs() >= torch.tensor(least)[:, None, None])


def elect_and_mean(dense: Tensor) -> Tensor:
    """TIES, steps 2 and 3: (adapters, out, in) → (out, in).

    A value's sign is that of the sum over the adapters, which is that of the larger total magnitude; the result is the
    mean of the values that have it. Zeros have no sign and do not count.
    """
    agrees = (dense.sign() == dense.sum(0).sign()) & (dense != 0)
    return (dense * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def drop(dense: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """DARE: each value stays with probability ``density`` and is divided by it, so that its expectation stays."""
    return dense * torch.empty_like(dense).bernoulli_(density, generator=generator) / density


def threshold(deltas: Deltas, density: float) -> float:
    """The least magnitude among the ``density`` largest values of an adapter, all layers together: TIES trims the task
    vector as a whole, so that layers which changed little lose more.

    Exact, with one layer's values in memory at a time.
    """
    count = sum(math.prod(one.shape) for one in deltas.values())
    wanted = max(1, round(density * count))
    upper, above = _bucket(deltas, wanted, lambda bits: bits >> _HALF, 1 << 16)
    lower, _ = _bucket(deltas, wanted - above, partial(_lower_half, upper=upper), 1 << _HALF)
    return float(torch.tensor((upper << _HALF) + lower, dtype=torch.int32).view(torch.float32))


def _bucket(deltas: Deltas, wanted: int, part: Callable[[Tensor], Tensor], size: int) -> tuple[int, int]:
    """By a part of their bits the bucket in which the ``wanted``-th largest magnitude is, and how many are above it."""
    counts = torch.zeros(size, dtype=torch.long)
    for one in deltas.values():
        bits = _dense(one, one.shape).abs().flatten().view(torch.int32)
        counts += torch.bincount(part(bits), minlength=size)
    from_top = counts.flip(0).cumsum(0)
    at = int(torch.searchsorted(from_top, wanted))
    return size - 1 - at, int(from_top[at - 1]) if at else 0


def _lower_half(bits: Tensor, upper: int) -> Tensor:
    return bits[(bits >> _HALF) == upper] & ((1 << _HALF) - 1)


# ----------------------------------------------------------------------------------------------------- of a given rank


def _nearest_sum(of_layer: Sequence[LowRank | None], weights: Sequence[float], rank: int) -> _Factors:
    """Σ w·scale·BA: exact where the ranks add up to no more than ``rank``, else the nearest of it."""
    there = [(one, weight) for one, weight in zip(of_layer, weights, strict=True) if one is not None]
    a = torch.cat([one.a for one, _ in there])
    b = torch.cat([weight * one.scale * one.b for one, weight in there], dim=1)
    if len(a) <= rank:
        return _Factors(a, b, float(torch.sum((a @ a.t()) * (b.t() @ b))))
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().t())
    u, s, v = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    square = s.square()
    a, b = v[:rank] @ q_a.t(), q_b @ (u[:, :rank] * s[:rank])
    return _Factors(a.float(), b.float(), float(square.sum()), float(square[rank:].sum()))


def _nearest(dense: Tensor, rank: int) -> _Factors:
    """Of (out, in): by the eigenvectors of ΔΔᵀ, or of ΔᵀΔ where that is smaller, in fp64."""
    if len(dense) > dense.shape[1]:
        transposed = _nearest(dense.t(), rank)
        return _Factors(transposed.b.t(), transposed.a.t(), transposed.square, transposed.lost)
    wide = dense.double()
    squares, vectors = torch.linalg.eigh(wide @ wide.t())  # rising
    u = vectors[:, -rank:]
    square = float(wide.square().sum())
    held = min(square, float(squares[-rank:].clamp_min(0).sum()))
    return _Factors((u.t() @ wide).float(), u.float(), square, square - held)


def _padded(delta: _Factors, rank: int) -> LowRank:
    more = rank - len(delta.a)
    return LowRank(functional.pad(delta.a, (0, 0, 0, more)), functional.pad(delta.b, (0, more)), 1.0)
