"""How the kernels may run, here and now: all the ambient state of the engine.

Between a training loop and the kernels stand tasks, Transformers' forward functions and autograd, and none passes an
argument of ours on. So what a loop allows holds inside a ``with`` instead: in its thread, or in the process where it is
about glibc's heap, of which there is one. On a CPU autograd runs backward in the thread that asks for it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from capotune.kernels import policy
from capotune.kernels.memory import Memory

__all__ = ["Execution", "execution", "lending", "reduced_precision", "reusing_memory", "training_memory"]


@dataclass(frozen=True)
class Execution:
    """What is allowed in a thread."""

    reduced_precision: bool = False
    """Products may round each value to 16 bits, of its own or, with prepacked weights, of the largest in its row."""
    memory: Memory | None = None
    """Of functions that are called again and again."""


_execution: ContextVar[Execution] = ContextVar("execution", default=Execution())  # noqa: B039 - it is frozen


def execution() -> Execution:
    """What is allowed in this thread, now."""
    return _execution.get()


@contextmanager
def _executing(**changes: Any) -> Iterator[None]:
    token = _execution.set(replace(_execution.get(), **changes))
    try:
        yield
    finally:
        _execution.reset(token)


def reduced_precision() -> AbstractContextManager[None]:
    """Inside, products may be computed in reduced precision. Backward has to be inside too."""
    return _executing(reduced_precision=True)


def lending() -> AbstractContextManager[None]:
    """Inside there is a ``Memory``; it is freed at the end."""
    return _executing(memory=Memory())


@contextmanager
def training_memory(*, sparing: bool) -> Iterator[None]:
    """For the steps of a training run: ``reusing_memory``, and unless it is ``sparing``, as with gradient
    checkpointing, memory is lent from step to step."""
    with reusing_memory(sparing=sparing), nullcontext() if sparing else lending():
        yield


# --------------------------------------------------------------------------------------------------------- glibc's heap

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Options of glibc's mallopt."""
_reusing = 0  # how many ask for it now


@contextmanager
def reusing_memory(*, sparing: bool = False) -> Iterator[None]:
    """Inside, tensors below 8 MB that PyTorch frees on the CPU leave their memory to the next one, and larger ones give
    it back to the system at once, where the C library is glibc. ``sparing``: those below 1 MB do; it takes longer, and
    leaves no gaps of some MB where long rows make all tensors large.

    By itself glibc gives back what is free at the end of its heap, and the system hands it out again page by page,
    zeroed: 5 to 10 % of a step of small tensors. And it soon keeps tensors of up to 32 MB in the heap, where long-lived
    small ones leave gaps between them: twice the memory with gradient checkpointing.

    It is for the whole process: whoever asks first decides, and who asks last ends it. Afterwards unused memory is
    returned and the thresholds are those that glibc comes to under such use; they no longer move by themselves.
    """
    global _reusing
    try:
        libc = ctypes.CDLL("libc.so.6" if sys.platform == "linux" else None)
        set_option, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library, or none that can be asked for by name
        yield
        return
    if not _reusing:
        set_option(_MMAP_THRESHOLD, policy.MAPPED_FROM_BYTES_SPARING if sparing else policy.MAPPED_FROM_BYTES)
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
