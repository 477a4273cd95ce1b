"""Where a block's values lie while its programs run (``block_program.py``): matrices in a few tensors, by symbols."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from capotune.kernels.blocks import (
    AddNorm,
    Attention,
    Block,
    Dropout,
    Gelu,
    Linear,
    Op,
    RmsNorm,
    Subset,
    SwiGLU,
    inputs,
)
from capotune.kernels.lora_linear import LinearLayer
from capotune.kernels.program import Affine, symbol

__all__ = [
    "ALIGNED", "NO_DELTA", "TOKENS", "LowRank", "Matrix", "Saved", "Space", "Variant", "active_ops", "aligned_tokens",
    "given", "rank", "ranks", "shape", "value_widths",
]  # fmt: skip

ALIGNED = 16  # fp32 elements in 64 bytes
TOKENS = symbol("tokens")
_ALIGNED_TOKENS = symbol("tokens, rounded up")


class Variant(NamedTuple):
    """What a program is compiled for, beside the block."""

    subset: bool
    """Whether ``Call.rows`` says which rows are computed."""
    dropout: tuple[bool, ...]
    """For each of the rates, whether there is any."""
    input_gradient: bool = True
    """Backward: whether x needs a gradient."""


def aligned_tokens(tokens: int) -> int:
    """So many that every matrix begins at a multiple of 64 bytes."""
    return -(-tokens // ALIGNED) * ALIGNED


class Matrix(NamedTuple):
    """(tokens, columns) fp32, or what else is said; rows lie ``stride`` elements apart."""

    address: Affine
    columns: int
    stride: int

    def part(self, start: int, columns: int) -> Matrix:
        """Columns from ``start`` on."""
        return Matrix(self.address + 4 * start, columns, self.stride)


def given(name: str, columns: int) -> Matrix:
    """A contiguous tensor of the caller's."""
    return Matrix(symbol(name), columns, columns)


class LowRank(NamedTuple):
    """One side of a LoRA delta: xa (tokens, ranks), none where it has no columns, and a matrix (ranks, any)."""

    xa: Matrix
    matrix: Affine | int
    scale: float = 1.0


NO_DELTA = LowRank(Matrix(TOKENS * 0, 0, 0), 0)


class Space:
    """Matrices one after the other in one tensor; those of a fixed size come first."""

    def __init__(self, name: str) -> None:
        self._address = symbol(name)
        self._free: list[Matrix] = []
        self._reused: list[Matrix] = []
        self.fixed = self.columns = 0

    def elements(self, count: int) -> Affine:
        """Address of so many elements, whatever the tokens."""
        assert not self.columns
        found = self._address + 4 * self.fixed
        self.fixed += -(-count // ALIGNED) * ALIGNED
        return found

    def matrix(self, columns: int) -> Matrix:
        """(tokens, columns), with room for whole tiles."""
        found = self._address + _ALIGNED_TOKENS * (4 * self.columns) + 4 * self.fixed
        self.columns += columns
        return Matrix(found, columns, columns)

    def borrow(self, columns: int) -> Matrix:
        """A matrix to ``give_back``."""
        found = next((one for one in self._free if one.columns == columns), None)
        if found is None:
            found = self.matrix(columns)
            self._reused.append(found)
        else:
            self._free.remove(found)
        return found

    def give_back(self, matrix: Matrix) -> None:
        """Nothing reads it any more. Nothing happens to a matrix that was not borrowed."""
        if matrix in self._reused and matrix not in self._free:
            self._free.append(matrix)

    def elements_for(self, tokens: int) -> int:
        """How many are needed for all."""
        return self.fixed + aligned_tokens(tokens) * self.columns


class NormSaved(NamedTuple):
    """Of an ``AddNorm``: what is normalised, and mean and reciprocal root of each row."""

    total: Matrix
    means: Matrix
    roots: Matrix


class Saved:
    """What forward leaves for backward: Bᵀ of each layer; A and x·Aᵀ of layers that share an input; the inputs of what
    is not linear, and of linear layers that have a LoRA delta."""

    def __init__(self, block: Block, ops: Sequence[Op], widths: Mapping[str, int]) -> None:
        space = self.space = Space("saved")
        linears = [op for op in ops if isinstance(op, Linear)]
        self.b_transposed = {
            name: space.elements(layer.lora_b.numel())
            for name, layer in block.layers.items()
            if layer.lora_b is not None
        }
        self.a = {op: self._place_of_a(block, op) for op in linears}
        self.xa = {op: space.matrix(ranks(block, op)) for op in linears}
        recomputed = {op.y for op in ops if isinstance(op, Gelu | SwiGLU | RmsNorm)}
        names = [op.x for op in linears if ranks(block, op) and op.x not in recomputed]
        names += [name for op in ops if isinstance(op, Attention | Gelu | SwiGLU | RmsNorm) for name in inputs(op)]
        self.values = {name: space.matrix(widths[name]) for name in dict.fromkeys(names) if name != "x"}
        self.norms = {
            op.norm: NormSaved(space.matrix(widths[op.x]), space.matrix(1), space.matrix(1))
            for op in ops
            if isinstance(op, AddNorm)
        }
        self.roots = {op.norm: space.matrix(1) for op in ops if isinstance(op, RmsNorm)}

    def _place_of_a(self, block: Block, op: Linear) -> Affine:
        """Of those one below the other; one alone stays where it is."""
        adapted = [name for name in op.layers if block.layers[name].lora_a is not None]
        if len(adapted) == 1:
            return symbol(f"a of {adapted[0]}")
        return self.space.elements(ranks(block, op) * shape(block.layers[op.layers[0]])[1])


def shape(layer: LinearLayer) -> tuple[int, int]:
    """(out, in) of its weight."""
    out_features, in_features = layer.weight(torch.float32).shape
    return out_features, in_features


def ranks(block: Block, op: Linear) -> int:
    """Of all its layers together."""
    return sum(rank(block.layers[name]) for name in op.layers)


def rank(layer: LinearLayer) -> int:
    """0 without a LoRA delta."""
    return 0 if layer.lora_a is None else len(layer.lora_a)


def active_ops(block: Block, variant: Variant) -> list[Op]:
    """Without those that give what they read: a subset of all rows, dropout at a rate of 0."""
    ops: list[Op] = []
    same: dict[str, str] = {}
    for op in block.ops:
        names = {field: same[name] for field, name in op._asdict().items() if field not in _NO_VALUES and name in same}
        renamed = op._replace(**names)  # type: ignore[arg-type]
        match renamed:
            case Subset(x, y) if not variant.subset:
                same[y] = x
            case Dropout(x, number, y) if not variant.dropout[number]:
                same[y] = x
            case _:
                ops.append(renamed)
    return ops


_NO_VALUES = ("layers", "norm", "number", "y")
"""Fields of ops that name no value which they read."""


def value_widths(block: Block, ops: Sequence[Op]) -> dict[str, int]:
    """Columns of each value."""
    widths = {"x": len(next(iter(block.norms.values())).weight)}
    for op in ops:
        if isinstance(op, Linear):
            widths |= {name: shape(block.layers[name])[0] for name in op.layers}
        else:
            widths[op.y] = widths[inputs(op)[0]]
    return widths
