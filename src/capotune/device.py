"""What this machine is and what it can do."""

from __future__ import annotations

import ctypes
import gc
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Options of glibc's mallopt."""
_reusing = 0  # how many ask for it now


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


@contextmanager
def reusing_memory(*, sparing: bool = False) -> Iterator[None]:
    """Inside, tensors below 8 MB that PyTorch frees on the CPU leave their memory to the next one, and larger ones give
    it back to the system at once, where the C library is glibc. ``sparing``: those below 1 MB do; it takes longer, and
    leaves no gaps of some MB where long rows make all tensors large.

    By itself glibc gives back what is free at the end of its heap, and the system hands it out again page by page,
    zeroed: 5 to 10 % of a step of small tensors. And it soon keeps tensors of up to 32 MB in the heap, where long-lived
    small ones leave gaps between them: twice the memory with gradient checkpointing.

    It is for the whole process. Afterwards unused memory is returned and the thresholds are those that glibc comes to
    under such use; they no longer move by themselves.
    """
    global _reusing
    try:
        libc = ctypes.CDLL("libc.so.6" if sys.platform == "linux" else None)
        set_option, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library, or none that can be asked for by name
        yield
        return
    if not _reusing:
        set_option(_MMAP_THRESHOLD, 2**20 if sparing else 2**23)
        set_option(_TRIM_THRESHOLD, 2**31 - 1)
    _reusing += 1
    try:
        yield
    finally:
        _reusing -= 1
        if not _reusing:
            set_option(_MMAP_THRESHOLD, 2**25)
            set_option(_TRIM_THRESHOLD, 2**26)
            trim(0)


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Inside, Python's garbage collector does not run. PyTorch and Transformers are some thousand modules: while they
    are imported it would look through them again and again, a tenth of the time, and all of them stay."""
    was_at_work = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_at_work:
            gc.enable()


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
