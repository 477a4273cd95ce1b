"""The gated unit of a Llama block: silu(gate)·up, where silu(x) = x·s(x) and s is the logistic function (Shazeer 2020).

    d gate = g·up·s·(1 + gate·(1 − s))        d up = g·gate·s

gate and up are saved for backward, nothing else; autograd would save silu(gate) too. Both may be slices of the
columns of one larger matrix, which is then read where it lies. On the CPU each direction is one C call, on a GPU one
kernel, elsewhere the same in PyTorch.
"""

from __future__ import annotations

from math import prod

import torch

from capotune.kernels.backends import backend_for
from capotune.kernels.native import as_rows, check_shape, output_rows
from capotune.kernels.reference import swiglu_reference

__all__ = ["SwiGLUPrologue", "swiglu_backward", "swiglu_forward", "swiglu_reference"]


class SwiGLUPrologue:
    """The same, faster and with less saved, as the prologue of a linear layer: gate and up (rows, n) → (rows, n)."""

    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """y; nothing else is saved."""
        return swiglu_forward(gate, up), ()

    def backward(
        self,
        grad: torch.Tensor,
        saved: tuple[torch.Tensor, ...],
        *,
        recompute: bool,  # noqa: ARG002 - y costs nothing
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """The gradients in the memory of gate and up, which nobody else reads, and y in that of its gradient."""
        gate, up = saved
        return swiglu_backward(grad, gate, up, out=(gate, up), y=grad), grad


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
    gate_rows, up_rows = (as_rows(tensor, rows, columns) for tensor in (gate, up))
    backend_for(gate, up, out).swiglu(gate_rows, up_rows, written)
    return out


@torch.no_grad()
def swiglu_backward(
    grad: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    y: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up, all of one shape (..., n), in ``out`` or in new contiguous tensors; silu(gate)·up
    once more in ``y``, if wanted.

    ``out`` may be ``(gate, up)`` itself and ``y`` be ``grad``. Raises as ``swiglu_forward`` does.
    """
    out = out or (_new(gate), _new(up))
    recomputed = _new(gate) if y is None else y
    for name, tensor in (("up", up), ("grad", grad), ("out[0]", out[0]), ("out[1]", out[1]), ("y", recomputed)):
        check_shape(name, tensor, gate.shape)
    rows, columns = prod(gate.shape[:-1]), gate.shape[-1]
    written = [output_rows(tensor, rows, columns) for tensor in (*out, recomputed)]
    read = [as_rows(tensor, rows, columns) for tensor in (grad, gate, up)]
    backend_for(grad, gate, up, *out, recomputed).swiglu_backward(*read, *written)
    return out


def _new(like: torch.Tensor) -> torch.Tensor:
    """Contiguous also where ``like`` is a slice."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)
