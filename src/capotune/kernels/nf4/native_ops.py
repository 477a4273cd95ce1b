"""The backend in C, on a CPU (nf4_cpu.c): the same bits as ``reference``."""

from __future__ import annotations

from ctypes import CDLL, c_int, c_int64

import torch
from torch import Tensor

from capotune.kernels import native, policy
from capotune.kernels.native import in_threads, pointer
from capotune.kernels.nf4.tables import absmax_map, absmax_map_midpoints, code_midpoints, code_values
from capotune.kernels.nf4.tensor import NESTED_BLOCK_SIZE, QuantizedTensor

__all__ = ["dequantize", "quantize", "quantize_absmax", "use_huge_pages"]

# How the C kernels call the dtypes.
C_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _library() -> CDLL:
    lib = native.library("nf4_cpu")
    assert lib is not None
    return lib


def quantize(flat: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    """As ``reference.quantize``."""
    lib, n = _library(), flat.numel()
    midpoints, order = code_midpoints(quant_type, flat.device)
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32)
    head = (pointer(flat), c_int(C_DTYPES[flat.dtype]), c_int64(n), c_int64(block_size))
    tail = (pointer(midpoints), pointer(order), pointer(codes), pointer(absmax))

    def work(first: int, last: int) -> None:
        lib.quantize_4bit(*head, c_int64(first), c_int64(last), *tail)

    in_threads(work, absmax.numel(), policy.QUANTIZE_PER_THREAD // block_size)
    return codes, absmax


def quantize_absmax(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """As ``reference.quantize_absmax``."""
    lib, n = _library(), absmax.numel()
    codes = torch.empty(n, dtype=torch.uint8)
    nested_absmax = torch.empty(-(-n // NESTED_BLOCK_SIZE), dtype=torch.float32)
    head = (pointer(absmax), pointer(offset), c_int64(n))
    tail = (pointer(absmax_map_midpoints(absmax.device)), pointer(codes), pointer(nested_absmax))

    def work(first: int, last: int) -> None:
        lib.quantize_absmax(*head, c_int64(first), c_int64(last), *tail)

    in_threads(work, nested_absmax.numel(), policy.ABSMAX_PER_THREAD // NESTED_BLOCK_SIZE)
    return codes, nested_absmax


def dequantize(q: QuantizedTensor, out: Tensor) -> None:
    """As ``reference.dequantize``."""
    lib, cpu = _library(), q.codes.device
    plain, nested = (None, q.absmax) if q.nested else (q.absmax, None)
    head = (pointer(q.codes), c_int64(q.numel), c_int64(q.block_size))
    tables = (pointer(code_values(q.quant_type, cpu)), pointer(plain), pointer(nested), pointer(absmax_map(cpu)))
    tail = (*tables, pointer(q.nested_absmax), pointer(q.offset), pointer(out), c_int(C_DTYPES[out.dtype]))

    def work(first: int, last: int) -> None:
        lib.dequantize_4bit(*head, c_int64(first), c_int64(last), *tail)

    in_threads(work, q.absmax.numel(), policy.DEQUANTIZE_PER_THREAD // q.block_size)


def use_huge_pages(out: Tensor) -> None:
    """Ask for large pages for a large new tensor."""
    if out.nbytes >= policy.HUGE_PAGES_FROM_BYTES:
        _library().ask_for_huge_pages(pointer(out), c_int64(out.nbytes))
