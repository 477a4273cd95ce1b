"""The products of linear layers: y = xWᵀ + bias, and in backward the input's gradient g·W and the weight's gᵀ·x.

Where ``execution`` allows reduced precision, on a CPU with AMX fp32 matrices are multiplied by its tiles
(``products_amx.c``), each value as the sum of two of bf16. It keeps 16 bits of each, sums are fp32, and it takes half
to three quarters of the time: PyTorch calls this precision "high" (``torch.set_float32_matmul_precision``), where GPUs
take TF32 with 11 bits. Training steps ask for it, and so does the computing of features and boundary states for the
cache. Elsewhere, in other dtypes and for few rows the products are PyTorch's. Frozen weights that are prepacked for AMX
are multiplied otherwise (``prepacked.py``).

Values below 1e-30 lose some of the 16 bits, since AMX knows no denormal numbers; an infinity gives NaN.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch.nn import functional

from capotune.device import cpu_level
from capotune.kernels import abi, policy
from capotune.kernels.execution import execution
from capotune.kernels.native import address, check_shape, fork_join, library

__all__ = [
    "LinearInput", "amx_kernels", "fits_reduced_precision", "input_gradient", "trained_linear", "weight_gradient",
]  # fmt: skip

_SIDE, _TERMS = 16, 32  # of a tile of products_amx.c


class LinearInput:
    """x (rows, in), split into strips once for all the layers that it enters."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x
        self._strips: torch.Tensor | None = None

    def linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x·weightᵀ + bias: weight (out, in), bias (out,) → (rows, out), a new tensor or ``out``.

        Raises ``SettingError`` where shapes do not fit.
        """
        check_shape("weight", weight, (weight.shape[0], self.x.shape[1]))
        if bias is not None:
            check_shape("bias", bias, weight.shape[:1])
        if out is not None:
            check_shape("out", out, (len(self.x), len(weight)))
        amx = _amx_for(self.x, weight, bias, out)
        if amx is None:
            if out is None:
                return functional.linear(self.x, weight, bias)
            if bias is None:
                return torch.mm(self.x, weight.t(), out=out)
            return torch.addmm(bias, self.x, weight.t(), out=out)
        out = torch.empty(len(self.x), len(weight), dtype=torch.float32) if out is None else out
        ready = self._strips is not None
        if self._strips is None:
            self._strips = _strips_workspace(*self.x.shape)
        _multiply(amx.linear, self.x, weight, bias, out, self._strips, accumulate=False, strips_ready=ready)
        return out


def input_gradient(
    grad: torch.Tensor, weight: torch.Tensor, accumulate_into: torch.Tensor | None = None
) -> torch.Tensor:
    """grad·weight: grad (rows, out), weight (out, in) → (rows, in), a new tensor, or added to ``accumulate_into``.

    Raises ``SettingError`` where shapes do not fit.
    """
    check_shape("weight", weight, (grad.shape[1], weight.shape[1]))
    total = accumulate_into
    if total is not None:
        check_shape("accumulate_into", total, (len(grad), weight.shape[1]))
    amx = _amx_for(grad, weight, total)
    if amx is None:
        return grad @ weight if total is None else total.addmm_(grad, weight)
    y = torch.empty(len(grad), weight.shape[1], dtype=torch.float32) if total is None else total
    strips = _strips_workspace(*grad.shape) if len(weight) <= policy.PREPARED_STRIPS_OUTPUTS else None
    accumulate = total is not None
    _multiply(amx.linear_input_gradient, grad, weight, None, y, strips, accumulate=accumulate, strips_ready=False)
    return y


def weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """gradᵀ·x: grad (rows, out), x (rows, in) → (out, in).

    Raises ``SettingError`` where shapes do not fit.
    """
    check_shape("grad", grad, (len(x), grad.shape[1]))
    amx = _amx_for(x, grad)
    if amx is None:
        return grad.t() @ x
    y, strips = torch.empty(grad.shape[1], x.shape[1], dtype=torch.float32), _strips_workspace(grad.shape[1], len(x))
    _multiply(amx.linear_weight_gradient, grad, x, None, y, strips, accumulate=False, strips_ready=False)
    return y


def trained_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x·weightᵀ + bias for weights that train: x (..., in), weight (out, in), bias (out,) → (..., out)."""
    y: torch.Tensor = _TrainedLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.shape[-1])


class _TrainedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return LinearInput(x).linear(weight, bias)

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
def amx_kernels() -> ctypes.CDLL | None:
    """The kernels of products_amx.c at level ``amx``, where the system grants the process AMX's registers; else
    None."""
    if cpu_level() != "amx":
        return None
    lib = library("products_amx")
    return lib if lib is not None and lib.ask_for_amx() else None


def fits_reduced_precision(x: torch.Tensor) -> bool:
    """Whether activations x (rows, any) are for the kernels of reduced precision, here and now: not few rows."""
    fits = len(x) >= policy.REDUCED_PRECISION_ROWS and x.is_cpu and x.dtype == torch.float32
    return fits and execution().reduced_precision


def _amx_for(x: torch.Tensor, *others: torch.Tensor | None) -> ctypes.CDLL | None:
    """The kernels where these are tensors for them; x are the activations."""
    if not fits_reduced_precision(x):
        return None
    for one in (x, *others):
        if one is not None and (one.dtype != torch.float32 or one.stride(-1) != 1 or one.numel() == 0):
            return None
    return amx_kernels()


def _strips_workspace(rows: int, terms: int) -> torch.Tensor:
    """Two bf16 values for each fp32 one, in whole tiles; PyTorch's memory begins at a multiple of 64 bytes."""
    elements = -(-rows // _SIDE) * _SIDE * -(-terms // _TERMS) * _TERMS
    return torch.empty(elements, dtype=torch.float32)


def _multiply(
    function: ctypes._NamedFuncPointer,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    strips: torch.Tensor | None,
    *,
    accumulate: bool,
    strips_ready: bool,
) -> None:
    """Calls a kernel of products_amx.c."""
    arguments = {
        "rows": len(y), "out_features": weight.shape[0], "in_features": weight.shape[1],
        "x": address(x), "x_stride": x.stride(0), "weight": address(weight), "weight_stride": weight.stride(0),
        "bias": address(bias), "y": address(y), "y_stride": y.stride(0), "accumulate": accumulate,
        "strips": address(strips), "strips_ready": strips_ready,
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
