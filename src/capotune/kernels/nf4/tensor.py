"""A tensor in 4 bits, as it lies in memory."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from capotune.errors import ModelError

__all__ = ["BLOCK_SIZES", "NESTED_BLOCK_SIZE", "QUANT_TYPES", "WEIGHT_DTYPES", "QuantizedTensor"]

QUANT_TYPES = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256
WEIGHT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor of n numbers in 4 bits each, in bitsandbytes' layout (QLoRA §3).

    With ``blocks = ceil(n / block_size)``:

    - ``codes``: uint8 (ceil(n/2),), two codes a byte, the first in the high nibble
    - ``absmax``: fp32 (blocks,), or uint8 (blocks,) when double-quantised
    - ``quant_type``: "nf4" or "fp4"; ``block_size``: a power of two in 32..4096
    - ``shape``, ``dtype``: of the original tensor
    - ``nested_absmax``: fp32 (ceil(blocks/256),), ``offset``: fp32 () — both None unless double-quantised

    Raises ``ModelError`` when the parts do not fit together (kernels rely on it to stay inside their buffers).
    """

    codes: Tensor
    absmax: Tensor
    quant_type: str
    block_size: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        if self.quant_type not in QUANT_TYPES:
            raise ModelError(f"unknown 4-bit type {self.quant_type!r}; known: {', '.join(QUANT_TYPES)}")
        if type(self.block_size) is not int or self.block_size not in BLOCK_SIZES:
            raise ModelError(f"block size {self.block_size!r} is not one of {BLOCK_SIZES}")
        if self.dtype not in WEIGHT_DTYPES.values():
            raise ModelError(f"original dtype {self.dtype} is not one of {', '.join(WEIGHT_DTYPES)}")
        blocks = -(-self.numel // self.block_size)
        self._expect("codes", torch.uint8, ((self.numel + 1) // 2,))
        self._expect("absmax", torch.uint8 if self.nested else torch.float32, (blocks,))
        if (self.nested_absmax is None) != (self.offset is None):
            raise ModelError("nested_absmax and offset come together or not at all")
        if self.nested:
            self._expect("nested_absmax", torch.float32, (-(-blocks // NESTED_BLOCK_SIZE),))
            self._expect("offset", torch.float32, ())

    def _expect(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        part: Tensor = getattr(self, name)
        if part.dtype != dtype or tuple(part.shape) != shape:
            has, needs = f"{part.dtype} {tuple(part.shape)}", f"{dtype} {shape}"
            raise ModelError(f"{name} is {has}; a tensor of shape {self.shape} needs {needs}")
        if part.device != self.codes.device or not part.is_contiguous():
            raise ModelError(f"{name} must be contiguous and on {self.codes.device}, where the codes are")

    @property
    def numel(self) -> int:
        """How many numbers are stored."""
        return prod(self.shape)

    @property
    def nested(self) -> bool:
        """Whether absmax is itself quantised to 8 bits."""
        return self.nested_absmax is not None

    @property
    def nbytes(self) -> int:
        """Bytes that this tensor needs: codes and statistics; the constant tables are shared by all tensors."""
        parts = (self.codes, self.absmax, self.nested_absmax, self.offset)
        return sum(part.nbytes for part in parts if part is not None)
