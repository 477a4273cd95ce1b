"""A block's ops by the kernels' autograd functions, one after the other: on any device, in any dtype.

A norm or an activation whose output is read by linear layers alone is their prologue (``lora_linear.py``): it is
computed inside their function, and what they read is not saved for backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional

from capotune.kernels import blocks
from capotune.kernels.blocks import Block, Call, Norm
from capotune.kernels.gelu import GeluPrologue
from capotune.kernels.layer_norm import add_layer_norm
from capotune.kernels.lora_linear import Prologue, lora_linears
from capotune.kernels.prefix import prefixed_attention
from capotune.kernels.rms_norm import RmsNormPrologue
from capotune.kernels.rotary import rotary
from capotune.kernels.swiglu import SwiGLUPrologue

__all__ = ["ComposedBlock"]

Values = dict[str, torch.Tensor]


class ComposedBlock:
    """Executes ``block``, whose layers are read when this is made."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self._prologues: dict[str, _Prologue] = {}
        """By the value that each gives."""
        steps = [step for op in block.ops if (step := self._step(op)) is not None]
        last_reads = {name: number for number, step in enumerate(steps) for name in step.reads}
        self._steps = [
            (step.run, tuple(name for name, last in last_reads.items() if last == number))
            for number, step in enumerate(steps)
        ]
        """Each with the values that nothing reads after it."""

    def __call__(self, x: torch.Tensor, call: Call) -> torch.Tensor:
        """x (tokens, hidden) → (tokens, hidden), or with ``call.rows`` (rows, hidden)."""
        values = {"x": x}
        for run, read_last in self._steps:
            run(values, call)
            for name in read_last:
                del values[name]
        return values["y"]

    def _step(self, op: blocks.Op) -> _Step | None:
        """What computes the op; None for a prologue, which the linear layers that read it compute."""
        norms, reads = self._block.norms, blocks.inputs(op)
        match op:
            case blocks.RmsNorm():
                norm = norms[op.norm]
                self._prologues[op.y] = _Prologue(
                    reads, (norm.weight,), RmsNormPrologue(norm.eps, trains=not norm.is_frozen)
                )
            case blocks.Gelu():
                self._prologues[op.y] = _Prologue(reads, (), GeluPrologue())
            case blocks.SwiGLU():
                self._prologues[op.y] = _Prologue(reads, (), SwiGLUPrologue())
            case blocks.Linear():
                return self._linear(op)
            case blocks.Attention():
                return _Step(partial(_attention, op, self._block), reads)
            case blocks.Rotary():
                return _Step(partial(_rotary, op, self._block.head_size), reads)
            case blocks.Subset():
                return _Step(partial(_subset, op), reads)
            case blocks.Dropout():
                return _Step(partial(_dropout, op), reads)
            case blocks.AddNorm():
                return _Step(partial(_add_norm, op, norms[op.norm]), reads)
            case blocks.Add():
                return _Step(partial(_add, op), reads)
        return None

    def _linear(self, op: blocks.Linear) -> _Step:
        layers = tuple(self._block.layers[name] for name in op.layers)
        before = self._prologues.get(op.x, _Prologue((op.x,), (), None))

        def run(values: Values, _call: Call) -> None:
            sources = (*(values[name] for name in before.reads), *before.weights)
            values.update(zip(op.layers, lora_linears(sources, layers, before.prologue), strict=True))

        return _Step(run, before.reads)


class _Step(NamedTuple):
    run: Callable[[Values, Call], None]
    reads: tuple[str, ...]


class _Prologue(NamedTuple):
    reads: tuple[str, ...]
    weights: tuple[torch.Tensor, ...]
    prologue: Prologue | None


def _heads(x: torch.Tensor, head_size: int) -> torch.Tensor:
    """(tokens, heads·head_size) → (tokens, heads, head_size), which rotary embedding gives already."""
    return x if x.dim() == 3 else x.view(len(x), -1, head_size)


def _attention(op: blocks.Attention, block: Block, values: Values, call: Call) -> None:
    q, k, v = (_heads(values[name], block.head_size) for name in (op.q, op.k, op.v))
    how = {"causal": block.causal, "scale": block.scale, "window": block.window}
    values[op.y] = prefixed_attention(block.prefix, q, k, v, call.sequences, **how).flatten(1)


def _rotary(op: blocks.Rotary, head_size: int, values: Values, call: Call) -> None:
    assert call.rotation is not None
    values[op.y] = rotary(_heads(values[op.x], head_size), *call.rotation)


def _subset(op: blocks.Subset, values: Values, call: Call) -> None:
    values[op.y] = values[op.x] if call.rows is None else values[op.x][call.rows]


def _dropout(op: blocks.Dropout, values: Values, call: Call) -> None:
    rate = call.dropout[op.number] if call.dropout else 0.0
    values[op.y] = functional.dropout(values[op.x], rate) if rate else values[op.x]


def _add_norm(op: blocks.AddNorm, norm: Norm, values: Values, _call: Call) -> None:
    x, residual = values[op.x], values[op.residual]
    assert norm.bias is not None
    if norm.is_frozen:
        values[op.y] = add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)
    else:
        values[op.y] = functional.layer_norm(x + residual, norm.weight.shape, norm.weight, norm.bias, norm.eps)


def _add(op: blocks.Add, values: Values, _call: Call) -> None:
    values[op.y] = values[op.x] + values[op.residual]
