"""The constants of the published format, on the device that asks."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["absmax_map", "absmax_map_midpoints", "byte_values", "code_midpoints", "code_values"]

# NF4: quantiles of N(0, 1). FP4 in the order of its bit patterns, so not sorted.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Both of its zeros are positive (+ 0.0), as bitsandbytes has them.
FP4_VALUES = tuple(sign * v / 12.0 + 0.0 for sign in (1.0, -1.0) for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))


@cache
def code_values(quant_type: str, device: torch.device) -> Tensor:
    """fp32 (16,): what each 4-bit code stands for."""
    return torch.tensor(NF4_VALUES if quant_type == "nf4" else FP4_VALUES, dtype=torch.float32, device=device)


@cache
def code_midpoints(quant_type: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Between which limits which code is nearest: midpoints fp32 (15,) ascending, codes uint8 (16,) in that order.

    FP4 holds zero twice (codes 0 and 8); numbers in (0, 0.0026] get 8 and their mirror image 0, as in bitsandbytes.
    """
    table = code_values(quant_type, torch.device("cpu"))
    order = torch.argsort(table, stable=True)
    ascending = table[order]
    return ((ascending[:-1] + ascending[1:]) / 2).to(device), order.to(device, torch.uint8)


@cache
def byte_values(quant_type: str, device: torch.device) -> Tensor:
    """fp32 (256, 2): the two numbers in a byte of codes, high nibble first."""
    table = code_values(quant_type, device)
    return torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)


@cache
def absmax_map(device: torch.device) -> Tensor:
    """fp32 (256,) ascending: the signed dynamic 8-bit type of Dettmers 2016 (arXiv 1511.04561), for absmax.

    Seven decades; decade i = 0..6 holds 2^i evenly spaced magnitudes from 10^(i−7) to 10^(i−6), each with both signs,
    and 0 and 1 are added: 2·(1 + 2 + … + 64) + 2 = 256.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        centres = (edges[:-1] + edges[1:]) / 2
        values += (10 ** (decade - 6) * centres).tolist() + (-(10 ** (decade - 6)) * centres).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@cache
def absmax_map_midpoints(device: torch.device) -> Tensor:
    """fp32 (255,) ascending: the limits between neighbouring values of the dynamic map."""
    values = absmax_map(device)
    return (values[:-1] + values[1:]) / 2
