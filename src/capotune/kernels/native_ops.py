"""The backend in C: fp32 and bf16 on a CPU, one pass over the elements for each function (``native.py``).

``backends.backend_for`` has seen to it that all tensors of a call are of one such dtype and on the CPU: C reads what it
is given. What a kernel does not take (rows that are not contiguous, many ranks) PyTorch computes.
"""

from __future__ import annotations

from ctypes import CDLL
from math import prod

import torch
from torch import Tensor

from capotune.kernels import native, reference
from capotune.kernels.native import address, dtype_code, over_rows

__all__ = [
    "DTYPES", "LOGITS_DTYPES", "MOST_RANKS", "NAME", "add_layer_norm", "add_layer_norm_backward", "gather", "gelu",
    "gelu_backward", "project", "rms_norm", "rms_norm_backward", "rotary", "softmax_cross_entropy", "swiglu",
    "swiglu_backward", "update",
]  # fmt: skip

NAME = "C"
DTYPES = (torch.float32, torch.bfloat16)
LOGITS_DTYPES = (torch.float32,)
MOST_RANKS = 48
"""That products_cpu.c has registers for."""
_LANES = 8  # columns that it takes together


def _elementwise() -> CDLL:
    lib = native.library("elementwise_cpu")
    assert lib is not None
    return lib


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows, columns = prod(x.shape[:-1]), x.shape[-1]
    x, weight = x.contiguous(), weight.contiguous()
    y, roots = torch.empty_like(x), torch.empty(rows, dtype=torch.float32)
    over_rows(
        _elementwise(), "rms_norm", rows, columns,
        dtype=dtype_code(x), x=address(x), weight=address(weight), columns=columns, eps=eps,
        y=address(y), roots=address(roots),
    )  # fmt: skip
    return y, roots


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, roots: Tensor) -> Tensor:
    rows, columns = prod(x.shape[:-1]), x.shape[-1]
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    grad_x = torch.empty_like(x)
    over_rows(
        _elementwise(), "rms_norm_backward", rows, columns,
        dtype=dtype_code(x), grad=address(grad), x=address(x), weight=address(weight), roots=address(roots),
        columns=columns, grad_x=address(grad_x),
    )  # fmt: skip
    return grad_x


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    rows, columns = x.shape
    x, residual, weight, bias = (tensor.contiguous() for tensor in (x, residual, weight, bias))
    total, y, means, roots = torch.empty_like(x), torch.empty_like(x), *torch.empty(2, rows, dtype=torch.float32)
    over_rows(
        _elementwise(), "add_layer_norm", rows, columns,
        dtype=dtype_code(x), x=address(x), residual=address(residual), weight=address(weight), bias=address(bias),
        columns=columns, eps=eps, total=address(total), y=address(y), means=address(means), roots=address(roots),
    )  # fmt: skip
    return y, (total, means, roots)


def add_layer_norm_backward(grad: Tensor, total: Tensor, means: Tensor, roots: Tensor, weight: Tensor) -> Tensor:
    grad, weight = grad.contiguous(), weight.contiguous()
    rows, columns = grad.shape
    grad_x = torch.empty_like(grad)
    over_rows(
        _elementwise(), "add_layer_norm_backward", rows, columns,
        dtype=dtype_code(grad), grad=address(grad), total=address(total), weight=address(weight),
        means=address(means), roots=address(roots), columns=columns, grad_x=address(grad_x),
    )  # fmt: skip
    return grad_x


def gelu(x: Tensor) -> Tensor:
    if not x.is_contiguous():
        return reference.gelu(x)
    y, (rows, columns) = torch.empty_like(x), x.shape
    over_rows(_elementwise(), "gelu", rows, columns, dtype=dtype_code(x), columns=columns, x=address(x), y=address(y))
    return y


def gelu_backward(grad: Tensor, x: Tensor) -> None:
    if not (x.is_contiguous() and grad.is_contiguous()):
        reference.gelu_backward(grad, x)
        return
    rows, columns = x.shape
    over_rows(
        _elementwise(), "gelu_backward", rows, columns,
        dtype=dtype_code(x), columns=columns, grad=address(grad), x=address(x), grad_x=address(grad), y=address(x),
    )  # fmt: skip


def swiglu(gate: Tensor, up: Tensor, out: Tensor) -> None:
    rows, columns = gate.shape
    over_rows(
        _elementwise(), "swiglu", rows, columns,
        dtype=dtype_code(out), columns=columns, gate=address(gate), up=address(up), y=address(out),
        gate_stride=gate.stride(0), up_stride=up.stride(0), y_stride=out.stride(0),
    )  # fmt: skip


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, y: Tensor) -> None:
    rows, columns = gate.shape
    over_rows(
        _elementwise(), "swiglu_backward", rows, columns,
        dtype=dtype_code(grad), columns=columns, grad=address(grad), gate=address(gate), up=address(up),
        grad_gate=address(grad_gate), grad_up=address(grad_up), y=address(y),
        grad_stride=grad.stride(0), gate_stride=gate.stride(0), up_stride=up.stride(0),
        grad_gate_stride=grad_gate.stride(0), grad_up_stride=grad_up.stride(0), y_stride=y.stride(0),
    )  # fmt: skip


def rotary(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, heads: int, *, transposed: bool) -> None:
    (tokens, columns), cos, sin = x.shape, cos.contiguous(), sin.contiguous()
    over_rows(
        _elementwise(), "rotary", tokens, columns,
        dtype=dtype_code(x), heads=heads, half=columns // heads // 2 if heads else 0, x=address(x), cos=address(cos),
        sin=address(sin), y=address(out), x_stride=x.stride(0), y_stride=out.stride(0), transposed=transposed,
    )  # fmt: skip


def softmax_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float, in_place: bool) -> Tensor:
    if logits.dtype != torch.float32 or not logits.is_contiguous():
        return reference.softmax_cross_entropy(logits, targets, label_smoothing, in_place)
    rows, columns = logits.shape
    targets, losses = targets.contiguous(), torch.empty(rows, dtype=torch.float32)
    over_rows(
        _elementwise(), "softmax_cross_entropy", rows, columns,
        logits=address(logits), columns=columns, targets=address(targets), smoothing=label_smoothing,
        in_place=in_place, losses=address(losses),
    )  # fmt: skip
    return losses


# --------------------------------------------------------------------------------- the small products of a LoRA delta


def project(x: Tensor, matrix: Tensor, scale: float, out: Tensor | None) -> Tensor:
    lib = _low_rank(x, x if out is None else out, matrix)
    if lib is None:
        return reference.project(x, matrix, scale, out)
    if out is None:
        out = torch.empty(x.shape[0], matrix.shape[0], dtype=x.dtype)
    _run(lib, "low_rank_project", x, out, matrix.contiguous(), scale, items=len(x), work=matrix.numel())
    return out


def update(x: Tensor, xa: Tensor, matrix: Tensor, scale: float) -> Tensor:
    lib = _low_rank(x, xa, matrix)
    if lib is None:
        return reference.update(x, xa, matrix, scale)
    _run(lib, "low_rank_update", x, xa, matrix.contiguous(), scale, items=len(x), work=matrix.numel())
    return x


def gather(xa: Tensor, x: Tensor, scale: float) -> Tensor:
    matrix = torch.empty(xa.shape[1], x.shape[1], dtype=x.dtype)
    lib = _low_rank(x, xa, matrix)
    if lib is None:
        return reference.gather(xa, x, scale)
    groups = -(-x.shape[1] // _LANES)
    _run(lib, "low_rank_gather", x, xa, matrix, scale, items=groups, work=xa.numel() * _LANES)
    return matrix


def _low_rank(x: Tensor, xa: Tensor, matrix: Tensor) -> CDLL | None:
    """The C kernels where these are fp32, of few ranks, their rows beside each other in memory."""
    few = x.dtype == torch.float32 and 0 < matrix.shape[0] <= MOST_RANKS
    return native.library("products_cpu") if few and x.numel() > 0 and x.stride(1) == 1 and xa.stride(1) == 1 else None


def _run(
    lib: CDLL, kernel: str, x: Tensor, xa: Tensor, matrix: Tensor, scale: float, *, items: int, work: int
) -> None:  # fmt: skip
    """``work``: operations for each of the items. The caller keeps a contiguous ``matrix`` alive."""
    over_rows(
        lib, kernel, items, work,
        rows=x.shape[0], columns=x.shape[1], ranks=matrix.shape[0], x=address(x), xa=address(xa),
        matrix=address(matrix), x_stride=x.stride(0), xa_stride=xa.stride(0), scale=scale,
    )  # fmt: skip
