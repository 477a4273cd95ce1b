"""Layer norm of a sum, with a frozen weight and bias, as it stands behind both halves of a BERT block.

    y = w ⊙ (t − m)·r + b        t = x + residual, m = mean(t), r = (mean((t − m)²) + eps)^(−1/2), one each per row
    dx = d residual = r·(g⊙w − mean(g⊙w) − n·mean(g⊙w⊙n))        n = (t − m)·r

t, m and r are saved for backward. On the CPU each direction is one C call, elsewhere the same in PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch

from capotune.kernels.backends import backend_for
from capotune.kernels.native import check_shape
from capotune.kernels.reference import add_layer_norm_reference

__all__ = ["add_layer_norm", "add_layer_norm_backward", "add_layer_norm_forward", "add_layer_norm_reference"]

Saved = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""t (rows, hidden), m (rows,) and r (rows,), the last two in fp32."""


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """The same, faster and with less saved; shapes and errors as in ``add_layer_norm_forward``."""
    return _AddLayerNorm.apply(x, residual, weight, bias, eps)  # type: ignore[no-any-return, no-untyped-call]


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor:
        y, saved = add_layer_norm_forward(x, residual, weight, bias, eps)
        ctx.save_for_backward(*saved)
        ctx.weight = weight
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_x = add_layer_norm_backward(grad, ctx.saved_tensors, ctx.weight)
        return grad_x, grad_x, None, None, None


@torch.no_grad()
def add_layer_norm_forward(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, Saved]:
    """x and residual (rows, hidden), weight and bias (hidden,) → y (rows, hidden) and what ``…_backward`` needs.

    Raises ``SettingError`` where shapes do not fit.
    """
    columns = x.shape[1]
    check_shape("residual", residual, x.shape)
    check_shape("the norm's weight", weight, (columns,))
    check_shape("the norm's bias", bias, (columns,))
    return backend_for(x, residual, weight, bias).add_layer_norm(x, residual, weight, bias, eps)


@torch.no_grad()
def add_layer_norm_backward(grad: torch.Tensor, saved: Saved, weight: torch.Tensor) -> torch.Tensor:
    """The gradient of x, which is the residual's too, from that of y (rows, hidden); a new tensor."""
    total, means, roots = saved
    check_shape("grad", grad, total.shape)
    return backend_for(grad, total, weight).add_layer_norm_backward(grad, total, means, roots, weight)
