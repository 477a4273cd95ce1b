"""Loads the C kernels: each source compiled once per machine at first use, kept in the user's cache folder.

Nothing here is needed: without a C compiler, with a read-only home, or with ``CAPOTUNE_NATIVE=0`` in the environment,
``library`` returns None and the PyTorch path computes the same, slower. ``CAPOTUNE_CPU_LEVEL`` leaves out instructions
that the machine has (``device.cpu_level``).
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
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from capotune.device import cpu_level
from capotune.errors import SettingError
from capotune.files import checksum, own_folder
from capotune.kernels import abi, policy

__all__ = [
    "address", "as_rows", "check_shape", "dtype_code", "elementwise", "fork_join", "in_threads", "library",
    "open_library", "output_rows", "over_rows", "pointer", "products",
]  # fmt: skip

FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared")
_LOOSE = ("-ffp-contract=fast", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
SOURCE_FLAGS = {
    # No -ffast-math and no fused multiply-add: each would change the last bit.
    "nf4_cpu": ("-ffp-contract=off",),
    # No -ffast-math either, NaN and infinity count. Nobody reads errno or the floating-point status flags, and a
    # compiler that may count on it turns every loop into vectors.
    "elementwise_cpu": _LOOSE,
    "products_cpu": _LOOSE,
    "products_amx": (),
    "prepacked_amx": (),
}
# By level (``device.cpu_level``). Named instruction sets rather than -march=native: they are part of the cached file's
# name, so that two machines that share a home folder do not run each other's code.
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mf16c")
SIMD_FLAGS = {"plain": (), "avx2": ("-mavx2", "-mf16c"), "avx512": _AVX512, "amx": _AVX512}
MORE_SIMD_FLAGS = {
    "elementwise_cpu": ("-mfma",),
    "products_cpu": ("-mfma",),
    "products_amx": ("-mfma", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "prepacked_amx": ("-mfma", "-mamx-tile", "-mamx-int8"),
}
COMPILE_SECONDS = 120
# How elementwise_cpu.c calls the dtypes.
ELEMENTWISE_DTYPES = {torch.float32: 0, torch.bfloat16: 1}

log = logging.getLogger(__name__)


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled kernels of ``name``.c beside this file, or None (said once, in the log) where they cannot be had."""
    if os.environ.get("CAPOTUNE_NATIVE") == "0":
        return None
    try:
        return _loaded(Path(__file__).with_name(f"{name}.c"))
    except (OSError, subprocess.SubprocessError) as error:
        log.info("%s runs in plain PyTorch, slower: the C kernels could not be built or loaded (%s)", name, error)
        return None


def _loaded(source: Path) -> ctypes.CDLL:
    path = _compiled(source)
    try:
        return open_library(path)
    except OSError:  # made for another C library, in a home folder that two systems share
        path.unlink(missing_ok=True)
        return open_library(_compiled(source))


def open_library(path: Path) -> ctypes.CDLL:
    """The kernels compiled from a source here, which all include abi.h but nf4_cpu.c. Raises ``AbiError`` where its
    structs are not those that Python knows."""
    lib = ctypes.CDLL(str(path))
    if hasattr(lib, "abi_table"):
        abi.check(lib)
        abi.declare(lib)
    return lib


def _compiled(source: Path) -> Path:
    """Path of the shared library, built now unless an earlier run built the same source with the same flags. Its name
    ends with its checksum: one that is damaged on the disk would compute something else."""
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")
    if compiler is None:
        raise OSError("no C compiler found")
    simd = SIMD_FLAGS[cpu_level()]
    flags = FLAGS + SOURCE_FLAGS[source.stem] + simd + (MORE_SIMD_FLAGS.get(source.stem, ()) if simd else ())
    content = b"".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h"))))
    key = hashlib.sha256("\0".join([platform.machine(), compiler, *flags]).encode() + content).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = own_folder(cache / "capotune", "XDG_CACHE_HOME")
    name = f"{source.stem}-{key[:16]}"
    for built in folder.glob(f"{name}-*.so"):
        if built.stem == f"{name}-{checksum(built)}":
            return built
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    unnamed = folder / f".{name}-{os.getpid()}.so"
    _compile(compiler, flags, source, unnamed)
    return unnamed.replace(folder / f"{name}-{checksum(unnamed)}.so")


def _compile(compiler: str, flags: tuple[str, ...], source: Path, target: Path) -> None:
    """Build beside ``target`` and rename, so that another process sees a whole file or none."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        unfinished = Path(folder) / target.name
        command = [compiler, *flags, "-o", str(unfinished), str(source), "-lm"]
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


def address(tensor: torch.Tensor | None) -> int:
    """Where a CPU tensor begins; 0 for None. The caller keeps the tensor alive and tells C its strides."""
    return 0 if tensor is None else tensor.data_ptr()


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """``address`` as an argument of a C function."""
    return ctypes.c_void_p(address(tensor))


# -------------------------------------------------------------------- for users of elementwise_cpu.c and products_cpu.c


def elementwise(*tensors: torch.Tensor) -> ctypes.CDLL | None:
    """The kernels of elementwise_cpu.c if they take these tensors: on the CPU, all fp32 or all bf16."""
    dtype = tensors[0].dtype
    return library("elementwise_cpu") if dtype in ELEMENTWISE_DTYPES and _on_cpu(tensors, dtype) else None


def products(*tensors: torch.Tensor) -> ctypes.CDLL | None:
    """The kernels of products_cpu.c if they take these tensors: on the CPU, fp32."""
    return library("products_cpu") if _on_cpu(tensors, torch.float32) else None


def _on_cpu(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> bool:
    for one in tensors:  # noqa: SIM110 - a step asks this a thousand times, and ``all`` takes twice as long
        if one.dtype != dtype or not one.is_cpu:
            return False
    return True


def dtype_code(tensor: torch.Tensor) -> int:
    """How elementwise_cpu.c calls the dtype of ``tensor``."""
    return ELEMENTWISE_DTYPES[tensor.dtype]


def over_rows(lib: ctypes.CDLL, kernel: str, rows: int, columns: int, /, **arguments: abi.Value) -> None:
    """Call ``kernel`` of ``lib`` over all rows, of so many ``columns`` each, in threads of PyTorch's own OpenMP pool.

    ``arguments`` are the fields of its struct in abi.h, by name. Threads of our own would be slower than none: after a
    matrix product the pool's threads wait for the next one in a loop, for some milliseconds, and the new threads would
    have to share the cores with them. Where PyTorch has another pool, one thread does all the work.

    Raises ``AbiError`` where the arguments are not those of the kernel.
    """
    if rows == 0:
        return
    function, block = getattr(lib, kernel), abi.kernel_layout(kernel).pack(arguments)
    threads = min(torch.get_num_threads(), rows, rows * columns // policy.ELEMENTS_PER_THREAD)
    pool = fork_join() if threads > 1 else None
    sharer = library("elementwise_cpu")
    if pool is None or sharer is None:
        function(block, 0, rows)
    else:
        sharer.share_rows(pool, function, block, ctypes.c_int64(rows), ctypes.c_int64(threads))


@cache
def fork_join() -> Any:
    """GNU OpenMP's entry point, in the copy that PyTorch is linked with, whatever that file is called; else None."""
    try:
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None


def as_rows(tensor: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """``tensor`` as (rows, columns), neighbours in a row beside each other in memory: a view if it can be, else a copy.

    A slice of a larger matrix's columns stays a view.
    """
    matrix = tensor.reshape(rows, columns)
    return matrix if columns <= 1 or matrix.stride(1) == 1 else matrix.contiguous()


def output_rows(out: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """``as_rows`` of a tensor to write to; raises ``SettingError`` where that would be a copy."""
    matrix = as_rows(out, rows, columns)
    if matrix.data_ptr() != out.data_ptr():
        raise SettingError(
            f"out has strides {out.stride()} for shape {tuple(out.shape)}; it must be contiguous, "
            "or a slice of the columns of a contiguous matrix"
        )
    return matrix


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise ``SettingError`` unless ``tensor`` has ``shape``: C would read beyond its end."""
    if tuple(tensor.shape) != tuple(shape):
        raise SettingError(
            f"{name} has shape {tuple(tensor.shape)}; to fit the other tensors it must be {tuple(shape)}"
        )
