"""Products with frozen weights that are prepacked: laid out once as a kernel reads them, for small models: xWᵀ and gW.

Two kernels, for programs (``program.py``) to call:

- With AMX ``prepacked_product_int16`` of prepacked_amx.c, in whole numbers of 16 bits: each row of x, and each of W
  (for gW each column), is whole numbers up to 32,639 times a scale. A prepacked weight takes 2 bytes an element.
- With AVX2 ``prepacked_product_fp32`` of products_cpu.c, in fp32; a prepacked weight takes 4 bytes an element.

Both are for where reduced precision is allowed (``execution.py``).
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch.nn import functional

from capotune.device import cpu_level
from capotune.kernels import linear, policy
from capotune.kernels.linear import fits_reduced_precision
from capotune.kernels.native import address, library, over_rows

__all__ = [
    "MOST_TERMS", "fits_prepacked", "int16_product_reference", "may_prepack", "prepack", "prepacked_amx_kernels",
    "strip_bytes",
]  # fmt: skip

_SIDE, _TERMS = 16, 64  # of a tile of prepacked_amx.c; the columns of a panel of products_cpu.c are as many
_LARGEST = 32639  # 127 * 256 + 127
MOST_TERMS = 2**16
"""Of which whole numbers of 32 bits hold the sum."""


def fits_prepacked(x: torch.Tensor) -> bool:
    """Whether activations x (rows, any) may be multiplied by these kernels, here and now."""
    return fits_reduced_precision(x) and (prepacked_amx_kernels() is not None or _vectors_are_faster())


def prepacked_amx_kernels() -> ctypes.CDLL | None:
    """The kernels of prepacked_amx.c where there is AMX; else None."""
    return library("prepacked_amx") if linear.amx_kernels() is not None else None


@cache
def _vectors_are_faster() -> bool:
    """Whether ``prepacked_product_fp32`` is faster here than PyTorch's product: so measured for AVX2."""
    return cpu_level() in policy.PREPACKED_FP32_LEVELS and library("products_cpu") is not None


def may_prepack(elements: int) -> bool:
    """Whether the weights of a whole model, of so many elements, may stand beside it prepacked for both directions."""
    with_amx = prepacked_amx_kernels() is not None
    bytes_each, most = (2, policy.PREPACKED_BYTES_WITH_AMX) if with_amx else (4, policy.PREPACKED_BYTES)
    return 2 * bytes_each * elements <= most


def prepack(weight: torch.Tensor, *, input_gradient: bool) -> torch.Tensor:
    """``weight`` (out, in), fp32, as the kernel here reads it for xWᵀ, or for gW.

    With AMX strips of bytes, as prepacked_amx.c says; otherwise panels (panels, terms, 16 columns), zero beyond the
    last column.
    """
    columns, amx = weight.t() if input_gradient else weight, prepacked_amx_kernels()
    count, terms = columns.shape
    if amx is None:
        padded = functional.pad(columns, (0, 0, 0, -count % _SIDE))
        return padded.view(-1, _SIDE, terms).transpose(1, 2).contiguous()
    columns, strips = columns.contiguous(), torch.empty(strip_bytes(terms) * -(-count // _SIDE), dtype=torch.int8)
    over_rows(
        amx, "prepack_int16", -(-count // _SIDE), _SIDE * terms,
        weight=address(columns), weight_stride=columns.stride(0), columns=count, terms=terms, strips=address(strips),
    )  # fmt: skip
    return strips


def int16_product_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What ``prepacked_product_int16`` computes of x (rows, terms) and weight (columns, terms), fp32, in plain PyTorch:
    x·weightᵀ (rows, columns) in fp64, whose sums of whole numbers are exact."""
    (x, x_low, x_scale), (weight, weight_low, weight_scale) = _int16_rows(x), _int16_rows(weight)
    return (x @ weight.t() - x_low @ weight_low.t()) * x_scale * weight_scale.t()


def _int16_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q = 256 h + l and l of each value, fp64, and the scale of each row: x is about q·scale."""
    scale = x.abs().amax(1, keepdim=True) / _LARGEST
    inverse = torch.where(scale > 0, 1 / scale, 0)
    q = (x * inverse).round().double()
    return q, (q + 128) % 256 - 128, scale.double()


def strip_bytes(terms: int) -> int:
    """Of 16 rows: two bytes for each value, in whole tiles, and 16 scales in fp32."""
    return 2 * _SIDE * -(-terms // _TERMS) * _TERMS + 4 * _SIDE
