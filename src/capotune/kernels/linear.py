"""The products of linear layers: y = xWᵀ + bias, and on the way back the input's gradient g·W and the weight's gᵀ·x.

Inside ``sixteen_bits()``, on a CPU with AMX, Intel's matrix unit, fp32 matrices are multiplied there
(``products_amx.c``), each number as the sum of two of bf16. It keeps 16 bits of each, sums are fp32, and it takes half
to three quarters of the time: PyTorch calls this precision "high" (``torch.set_float32_matmul_precision``), where GPUs
take TF32 with 11 bits. Training steps and the computing of features and states that are kept ask for it. Elsewhere, in
other dtypes and for few rows the products are PyTorch's. Frozen weights that are kept ready for the unit are multiplied
otherwise (``frozen_linear.py``).

Numbers below 1e-30 lose some of the 16 bits, since the unit knows no denormal numbers; an infinity gives NaN.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch.nn import functional

from capotune.device import cpu_level
from capotune.kernels import abi, policy
from capotune.kernels._native import address, check_shape, fork_join, library

__all__ = [
    "Rows", "fit_for_kernels", "input_gradient", "matrix_unit", "sixteen_bits", "trained_linear", "weight_gradient",
]  # fmt: skip

_SIDE, _TERMS = 16, 32  # of a tile of products_amx.c

_enough = ContextVar("sixteen bits are enough", default=False)


@contextmanager
def sixteen_bits() -> Iterator[None]:
    """Inside, in this thread, products may round each number to 16 bits, of its own or, with weights that are kept, of
    the largest in its row. The way back is to be inside too."""
    token = _enough.set(True)
    try:
        yield
    finally:
        _enough.reset(token)


class Rows:
    """x (rows, into), made ready once for all the layers that it enters."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x
        self._strips: torch.Tensor | None = None

    def linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x·weightᵀ + bias: weight (out, into), bias (out,) → (rows, out), a new tensor or ``out``.

        Raises ``SettingError`` where shapes do not fit.
        """
        check_shape("weight", weight, (weight.shape[0], self.x.shape[1]))
        if bias is not None:
            check_shape("bias", bias, weight.shape[:1])
        if out is not None:
            check_shape("out", out, (len(self.x), len(weight)))
        unit = _unit_for(self.x, weight, bias, out)
        if unit is None:
            if out is None:
                return functional.linear(self.x, weight, bias)
            if bias is None:
                return torch.mm(self.x, weight.t(), out=out)
            return torch.addmm(bias, self.x, weight.t(), out=out)
        out = torch.empty(len(self.x), len(weight), dtype=torch.float32) if out is None else out
        ready = self._strips is not None
        if self._strips is None:
            self._strips = _room_for_strips(*self.x.shape)
        _multiply(unit.linear, self.x, weight, bias, out, self._strips, onto=False, ready=ready)
        return out


def input_gradient(grad: torch.Tensor, weight: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
    """grad·weight: grad (rows, out), weight (out, into) → (rows, into), a new tensor, or added to ``onto`` in place.

    Raises ``SettingError`` where shapes do not fit.
    """
    check_shape("weight", weight, (grad.shape[1], weight.shape[1]))
    if onto is not None:
        check_shape("onto", onto, (len(grad), weight.shape[1]))
    unit = _unit_for(grad, weight, onto)
    if unit is None:
        return grad @ weight if onto is None else onto.addmm_(grad, weight)
    y = torch.empty(len(grad), weight.shape[1], dtype=torch.float32) if onto is None else onto
    strips = _room_for_strips(*grad.shape) if len(weight) <= policy.PREPARED_STRIPS_OUTPUTS else None
    _multiply(unit.linear_input_gradient, grad, weight, None, y, strips, onto=onto is not None, ready=False)
    return y


def weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """gradᵀ·x: grad (rows, out), x (rows, into) → (out, into).

    Raises ``SettingError`` where shapes do not fit.
    """
    check_shape("grad", grad, (len(x), grad.shape[1]))
    unit = _unit_for(x, grad)
    if unit is None:
        return grad.t() @ x
    y, strips = torch.empty(grad.shape[1], x.shape[1], dtype=torch.float32), _room_for_strips(grad.shape[1], len(x))
    _multiply(unit.linear_weight_gradient, grad, x, None, y, strips, onto=False, ready=False)
    return y


def trained_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x·weightᵀ + bias for weights that train: x (..., into), weight (out, into), bias (out,) → (..., out)."""
    y: torch.Tensor = _TrainedLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.shape[-1])


class _TrainedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return Rows(x).linear(weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, weight), (needs_x, needs_weight, needs_bias) = ctx.saved_tensors, ctx.needs_input_grad
        return (
            input_gradient(grad, weight) if needs_x else None,
            weight_gradient(grad, x) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


@cache
def matrix_unit() -> ctypes.CDLL | None:
    """The kernels of products_amx.c at level ``amx``, where the system grants the process AMX's registers; else
    None."""
    if cpu_level() != "amx":
        return None
    lib = library("products_amx")
    return lib if lib is not None and lib.ask_for_amx() else None


def fit_for_kernels(x: torch.Tensor) -> bool:
    """Whether activations x (rows, any) are such as kernels of sixteen bits are for, here and now: not a few rows."""
    return _enough.get() and len(x) >= policy.REDUCED_PRECISION_ROWS and x.is_cpu and x.dtype == torch.float32


def _unit_for(x: torch.Tensor, *others: torch.Tensor | None) -> ctypes.CDLL | None:
    """The kernels where these are tensors for them; x are the activations."""
    if not fit_for_kernels(x):
        return None
    for one in (x, *others):
        if one is not None and (one.dtype != torch.float32 or one.stride(-1) != 1 or one.numel() == 0):
            return None
    return matrix_unit()


def _room_for_strips(rows: int, terms: int) -> torch.Tensor:
    """Two bf16 numbers for each fp32 one, in whole tiles; PyTorch's memory begins at a multiple of 64 bytes."""
    numbers = -(-rows // _SIDE) * _SIDE * -(-terms // _TERMS) * _TERMS
    return torch.empty(numbers, dtype=torch.float32)


def _multiply(
    function: ctypes._NamedFuncPointer,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    strips: torch.Tensor | None,
    *,
    onto: bool,
    ready: bool,
) -> None:
    """Calls a kernel of products_amx.c."""
    arguments = {
        "rows": len(y), "out_features": weight.shape[0], "in_features": weight.shape[1],
        "x": address(x), "x_stride": x.stride(0), "weight": address(weight), "weight_stride": weight.stride(0),
        "bias": address(bias), "y": address(y), "y_stride": y.stride(0), "accumulate": onto,
        "strips": address(strips), "strips_ready": ready,
    }  # fmt: skip
    block = abi.kernel_layout(function.__name__).pack(arguments)
    function(block, *_pool(), torch.get_num_threads())


@cache
def _pool() -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    """What shares work out over threads, and whose threads: PyTorch's; null pointers for one thread."""
    sharer, pool = library("elementwise_cpu"), fork_join()
    if sharer is None or pool is None:
        return ctypes.c_void_p(), ctypes.c_void_p()
    return ctypes.cast(sharer.share_rows, ctypes.c_void_p), ctypes.cast(pool, ctypes.c_void_p)
