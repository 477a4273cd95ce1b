"""Rounding in Triton, the same compiled and interpreted; importing this imports Triton."""

# mypy: ignore-errors
# Triton compiles these functions from their source: annotations other than its own have no meaning in them.
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """fp32 → ``dtype``, to nearest, ties to even. For bf16 in whole numbers: Triton's interpreter would cut off. There
    a NaN stays one."""
    if dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(values == values, near, (bits >> 16) | 64)
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return values.to(dtype)
