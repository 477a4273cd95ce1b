"""Seconds from the start of ``capo train`` to the end of its first optimiser step, on MiniLM and the example's tickets.

    python benchmarks/startup.py [--rounds N]

Each run is a process of its own that ends there. LoRA begins with a solved head, for which the base reads every
training row once; an earlier run leaves what it computed in the cache.
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

from capotune.device import environment

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "startup.json"
DATA = HERE.parent / "examples" / "support_tickets.csv"
STAGES = ("imports", "first step")
# Tells when PyTorch, Transformers and capotune are loaded, and when an optimiser has stepped for the first time, and is
# then done. The imports are those that the command makes itself, a moment later.
PROGRAM = """
import os, sys, time
from capotune.device import collector_at_rest
with collector_at_rest():
    import capotune.runs.run
from capotune.cli.main import main
from torch.optim.optimizer import register_optimizer_step_post_hook
print("imports", time.time(), file=sys.stderr, flush=True)
def stepped(*_):
    print("first step", time.time(), file=sys.stderr, flush=True)
    os._exit(0)
register_optimizer_step_post_hook(stepped)
sys.exit(main(sys.argv[1:]))
"""


def run(cache: Path) -> dict[str, float]:
    """Seconds to each stage."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["train", "lora", "--data", str(DATA), "--out", f"{folder}/out"]
        started = time.time()
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *command],
            env={**os.environ, "CAPOTUNE_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=True,
        )
    lines = [line.rsplit(" ", 1) for line in done.stderr.splitlines() if line.startswith(STAGES)]
    return {stage: float(at) - started for stage, at in lines}


def summary(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median, least and most of each stage."""
    found = {stage: [one[stage] for one in runs] for stage in STAGES}
    return {
        stage: {"median": round(statistics.median(times), 2), "low": round(min(times), 2), "high": round(max(times), 2)}
        for stage, times in found.items()
    }


def main() -> None:
    """Alternate between an empty cache and one that a run has filled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="capotune-startup-") as folder:
        run(Path(folder) / "filled")  # and the kernels are compiled, and files are in memory
        pairs = [(run(Path(folder) / "filled"), run(Path(folder) / f"empty{number}")) for number in range(rounds)]
    cached, fresh = zip(*pairs, strict=True)
    content = {
        "environment": environment(),
        "date": time.strftime("%Y-%m-%d"),
        "rounds": rounds,
        "features cached": summary(list(cached)),
        "nothing cached": summary(list(fresh)),
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
