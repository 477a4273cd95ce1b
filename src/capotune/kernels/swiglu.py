"""The gated unit of a Llama block: silu(gate)·up, where silu(x) = x·s(x) and s is the logistic function (Shazeer 2020).

    d gate = g·up·s·(1 + gate·(1 − s))        d up = g·gate·s

For the backward pass gate and up are kept, nothing else; autograd would keep silu(gate) too. Both may be slices of the
columns of one larger matrix, which is then read where it lies. On the CPU each direction is one C call, elsewhere the
same in PyTorch.
"""

from __future__ import annotations

from ctypes import c_int64
from math import prod
from typing import Any

import torch
from torch.nn import functional

from capotune.kernels._native import (
    Argument,
    as_rows,
    check_shape,
    dtype_code,
    elementwise,
    output_rows,
    over_rows,
    pointer,
)

__all__ = ["swiglu", "swiglu_backward", "swiglu_forward", "swiglu_reference"]


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The definition in plain PyTorch."""
    return functional.silu(gate) * up


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The same, faster and with less kept: gate and up (..., n) → (..., n). Raises as ``swiglu_forward`` does."""
    return _SwiGLU.apply(gate, up)  # type: ignore[no-any-return, no-untyped-call]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu_forward(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return swiglu_backward(grad, *ctx.saved_tensors)


@torch.no_grad()
def swiglu_forward(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate)·up outside of autograd: gate and up (..., n) → ``out``, or a new contiguous tensor.

    ``out`` may be ``gate`` or ``up``. Raises ``SettingError`` where the shapes differ, or for an ``out`` that is
    neither contiguous nor a slice of a matrix's columns.
    """
    check_shape("up", up, gate.shape)
    rows, columns = prod(gate.shape[:-1]), gate.shape[-1]
    if out is None:
        out = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    check_shape("out", out, gate.shape)
    written = output_rows(out, rows, columns)
    lib = elementwise(gate, up, out)
    if lib is None:
        out.copy_(swiglu_reference(gate, up))
        return out
    read = [as_rows(tensor, rows, columns) for tensor in (gate, up)]
    over_rows(lib, "swiglu", _arguments(*read, written), rows, columns)
    return out


@torch.no_grad()
def swiglu_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up, all of one shape (..., n), in ``out`` or in new contiguous tensors.

    ``out`` may be ``(gate, up)`` itself. Raises as ``swiglu_forward`` does.
    """
    out = out or (_new(gate), _new(up))
    for name, tensor in (("up", up), ("grad", grad), ("out[0]", out[0]), ("out[1]", out[1])):
        check_shape(name, tensor, gate.shape)
    rows, columns = prod(gate.shape[:-1]), gate.shape[-1]
    written = (output_rows(out[0], rows, columns), output_rows(out[1], rows, columns))
    lib = elementwise(grad, gate, up, *out)
    if lib is None:
        for target, found in zip(out, _backward_reference(grad, gate, up), strict=True):
            target.copy_(found)
        return out
    read = [as_rows(tensor, rows, columns) for tensor in (grad, gate, up)]
    over_rows(lib, "swiglu_backward", _arguments(*read, *written), rows, columns)
    return out


def _backward_reference(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients in fp32 (fp64 for fp64): 1 − s is taken as s(−gate), which does not cancel."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    grad, gate, up = grad.to(wide), gate.to(wide), up.to(wide)
    s = torch.sigmoid(gate)
    return grad * up * (s * (1 + gate * torch.sigmoid(-gate))), grad * (gate * s)


def _new(like: torch.Tensor) -> torch.Tensor:
    """Contiguous also where ``like`` is a slice."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _arguments(*matrices: torch.Tensor) -> list[Argument]:
    """What both kernels take: dtype and columns, where each matrix begins, how far apart its rows lie."""
    arguments: list[Argument] = [dtype_code(matrices[0]), c_int64(matrices[0].shape[1])]
    arguments += map(pointer, matrices)
    arguments += [c_int64(matrix.stride(0)) for matrix in matrices]
    return arguments
