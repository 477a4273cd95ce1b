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
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from ctypes import CDLL, c_int, c_int64
from dataclasses import dataclass, replace
from functools import cache
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capotune.errors import ModelError, SettingError
from capotune.kernels import nf4_triton, policy
from capotune.kernels._triton import available
from capotune.kernels.native import in_threads, library, pointer

__all__ = ["Linear4bit", "QuantizedTensor", "dequantize_4bit", "from_checkpoint", "quantize_4bit", "to_checkpoint"]

QUANT_TYPES = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256
WEIGHT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The published constants. NF4: quantiles of N(0, 1). FP4 in the order of its bit patterns, so not sorted.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Both of its zeros are positive (+ 0.0), as bitsandbytes has them.
FP4_VALUES = tuple(sign * v / 12.0 + 0.0 for sign in (1.0, -1.0) for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
# A block of zeros has absmax 0; dividing by this instead leaves its scaled weights at 0.
SMALLEST_SCALE = 1e-38
# How the C kernels call the dtypes.
C_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


# ------------------------------------------------------------------------------------------------ the stored tensor


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


# --------------------------------------------------------------------------------------------- quantise, dequantise


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
    lib = library("nf4_cpu") if flat.device.type == "cpu" else None
    if lib is None:
        codes, absmax = quantize_reference(flat, quant_type, block_size)
    else:
        codes, absmax = quantize_native(lib, flat, quant_type, block_size)
    summary = absmax.mean() if double_quant else absmax.amax()  # NaN or infinity anywhere shows in either
    if not isfinite(summary.item()):
        raise _not_finite(tensor)
    whole = quant_type, block_size, tuple(tensor.shape), tensor.dtype
    if not double_quant:
        return QuantizedTensor(codes, absmax, *whole)
    if lib is None:
        absmax8, nested_absmax = quantize_absmax_reference(absmax, offset=summary)
    else:
        absmax8, nested_absmax = quantize_absmax_native(lib, absmax, offset=summary)
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
    triton = available(device)
    lib = library("nf4_cpu") if device.type == "cpu" and not triton else None
    if out is None:
        out = torch.empty(q.shape, dtype=dtype, device=device)
        if lib is not None and out.nbytes >= policy.HUGE_PAGES_FROM_BYTES:
            lib.ask_for_huge_pages(pointer(out), c_int64(out.nbytes))
    elif tuple(out.shape) != q.shape or out.dtype != dtype or out.device != device or not out.is_contiguous():
        raise SettingError(f"out must be a contiguous {dtype} tensor of shape {q.shape} on {device}")
    flat = out.detach().view(-1)
    if triton:
        nf4_triton.dequantize(q, flat, _table(q.quant_type, device), _dynamic_map(device))
    elif lib is not None:
        dequantize_native(lib, q, flat)
    else:
        dequantize_reference(q, flat)
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


# ------------------------------------------------------------------------------------- the reference, plain PyTorch


def quantize_reference(flat: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    """flat (n,) → codes uint8 (ceil(n/2),), absmax fp32 (blocks,)."""
    midpoints, order = _midpoints(quant_type, flat.device)
    codes, absmax = [], []
    for part in torch.split(flat, policy.QUANTIZE_AT_ONCE):
        scaled, part_absmax = _scale_to_unit(part.float(), block_size)
        part_codes = order[torch.bucketize(F.pad(scaled, (0, scaled.numel() % 2)), midpoints, out_int32=True)]
        codes.append(part_codes[0::2] << 4 | part_codes[1::2])
        absmax.append(part_absmax)
    return torch.cat(codes), torch.cat(absmax)


def dequantize_reference(q: QuantizedTensor, out: Tensor) -> None:
    """Write table[code] · absmax, computed in fp32 and rounded once, into ``out`` (n,)."""
    table = _byte_table(q.quant_type, q.codes.device)
    parts = zip(
        torch.split(out, policy.QUANTIZE_AT_ONCE),
        torch.split(q.codes, policy.QUANTIZE_AT_ONCE // 2),
        torch.split(_absmax_of(q), policy.QUANTIZE_AT_ONCE // q.block_size),
        strict=True,
    )
    for part, codes, absmax in parts:
        n = part.numel()
        part.copy_(table[codes.int()].view(-1)[:n].mul_(absmax.repeat_interleave(q.block_size)[:n]))


def quantize_absmax_reference(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """absmax fp32 (blocks,), offset fp32 () → uint8 (blocks,) codes, nested absmax fp32 (ceil(blocks/256),)."""
    scaled, nested_absmax = _scale_to_unit(absmax - offset, NESTED_BLOCK_SIZE)
    return torch.bucketize(scaled, _map_midpoints(absmax.device), out_int32=True).to(torch.uint8), nested_absmax


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
    return _dequantize_absmax(q.absmax, _dynamic_map(q.absmax.device), q.nested_absmax, q.offset)


def _dequantize_absmax(absmax8: Tensor, values: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """absmax8 uint8 (blocks,), values fp32 (256,) → values[absmax8] · nested_absmax + offset, fp32 (blocks,).

    Two roundings, product then sum, as in bitsandbytes; a fused multiply-add would differ in the last bit.
    """
    scale = nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: absmax8.numel()]
    return values[absmax8.int()].mul_(scale).add_(offset)


# ---------------------------------------------------------------------------------------- the fast path, C on the CPU


def quantize_native(lib: CDLL, flat: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    """``quantize_reference``, the same bits, by the C kernel ``lib`` (CPU)."""
    n = flat.numel()
    midpoints, order = _midpoints(quant_type, flat.device)
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32)
    head = (pointer(flat), c_int(C_DTYPES[flat.dtype]), c_int64(n), c_int64(block_size))
    tail = (pointer(midpoints), pointer(order), pointer(codes), pointer(absmax))

    def work(first: int, last: int) -> None:
        lib.quantize_4bit(*head, c_int64(first), c_int64(last), *tail)

    in_threads(work, absmax.numel(), policy.QUANTIZE_PER_THREAD // block_size)
    return codes, absmax


def quantize_absmax_native(lib: CDLL, absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """``quantize_absmax_reference``, the same bits, by the C kernel ``lib`` (CPU)."""
    n = absmax.numel()
    codes = torch.empty(n, dtype=torch.uint8)
    nested_absmax = torch.empty(-(-n // NESTED_BLOCK_SIZE), dtype=torch.float32)
    head = (pointer(absmax), pointer(offset), c_int64(n))
    tail = (pointer(_map_midpoints(absmax.device)), pointer(codes), pointer(nested_absmax))

    def work(first: int, last: int) -> None:
        lib.quantize_absmax(*head, c_int64(first), c_int64(last), *tail)

    in_threads(work, nested_absmax.numel(), policy.ABSMAX_PER_THREAD // NESTED_BLOCK_SIZE)
    return codes, nested_absmax


def dequantize_native(lib: CDLL, q: QuantizedTensor, out: Tensor) -> None:
    """``dequantize_reference``, the same bits, by the C kernel ``lib`` (CPU)."""
    cpu = q.codes.device
    plain, nested = (None, q.absmax) if q.nested else (q.absmax, None)
    head = (pointer(q.codes), c_int64(q.numel), c_int64(q.block_size))
    tables = (pointer(_table(q.quant_type, cpu)), pointer(plain), pointer(nested), pointer(_dynamic_map(cpu)))
    tail = (*tables, pointer(q.nested_absmax), pointer(q.offset), pointer(out), c_int(C_DTYPES[out.dtype]))

    def work(first: int, last: int) -> None:
        lib.dequantize_4bit(*head, c_int64(first), c_int64(last), *tail)

    in_threads(work, q.absmax.numel(), policy.DEQUANTIZE_PER_THREAD // q.block_size)


# ------------------------------------------------------------------------------------------------------- the tables


@cache
def _table(quant_type: str, device: torch.device) -> Tensor:
    """fp32 (16,): what each 4-bit code stands for."""
    return torch.tensor(NF4_VALUES if quant_type == "nf4" else FP4_VALUES, dtype=torch.float32, device=device)


@cache
def _midpoints(quant_type: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Between which limits which code is nearest: midpoints fp32 (15,) ascending, codes uint8 (16,) in that order.

    FP4 holds zero twice (codes 0 and 8); numbers in (0, 0.0026] get 8 and their mirror image 0, as in bitsandbytes.
    """
    table = _table(quant_type, torch.device("cpu"))
    order = torch.argsort(table, stable=True)
    ascending = table[order]
    return ((ascending[:-1] + ascending[1:]) / 2).to(device), order.to(device, torch.uint8)


@cache
def _byte_table(quant_type: str, device: torch.device) -> Tensor:
    """fp32 (256, 2): the two numbers in a byte of codes, high nibble first."""
    table = _table(quant_type, device)
    return torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)


@cache
def _dynamic_map(device: torch.device) -> Tensor:
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
def _map_midpoints(device: torch.device) -> Tensor:
    """fp32 (255,) ascending: the limits between neighbouring values of the dynamic map."""
    values = _dynamic_map(device)
    return (values[:-1] + values[1:]) / 2


# -------------------------------------------------------------------------------------------------- the linear layer


_scratch = threading.local()


def _borrow_dense(q: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """``dequantize_4bit(q, dtype)`` in memory that this thread's next call overwrites.

    On the CPU a large new tensor costs more in page faults than the arithmetic that fills it, and one matrix is needed
    at a time. Elsewhere PyTorch's allocator keeps the memory itself.
    """
    if q.codes.device.type != "cpu":
        return dequantize_4bit(q, dtype)
    buffer: Tensor | None = getattr(_scratch, "buffer", None)
    nbytes = q.numel * dtype.itemsize
    if buffer is None or buffer.numel() < nbytes:
        _scratch.buffer = buffer = torch.empty(nbytes, dtype=torch.uint8)
    return dequantize_4bit(q, out=buffer[:nbytes].view(dtype).view(q.shape))


class _Linear4bitFunction(torch.autograd.Function):
    """y = x Wᵀ + b with W dequantised for the product only: (…, in) → (…, out).

    Only the reference to the packed weight is kept for backward, which dequantises again: dx = dy W. W has no gradient.
    On a GPU, where Triton is, a few rows are multiplied with the packed weight itself.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, q: QuantizedTensor) -> Tensor:
        ctx.q = q
        if nf4_triton.fits(x, q):
            y = nf4_triton.linear(x, q, _table(q.quant_type, x.device), _dynamic_map(x.device))
            return y if bias is None else y.add_(bias)
        return F.linear(x, _borrow_dense(q, x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        needs_x, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_y @ _borrow_dense(ctx.q, grad_y.dtype) if needs_x else None
        grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0) if needs_bias else None
        return grad_x, grad_bias, None


class Linear4bit(nn.Module):
    """A frozen linear layer with its weight in 4 bits: y = x Wᵀ + b, (…, in_features) → (…, out_features).

    The packed codes and their statistics are buffers; the dense weight exists only inside a product. ``compute_dtype``
    is what the product runs in (None: the input's dtype); the result has the input's dtype. ``state_dict`` holds
    bitsandbytes' published names (see ``to_checkpoint``). Casting the module (``.to(torch.bfloat16)``) casts the bias
    and leaves the statistics in fp32, which their meaning depends on.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None

    def __init__(
        self, q: QuantizedTensor, bias: Tensor | None = None, compute_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
        self._set_quantized(q)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ModelError(f"bias has shape {tuple(bias.shape)}, the weight {q.shape}")

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
    ) -> Linear4bit:
        """Quantise ``linear``'s weight (out, in) and share its bias. Raises as ``quantize_4bit`` does."""
        q = quantize_4bit(linear.weight, quant_type=quant_type, block_size=block_size, double_quant=double_quant)
        return cls(q, linear.bias, compute_dtype)

    @classmethod
    def from_quantized(
        cls, q: QuantizedTensor, *, bias: Tensor | None = None, compute_dtype: torch.dtype | None = None
    ) -> Linear4bit:
        """Wrap a weight (out, in) that is already in 4 bits. Raises ``ModelError`` if it is not a matrix."""
        return cls(q, bias, compute_dtype)

    @property
    def quantized(self) -> QuantizedTensor:
        """The packed weight; shares memory with the buffers."""
        return QuantizedTensor(
            self.codes,
            self.absmax,
            self.quant_type,
            self.block_size,
            (self.out_features, self.in_features),
            self.weight_dtype,
            self.nested_absmax,
            self.offset,
        )

    @property
    def weight_nbytes(self) -> int:
        """Bytes that the packed weight needs, statistics included."""
        return self.quantized.nbytes

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """A new dense copy of the weight: (out_features, in_features)."""
        return dequantize_4bit(self.quantized, dtype)

    def borrowed_weight(self, dtype: torch.dtype) -> Tensor:
        """``dense_weight`` without the cost of new memory: valid until this thread asks any layer for the next one.

        For a product that runs at once and keeps no reference, as in a hand-written autograd function.
        """
        return _borrow_dense(self.quantized, dtype)

    def multiplies_packed(self, x: Tensor) -> bool:
        """Whether ``forward(x)`` needs no dense weight: few rows on a GPU with Triton (``kernels.nf4_triton``)."""
        return nf4_triton.fits(x, self.quantized)

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        y: Tensor = _Linear4bitFunction.apply(x.to(dtype), bias, self.quantized)  # type: ignore[no-untyped-call]
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"quant_type={self.quant_type}, block_size={self.block_size}, double_quant={self.nested_absmax is not None}"
        )

    def _set_quantized(self, q: QuantizedTensor) -> None:
        if len(q.shape) != 2:
            raise ModelError(f"a linear weight must have two dimensions (out, in), not {q.shape}")
        self.out_features, self.in_features = q.shape
        self.quant_type, self.block_size, self.weight_dtype = q.quant_type, q.block_size, q.dtype
        for name in ("codes", "absmax", "nested_absmax", "offset"):
            self.register_buffer(name, getattr(q, name), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Linear4bit:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self.get_buffer(name)
            if new.dtype != old.dtype:  # a cast of the module must not round the statistics
                setattr(self, name, old.to(new.device))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(to_checkpoint(self.quantized, prefix))

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: Any,
        unexpected_keys: Any,
        error_msgs: Any,
    ) -> None:
        mine = {key: state_dict[key] for key in state_dict if _is_weight_key(key, prefix)}
        rest = {key: state_dict[key] for key in state_dict if key not in mine}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if not mine:
            missing_keys.append(f"{prefix}weight")
            return
        q = from_checkpoint(mine, prefix)
        if q.shape != (self.out_features, self.in_features):
            raise ModelError(f"{prefix}weight has shape {q.shape}; expected {(self.out_features, self.in_features)}")
        device = self.codes.device
        self._set_quantized(q)
        self.to(device)


# ----------------------------------------------------------------------------------------- the published file layout


def to_checkpoint(q: QuantizedTensor, prefix: str = "") -> dict[str, Tensor]:
    """``q`` under the names and bytes that bitsandbytes publishes (its ``QuantState.as_dict(packed=True)``).

    Keys, each after ``prefix`` (as "model.layers.0.mlp.up_proj."): weight uint8 (ceil(n/2), 1); weight.absmax;
    weight.quant_map fp32 (16,); when double-quantised weight.nested_absmax and weight.nested_quant_map fp32 (256,);
    weight.quant_state.bitsandbytes__nf4 (or __fp4): JSON as uint8. Tensors that belong to ``q`` are not copied.
    """
    device = q.codes.device
    facts: dict[str, Any] = {
        "quant_type": q.quant_type,
        "blocksize": q.block_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": q.shape,
    }
    tensors = {"": q.codes.view(-1, 1), ".absmax": q.absmax, ".quant_map": _table(q.quant_type, device).clone()}
    if q.nested_absmax is not None and q.offset is not None:
        facts |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32", "nested_offset": q.offset.item()}
        tensors |= {".nested_absmax": q.nested_absmax, ".nested_quant_map": _dynamic_map(device).clone()}
    packed = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    tensors[f".quant_state.bitsandbytes__{q.quant_type}"] = packed
    return {f"{prefix}weight{name}": tensor for name, tensor in tensors.items()}


def from_checkpoint(tensors: Mapping[str, Tensor], prefix: str = "") -> QuantizedTensor:
    """The tensor stored under ``prefix`` in the published layout; see ``to_checkpoint``. Other keys are ignored.

    Raises ``ModelError`` that names the tensor when a part is missing, truncated, of the wrong dtype, not finite, or at
    odds with the stated shape, type or block size.
    """
    name = f"{prefix}weight"
    facts = _read_facts(tensors, name)
    try:
        return _assemble(tensors, name, facts)
    except ModelError as error:
        raise ModelError(f"{name}: {error}; the checkpoint is damaged or not bitsandbytes' 4-bit format") from None


def _assemble(tensors: Mapping[str, Tensor], name: str, facts: dict[str, Any]) -> QuantizedTensor:
    # FSDP stores the packed bytes in the model's dtype; they are the same bytes.
    codes = _part(tensors, name).reshape(-1).contiguous().view(torch.uint8)
    nested_absmax = offset = None
    if "nested_offset" in facts:
        nested_absmax = _part(tensors, f"{name}.nested_absmax")
        offset = torch.tensor(_number(facts, "nested_offset"), dtype=torch.float32, device=codes.device)
        if facts.get("nested_blocksize") != NESTED_BLOCK_SIZE:
            raise ModelError(f"nested block size {facts.get('nested_blocksize')!r} is not {NESTED_BLOCK_SIZE}")
    absmax = _part(tensors, f"{name}.absmax")
    kind, block_size = facts["quant_type"], facts.get("blocksize")
    q = QuantizedTensor(codes, absmax, kind, block_size, _shape(facts), _dtype(facts), nested_absmax, offset)  # type: ignore[arg-type]
    if not torch.equal(_part(tensors, f"{name}.quant_map"), _table(q.quant_type, codes.device)):
        raise ModelError(f"quant_map is not the {q.quant_type} table")
    q = _with_known_map(q, tensors, name)
    for label, values in (("absmax", q.absmax), ("nested_absmax", q.nested_absmax), ("nested_offset", q.offset)):
        if values is not None and not bool(torch.isfinite(values).all()):
            raise ModelError(f"{label} holds values that are NaN or infinite")
    return q


def _with_known_map(q: QuantizedTensor, tensors: Mapping[str, Tensor], name: str) -> QuantizedTensor:
    """Read absmax through a foreign 8-bit map once and keep the values: such checkpoints exist.

    Old CPU builds of bitsandbytes overwrote the first entry of the map with −1.
    """
    if q.nested_absmax is None or q.offset is None:
        return q
    values = _part(tensors, f"{name}.nested_quant_map")
    if values.dtype != torch.float32 or tuple(values.shape) != (256,):
        raise ModelError(f"nested_quant_map is {values.dtype} {tuple(values.shape)}, not torch.float32 (256,)")
    if torch.equal(values, _dynamic_map(values.device)):
        return q
    absmax = _dequantize_absmax(q.absmax, values, q.nested_absmax, q.offset)
    return replace(q, absmax=absmax, nested_absmax=None, offset=None)


def _read_facts(tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """The JSON beside the codes; its key ends in the quantisation type."""
    start = f"{name}.quant_state.bitsandbytes__"
    keys = [key for key in tensors if key.startswith(start)]
    if len(keys) != 1:
        raise ModelError(f"{name}: expected one tensor {start}<type>, found {len(keys)}; is this a 4-bit checkpoint?")
    try:
        facts = json.loads(bytes(tensors[keys[0]].tolist()))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{keys[0]}: not JSON stored as uint8 ({error}); the checkpoint is damaged") from None
    if not isinstance(facts, dict) or facts.get("quant_type") != keys[0].removeprefix(start):
        raise ModelError(f"{keys[0]}: its content does not name the type in its key; the checkpoint is damaged")
    return facts


def _part(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise ModelError(f"tensor {key} is missing")
    return tensors[key]


def _shape(facts: dict[str, Any]) -> tuple[int, ...]:
    shape = facts.get("shape")
    if not isinstance(shape, list) or not shape or not all(type(size) is int and size > 0 for size in shape):
        raise ModelError(f"stated shape {shape!r} is not a list of positive whole numbers")
    return tuple(shape)


def _dtype(facts: dict[str, Any]) -> torch.dtype:
    name = facts.get("dtype")
    if not isinstance(name, str) or name not in WEIGHT_DTYPES:
        raise ModelError(f"original dtype {name!r} is not one of {', '.join(WEIGHT_DTYPES)}")
    return WEIGHT_DTYPES[name]


def _number(facts: dict[str, Any], key: str) -> float:
    if type(facts[key]) is not float:
        raise ModelError(f"{key} {facts[key]!r} is not a number")
    return float(facts[key])


def _is_weight_key(key: str, prefix: str) -> bool:
    return key == f"{prefix}weight" or key.startswith(f"{prefix}weight.")
