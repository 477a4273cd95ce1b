"""Which implementation computes what on a device: plain PyTorch, C, or Triton.

A backend is a table of functions, a module that has every name of ``Backend`` with its signature: ``reference``,
``native_ops``, ``triton_ops``. ``bound`` says which one a device and dtype have, ``backend_for`` which one takes some
tensors; nothing else decides. The operations' own modules check shapes, say what is saved for backward, and call the
backend. Products of linear layers and attention are PyTorch's on every device, but for what ``linear.py`` (AMX),
``prepacked.py`` and ``attention.py`` say, which depends on sizes and on the precision that is allowed.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from capotune.kernels import native, native_ops, reference, triton_ops
from capotune.kernels._triton import available

__all__ = ["Backend", "backend_for", "bound"]


class Backend(Protocol):
    """All of it outside of autograd. Matrices are (rows, columns) with columns side by side in memory, their rows any
    distance apart; tensors of one call are of one dtype, but for statistics in fp32.

    Backward functions return or write the gradient of what the forward function was given.
    """

    @property
    def NAME(self) -> str:  # noqa: N802 - a module's constant
        """For the record of a run."""

    @property
    def LOGITS_DTYPES(self) -> tuple[torch.dtype, ...]:  # noqa: N802
        """Those that ``softmax_cross_entropy`` takes without loss."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x (..., hidden), weight (hidden,) → y like x, and r, the reciprocal roots, fp32 (rows,)."""

    def rms_norm_backward(self, grad: Tensor, x: Tensor, weight: Tensor, roots: Tensor) -> Tensor:
        """The gradient of x, like x."""

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """x and residual (rows, hidden) → y like x; x + residual, means and reciprocal roots (rows,)."""

    def add_layer_norm_backward(
        self, grad: Tensor, total: Tensor, means: Tensor, roots: Tensor, weight: Tensor
    ) -> Tensor:
        """The gradient of x, which is the residual's too; a new tensor."""

    def gelu(self, x: Tensor) -> Tensor:
        """x (rows, columns) → a new tensor like it."""

    def gelu_backward(self, grad: Tensor, x: Tensor) -> None:
        """``grad`` becomes the gradient of x, and x becomes y."""

    def swiglu(self, gate: Tensor, up: Tensor, out: Tensor) -> None:
        """Matrices; ``out``, which may be one of the others, becomes silu(gate)·up."""

    def swiglu_backward(
        self, grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, y: Tensor
    ) -> None:
        """Matrices; the last three are written and may be the first three."""

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, heads: int, *, transposed: bool) -> None:
        """Matrices x and ``out`` (tokens, heads·size), which may be one; cos and sin (tokens, size). ``transposed``:
        backward, from y's gradient to x's."""

    def softmax_cross_entropy(self, logits: Tensor, targets: Tensor, label_smoothing: float, in_place: bool) -> Tensor:
        """logits (n, vocabulary), targets (n,) int64 → losses (n,) fp32; with ``in_place`` their gradients replace the
        logits."""

    def project(self, x: Tensor, matrix: Tensor, scale: float, out: Tensor | None) -> Tensor:
        """x (rows, columns), matrix (ranks, columns) → scale·x·matrixᵀ, in ``out`` or a new tensor."""

    def update(self, x: Tensor, xa: Tensor, matrix: Tensor, scale: float) -> Tensor:
        """x += scale·xa·matrix, in place."""

    def gather(self, xa: Tensor, x: Tensor, scale: float) -> Tensor:
        """xa (rows, ranks), x (rows, columns) → scale·xaᵀ·x, a new tensor."""


def bound(device: torch.device, dtype: torch.dtype) -> Backend:
    """The fastest backend there: C on a CPU, Triton where it runs, plain PyTorch elsewhere and in other dtypes."""
    return _on_cpu(dtype) if device.type == "cpu" else _elsewhere(device, dtype)


def backend_for(*tensors: Tensor) -> Backend:
    """That of the first one's device and dtype, where all tensors are there and of that dtype; else plain PyTorch,
    since the other backends read what they are given."""
    first = tensors[0]
    dtype, is_cpu = first.dtype, first.is_cpu
    for one in tensors:  # a step asks this a thousand times, and ``all`` takes twice as long
        if one.dtype != dtype or one.is_cpu != is_cpu:
            return reference
    if is_cpu:
        return _on_cpu(dtype)
    alike = all(one.device == first.device for one in tensors)
    return _elsewhere(first.device, dtype) if alike else reference


def _on_cpu(dtype: torch.dtype) -> Backend:
    if dtype in native_ops.DTYPES and native.library("elementwise_cpu") is not None:
        return native_ops
    return _elsewhere(torch.device("cpu"), dtype)


def _elsewhere(device: torch.device, dtype: torch.dtype) -> Backend:
    return triton_ops if dtype in triton_ops.DTYPES and available(device) else reference
