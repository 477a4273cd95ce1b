"""The training engine of two checkouts on the same rows, batches and first weights, alternating in one run.

    python benchmarks/before_after.py OTHER_CHECKOUT [a c d] [--rounds N] [--steps N]

``OTHER_CHECKOUT`` is the root of another working tree of this repository, for instance made by ``git worktree add``.
Every run is a process of its own, as in ``engine.py``. The losses of both must agree to a thousandth at every step. The
medians, and their ratio (below 1: this checkout is faster, or takes less memory), go to
``results/before-after-LETTER.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _engine_workloads import OURS, Comparison, workload

from capotune import kernels
from capotune.device import environment, pick_device

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TOLERANCE = 1e-3
"""Largest relative difference of a step's losses."""


def process(checkout: Path, letter: str, folder: Path, arguments: list[str]) -> dict[str, Any]:
    """What ``_engine_process.py`` of that checkout measured, or prepared."""
    out = folder / "measured.json"
    script = [sys.executable, str(checkout / "benchmarks" / "_engine_process.py"), letter, str(folder)]
    path = {"PYTHONPATH": str(checkout / "src"), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [*script, *arguments, "--out", str(out)]
    subprocess.run(command, env=os.environ | path, stdout=subprocess.DEVNULL, check=True)
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def measure(
    checkouts: dict[str, Path], letter: str, comparison: Comparison, folder: Path, rounds: int, steps: list[str]
) -> dict[str, Any]:
    """All rounds of one table: seconds and bytes of both, and their ratios."""
    number = next(at for at, one in enumerate(comparison.everyone) if one.name == OURS)
    arguments = ["--comparison", comparison.name, "--contender", str(number), *steps]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    for _ in range(rounds):
        for name, checkout in checkouts.items():
            runs[name].append(process(checkout, letter, folder, arguments))
            print(letter, comparison.name, name, f"{runs[name][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    losses = [runs[name][0]["losses"] for name in checkouts]
    largest = max((abs(a - b) / max(abs(a), 1e-9) for a, b in zip(*losses, strict=True)), default=0.0)
    seconds = {name: statistics.median(run["seconds"] for run in found) for name, found in runs.items()}
    memory = {name: statistics.median(run["peak_bytes"] for run in found) for name, found in runs.items()}
    return {
        "comparison": comparison.name,
        "rounds": rounds,
        "seconds": seconds,
        "all_seconds": {name: [run["seconds"] for run in found] for name, found in runs.items()},
        "peak_bytes": memory,
        "seconds_ratio": seconds["after"] / seconds["before"],
        "memory_ratio": memory["after"] / memory["before"],
        "largest_loss_difference": largest,
        "losses_agree": largest <= TOLERANCE,
    }


def main() -> None:
    """Measure the letters, and write each as soon as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("letters", nargs="*", default=["a", "c", "d"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    checkouts = {"before": options.before.absolute(), "after": HERE.parent}
    steps = [] if options.steps is None else ["--steps", str(options.steps)]
    machine = environment() | {"kernels": kernels.described(pick_device())}
    head: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "environment": machine, "steps": options.steps}
    for letter in options.letters:
        with tempfile.TemporaryDirectory(prefix="capotune-before-after-") as folder:
            process(checkouts["after"], letter, Path(folder), steps)
            tables = [
                measure(checkouts, letter, comparison, Path(folder), options.rounds, steps)
                for comparison in workload(letter, steps=options.steps).comparisons
            ]
        text = json.dumps(head | {"comparisons": tables}, indent=1)
        (RESULTS / f"before-after-{letter}.json").write_text(text + "\n", encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
