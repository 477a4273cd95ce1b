"""The backend in plain PyTorch, on any device: the definition, bit for bit bitsandbytes' format."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from capotune.kernels import policy
from capotune.kernels.nf4.tables import absmax_map, absmax_map_midpoints, byte_values, code_midpoints
from capotune.kernels.nf4.tensor import NESTED_BLOCK_SIZE, QuantizedTensor

__all__ = ["dequantize", "dequantize_absmax", "quantize", "quantize_absmax"]

# A block of zeros has absmax 0; dividing by this instead leaves its scaled weights at 0.
SMALLEST_SCALE = 1e-38


def quantize(flat: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    """flat (n,) → codes uint8 (ceil(n/2),), absmax fp32 (blocks,)."""
    midpoints, order = code_midpoints(quant_type, flat.device)
    codes, absmax = [], []
    for part in torch.split(flat, policy.QUANTIZE_AT_ONCE):
        scaled, part_absmax = _scale_to_unit(part.float(), block_size)
        part_codes = order[torch.bucketize(F.pad(scaled, (0, scaled.numel() % 2)), midpoints, out_int32=True)]
        codes.append(part_codes[0::2] << 4 | part_codes[1::2])
        absmax.append(part_absmax)
    return torch.cat(codes), torch.cat(absmax)


def dequantize(q: QuantizedTensor, out: Tensor) -> None:
    """Write table[code] · absmax, computed in fp32 and rounded once, into ``out`` (n,)."""
    table = byte_values(q.quant_type, q.codes.device)
    parts = zip(
        torch.split(out, policy.QUANTIZE_AT_ONCE),
        torch.split(q.codes, policy.QUANTIZE_AT_ONCE // 2),
        torch.split(_absmax_of(q), policy.QUANTIZE_AT_ONCE // q.block_size),
        strict=True,
    )
    for part, codes, absmax in parts:
        n = part.numel()
        part.copy_(table[codes.int()].view(-1)[:n].mul_(absmax.repeat_interleave(q.block_size)[:n]))


def quantize_absmax(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """absmax fp32 (blocks,), offset fp32 () → uint8 (blocks,) codes, nested absmax fp32 (ceil(blocks/256),)."""
    scaled, nested_absmax = _scale_to_unit(absmax - offset, NESTED_BLOCK_SIZE)
    return torch.bucketize(scaled, absmax_map_midpoints(absmax.device), out_int32=True).to(torch.uint8), nested_absmax


def _scale_to_unit(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """flat fp32 (n,) → flat / absmax of its block, in [−1, 1] (n,), and absmax (blocks,).

    Full blocks are multiplied by 1/absmax and a short last block is divided by absmax, and only the latter stores the
    floor that guards against 0/0. It looks arbitrary; it is what bitsandbytes computes, to the last bit.
    """
    full = flat.numel() // block_size * block_size
    blocks, rest = flat[:full].view(-1, block_size), flat[full:]
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=SMALLEST_SCALE)).unsqueeze(1)).view(-1)
    if rest.numel():
        rest_absmax = rest.abs().max().clamp(min=SMALLEST_SCALE)
        absmax = torch.cat([absmax, rest_absmax.view(1)])
        scaled = torch.cat([scaled, rest / rest_absmax])
    return scaled.clamp_(-1.0, 1.0), absmax


def _absmax_of(q: QuantizedTensor) -> Tensor:
    """fp32 (blocks,): absmax as it is, or read back from its 8 bits."""
    if q.nested_absmax is None or q.offset is None:
        return q.absmax
    return dequantize_absmax(q.absmax, absmax_map(q.absmax.device), q.nested_absmax, q.offset)


def dequantize_absmax(absmax8: Tensor, values: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """absmax8 uint8 (blocks,), values fp32 (256,) → values[absmax8] · nested_absmax + offset, fp32 (blocks,).

    Two roundings, product then sum, as in bitsandbytes; a fused multiply-add would differ in the last bit.
    """
    scale = nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: absmax8.numel()]
    return values[absmax8.int()].mul_(scale).add_(offset)
