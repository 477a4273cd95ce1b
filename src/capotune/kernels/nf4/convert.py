"""Into 4 bits and back, by the fastest backend of a device."""

from __future__ import annotations

from math import isfinite
from typing import Protocol

import torch
from torch import Tensor

from capotune.errors import ModelError, SettingError
from capotune.kernels import native
from capotune.kernels._triton import available
from capotune.kernels.nf4 import native_ops, reference, triton_ops
from capotune.kernels.nf4.tensor import BLOCK_SIZES, QUANT_TYPES, WEIGHT_DTYPES, QuantizedTensor

__all__ = ["backend_for", "dequantize_4bit", "quantize_4bit"]


class Nf4Backend(Protocol):
    """A module that converts: ``reference``, ``native_ops``, ``triton_ops``. All give the same bits."""

    def quantize(self, flat: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
        """flat (n,), contiguous → codes uint8 (ceil(n/2),), absmax fp32 (blocks,)."""

    def quantize_absmax(self, absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """absmax fp32 (blocks,), offset fp32 () → uint8 (blocks,), nested absmax fp32 (ceil(blocks/256),)."""

    def dequantize(self, q: QuantizedTensor, out: Tensor) -> None:
        """Write table[code]·absmax, computed in fp32 and rounded once, into the contiguous ``out`` (n,)."""


def backend_for(device: torch.device) -> Nf4Backend:
    """C on a CPU, Triton where it runs, else plain PyTorch."""
    if device.type == "cpu" and native.library("nf4_cpu") is not None:
        return native_ops
    return triton_ops if available(device) else reference


def quantize_4bit(
    tensor: Tensor, *, quant_type: str = "nf4", block_size: int = 64, double_quant: bool = True
) -> QuantizedTensor:
    """Store ``tensor`` (any shape; fp32, bf16 or fp16) in 4 bits a number (QLoRA §3).

    Raises ``SettingError`` for an unknown ``quant_type`` or ``block_size``, ``ModelError`` for a tensor that is empty,
    of another dtype, holds NaN or infinity, or is so large that the sum of its absmax overflows fp32.
    """
    _check_settings(quant_type, block_size)
    _check_weight(tensor)
    flat = tensor.detach().reshape(-1).contiguous()
    backend = backend_for(flat.device)
    codes, absmax = backend.quantize(flat, quant_type, block_size)
    summary = absmax.mean() if double_quant else absmax.amax()  # NaN or infinity anywhere shows in either
    if not isfinite(summary.item()):
        raise _not_finite(tensor)
    whole = quant_type, block_size, tuple(tensor.shape), tensor.dtype
    if not double_quant:
        return QuantizedTensor(codes, absmax, *whole)
    absmax8, nested_absmax = backend.quantize_absmax(absmax, summary)
    return QuantizedTensor(codes, absmax8, *whole, nested_absmax, summary)


def dequantize_4bit(q: QuantizedTensor, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """The numbers that ``q`` stands for, in ``q.shape``: table[code] · absmax in fp32, rounded once to ``dtype``.

    ``dtype`` is fp32, bf16 or fp16 and defaults to ``out``'s, else to ``q.dtype``. ``out``, if given, is a contiguous
    tensor of ``q.shape`` that receives the result. Raises ``SettingError`` for another dtype or an ``out`` that does
    not fit.
    """
    dtype = dtype or (q.dtype if out is None else out.dtype)
    if dtype not in WEIGHT_DTYPES.values():
        raise SettingError(f"cannot dequantise to {dtype}; allowed: {', '.join(WEIGHT_DTYPES)}")
    device = q.codes.device
    backend = backend_for(device)
    if out is None:
        out = torch.empty(q.shape, dtype=dtype, device=device)
        if backend is native_ops:
            native_ops.use_huge_pages(out)
    elif tuple(out.shape) != q.shape or out.dtype != dtype or out.device != device or not out.is_contiguous():
        raise SettingError(f"out must be a contiguous {dtype} tensor of shape {q.shape} on {device}")
    backend.dequantize(q, out.detach().view(-1))
    return out


def _check_settings(quant_type: str, block_size: int) -> None:
    if quant_type not in QUANT_TYPES:
        raise SettingError(f"quant_type is {quant_type!r}; allowed: {', '.join(QUANT_TYPES)}")
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        raise SettingError(f"block_size is {block_size!r}; allowed: {', '.join(map(str, BLOCK_SIZES))}")


def _check_weight(tensor: Tensor) -> None:
    if tensor.dtype not in WEIGHT_DTYPES.values():
        raise ModelError(f"a weight of dtype {tensor.dtype} cannot be quantised; allowed: {', '.join(WEIGHT_DTYPES)}")
    if tensor.numel() == 0:
        raise ModelError(f"a weight of shape {tuple(tensor.shape)} has no values to quantise")


def _not_finite(tensor: Tensor) -> ModelError:
    shape, bad = tuple(tensor.shape), int((~torch.isfinite(tensor)).sum())
    if bad:
        return ModelError(f"a weight of shape {shape} holds {bad} values that are NaN or infinite")
    return ModelError(f"a weight of shape {shape} is too large for double quantisation; use double_quant=False")
