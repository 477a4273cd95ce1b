"""Loads the C kernels: compiled once per machine at first use, kept in the user's cache folder.

Nothing here is needed: without a C compiler, with a read-only home, or with ``CAPOTUNE_NATIVE=0`` in the environment,
``library`` returns None and the PyTorch path computes the same bits, slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

__all__ = ["in_threads", "library", "pointer"]

SOURCE = Path(__file__).with_name("nf4_cpu.c")
# No -ffast-math and no fused multiply-add: each would change the last bit.
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-ffp-contract=off")
# Named instruction sets rather than -march=native: they are part of the cached file's name, so that two machines that
# share a home folder do not run each other's code.
SIMD_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mf16c"),
    "AVX2": ("-mavx2", "-mf16c"),
}
COMPILE_SECONDS = 120

log = logging.getLogger(__name__)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None (said once, in the log) where they cannot be had."""
    if os.environ.get("CAPOTUNE_NATIVE") == "0":
        return None
    try:
        return ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        log.info("4-bit kernels run in plain PyTorch, slower: the C kernels could not be built (%s)", error)
        return None


def _compiled() -> Path:
    """Path of the shared library, built now unless an earlier run built the same source with the same flags."""
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")
    if compiler is None:
        raise OSError("no C compiler found")
    flags = FLAGS + SIMD_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ())
    key = hashlib.sha256("\0".join([platform.machine(), compiler, *flags]).encode() + SOURCE.read_bytes()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "capotune"
    target = folder / f"{SOURCE.stem}-{key[:16]}.so"
    if not target.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _compile(compiler, flags, target)
    return target


def _compile(compiler: str, flags: tuple[str, ...], target: Path) -> None:
    """Build beside ``target`` and rename, so that another process sees a whole file or none."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        unfinished = Path(folder) / target.name
        command = [compiler, *flags, "-o", str(unfinished), str(SOURCE)]
        subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_SECONDS)
        unfinished.replace(target)


def in_threads(work: Callable[[int, int], object], items: int, smallest_share: int) -> None:
    """Call ``work(first, last)`` over consecutive ranges that cover 0..items, at once, in PyTorch's number of threads.

    ctypes lets go of the interpreter lock while C runs. Threads are started anew for each call: that costs some 50 µs
    each, which ``smallest_share`` keeps small beside the work, and leaves no pool behind that a fork would break.
    """
    shares = max(1, min(torch.get_num_threads(), items // smallest_share))
    edges = [items * i // shares for i in range(shares + 1)]
    threads = [threading.Thread(target=work, args=(edges[i], edges[i + 1])) for i in range(1, shares)]
    for thread in threads:
        thread.start()
    work(edges[0], edges[1])
    for thread in threads:
        thread.join()


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Where a contiguous CPU tensor begins; NULL for None. The caller keeps the tensor alive."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
