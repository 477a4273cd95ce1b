"""The kernels of ``triton_ops``; importing this imports Triton.

Names of sizes: n numbers in ceil(n/2) bytes of codes; a program's tile has ``block…`` entries.
"""

# mypy: ignore-errors
# Triton compiles these functions from their source: annotations other than its own have no meaning in them.
from __future__ import annotations

import triton
import triton.language as tl

from capotune.kernels._triton_rounding import rounded


@triton.jit
def _absmax(absmax, absmax_map, nested_absmax, offset, at, mask, nested: tl.constexpr):
    """fp32: the scale of the blocks with numbers ``at``."""
    if nested:
        code = tl.load(absmax + at, mask=mask, other=0).to(tl.int32)
        scale = tl.load(nested_absmax + at // 256, mask=mask, other=0.0)
        found = tl.load(absmax_map + code) * scale + tl.load(offset)
    else:  # not after a return: the compiler wants one type, of what is left out too
        found = tl.load(absmax + at, mask=mask, other=0.0)
    return found


@triton.jit
def dequantize_kernel(
    codes, absmax, absmax_map, nested_absmax, offset, table, out, n,
    block_size: tl.constexpr, nested: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Each program unpacks ``block`` bytes into 2 · ``block`` numbers."""
    first = tl.program_id(0).to(tl.int64) * block
    at = first + tl.arange(0, block)
    inside = 2 * at < n
    byte = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    scale = _absmax(absmax, absmax_map, nested_absmax, offset, 2 * at // block_size, inside, nested)
    numbers = tl.interleave(tl.load(table + (byte >> 4)) * scale, tl.load(table + (byte & 15)) * scale)
    to = 2 * first + tl.arange(0, 2 * block)
    tl.store(out + to, rounded(numbers, out.dtype.element_ty), mask=to < n)


@triton.jit
def linear_kernel(
    x, codes, absmax, absmax_map, nested_absmax, offset, table, y, rows, outputs, columns,
    block_size: tl.constexpr, nested: tl.constexpr,
    block_rows: tl.constexpr, block_out: tl.constexpr, block_pairs: tl.constexpr, widen: tl.constexpr,
):  # fmt: skip
    """Each program computes ``block_out`` outputs of every row.

    A byte holds the weights of columns 2j and 2j+1, so that x's even and odd columns meet its high and low codes in two
    products of their own. Columns beyond the last are zero in x and count for nothing. ``widen`` multiplies in fp32,
    which changes no product of two half-precision numbers: the interpreter's ``tl.dot`` does not know bf16.
    """
    row = tl.arange(0, block_rows)
    output = tl.program_id(0).to(tl.int64) * block_out + tl.arange(0, block_out)
    dtype: tl.constexpr = x.dtype.element_ty
    total = tl.zeros((block_rows, block_out), dtype=tl.float32)
    for start in range(0, columns // 2, block_pairs):
        pair = start + tl.arange(0, block_pairs)
        x_at = x + row[:, None] * columns + 2 * pair[None, :]
        x_inside = (row[:, None] < rows) & (pair[None, :] < columns // 2)
        w_at = output[None, :] * (columns // 2) + pair[:, None]
        w_inside = (pair[:, None] < columns // 2) & (output[None, :] < outputs)
        byte = tl.load(codes + w_at, mask=w_inside, other=0).to(tl.int32)
        scale = _absmax(absmax, absmax_map, nested_absmax, offset, 2 * w_at // block_size, w_inside, nested)
        high = rounded(tl.load(table + (byte >> 4)) * scale, dtype)
        low = rounded(tl.load(table + (byte & 15)) * scale, dtype)
        even = tl.load(x_at, mask=x_inside, other=0.0)
        odd = tl.load(x_at + 1, mask=x_inside, other=0.0)
        if widen:
            even, odd, high, low = even.to(tl.float32), odd.to(tl.float32), high.to(tl.float32), low.to(tl.float32)
        total = tl.dot(even, high, total, input_precision="ieee")
        total = tl.dot(odd, low, total, input_precision="ieee")
    inside = (row[:, None] < rows) & (output[None, :] < outputs)
    tl.store(y + row[:, None] * outputs + output[None, :], rounded(total, dtype), mask=inside)
