"""The small products of a LoRA delta, with r ranks (8, say) between two sides of hundreds or thousands:

    project: xa = s·X Mᵀ        update: X += s·xa M        gather: M = s·xaᵀ X

with X (rows, columns), xa (rows, r), M (r, columns). A library for large products runs these at a fraction of its
speed. In C on the CPU each is one pass over X.
"""

from __future__ import annotations

from ctypes import CDLL

import torch

from capotune.kernels.native import address, check_shape, over_rows, products

__all__ = ["gather", "project", "update"]

_LANES = 8  # columns that products_cpu.c takes together
MOST_RANKS = 48  # more are no longer small


def project(x: torch.Tensor, matrix: torch.Tensor, scale: float = 1.0, out: torch.Tensor | None = None) -> torch.Tensor:
    """x (rows, columns), matrix (r, columns) → scale·x·matrixᵀ (rows, r) in x's dtype, a new tensor or ``out``."""
    check_shape("matrix", matrix, (matrix.shape[0], x.shape[1]))
    if out is not None:
        check_shape("out", out, (x.shape[0], matrix.shape[0]))
    lib = _kernels(x, x if out is None else out, matrix)
    if lib is None and x.is_cuda:
        out = torch.empty(x.shape[0], matrix.shape[0], dtype=x.dtype, device=x.device) if out is None else out
        return torch.addmm(out, x, matrix.to(x.dtype).t(), beta=0, alpha=scale, out=out)  # beta 0: out is not read
    if lib is None:  # the rank first in memory: with it last, a CPU takes twice as long
        xa = matrix.to(x.dtype) @ x.t()
        xa = (xa if scale == 1 else xa.mul_(scale)).t()
        return xa if out is None else out.copy_(xa)
    if out is None:
        out = torch.empty(x.shape[0], matrix.shape[0], dtype=x.dtype)
    matrix = matrix.contiguous()
    _run(lib, "low_rank_project", x, out, matrix, scale, items=len(x), work=matrix.numel())
    return out


def update(x: torch.Tensor, xa: torch.Tensor, matrix: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """x (rows, columns) plus scale·xa·matrix, in place; xa (rows, r), matrix (r, columns)."""
    check_shape("xa", xa, (x.shape[0], matrix.shape[0]))
    check_shape("matrix", matrix, (matrix.shape[0], x.shape[1]))
    lib = _kernels(x, xa, matrix)
    if lib is None:
        return x.addmm_(xa, matrix.to(x.dtype), alpha=scale)
    matrix = matrix.contiguous()
    _run(lib, "low_rank_update", x, xa, matrix, scale, items=len(x), work=matrix.numel())
    return x


def gather(xa: torch.Tensor, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """xa (rows, r), x (rows, columns) → scale·lowᵀ·x (r, columns) in x's dtype."""
    check_shape("xa", xa, (x.shape[0], xa.shape[1]))
    matrix = torch.empty(xa.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
    lib = _kernels(x, xa, matrix)
    if lib is None:
        return torch.addmm(matrix, xa.t(), x, beta=0, alpha=scale, out=matrix)
    groups = -(-x.shape[1] // _LANES)
    _run(lib, "low_rank_gather", x, xa, matrix, scale, items=groups, work=xa.numel() * _LANES)
    return matrix


def _kernels(x: torch.Tensor, xa: torch.Tensor, matrix: torch.Tensor) -> CDLL | None:
    """The C kernels, where these are the tensors for them."""
    known = 0 < matrix.shape[0] <= MOST_RANKS and x.numel() > 0 and x.stride(1) == 1 and xa.stride(1) == 1
    return products(x, xa, matrix) if known else None


def _run(
    lib: CDLL,
    kernel: str,
    x: torch.Tensor,
    xa: torch.Tensor,
    matrix: torch.Tensor,
    scale: float,
    *,
    items: int,
    work: int,
) -> None:
    """``work``: operations for each of the items."""
    over_rows(
        lib, kernel, items, work,
        rows=x.shape[0], columns=x.shape[1], ranks=matrix.shape[0], x=address(x), xa=address(xa),
        matrix=address(matrix), x_stride=x.stride(0), xa_stride=xa.stride(0), scale=scale,
    )  # fmt: skip
