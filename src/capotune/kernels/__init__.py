"""A fast path and beside it a reference in plain PyTorch, for each of the computations that take a step's time."""

from __future__ import annotations

from capotune.kernels._native import library

__all__ = ["compiled"]


def compiled() -> bool:
    """Whether the C kernels of a step are to be had here; without them PyTorch computes the same, slower."""
    return all(library(name) is not None for name in ("elementwise_cpu", "products_cpu"))
