"""Root mean square norm of a frozen weight (Zhang and Sennrich 2019), as Llama and its kin have it.

    y = w ⊙ x·r        r = (mean(x²) + eps)^(−1/2), one per row
    dx = r·(g⊙w − x·r²·mean(g⊙w⊙x))

For the backward pass x and r are kept; autograd would keep x once more in fp32, its square and its product with r. On
the CPU each direction is one C call, elsewhere the same in PyTorch.
"""

from __future__ import annotations

from ctypes import c_double, c_int64
from math import prod
from typing import Any

import torch

from capotune.kernels._native import check_shape, dtype_code, elementwise, over_rows, pointer

__all__ = ["rms_norm", "rms_norm_reference"]


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The definition in plain PyTorch: computed in fp32 and rounded to x's dtype before the weight multiplies it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The same, faster and with less kept: x (..., hidden), weight (hidden,) → (..., hidden).

    A weight that asks for a gradient gets it by way of ``rms_norm_reference``. Raises ``SettingError`` where the weight
    does not fit x.
    """
    check_shape("the norm's weight", weight, x.shape[-1:])
    if weight.requires_grad and torch.is_grad_enabled():
        return rms_norm_reference(x, weight, eps)
    return _RmsNorm.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y, roots = _forward(x, weight, eps)
        ctx.save_for_backward(x, roots)
        ctx.weight = weight
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, roots = ctx.saved_tensors
        return _backward(grad, x, ctx.weight, roots), None, None


def _forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """y like x, and the reciprocal roots, fp32 (rows,)."""
    rows, columns = prod(x.shape[:-1]), x.shape[-1]
    lib = elementwise(x, weight)
    if lib is None:
        wide = x.float().reshape(rows, columns)
        roots = torch.rsqrt(wide.pow(2).mean(-1) + eps)
        return weight * (wide * roots[:, None]).to(x.dtype).view(x.shape), roots
    x, weight = x.contiguous(), weight.contiguous()
    y, roots = torch.empty_like(x), torch.empty(rows, dtype=torch.float32)
    read = (dtype_code(x), pointer(x), pointer(weight), c_int64(columns), c_double(eps))
    over_rows(lib, "rms_norm", (*read, pointer(y), pointer(roots)), rows, columns)
    return y, roots


def _backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, roots: torch.Tensor) -> torch.Tensor:
    """The gradient of x, in its dtype."""
    rows, columns = prod(x.shape[:-1]), x.shape[-1]
    lib = elementwise(grad, x, weight)
    if lib is None:
        wide, weighted, root = x.float(), grad.float() * weight.float(), roots.view(*x.shape[:-1], 1)
        return (root * (weighted - wide * (root**2 * (weighted * wide).mean(-1, keepdim=True)))).to(x.dtype)
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    grad_x = torch.empty_like(x)
    read = (dtype_code(x), pointer(grad), pointer(x), pointer(weight), pointer(roots), c_int64(columns))
    over_rows(lib, "rms_norm_backward", (*read, pointer(grad_x)), rows, columns)
    return grad_x
