"""The small products of a LoRA delta, with r ranks (8, say) between two sides of hundreds or thousands:

    project: xa = s·X Mᵀ        update: X += s·xa M        gather: M = s·xaᵀ X

with X (rows, columns), xa (rows, r), M (r, columns). A library for large products runs these at a fraction of its
speed. In C on the CPU each is one pass over X.
"""

from __future__ import annotations

import torch

from capotune.kernels.backends import backend_for
from capotune.kernels.native import check_shape

__all__ = ["gather", "project", "update"]


def project(x: torch.Tensor, matrix: torch.Tensor, scale: float = 1.0, out: torch.Tensor | None = None) -> torch.Tensor:
    """x (rows, columns), matrix (r, columns) → scale·x·matrixᵀ (rows, r) in x's dtype, a new tensor or ``out``."""
    check_shape("matrix", matrix, (matrix.shape[0], x.shape[1]))
    if out is not None:
        check_shape("out", out, (x.shape[0], matrix.shape[0]))
    return backend_for(x, x if out is None else out, matrix).project(x, matrix, scale, out)


def update(x: torch.Tensor, xa: torch.Tensor, matrix: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """x (rows, columns) plus scale·xa·matrix, in place; xa (rows, r), matrix (r, columns)."""
    check_shape("xa", xa, (x.shape[0], matrix.shape[0]))
    check_shape("matrix", matrix, (matrix.shape[0], x.shape[1]))
    return backend_for(x, xa, matrix).update(x, xa, matrix, scale)


def gather(xa: torch.Tensor, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """xa (rows, r), x (rows, columns) → scale·xaᵀ·x (r, columns) in x's dtype."""
    check_shape("xa", xa, (x.shape[0], xa.shape[1]))
    return backend_for(x, xa).gather(xa, x, scale)
