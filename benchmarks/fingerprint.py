"""First and second use of a base's fingerprint, beside reading its file: ratios, on a file that this makes.

    python benchmarks/fingerprint.py [GB]

The file's pages are dropped before each cold round; reading and hashing alternate.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from capotune.adapters.fingerprint import fingerprint
from capotune.models.base import Base

ROUNDS = 3
SECOND = "import sys, time; from pathlib import Path; from capotune.adapters.fingerprint import fingerprint; \
from capotune.models.base import Base; base = Base('big', Path(sys.argv[1])); start = time.perf_counter(); \
fingerprint(base); print(time.perf_counter() - start)"


def make(folder: Path, gigabytes: float) -> Path:
    """A model's folder with random bf16 weights."""
    (folder / "config.json").write_text('{"model_type": "llama"}')
    bits = {
        str(at): torch.randint(-(2**15), 2**15, (4096, 16384), dtype=torch.int16) for at in range(round(8 * gigabytes))
    }
    save_file({name: one.view(torch.bfloat16) for name, one in bits.items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


def drop(path: Path) -> None:
    """Its pages leave the memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path) -> None:
    """Every byte, by one thread."""
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def seconds(work: Callable[[], object]) -> float:
    """Of the wall clock."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main(gigabytes: float) -> None:
    """Print medians."""
    with tempfile.TemporaryDirectory() as name:
        os.environ["CAPOTUNE_CACHE"] = f"{name}/cache"
        path = make(Path(name), gigabytes)
        times: dict[str, list[float]] = {"read": [], "hashed": []}
        for _ in range(ROUNDS):
            for what, work in (("read", lambda: read(path)), ("hashed", lambda: fingerprint(Base("big", path.parent)))):
                drop(path)
                os.utime(path)  # what is remembered does not count
                times[what].append(seconds(work))
        reading, hashing = (statistics.median(one) for one in times.values())
        size = path.stat().st_size / 1e9
        time.sleep(3)  # a file changed a moment ago is not remembered
        fingerprint(Base("big", path.parent))
        ran = subprocess.run([sys.executable, "-c", SECOND, name], check=True, capture_output=True, text=True)
        print(f"{size:.1f} GB, cold: read at {size / reading:.2f} GB/s, first fingerprint at {size / hashing:.2f} GB/s")
        print(f"ratio of time {hashing / reading:.2f}; second use in another process {float(ran.stdout) * 1e3:.1f} ms")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 2.0)
