"""What this machine is and what it can do."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def pick_device() -> torch.device:
    """The GPU when PyTorch can use one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(device: torch.device, *, packed: bool = False) -> torch.dtype:
    """What a language model computes in: bf16 on a GPU that has it, else fp32.

    A model that is ``packed`` in 4 bits computes in bf16 on a CPU with instructions for it too: on an EPYC with
    avx512_bf16 a QLoRA step of 512 tokens takes a third of the time, at the same loss to five digits.
    """
    import torch

    if device.type == "cpu":
        find: Any = getattr(torch.cpu, "get_capabilities", dict)  # which older PyTorch does not have
        fast = packed and any(find().get(name) for name in ("avx512_bf16", "amx_bf16"))
    else:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def reset_peak_memory() -> None:
    """Start a new peak for ``peak_memory_bytes`` where the machine can (a GPU); a process has one peak on a CPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes() -> int:
    """Peak memory of this process in bytes: on a GPU what PyTorch allocated there, else the resident set's peak."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)  # macOS counts bytes, Linux KiB


def environment() -> dict[str, str]:
    """Versions and machine, for the record of a run."""
    import os

    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = {name: metadata.version(name) for name in ("capotune", "torch", "transformers", "tokenizers", "numpy")}
    return {
        **versions,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "gpu": gpu,
    }
