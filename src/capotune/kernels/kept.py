"""What a forward pass keeps for the way back, in 16 bits: half the memory of activations in fp32.

Each row, along the last dimension, is whole numbers of 16 bits times a scale, the largest magnitude in that row over
32,767: a number is off by at most 2⁻¹⁶ of the largest one beside it. Only gradients see that; what the pass computes is
as it was. Each direction reads and writes the numbers once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from capotune.kernels import policy
from capotune.kernels._native import address, elementwise, over_rows

__all__ = ["Halved", "halve", "halved_reference", "kept_in_16_bits", "whole_again"]

_LARGEST = 32767


@dataclass(frozen=True)
class Halved:
    """A tensor in 16 bits."""

    numbers: torch.Tensor
    """int16, of the tensor's shape."""
    scales: torch.Tensor
    """fp32, one for each row."""


def halved_reference(x: torch.Tensor) -> torch.Tensor:
    """``whole_again(halve(x))`` in plain PyTorch, for x (..., n), fp32. Rows whose numbers are below 1e-30 are 0, and
    NaN where one is not finite."""
    largest = x.abs().amax(-1, keepdim=True)
    scale = torch.where(largest < 1e-30, 0, torch.where(largest.isfinite(), largest / _LARGEST, torch.nan))
    numbers = (x * torch.where(scale > 0, 1 / scale, 0)).nan_to_num(0, 0, 0).round()
    return numbers * scale


@torch.no_grad()
def halve(x: torch.Tensor) -> Halved:
    """x (..., n), fp32 on the CPU."""
    columns = x.shape[-1]
    x = x.contiguous()
    halved = Halved(torch.empty(x.shape, dtype=torch.int16), torch.empty(x.numel() // columns, dtype=torch.float32))
    lib = elementwise(x)
    assert lib is not None
    over_rows(
        lib, "quantize_rows", len(halved.scales), columns,
        columns=columns, x=address(x), values=address(halved.numbers), scales=address(halved.scales),
    )  # fmt: skip
    return halved


@torch.no_grad()
def whole_again(halved: Halved) -> torch.Tensor:
    """A new tensor, fp32, contiguous."""
    x, columns = torch.empty(halved.numbers.shape, dtype=torch.float32), halved.numbers.shape[-1]
    lib = elementwise(x)
    assert lib is not None
    over_rows(
        lib, "dequantize_rows", len(halved.scales), columns,
        columns=columns, values=address(halved.numbers), scales=address(halved.scales), x=address(x),
    )  # fmt: skip
    return x


@contextmanager
def kept_in_16_bits() -> Iterator[None]:
    """Inside, in this thread, activations in fp32 on a CPU are kept so; without C kernels as they are."""
    with torch.autograd.graph.saved_tensors_hooks(_put_away, _fetch):
        yield


def _put_away(x: torch.Tensor) -> Any:
    """Weights stay where they are, turned ones too, and so do buffers, which have no rows."""
    weight = isinstance(x if x._base is None else x._base, nn.Parameter)
    activation = x.dim() > 1 and not weight and x.dtype == torch.float32 and x.is_cpu
    large = x.numel() >= policy.QUANTIZE_SAVED_FROM_ELEMENTS
    return halve(x) if activation and large and elementwise(x) is not None else x


def _fetch(kept: Any) -> torch.Tensor:
    return whole_again(kept) if isinstance(kept, Halved) else kept
