"""Rotary position embedding (Su et al. 2021), in the form of Transformers' Llama: a head's two halves rotate together.

With a head's halves (a, b) and those of cos and sin:

    y = (a·cos_a − b·sin_a,  b·cos_b + a·sin_b)        dx = (g_a·cos_a + g_b·sin_b,  g_b·cos_b − g_a·sin_a)

cos and sin are saved for backward, nothing else; autograd would save the rotated halves too. On the CPU each
direction is one C call, on a GPU one kernel, elsewhere the same in PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch

from capotune.kernels.backends import backend_for
from capotune.kernels.native import as_rows, check_shape, output_rows
from capotune.kernels.reference import rotary_reference

__all__ = ["rotary", "rotary_backward", "rotary_forward", "rotary_reference"]


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The same, faster and with less saved: x (tokens, heads, head_dim), cos and sin (tokens, head_dim) without a
    gradient → (tokens, heads, head_dim), contiguous. Raises as ``rotary_forward`` does."""
    return _Rotary.apply(x, cos, sin)  # type: ignore[no-any-return, no-untyped-call]


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return rotary_forward(x, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return rotary_backward(grad, *ctx.saved_tensors), None, None


def rotary_forward(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``rotary`` outside of autograd, into ``out`` or a new contiguous tensor.

    The rows of x and of ``out`` may be a slice of the columns of a larger matrix; ``out`` may be x. Raises
    ``SettingError`` where shapes do not fit, head_dim is odd, or ``out`` has another layout.
    """
    return _rotate(x, cos, sin, out, transposed=False)


def rotary_backward(
    grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient of x from that of y; shapes, ``out`` and errors as in ``rotary_forward``."""
    return _rotate(grad, cos, sin, out, transposed=True)


@torch.no_grad()
def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor | None, *, transposed: bool
) -> torch.Tensor:
    tokens, heads, size = x.shape
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for name, tensor, shape in (("cos", cos, (tokens, size)), ("sin", sin, (tokens, size)), ("out", out, x.shape)):
        check_shape(name, tensor, shape)
    check_shape("x", x, (tokens, heads, size // 2 * 2))
    written = output_rows(out, tokens, heads * size)
    read = as_rows(x, tokens, heads * size)
    backend_for(x, cos, sin, out).rotary(read, cos, sin, written, heads, transposed=transposed)
    return out
