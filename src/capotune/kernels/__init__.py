"""A fast path and beside it a reference in plain PyTorch, for each of the computations that take a step's time."""

from __future__ import annotations

import torch

from capotune.kernels._native import library
from capotune.kernels._triton import available
from capotune.kernels.linear import matrix_unit

__all__ = ["described"]


def described(device: torch.device) -> str:
    """Who computes a step there, for the record of a run: results differ in the last bits, and in time."""
    if device.type != "cpu" and available(device):
        return "PyTorch and Triton"
    if device.type != "cpu" or not all(library(name) for name in ("elementwise_cpu", "products_cpu")):
        return "PyTorch"
    return "compiled" if matrix_unit() is None else "compiled, with the products of linear layers at 16 bits by AMX"
