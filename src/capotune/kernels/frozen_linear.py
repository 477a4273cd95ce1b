"""Products with frozen weights that are kept in a form of the kernels' own, for small models: y = xWᵀ, and gW.

Two kernels, for programs (``program.py``) to call:

- On Intel's matrix unit ``prepacked_product_int16`` of frozen_amx.c, in whole numbers of 16 bits: each row of x, and
  each of W (for gW each column), is whole numbers up to 32,639 times a scale. A form takes 2 bytes for each weight.
- With AVX2 ``prepacked_product_fp32`` of products_cpu.c, in fp32; a form takes 4 bytes for each weight.

Both are for where 16 bits are enough (``linear.sixteen_bits``).
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch.nn import functional

from capotune.device import cpu_level
from capotune.kernels import linear, policy
from capotune.kernels._native import address, library, over_rows
from capotune.kernels.linear import fit_for_kernels

__all__ = [
    "MOST_TERMS",
    "allowed",
    "frozen_unit",
    "kernel_form",
    "may_be_kept",
    "strip_bytes",
    "whole_numbers_reference",
]

_SIDE, _TERMS = 16, 64  # of a tile of frozen_amx.c; the columns of a panel of products_cpu.c are as many
_LARGEST = 32639  # 127 * 256 + 127
MOST_TERMS = 2**16
"""Of which whole numbers of 32 bits hold the sum."""


def allowed(x: torch.Tensor) -> bool:
    """Whether activations x (rows, any) may be multiplied by these kernels, here and now."""
    return fit_for_kernels(x) and (frozen_unit() is not None or _vectors_are_faster())


def frozen_unit() -> ctypes.CDLL | None:
    """The kernels of frozen_amx.c where there is a matrix unit; else None."""
    return library("frozen_amx") if linear.matrix_unit() is not None else None


@cache
def _vectors_are_faster() -> bool:
    """Whether ``prepacked_product_fp32`` is faster here than PyTorch's product: so measured for AVX2."""
    return cpu_level() in policy.PREPACKED_FP32_LEVELS and library("products_cpu") is not None


def may_be_kept(weights: int) -> bool:
    """Whether both forms of so many weights, of a whole model, may stand beside it: with a matrix unit up to 1 GiB,
    since such machines are servers, and they halve a step's time; else up to 256 MiB."""
    each, most = (4, policy.PREPACKED_BYTES) if frozen_unit() is None else (2, policy.PREPACKED_BYTES_WITH_AMX)
    return 2 * each * weights <= most


def kernel_form(weight: torch.Tensor, *, input_gradient: bool) -> torch.Tensor:
    """``weight`` (out, into), fp32, as the kernel here wants it for xWᵀ, or for gW.

    For the matrix unit strips of bytes, as frozen_amx.c says; otherwise panels (panels, terms, 16 columns), the columns
    beyond the last one zero.
    """
    columns, unit = weight.t() if input_gradient else weight, frozen_unit()
    count, terms = columns.shape
    if unit is None:
        padded = functional.pad(columns, (0, 0, 0, -count % _SIDE))
        return padded.view(-1, _SIDE, terms).transpose(1, 2).contiguous()
    columns, strips = columns.contiguous(), torch.empty(strip_bytes(terms) * -(-count // _SIDE), dtype=torch.int8)
    over_rows(
        unit, "prepack_int16", -(-count // _SIDE), _SIDE * terms,
        weight=address(columns), weight_stride=columns.stride(0), columns=count, terms=terms, strips=address(strips),
    )  # fmt: skip
    return strips


def whole_numbers_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What ``prepacked_product_int16`` computes of x (rows, terms) and weight (columns, terms), fp32, in plain PyTorch:
    x·weightᵀ (rows, columns) in fp64, whose sums of whole numbers are exact."""
    (x, low, scale), (weight, weight_low, weight_scale) = _whole_numbers(x), _whole_numbers(weight)
    return (x @ weight.t() - low @ weight_low.t()) * scale * weight_scale.t()


def _whole_numbers(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q = 256 h + l and l of each number, fp64, and the scale of each row: x is about q·scale."""
    scale = x.abs().amax(1, keepdim=True) / _LARGEST
    inverse = torch.where(scale > 0, 1 / scale, 0)
    q = (x * inverse).round().double()
    return q, (q + 128) % 256 - 128, scale.double()


def strip_bytes(terms: int) -> int:
    """Of 16 rows: two bytes for each number, in whole tiles, and 16 scales in fp32."""
    return 2 * _SIDE * -(-terms // _TERMS) * _TERMS + 4 * _SIDE
