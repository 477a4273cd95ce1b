"""The backend in plain PyTorch: for any device and dtype, and what the faster ones are held against.

``…_reference`` are the definitions, which autograd can differentiate; the functions of the table (``backends.Backend``)
compute the same and its gradients outside of autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "LOGITS_DTYPES", "NAME", "add_layer_norm", "add_layer_norm_backward", "add_layer_norm_reference", "gather", "gelu",
    "gelu_backward", "gelu_reference", "project", "rms_norm", "rms_norm_backward", "rms_norm_reference", "rotary",
    "rotary_reference", "softmax_cross_entropy", "swiglu", "swiglu_backward", "swiglu_reference", "update",
]  # fmt: skip

NAME = "PyTorch"
LOGITS_DTYPES = (torch.float32,)


# ---------------------------------------------------------------------------------------------------------- definitions


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of x (..., hidden), computed in fp32 and rounded to x's dtype before the weight multiplies it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_layer_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm of x + residual, (rows, hidden)."""
    return functional.layer_norm(x + residual, weight.shape, weight, bias, eps)


def gelu_reference(x: Tensor) -> Tensor:
    """GELU, exact."""
    return functional.gelu(x)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate)·up."""
    return functional.silu(gate) * up


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (tokens, heads, head_dim); cos and sin (tokens, head_dim)."""
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos[:, None] + torch.cat((-b, a), dim=-1) * sin[:, None]


# ------------------------------------------------------------------------------------------------------------ the table


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.float().reshape(-1, x.shape[-1])
    roots = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    return weight * (wide * roots[:, None]).to(x.dtype).view(x.shape), roots


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, roots: Tensor) -> Tensor:
    wide, weighted, root = x.float(), grad.float() * weight.float(), roots.view(*x.shape[:-1], 1)
    return (root * (weighted - wide * (root**2 * (weighted * wide).mean(-1, keepdim=True)))).to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    total = x + residual
    y, means, roots = torch.native_layer_norm(total, [x.shape[1]], weight, bias, eps)
    return y, (total, means[:, 0], roots[:, 0])


def add_layer_norm_backward(grad: Tensor, total: Tensor, means: Tensor, roots: Tensor, weight: Tensor) -> Tensor:
    statistics, wanted = (means[:, None], roots[:, None]), [True, False, False]
    given = (grad, total, weight.shape, *statistics, weight, None)
    return torch.ops.aten.native_layer_norm_backward(*given, wanted)[0]  # type: ignore[no-any-return]


def gelu(x: Tensor) -> Tensor:
    return gelu_reference(x)


def gelu_backward(grad: Tensor, x: Tensor) -> None:
    torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad)
    torch.ops.aten.gelu.out(x, out=x)


def swiglu(gate: Tensor, up: Tensor, out: Tensor) -> None:
    out.copy_(swiglu_reference(gate, up))


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, y: Tensor) -> None:
    # in fp32 (fp64 for fp64): 1 − s is taken as s(−gate), which does not cancel
    wide = torch.promote_types(gate.dtype, torch.float32)
    g, a, b = grad.to(wide), gate.to(wide), up.to(wide)
    s = torch.sigmoid(a)
    found = g * b * (s * (1 + a * torch.sigmoid(-a))), g * (a * s), swiglu_reference(gate, up)
    for target, values in zip((grad_gate, grad_up, y), found, strict=True):
        target.copy_(values)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, heads: int, *, transposed: bool) -> None:
    x, out = (one.view(len(cos), heads, cos.shape[1]) for one in (x, out))
    out.copy_(_rotary_transposed(x, cos, sin) if transposed else rotary_reference(x, cos, sin))


def _rotary_transposed(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    product = grad * sin[:, None]
    a, b = product[..., : product.shape[-1] // 2], product[..., product.shape[-1] // 2 :]
    return grad * cos[:, None] + torch.cat((b, -a), dim=-1)


def softmax_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float, in_place: bool) -> Tensor:
    target, total = targets[:, None], logits.logsumexp(1)
    losses = total - (1 - label_smoothing) * logits.gather(1, target)[:, 0]
    if label_smoothing:
        losses -= label_smoothing * logits.mean(1)
    if in_place:
        logits.sub_(total[:, None]).exp_()  # softmax
        logits.scatter_add_(1, target, torch.full_like(target, -(1 - label_smoothing), dtype=logits.dtype))
        if label_smoothing:
            logits.sub_(label_smoothing / logits.shape[1])
    return losses


def project(x: Tensor, matrix: Tensor, scale: float, out: Tensor | None) -> Tensor:
    if x.is_cuda:
        out = torch.empty(x.shape[0], matrix.shape[0], dtype=x.dtype, device=x.device) if out is None else out
        return torch.addmm(out, x, matrix.to(x.dtype).t(), beta=0, alpha=scale, out=out)  # beta 0: out is not read
    xa = matrix.to(x.dtype) @ x.t()  # the rank first in memory: with it last, a CPU takes twice as long
    xa = (xa if scale == 1 else xa.mul_(scale)).t()
    return xa if out is None else out.copy_(xa)


def update(x: Tensor, xa: Tensor, matrix: Tensor, scale: float) -> Tensor:
    return x.addmm_(xa, matrix.to(x.dtype), alpha=scale)


def gather(xa: Tensor, x: Tensor, scale: float) -> Tensor:
    matrix = torch.empty(xa.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
    return torch.addmm(matrix, xa.t(), x, beta=0, alpha=scale, out=matrix)
