"""AMX in software (software_amx.h): the kernels for it run where the processor has AVX-512 with bf16 and no AMX.

``SOFTWARE_AMX=1 pytest …`` runs every test as on a machine that has it (conftest.py). Programs that tests start run at
the machine's own level.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
from pathlib import Path

HEADER = Path(__file__).with_name("software_amx.h")
SOURCES = "products_amx", "prepacked_amx"


def flags() -> tuple[str, ...]:
    """For the compiler, beside those of the sources; the header's content is among them, so that the cache of compiled
    kernels, which goes by flags, sees when it changes."""
    digest = hashlib.sha256(HEADER.read_bytes()).hexdigest()[:8]
    return "-mavx512bf16", "-include", str(HEADER), f"-DSOFTWARE_AMX=0x{digest}"


def why_not() -> str | None:
    """Why it cannot be had here, in words: not where the tests run at another level (levels.py)."""
    if os.environ.get("CAPOTUNE_CPU_LEVEL") or os.environ.get("CAPOTUNE_NATIVE") == "0":
        return "the tests of AMX run at another level"
    processor = Path("/proc/cpuinfo")
    if not processor.is_file() or "avx512_bf16" not in processor.read_text(encoding="utf-8"):
        return "no AMX here, nor AVX-512 with bf16 for AMX in software"
    return None if shutil.which("gcc") else "no AMX here, nor gcc for AMX in software"


def compiled(name: str, folder: Path) -> ctypes.CDLL:
    """The kernels of ``name``.c, one of ``SOURCES``."""
    from capotune.kernels import native

    made = folder / f"{name}.so"
    known = *native.FLAGS, *native.SIMD_FLAGS["amx"], *native.MORE_SIMD_FLAGS[name], *flags()
    compiler = shutil.which("gcc")
    assert compiler is not None
    native._compile(compiler, known, Path(native.__file__).with_name(f"{name}.c"), made)
    return native.open_library(made)


def install() -> None:
    """From now on this process is as on a machine with AMX. Raises ``RuntimeError`` where it cannot be had."""
    if reason := why_not():
        raise RuntimeError(reason)
    from capotune import device
    from capotune.kernels import native

    device.machine_cpu_level = lambda: "amx"
    native.MORE_SIMD_FLAGS |= {name: (*native.MORE_SIMD_FLAGS[name], *flags()) for name in SOURCES}
