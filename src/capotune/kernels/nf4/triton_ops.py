"""Four-bit weights on a GPU: Triton kernels that unpack them, and that multiply a few rows without unpacking.

``dequantize`` writes the same bits as ``nf4.dequantize_reference``: table[code] · absmax in fp32, rounded once; absmax
itself, when double-quantised, as a product and a sum with two roundings (hence no fused multiply-add: ``_OPTIONS``).

``linear`` computes y = x Wᵀ for at most 16 rows, as when text is generated token by token. Such a product waits for
memory, not for arithmetic, and reading W in 4 bits moves a quarter of the bytes of bf16. W is unpacked in registers,
rounded to x's dtype as a dense W would be, and the sum runs in fp32; against the dense product only its order differs.

Where Triton is not ``available`` (``_triton``) plain PyTorch computes the same.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from capotune.kernels._triton import available, interpreted
from capotune.kernels.nf4.reference import quantize, quantize_absmax
from capotune.kernels.nf4.tables import absmax_map, code_values
from capotune.kernels.nf4.tensor import QuantizedTensor

__all__ = ["MOST_ROWS", "dequantize", "fits", "linear", "quantize", "quantize_absmax"]

MOST_ROWS = 16
"""Rows of x that ``linear`` takes: the smallest tile of a tensor core."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BYTES = 1024  # of codes per program of ``dequantize``
OUTPUTS, PAIRS = 32, 64  # rows of W per program of ``linear``, and pairs of columns in one of its steps
# A fused multiply-add in map · nested_absmax + offset would round once where the published format rounds twice.
_OPTIONS = {"enable_fp_fusion": False}


def fits(x: Tensor, q: QuantizedTensor) -> bool:
    """Whether ``linear(x, q)`` can be computed: few rows, an even number of columns, and Triton on x's device."""
    columns = q.shape[-1]
    rows = x.numel() // columns
    return 0 < rows <= MOST_ROWS and columns % 2 == 0 and x.dtype in DTYPES and available(x.device)


def dequantize(q: QuantizedTensor, out: Tensor) -> None:
    """As ``reference.dequantize``; ``out`` fp32, bf16 or fp16."""
    programs = -(-q.codes.numel() // BYTES)
    _kernels().dequantize_kernel[(programs,)](
        q.codes, *_statistics(q), code_values(q.quant_type, q.codes.device), out, q.numel,
        block_size=q.block_size, nested=q.nested, block=BYTES, **_OPTIONS,
    )  # fmt: skip


def linear(x: Tensor, q: QuantizedTensor) -> Tensor:
    """x (…, in) times the weight ``q`` (out, in), transposed: (…, out) in x's dtype. See ``fits``."""
    outputs, columns = q.shape
    rows = x.reshape(-1, columns).contiguous()
    y = torch.empty(rows.shape[0], outputs, dtype=x.dtype, device=x.device)
    _kernels().linear_kernel[(-(-outputs // OUTPUTS),)](
        rows, q.codes, *_statistics(q), code_values(q.quant_type, x.device), y, rows.shape[0], outputs, columns,
        block_size=q.block_size, nested=q.nested, block_rows=MOST_ROWS, block_out=OUTPUTS, block_pairs=PAIRS,
        widen=interpreted(), **_OPTIONS,
    )  # fmt: skip
    return y.view(*x.shape[:-1], outputs)


def _statistics(q: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """absmax, its map, nested absmax, offset; without double quantisation any pointer does for the last three."""
    nested = (q.nested_absmax, q.offset) if q.nested_absmax is not None and q.offset is not None else (q.absmax,) * 2
    return q.absmax, absmax_map(q.absmax.device), *nested


@cache
def _kernels() -> Any:
    """The module of kernels, which imports Triton: that takes a second and is put off until it is needed."""
    from capotune.kernels.nf4 import _triton_kernels

    return _triton_kernels
