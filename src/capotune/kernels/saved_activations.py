"""Activations that are saved for backward in 16 bits: half the memory of fp32.

Each row, along the last dimension, is whole numbers of 16 bits times a scale, the largest magnitude in that row over
32,767: a value is off by at most 2⁻¹⁶ of the largest one beside it. Only gradients see that; what the forward pass
computes is as it was. Each direction reads and writes the values once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from capotune.kernels import policy
from capotune.kernels.native import address, elementwise, over_rows

__all__ = [
    "QuantizedRows", "dequantize_rows", "quantize_rows", "quantize_rows_reference", "quantized_saved_activations",
]  # fmt: skip

_LARGEST = 32767


@dataclass(frozen=True)
class QuantizedRows:
    """A tensor in 16 bits."""

    values: torch.Tensor
    """int16, of the tensor's shape."""
    scales: torch.Tensor
    """fp32, one for each row."""


def quantize_rows_reference(x: torch.Tensor) -> torch.Tensor:
    """``dequantize_rows(quantize_rows(x))`` in plain PyTorch, for x (..., n), fp32. Rows whose values are below 1e-30
    are 0, and NaN where one is not finite."""
    largest = x.abs().amax(-1, keepdim=True)
    scale = torch.where(largest < 1e-30, 0, torch.where(largest.isfinite(), largest / _LARGEST, torch.nan))
    values = (x * torch.where(scale > 0, 1 / scale, 0)).nan_to_num(0, 0, 0).round()
    return values * scale


@torch.no_grad()
def quantize_rows(x: torch.Tensor) -> QuantizedRows:
    """x (..., n), fp32 on the CPU."""
    rows, columns = x.numel() // x.shape[-1], x.shape[-1]
    x = x.contiguous()
    quantized = QuantizedRows(torch.empty(x.shape, dtype=torch.int16), torch.empty(rows, dtype=torch.float32))
    lib = elementwise(x)
    assert lib is not None
    over_rows(
        lib, "quantize_rows", rows, columns,
        columns=columns, x=address(x), values=address(quantized.values), scales=address(quantized.scales),
    )  # fmt: skip
    return quantized


@torch.no_grad()
def dequantize_rows(quantized: QuantizedRows) -> torch.Tensor:
    """A new tensor, fp32, contiguous."""
    x, columns = torch.empty(quantized.values.shape, dtype=torch.float32), quantized.values.shape[-1]
    lib = elementwise(x)
    assert lib is not None
    over_rows(
        lib, "dequantize_rows", len(quantized.scales), columns,
        columns=columns, values=address(quantized.values), scales=address(quantized.scales), x=address(x),
    )  # fmt: skip
    return x


@contextmanager
def quantized_saved_activations() -> Iterator[None]:
    """Inside, in this thread, fp32 activations on a CPU are saved so; without C kernels they are saved as they are."""
    with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
        yield


def _pack(x: torch.Tensor) -> Any:
    """Weights are saved as they are, transposed ones too, and so are buffers, which have no rows."""
    weight = isinstance(x if x._base is None else x._base, nn.Parameter)
    activation = x.dim() > 1 and not weight and x.dtype == torch.float32 and x.is_cpu
    large = x.numel() >= policy.QUANTIZE_SAVED_FROM_ELEMENTS
    return quantize_rows(x) if activation and large and elementwise(x) is not None else x


def _unpack(saved: Any) -> torch.Tensor:
    return dequantize_rows(saved) if isinstance(saved, QuantizedRows) else saved
