"""The engine: each computation that takes a step's time, in C, Triton or PyTorch, with a reference in plain PyTorch
beside it; transformer blocks as lists of ops, and what executes them. README.md tells how it works."""

from __future__ import annotations

import torch

from capotune.device import cpu_level
from capotune.kernels import native_ops
from capotune.kernels.backends import bound
from capotune.kernels.linear import amx_kernels
from capotune.kernels.native import library

__all__ = ["described"]


def described(device: torch.device) -> str:
    """Who computes a step there, for the record of a run: results differ in the last bits, and in time."""
    backend = bound(device, torch.float32)
    if backend is not native_ops or library("products_cpu") is None:
        return backend.NAME
    if amx_kernels() is not None:
        return "compiled for amx, with the products of linear layers in reduced precision"
    level = cpu_level()
    return f"compiled for {'avx512' if level == 'amx' else level}"  # amx without the system's leave to use it
