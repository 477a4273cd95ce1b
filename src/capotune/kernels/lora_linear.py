"""A frozen linear layer with a low-rank change: y = xWᵀ + bias + scale·(xAᵀ)Bᵀ.

``lora_linear`` is one autograd function. Next to what autograd would keep for the plain expression (``lora_reference``)
it keeps x and the small product xAᵀ only, asks for no gradient of W, adds the change into y in place, and asks for the
dense W anew in the backward pass, so that a 4-bit W never lives between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

FrozenWeight = Callable[[torch.dtype], torch.Tensor]
"""Gives the dense frozen weight (out, in) in the asked dtype."""


def lora_reference(
    x: torch.Tensor, weight: FrozenWeight, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """The definition in plain PyTorch. Shapes as in ``lora_linear``."""
    change = functional.linear(functional.linear(x, a.to(x.dtype)), b.to(x.dtype))
    return functional.linear(x, weight(x.dtype), bias) + scale * change


def lora_linear(
    x: torch.Tensor, weight: FrozenWeight, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """The same, faster: x (..., in), a (rank, in), b (out, rank), bias (out,) frozen → (..., out) in x's dtype.

    a and b may be fp32 while x is bf16; their gradients come back in their own dtype.
    """
    return _LoraLinear.apply(x, a, b, weight, bias, scale)  # type: ignore[no-any-return, no-untyped-call]


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        weight: FrozenWeight,
        bias: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ a.to(x.dtype).t()  # (rows, rank)
        y = functional.linear(rows, weight(x.dtype), bias)
        y.addmm_(low, b.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(rows, low, a, b)
        ctx.weight, ctx.scale, ctx.shape = weight, scale, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, low, a, b = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_low = (grad @ b.to(grad.dtype)).mul_(ctx.scale)  # (rows, rank)
        grad_b = torch.mul(grad.t() @ low, ctx.scale).to(b.dtype)
        grad_a = (grad_low.t() @ rows).to(a.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:  # not below the lowest adapted layer
            grad_x = (grad @ ctx.weight(grad.dtype)).addmm_(grad_low, a.to(grad.dtype)).view(ctx.shape)
        return grad_x, grad_a, grad_b, None, None, None
