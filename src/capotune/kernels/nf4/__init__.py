"""Weights in four bits: NF4 and FP4 with double quantisation, bit for bit in bitsandbytes' published format.

QLoRA (Dettmers et al. 2023, §3) stores a frozen weight matrix as follows. The tensor is read as one flat row of n
numbers and cut into blocks of ``block_size``; the last block may be shorter.

    absmax_b = max |w| over block b                                  fp32, one per block
    code_i   = argmin_k | w_i / absmax_b − table[k] |                4 bits, two per byte, the first in the high nibble
    w_i      ≈ table[code_i] · absmax_b

NF4's sixteen values are quantiles of a standard normal scaled to [−1, 1] (§3, "4-bit NormalFloat"); FP4's are a sign,
two exponent bits and one mantissa bit. Double quantisation (§3) stores absmax in 8 bits as well:

    offset   = mean(absmax)                                          fp32, one per tensor
    absmax_b ≈ map[code8_b] · nested_absmax_B + offset               8 bits per block, one fp32 per 256 blocks

At ``block_size=64`` that is 4 + 8/64 + 32/(64·256) = 4.127 bits a parameter.

"Nearest" is exact here: a code is the number of midpoints between neighbouring table values that lie below the scaled
weight, as in bitsandbytes' PyTorch kernels. Two of its C++ kernels for the CPU differ, and tests/test_nf4.py shows how:
the 8-bit quantiser rounds to a grid of 65536 points first and picks the second-nearest code in about one block of 700,
and the AVX-512 dequantiser reads the wrong absmax when a row is not a whole number of blocks. The stored format is the
same everywhere: either side reads what the other wrote.

``tensor.py`` holds such a tensor, ``tables.py`` the constants; ``convert.py`` goes from and to dense tensors by one of
the backends ``reference.py``, ``native_ops.py`` (C) and ``triton_ops.py``; ``linear.py`` computes with a weight in 4
bits, and ``checkpoint.py`` knows the file format.
"""

from __future__ import annotations

from capotune.kernels.nf4.checkpoint import from_checkpoint, to_checkpoint
from capotune.kernels.nf4.convert import dequantize_4bit, quantize_4bit
from capotune.kernels.nf4.linear import Linear4bit
from capotune.kernels.nf4.tensor import BLOCK_SIZES, NESTED_BLOCK_SIZE, QUANT_TYPES, WEIGHT_DTYPES, QuantizedTensor

__all__ = [
    "BLOCK_SIZES", "NESTED_BLOCK_SIZE", "QUANT_TYPES", "WEIGHT_DTYPES", "Linear4bit", "QuantizedTensor",
    "dequantize_4bit", "from_checkpoint", "quantize_4bit", "to_checkpoint",
]  # fmt: skip
