"""What ``capo data`` takes for many rows: processor time and peak memory.

    python benchmarks/reading.py labelled            # 10⁴, 10⁵ and 10⁶ rows of labelled text
    python benchmarks/reading.py written             # 10 MB, 100 MB and 1 GB of pairs to write, for smollm2
    python benchmarks/reading.py written 10000000    # one size

The rows are made here: 5 to 25 made-up words and one of 20 labels, 101 bytes a row; pairs of 20 to 60 and 10 to 40
words, 410 bytes a row, each with a number of its own. Each count is read by a process of its own. Pairs are read twice,
from an empty cache and from what that left. Peak memory is what the kernel counts as resident, with the pages of mapped
files; ``peak_anonymous_bytes`` is without those, which can be given back at any time, looked at ten times a second.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from capotune.device import environment
from capotune.files import write_atomic

ROWS = (10_000, 100_000, 1_000_000)
BYTES = (10**7, 10**8, 10**9)
STARTS = ["ba", "ke", "lo", "mi", "nu", "pa", "re", "so", "ti", "vu"]
WORDS = [start + end for start in STARTS for end in ["br", "st", "ckle", "lling", "mnor", "shed", "ng", "r"]]
RESULT = Path(__file__).parent / "results" / "reading.json"


def make(path: Path, rows: int) -> int:
    """Write the rows; returns the file's bytes."""
    chooser = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        file.write("text,label\n")
        for _ in range(rows):
            words = chooser.choices(WORDS, k=chooser.randint(5, 25))
            file.write(f"{' '.join(words)},label {chooser.randrange(20)}\n")
    return path.stat().st_size


def make_pairs(path: Path, size: int) -> int:
    """Write ``size`` bytes of pairs or some more; returns the rows. Some thousand are repeated with other numbers."""
    chooser = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(chooser.choices(WORDS, k=chooser.randint(low, high)))

    number = "#" * 8
    made = [{"prompt": f"{number} {text(20, 60)}?", "completion": f" {text(10, 40)}"} for _ in range(20_000)]
    block = np.frombuffer("".join(json.dumps(one) + "\n" for one in made).encode(), np.uint8).copy()
    places = np.flatnonzero(block == ord("#")).reshape(-1, len(number))
    times = -(-size // len(block))
    with path.open("wb") as file:
        for again in range(times):
            numbers = again * len(made) + np.arange(len(made))
            for digit in range(len(number)):
                block[places[:, -1 - digit]] = ord("0") + numbers // 10**digit % 10
            file.write(block.tobytes())
    return times * len(made)


def measured(path: Path, *flags: str) -> dict[str, float]:
    """Processor seconds and peak bytes of ``capo data`` on a file, in a process of its own."""
    program = "import sys; from capotune.cli import main; sys.exit(main(['data', *sys.argv[1:]]))"
    process = subprocess.Popen([sys.executable, "-c", program, str(path), *flags], stdout=subprocess.DEVNULL)
    watched = ThreadPoolExecutor(1).submit(_peak_anonymous, process.pid)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, process.returncode
    return {
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_memory_bytes": used.ru_maxrss * 1024,
        "peak_anonymous_bytes": watched.result(),
    }


def _peak_anonymous(process: int) -> int:
    """The most anonymous memory of a process until it ends."""
    peak = 0
    with suppress(OSError, IndexError):  # it has ended; or ended and is not yet waited for
        while True:
            status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
            peak = max(peak, 1024 * int(status.split("RssAnon:")[1].split()[0]))
            time.sleep(0.1)
    return peak


def labelled(folder: Path) -> Iterator[dict[str, Any]]:
    """Each count of labelled rows."""
    path = folder / "rows.csv"
    make(path, 100)
    measured(path)  # what is read for the first time does not count
    for rows in ROWS:
        size = make(path, rows)
        yield {"rows": rows, "bytes": size, **measured(path)}


def written(folder: Path, sizes: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Each size of pairs, from an empty cache and once more."""
    path = folder / "pairs.jsonl"
    for size in sizes:
        os.environ["CAPOTUNE_CACHE"] = str(folder / f"cache-{size}")
        rows = make_pairs(path, size)
        for start in ("first", "second"):
            yield {"rows": rows, "bytes": path.stat().st_size, "start": start, **measured(path, "--model", "smollm2")}
        shutil.rmtree(os.environ["CAPOTUNE_CACHE"])


def main() -> None:
    """Measure, and write each figure when it is known."""
    kind, *sizes = sys.argv[1:] or ["labelled"]
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        rows = labelled(folder) if kind == "labelled" else written(folder, list(map(int, sizes)) or BYTES)
        for row in rows:
            print(row, flush=True)
            found = json.loads(RESULT.read_text(encoding="utf-8"))
            same = ("rows", "start")
            others = [one for one in found.get(kind, []) if any(one.get(key) != row.get(key) for key in same)]
            both = sorted([*others, row], key=lambda one: (one["rows"], one.get("start", "")))
            found |= {kind: both, "environment": environment()}
            write_atomic(RESULT, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
