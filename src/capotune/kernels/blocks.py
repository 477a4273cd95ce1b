"""Transformer blocks as data: a list of ops for each family, and how plain PyTorch computes it.

A block is a list of ops in order. Each reads values by name and gives new ones; ``x`` is the block's input, ``y`` its
output, and every other name is given once. Three executors run the same list:

- ``reference`` here, in plain PyTorch: the definition, for tests,
- ``composed_block.py`` by the kernels' autograd functions, on any device,
- ``native_block.py`` as one program of C calls each for forward and backward, on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from capotune.kernels.attention import Sequences, packed_attention_reference
from capotune.kernels.lora_linear import LinearLayer, lora_reference
from capotune.kernels.prefix import LayerPrefix, prefixed_attention_reference
from capotune.kernels.reference import (
    add_layer_norm_reference,
    gelu_reference,
    rms_norm_reference,
    rotary_reference,
    swiglu_reference,
)

__all__ = [
    "BERT", "LLAMA", "Add", "AddNorm", "Attention", "Block", "Call", "Dropout", "Gelu", "Linear", "Norm", "Op",
    "RmsNorm", "Rotary", "Subset", "SwiGLU", "inputs", "outputs", "reference",
]  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------- ops


class Linear(NamedTuple):
    """Layers that share their input; each gives the value of its own name."""

    x: str
    layers: tuple[str, ...]


class Attention(NamedTuple):
    """softmax(scale·q kᵀ) v within each sequence; ``y`` has the heads beside each other."""

    q: str
    k: str
    v: str
    y: str


class Subset(NamedTuple):
    """The rows of x that the caller asks for, or all: what reads y is computed for these alone."""

    x: str
    y: str


class Dropout(NamedTuple):
    """At the ``number``-th of the block's rates."""

    x: str
    number: int
    y: str


class AddNorm(NamedTuple):
    """Layer norm of x + residual."""

    x: str
    residual: str
    norm: str
    y: str


class RmsNorm(NamedTuple):
    """Of x, times the norm's weight."""

    x: str
    norm: str
    y: str


class Rotary(NamedTuple):
    """Rotary position embedding of queries or keys."""

    x: str
    y: str


class Gelu(NamedTuple):
    """GELU, exact."""

    x: str
    y: str


class SwiGLU(NamedTuple):
    """silu(gate)·up."""

    gate: str
    up: str
    y: str


class Add(NamedTuple):
    """x + residual."""

    x: str
    residual: str
    y: str


Op = Linear | Attention | Subset | Dropout | AddNorm | RmsNorm | Rotary | Gelu | SwiGLU | Add


def inputs(op: Op) -> tuple[str, ...]:
    """Names of the values that it reads."""
    match op:
        case Linear(x, _) | Subset(x, _) | Dropout(x, _, _) | RmsNorm(x, _, _) | Rotary(x, _) | Gelu(x, _):
            return (x,)
        case Attention(q, k, v, _):
            return (q, k, v)
        case AddNorm(x, residual, _, _) | Add(x, residual, _):
            return (x, residual)
        case SwiGLU(gate, up, _):
            return (gate, up)


def outputs(op: Op) -> tuple[str, ...]:
    """Names of the values that it gives."""
    return op.layers if isinstance(op, Linear) else (op.y,)


# ------------------------------------------------------------------------------------------------------------ families

BERT: tuple[Op, ...] = (
    Linear("x", ("q", "k", "v")),
    Attention("q", "k", "v", "mixed"),
    Subset("mixed", "mixed_rows"),
    Subset("x", "x_rows"),
    Linear("mixed_rows", ("o",)),
    Dropout("o", 0, "o_dropped"),
    AddNorm("o_dropped", "x_rows", "norm1", "u"),
    Linear("u", ("up",)),
    Gelu("up", "wide"),
    Linear("wide", ("down",)),
    Dropout("down", 1, "down_dropped"),
    AddNorm("down_dropped", "u", "norm2", "y"),
)

LLAMA: tuple[Op, ...] = (
    RmsNorm("x", "norm1", "x_normed"),
    Linear("x_normed", ("q", "k", "v")),
    Rotary("q", "q_rotated"),
    Rotary("k", "k_rotated"),
    Attention("q_rotated", "k_rotated", "v", "mixed"),
    Subset("mixed", "mixed_rows"),
    Subset("x", "x_rows"),
    Linear("mixed_rows", ("o",)),
    Add("x_rows", "o", "u"),
    RmsNorm("u", "norm2", "u_normed"),
    Linear("u_normed", ("gate", "up")),
    SwiGLU("gate", "up", "wide"),
    Linear("wide", ("down",)),
    Add("u", "down", "y"),
)


# -------------------------------------------------------------------------------------------------------- one block


class Norm(NamedTuple):
    """Weight and bias (hidden,); an RMS norm has no bias."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float

    @property
    def is_frozen(self) -> bool:
        """Whether neither trains."""
        return not any(one is not None and one.requires_grad for one in (self.weight, self.bias))


@dataclass(frozen=True)
class Block:
    """A family's ops with the parts of one block, by the names that the ops have for them."""

    ops: tuple[Op, ...]
    layers: Mapping[str, LinearLayer]
    norms: Mapping[str, Norm]
    head_size: int
    scale: float
    """Of attention's scores."""
    causal: bool
    window: int | None = None
    """Of attention, in tokens; None: whole sequences."""
    prefix: LayerPrefix | None = None
    """Keys and values that attention reads before its own."""


@dataclass(frozen=True)
class Call:
    """What an executor is given beside x (tokens, hidden)."""

    sequences: Sequences
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None
    """cos and sin (tokens, head_size), for families with rotary embedding."""
    dropout: tuple[float, ...] = ()
    """Rates, by the numbers of ``Dropout``."""
    rows: torch.Tensor | None = None
    """Rows of the output that are computed, int64, each once; None: all."""


def reference(block: Block, x: torch.Tensor, call: Call) -> torch.Tensor:
    """The definition in plain PyTorch, of the shapes that executors have: x (tokens, hidden) → (tokens, hidden), or
    with ``call.rows`` (rows, hidden)."""
    values = {"x": x}
    for op in block.ops:
        match op:
            case Linear(source, names):
                values |= {name: _linear(values[source], block.layers[name]) for name in names}
            case Attention(q, k, v, y):
                query, key, value = (values[name].view(len(x), -1, block.head_size) for name in (q, k, v))
                how: dict[str, Any] = {"causal": block.causal, "scale": block.scale, "window": block.window}
                if block.prefix is not None and call.sequences.prefix:
                    mixed = prefixed_attention_reference(block.prefix, query, key, value, call.sequences, **how)
                else:
                    mixed = packed_attention_reference(query, key, value, call.sequences, **how)
                values[y] = mixed.flatten(1)
            case Subset(source, y):
                values[y] = values[source] if call.rows is None else values[source][call.rows]
            case Dropout(source, number, y):
                values[y] = functional.dropout(values[source], call.dropout[number]) if call.dropout else values[source]
            case AddNorm(source, residual, norm, y):
                values[y] = _add_norm(values[source], values[residual], block.norms[norm])
            case RmsNorm(source, norm, y):
                values[y] = rms_norm_reference(values[source], block.norms[norm].weight, block.norms[norm].eps)
            case Rotary(source, y):
                assert call.rotation is not None
                values[y] = rotary_reference(values[source].view(len(x), -1, block.head_size), *call.rotation)
            case Gelu(source, y):
                values[y] = gelu_reference(values[source])
            case SwiGLU(gate, up, y):
                values[y] = swiglu_reference(values[gate], values[up])
            case Add(source, residual, y):
                values[y] = values[source] + values[residual]
    return values["y"]


def _add_norm(x: torch.Tensor, residual: torch.Tensor, norm: Norm) -> torch.Tensor:
    assert norm.bias is not None
    return add_layer_norm_reference(x, residual, norm.weight, norm.bias, norm.eps)


def _linear(x: torch.Tensor, layer: LinearLayer) -> torch.Tensor:
    if layer.lora_a is None or layer.lora_b is None:
        return functional.linear(x, layer.weight(x.dtype), layer.bias)
    return lora_reference(x, layer.weight, layer.bias, layer.lora_a, layer.lora_b, layer.scale)
