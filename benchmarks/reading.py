"""What ``capo data`` takes for 10⁴, 10⁵ and 10⁶ rows of labelled text: processor time and peak memory.

    python benchmarks/reading.py

The rows are made here: 5 to 25 made-up words and one of 20 labels, 101 bytes a row. Each count is read by a process of
its own.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from capotune.device import environment
from capotune.files import write_atomic

ROWS = (10_000, 100_000, 1_000_000)
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


def measured(path: Path) -> dict[str, float]:
    """Processor seconds and peak bytes of ``capo data`` on a file, in a process of its own."""
    program = "import sys; from capotune.cli import main; sys.exit(main(['data', sys.argv[1]]))"
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, process.returncode
    return {"cpu_seconds": used.ru_utime + used.ru_stime, "peak_memory_bytes": used.ru_maxrss * 1024}


def main() -> None:
    """Measure each count and write the result."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "rows.csv"
        make(path, 100)
        measured(path)  # what is read for the first time does not count
        for rows in ROWS:
            size = make(path, rows)
            found.append({"rows": rows, "bytes": size, **measured(path)})
            print(found[-1])
    write_atomic(RESULT, json.dumps({"rows": found, "environment": environment()}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
