"""Whether Triton's kernels can run, for all modules that have some. Asking does not import Triton.

With ``TRITON_INTERPRET=1`` in the environment they run on the CPU, slowly: that is how they are tested where there is
no GPU.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

__all__ = ["available", "interpreted"]


def available(device: torch.device) -> bool:
    """Whether the kernels can run on tensors of ``device``."""
    return (device.type == "cuda" or (device.type == "cpu" and interpreted())) and _triton_is_there()


def interpreted() -> bool:
    """Whether they run on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _triton_is_there() -> bool:
    return importlib.util.find_spec("triton") is not None
