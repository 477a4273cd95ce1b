"""Root mean square norm (Zhang and Sennrich 2019), as Llama and its kin have it.

    y = w ⊙ x·r        r = (mean(x²) + eps)^(−1/2), one per row
    dx = r·(g⊙w − x·r²·mean(g⊙w⊙x))        dw = Σ over rows of g ⊙ x·r

For the backward pass x and r are kept; autograd would keep x once more in fp32, its square and its product with r. On
the CPU each direction is one C call, on a GPU one kernel, elsewhere the same in PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from capotune.kernels import elementwise_triton
from capotune.kernels.native import address, check_shape, dtype_code, elementwise, over_rows

__all__ = ["RmsNorm", "rms_norm_reference"]


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The definition in plain PyTorch: computed in fp32 and rounded to x's dtype before the weight multiplies it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@dataclass(frozen=True)
class RmsNorm:
    """The same, faster and with less kept, as the prologue of linear layers: x (..., hidden) and weight (hidden,) →
    (..., hidden). Raises ``SettingError`` where the weight does not fit x."""

    eps: float
    learns: bool = False
    """Whether the weight is to have a gradient."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """y, and r in fp32."""
        check_shape("the norm's weight", weight, x.shape[-1:])
        y, roots = _forward(x, weight, self.eps)
        return y, (roots,)

    def backward(
        self, grad: torch.Tensor, saved: tuple[torch.Tensor, ...], *, recompute: bool
    ) -> tuple[tuple[torch.Tensor | None, ...], torch.Tensor | None]:
        """The gradients of x and, where it learns, of the weight, and y once more."""
        x, weight, roots = saved
        y = _forward(x, weight, self.eps)[0] if recompute else None
        of_weight = None
        if self.learns:
            products = grad.float().mul(x).reshape(-1, x.shape[-1])
            of_weight = torch.mv(products.t(), roots).to(weight.dtype)
        return (_backward(grad, x, weight, roots), of_weight), y


def _forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """y like x, and the reciprocal roots, fp32 (rows,)."""
    rows, columns = prod(x.shape[:-1]), x.shape[-1]
    lib = elementwise(x, weight)
    if lib is None and elementwise_triton.kernels_for(x, weight) and columns <= elementwise_triton.WIDEST:
        y, roots = elementwise_triton.rms_norm(x.reshape(rows, columns).contiguous(), weight.contiguous(), eps)
        return y.view(x.shape), roots
    if lib is None:
        wide = x.float().reshape(rows, columns)
        roots = torch.rsqrt(wide.pow(2).mean(-1) + eps)
        return weight * (wide * roots[:, None]).to(x.dtype).view(x.shape), roots
    x, weight = x.contiguous(), weight.contiguous()
    y, roots = torch.empty_like(x), torch.empty(rows, dtype=torch.float32)
    over_rows(
        lib, "rms_norm", rows, columns,
        dtype=dtype_code(x), x=address(x), weight=address(weight), columns=columns, eps=eps,
        y=address(y), roots=address(roots),
    )  # fmt: skip
    return y, roots


def _backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, roots: torch.Tensor) -> torch.Tensor:
    """The gradient of x, in its dtype."""
    rows, columns = prod(x.shape[:-1]), x.shape[-1]
    lib = elementwise(grad, x, weight)
    if lib is None and elementwise_triton.kernels_for(grad, x, weight) and columns <= elementwise_triton.WIDEST:
        grad_rows, x_rows = (one.reshape(rows, columns).contiguous() for one in (grad, x))
        return elementwise_triton.rms_norm_backward(grad_rows, x_rows, weight.contiguous(), roots).view(x.shape)
    if lib is None:
        wide, weighted, root = x.float(), grad.float() * weight.float(), roots.view(*x.shape[:-1], 1)
        return (root * (weighted - wide * (root**2 * (weighted * wide).mean(-1, keepdim=True)))).to(x.dtype)
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    grad_x = torch.empty_like(x)
    over_rows(
        lib, "rms_norm_backward", rows, columns,
        dtype=dtype_code(x), grad=address(grad), x=address(x), weight=address(weight), roots=address(roots),
        columns=columns, grad_x=address(grad_x),
    )  # fmt: skip
    return grad_x
