"""The backend in Triton, on a GPU: norm, gated unit, rotary embedding and cross-entropy by one kernel each way, where
PyTorch takes three to ten. A step of a small batch waits for its kernels to be started, one of a large batch for
memory; both are saved.

They compute in fp32 inside and round once. What has no kernel here (layer norm and GELU, the small products, empty
tensors, rows that one program cannot hold) PyTorch computes. With ``TRITON_INTERPRET=1`` the kernels run on the CPU,
slowly: so they are tested where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from capotune.kernels import reference
from capotune.kernels.reference import (
    add_layer_norm,
    add_layer_norm_backward,
    gather,
    gelu,
    gelu_backward,
    project,
    update,
)

__all__ = [
    "DTYPES", "LOGITS_DTYPES", "NAME", "add_layer_norm", "add_layer_norm_backward", "gather", "gelu", "gelu_backward",
    "project", "rms_norm", "rms_norm_backward", "rotary", "softmax_cross_entropy", "swiglu", "swiglu_backward",
    "update",
]  # fmt: skip

NAME = "PyTorch and Triton"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOGITS_DTYPES = DTYPES
WIDEST = 2**15  # elements of a row, or of a token's heads, that one program holds
_TILE = 1024  # columns of a row in one program, where they need not meet
_VOCABULARY_TILE = 4096


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    columns = x.shape[-1]
    if not _fits(x, columns):
        return reference.rms_norm(x, weight, eps)
    x = x.contiguous()
    rows = x.numel() // columns
    y, roots = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    _kernel("rms_norm_kernel")[(rows,)](
        x, weight.contiguous(), y, roots, columns, eps, block=_power(columns), **_warps(columns)
    )
    return y, roots


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, roots: Tensor) -> Tensor:
    columns = x.shape[-1]
    if not _fits(x, columns):
        return reference.rms_norm_backward(grad, x, weight, roots)
    grad, x = grad.contiguous(), x.contiguous()
    grad_x = torch.empty_like(x)
    _kernel("rms_norm_backward_kernel")[(len(roots),)](
        grad, x, weight.contiguous(), roots, grad_x, columns, block=_power(columns), **_warps(columns)
    )
    return grad_x


def swiglu(gate: Tensor, up: Tensor, out: Tensor) -> None:
    if gate.numel() == 0:
        return
    rows, columns = gate.shape
    strides = (one.stride(0) for one in (gate, up, out))
    _kernel("swiglu_kernel")[(rows, -(-columns // _TILE))](gate, up, out, *strides, columns, block=_TILE)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, y: Tensor) -> None:
    if gate.numel() == 0:
        return
    rows, columns = gate.shape
    matrices = grad, gate, up, grad_gate, grad_up, y
    strides = (one.stride(0) for one in matrices)
    _kernel("swiglu_backward_kernel")[(rows, -(-columns // _TILE))](*matrices, *strides, columns, block=_TILE)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, heads: int, *, transposed: bool) -> None:
    if not _fits(x, x.shape[1]):
        reference.rotary(x, cos, sin, out, heads, transposed=transposed)
        return
    cos, sin, half = cos.contiguous(), sin.contiguous(), cos.shape[1] // 2
    _kernel("rotary_kernel")[(len(x),)](
        x, cos, sin, out, x.stride(0), out.stride(0), heads, half,
        transposed=transposed, block_heads=_power(heads), block_half=_power(half), **_warps(heads * half),
    )  # fmt: skip


def softmax_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float, in_place: bool) -> Tensor:
    """A target that is not in the vocabulary gives NaN."""
    if logits.numel() == 0 or logits.stride(1) != 1:
        return reference.softmax_cross_entropy(logits, targets, label_smoothing, in_place)
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _kernel("softmax_cross_entropy_kernel")[(rows,)](
        logits, targets.contiguous(), losses, logits.stride(0), columns, label_smoothing,
        in_place=in_place, block=_VOCABULARY_TILE, num_warps=8,
    )  # fmt: skip
    return losses


def _fits(x: Tensor, row: int) -> bool:
    """Whether one program can hold a row of so many elements, and there is one."""
    return x.numel() > 0 and row <= WIDEST


def _power(number: int) -> int:
    """The least power of 2 that is not less."""
    return 1 << (number - 1).bit_length()


def _warps(elements: int) -> dict[str, int]:
    """More of them for long rows."""
    return {"num_warps": min(16, max(1, _power(elements) // 512))}


@cache
def _kernel(name: str) -> Any:
    """By name; the first one imports Triton, which takes a second."""
    from capotune.kernels import _elementwise_triton_kernels

    found: Callable[..., Any] = getattr(_elementwise_triton_kernels, name)
    return found
