"""Norm, gated unit, rotary embedding and cross-entropy on a GPU: one Triton kernel each way, where PyTorch takes three
to ten. A step of a small batch waits for its kernels to be started, one of a large batch for memory; both are saved.

They compute what the definitions beside their callers do (``rms_norm``, ``swiglu``, ``rotary``, ``cross_entropy``), in
fp32 inside and rounded once. ``kernels_for`` says whether tensors are for them; with ``TRITON_INTERPRET=1`` they run on
the CPU, slowly: so they are tested where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from capotune.kernels._triton import available

__all__ = [
    "kernels_for", "rms_norm", "rms_norm_backward", "rotary", "softmax_cross_entropy", "swiglu", "swiglu_backward",
]  # fmt: skip

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 2**15  # numbers of a row, or of a token's heads, that one program holds
_TILE = 1024  # columns of a row in one program, where they need not meet
_VOCABULARY_TILE = 4096


def kernels_for(*tensors: Tensor) -> bool:
    """Whether the kernels take these: on a GPU, none empty, all of one of ``DTYPES``."""
    first = tensors[0]
    if first.is_cpu and not available(first.device):  # the common case is told at once
        return False
    alike = all(one.dtype == first.dtype and one.device == first.device and one.numel() > 0 for one in tensors)
    return alike and first.dtype in DTYPES and available(first.device)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (rows, columns ≤ ``WIDEST``) contiguous, weight (columns,) → y like x, and r fp32 (rows,)."""
    rows, columns = x.shape
    y, roots = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    _kernel("rms_norm_kernel")[(rows,)](x, weight, y, roots, columns, eps, block=_power(columns), **_warps(columns))
    return y, roots


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, roots: Tensor) -> Tensor:
    """grad and x (rows, columns) contiguous → the gradient of x, a new tensor."""
    rows, columns = x.shape
    grad_x = torch.empty_like(x)
    _kernel("rms_norm_backward_kernel")[(rows,)](
        grad, x, weight, roots, grad_x, columns, block=_power(columns), **_warps(columns)
    )
    return grad_x


def swiglu(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """Matrices (rows, columns), each with its columns side by side; ``out`` is written and may be one of the others."""
    rows, columns = gate.shape
    strides = (one.stride(0) for one in (gate, up, out))
    _kernel("swiglu_kernel")[(rows, -(-columns // _TILE))](gate, up, out, *strides, columns, block=_TILE)


def swiglu_backward(read: Sequence[Tensor], written: Sequence[Tensor]) -> None:
    """Matrices as in ``swiglu``: y's gradient, gate and up; the gradients of gate and up, and y, which may be the first
    three."""
    rows, columns = read[0].shape
    matrices = (*read, *written)
    strides = (one.stride(0) for one in matrices)
    _kernel("swiglu_backward_kernel")[(rows, -(-columns // _TILE))](*matrices, *strides, columns, block=_TILE)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, heads: int, *, transposed: bool) -> None:
    """x and ``out`` (tokens, heads·size ≤ ``WIDEST``) with columns side by side, cos and sin (tokens, size)
    contiguous; ``out`` is written and may be x."""
    half = cos.shape[1] // 2
    _kernel("rotary_kernel")[(len(x),)](
        x, cos, sin, out, x.stride(0), out.stride(0), heads, half,
        transposed=transposed, block_heads=_power(heads), block_half=_power(half), **_warps(heads * half),
    )  # fmt: skip


def softmax_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float, in_place: bool) -> Tensor:
    """logits (n, vocabulary) with columns side by side, targets (n,) int64 → losses (n,) fp32; with ``in_place`` the
    gradients of the losses replace the logits. A target that is not in the vocabulary gives NaN."""
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _kernel("softmax_cross_entropy_kernel")[(rows,)](
        logits, targets, losses, logits.stride(0), columns, label_smoothing,
        in_place=in_place, block=_VOCABULARY_TILE, num_warps=8,
    )  # fmt: skip
    return losses


def _power(number: int) -> int:
    """The least power of 2 that is not less."""
    return 1 << (number - 1).bit_length()


def _warps(numbers: int) -> dict[str, int]:
    """More of them for long rows."""
    return {"num_warps": min(16, max(1, _power(numbers) // 512))}


@cache
def _kernel(name: str) -> Any:
    """By name; the first one imports Triton, which takes a second."""
    from capotune.kernels import _elementwise_triton_kernels

    found: Callable[..., Any] = getattr(_elementwise_triton_kernels, name)
    return found
