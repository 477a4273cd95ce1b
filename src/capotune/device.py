"""What this machine is and what it can do."""

from __future__ import annotations

import gc
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capotune.errors import SettingError
from capotune.files import human_bytes

if TYPE_CHECKING:
    import torch


CPU_LEVELS = ("plain", "avx2", "avx512", "amx")
CPU_LEVEL_VARIABLE = "CAPOTUNE_CPU_LEVEL"
_RECORDED_VERSIONS = ("capotune", "torch", "transformers", "tokenizers", "safetensors", "numpy", "scikit-learn")
_AMX_FLAGS = {"amx_tile", "amx_bf16", "amx_int8", "avx512_bf16"}
"""Of /proc/cpuinfo; Linux lists them where it can hand out AMX's registers."""
_OUT_OF_MEMORY = (
    "can't allocate memory", "Cannot allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED",
    "bad_alloc",
)  # fmt: skip
"""What PyTorch says (on Linux, on Windows, of a GPU), cuBLAS, C++ and the system."""


def pick_device() -> torch.device:
    """The GPU when PyTorch can use one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cpu_level() -> str:
    """Which instructions the C kernels may use: one of ``CPU_LEVELS``, each of which contains those before it.

    - ``plain``: no SIMD flag for the compiler; the level of every architecture but x86_64
    - ``avx2``: AVX2, FMA and F16C
    - ``avx512``: AVX-512 F, BW, VL and DQ
    - ``amx``: AVX-512 with bf16, and Intel's AMX for 8 bits and bf16

    It is what the processor has and PyTorch uses, or what ``CAPOTUNE_CPU_LEVEL`` says where that is less, which makes
    a run compute as on a lesser processor. PyTorch's own kernels stay as they are.

    Raises ``SettingError`` for a level that does not exist or that this machine does not have: to take another one
    instead would leave open what ran.
    """
    level, wanted = machine_cpu_level(), os.environ.get(CPU_LEVEL_VARIABLE)
    if not wanted:
        return level
    there = CPU_LEVELS[: CPU_LEVELS.index(level) + 1]
    if wanted not in there:
        problem = "this machine does not have that level." if wanted in CPU_LEVELS else "there is no such level."
        raise SettingError(problem, allowed=", ".join(there), where=f"{CPU_LEVEL_VARIABLE}={wanted}")
    return wanted


@cache
def machine_cpu_level() -> str:
    """The highest of ``CPU_LEVELS`` that this machine has, and that PyTorch uses (``ATEN_CPU_CAPABILITY``)."""
    import torch

    level = {"AVX2": "avx2", "AVX512": "avx512"}.get(torch.backends.cpu.get_cpu_capability(), "plain")
    return "amx" if level == "avx512" and _linux_lists(_AMX_FLAGS) else level


def _linux_lists(flags: set[str]) -> bool:
    """Whether Linux says that the processor has them all."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return flags <= set(line.split())


def compute_dtype(device: torch.device, *, quantized: bool = False) -> torch.dtype:
    """What a language model computes in: bf16 on a GPU that has it, else fp32.

    A model that is ``quantized`` to 4 bits computes in bf16 on a CPU with instructions for it too: on an EPYC with
    avx512_bf16 a QLoRA step of 512 tokens takes a third of the time, at the same loss to five digits. Such processors
    are at ``cpu_level`` avx512 or above.
    """
    import torch

    if device.type == "cpu":
        find: Any = getattr(torch.cpu, "get_capabilities", dict)  # which older PyTorch does not have
        has_bf16 = any(find().get(name) for name in ("avx512_bf16", "amx_bf16"))
        fast = quantized and has_bf16 and cpu_level() in ("avx512", "amx")
    else:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the CPU or on the GPU. PyTorch says so of a CPU in a ``RuntimeError``'s words only."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


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
    import torch

    versions = {name: metadata.version(name) for name in _RECORDED_VERSIONS}
    return {
        **versions,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "cpu_level": cpu_level(),
        "memory": _memory(),
        "gpu": _gpu(),
    }


def _processor() -> str:
    """The processor's name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    return next(named, platform.machine())


def _memory() -> str:
    """The machine's memory."""
    if sys.platform == "win32":
        import psutil

        return human_bytes(psutil.virtual_memory().total)
    return human_bytes(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none"
    memory = human_bytes(torch.cuda.get_device_properties(0).total_memory)
    return f"{torch.cuda.get_device_name()}, {memory}, CUDA {torch.version.cuda}"
