"""LoRA deltas seen as geometry: how large they are, block by block, and how two adapters' lie to each other.

No delta is formed. With Δ = s·BA, ranks r₁ and r₂, and ⟨X, Y⟩ = tr(XᵀY):

    ⟨Δ₁, Δ₂⟩ = s₁s₂·Σ (B₁ᵀB₂) ⊙ (A₁A₂ᵀ)        two products of (r₁, out)·(out, r₂) and (r₁, in)·(in, r₂)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from capotune.methods.base import LowRank

Deltas = Mapping[str, LowRank]
"""By their layers' paths."""
OUTSIDE = "outside the blocks"


@dataclass(frozen=True)
class Norms:
    """Of two adapters' deltas, of one block or of all."""

    one: float
    """√Σ‖Δ‖² of the first adapter's."""
    other: float
    cosine: float | None
    """⟨Δ₁, Δ₂⟩ / (‖Δ₁‖·‖Δ₂‖), all layers as one vector; None where one of them is zero."""

    @property
    def degrees(self) -> float | None:
        """The angle between the two."""
        return None if self.cosine is None else math.degrees(math.acos(self.cosine))


def inner(one: LowRank, other: LowRank) -> float:
    """⟨Δ₁, Δ₂⟩, in fp64; DoRA's magnitudes are left out."""
    a = one.a.double() @ other.a.double().t()
    b = one.b.double().t() @ other.b.double()
    return one.scale * other.scale * float((a * b).sum())


def block_of(path: str) -> str:
    """The block that a layer's path names: up to the first number in it."""
    parts = path.split(".")
    at = next((at for at, part in enumerate(parts) if part.isdecimal()), None)
    return OUTSIDE if at is None else ".".join(parts[: at + 1])


def block_norms(deltas: Deltas) -> dict[str, float]:
    """√Σ‖Δ‖² of every block, in the order of the layers."""
    squares: dict[str, float] = {}
    for path, one in deltas.items():
        block = block_of(path)
        squares[block] = squares.get(block, 0.0) + inner(one, one)
    return {block: _norm(square) for block, square in in_order(squares).items()}


def compare_blocks(one: Deltas, other: Deltas) -> dict[str, Norms]:
    """Of every block that either has a delta in; a layer that has none counts as zeros."""
    blocks = in_order({block_of(path): 0.0 for path in (*one, *other)})
    return {block: compare(_within(one, block), _within(other, block)) for block in blocks}


def compare(one: Deltas, other: Deltas) -> Norms:
    """Of all layers together."""
    norms = [_norm(sum(inner(delta, delta) for delta in deltas.values())) for deltas in (one, other)]
    product = sum(inner(delta, other[path]) for path, delta in one.items() if path in other)
    size = norms[0] * norms[1]
    return Norms(norms[0], norms[1], max(-1.0, min(1.0, product / size)) if size else None)


def in_order(blocks: Mapping[str, float]) -> dict[str, float]:
    """By the numbers of the blocks; what is outside them last."""

    def place(block: str) -> tuple[bool, str, int]:
        name, _, number = block.rpartition(".")
        return block == OUTSIDE, name, int(number) if number.isdecimal() else 0

    return {block: blocks[block] for block in sorted(blocks, key=place)}


def _norm(square: float) -> float:
    """Of a delta whose factors cancel, rounding may leave a square below zero."""
    return math.sqrt(max(0.0, square))


def _within(deltas: Deltas, block: str) -> Deltas:
    return {path: one for path, one in deltas.items() if block_of(path) == block}
