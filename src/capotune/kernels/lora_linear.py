"""Frozen linear layers with a low-rank change: y = xWᵀ + bias + scale·(xAᵀ)Bᵀ.

``lora_linears`` is one autograd function for all layers that share an input (query, key and value; gate and up). Of
all that autograd would keep for the plain expression (``lora_reference``) it keeps x once and the small products xAᵀ.
It asks for no gradient of W, takes the small products of all layers in one, adds every change in place, and asks for
the dense W anew in the backward pass, so that a 4-bit W never lives between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

FrozenWeight = Callable[[torch.dtype], torch.Tensor]
"""Gives the dense frozen weight (out, in) in the asked dtype."""
Remake = Callable[[], torch.Tensor]
"""Computes x again in the backward pass."""


@dataclass(frozen=True)
class LowRank:
    """One layer: frozen ``weight`` (out, in) and ``bias`` (out,), trained ``a`` (rank, in) and ``b`` (out, rank)."""

    weight: FrozenWeight
    bias: torch.Tensor | None
    a: torch.Tensor
    b: torch.Tensor
    scale: float


def lora_reference(
    x: torch.Tensor, weight: FrozenWeight, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """The definition of one layer in plain PyTorch. Shapes as in ``lora_linear``."""
    change = functional.linear(functional.linear(x, a.to(x.dtype)), b.to(x.dtype))
    return functional.linear(x, weight(x.dtype), bias) + scale * change


def lora_linear(
    x: torch.Tensor, weight: FrozenWeight, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """The same, faster: x (..., in), a (rank, in), b (out, rank), bias (out,) frozen → (..., out) in x's dtype.

    a and b may be fp32 while x is bf16; their gradients come back in their own dtype.
    """
    return lora_linears(x, (LowRank(weight, bias, a, b, scale),))[0]


def lora_linears(x: torch.Tensor, layers: Sequence[LowRank], remake: Remake | None = None) -> tuple[torch.Tensor, ...]:
    """Several layers on one input: x (..., in) → (..., out) of each.

    With ``remake`` x is not kept for the backward pass but computed again there: for an x that is cheap to compute from
    what is kept anyway.
    """
    trained = [weight for layer in layers for weight in (layer.a, layer.b)]
    return _LoraLinears.apply(x, tuple(layers), remake, *trained)  # type: ignore[no-any-return, no-untyped-call]


class _LoraLinears(torch.autograd.Function):
    """The small products are taken with the rank as their first dimension, (rank, rows): with it last, at rank 8, a
    CPU's backward pass takes two to four times as long for them."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layers: tuple[LowRank, ...], remake: Remake | None, *trained: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        low = _stacked(trained[0::2]).to(x.dtype) @ rows.t()  # (all ranks, rows)
        outs = []
        for layer, low_part in zip(layers, _by_rank(low, layers), strict=True):
            y = functional.linear(rows, layer.weight(x.dtype), layer.bias)
            y.addmm_(low_part.t(), layer.b.to(x.dtype).t(), alpha=layer.scale)
            outs.append(y.view(*x.shape[:-1], y.shape[-1]))
        ctx.save_for_backward(None if remake else rows, low, *trained)
        ctx.layers, ctx.remake, ctx.shape = layers, remake, x.shape
        return tuple(outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, low, *trained = ctx.saved_tensors
        if ctx.remake:
            rows = ctx.remake().reshape(-1, ctx.shape[-1])
        grad_low, grad_x, trained_grads = torch.empty_like(low), None, []
        parts = zip(ctx.layers, grads, _by_rank(low, ctx.layers), _by_rank(grad_low, ctx.layers), strict=True)
        for layer, grad, low_part, grad_low_part in parts:
            grad = grad.reshape(-1, grad.shape[-1])
            torch.mm(layer.b.to(grad.dtype).t(), grad.t(), out=grad_low_part).mul_(layer.scale)
            trained_grads.append(torch.mul(low_part @ grad, layer.scale).t().to(layer.b.dtype))
            if ctx.needs_input_grad[0]:  # not below the lowest adapted layer
                weight = layer.weight(grad.dtype)
                grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
        a = _stacked(trained[0::2])
        grads_a = _by_rank((grad_low @ rows).to(a.dtype), ctx.layers)
        if grad_x is not None:
            grad_x = grad_x.addmm_(grad_low.t(), a.to(grad_x.dtype)).view(ctx.shape)
        return grad_x, None, None, *(grad for pair in zip(grads_a, trained_grads, strict=True) for grad in pair)


def _stacked(a: Sequence[torch.Tensor]) -> torch.Tensor:
    """Every layer's A one below the other, (all ranks, in)."""
    return a[0] if len(a) == 1 else torch.cat(tuple(a))


def _by_rank(stacked: torch.Tensor, layers: tuple[LowRank, ...]) -> tuple[torch.Tensor, ...]:
    """(all ranks, …) → views (rank, …), one for each layer."""
    return torch.split(stacked, [len(layer.a) for layer in layers])
