"""The training engine against peers: time, memory, and how near the floor of matrix products, at equal losses.

    python benchmarks/engine.py [a b c d e f g] [--rounds N] [--steps N] [--comparison NAME] [--quick]

Workloads are in ``_engine_workloads.py``, peers in ``_engine_peers.py``. Every run is a process of its own, so its peak
memory is its own; in each round all contenders of a comparison run one after the other, on the same rows in the same
batches from the same first weights, with as many threads as PyTorch takes by itself. A peer whose losses differ from
Capotune's by more than a thousandth at any step, or whose accuracy is above Capotune's, is not compared. The first step
is timed apart and left out, unless a workload says otherwise. ``--quick`` runs three steps of small models and shows
the result only; without it, a workload's part of ``results/engine.json`` is replaced when it is done, and with
``--comparison`` that one table of it.
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

from _engine_workloads import (
    FLOOR,
    GPU_WORKLOADS,
    KERNEL_FLOOR,
    OURS,
    WORKLOADS,
    Comparison,
    Contender,
    Workload,
    workload,
)

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "engine.json"
TOLERANCE = 1e-3
"""Largest relative difference of a step's losses."""
_LONGEST = 3 * 3600  # seconds after which a run is given up
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

Run = dict[str, Any]
"""What ``_engine_process`` wrote; ``absent`` or ``failed`` with the reason where it could not."""


class Processes:
    """Starts the processes of one workload."""

    def __init__(self, work: Workload, folder: Path, flags: list[str]) -> None:
        self.work, self.folder, self.flags = work, folder, flags

    def prepare(self) -> Run:
        """Base, rows and first weights, into the folder."""
        return self._start([], {})

    def run(self, comparison: Comparison, contender: Contender) -> Run:
        """One contender's measurements."""
        number = comparison.everyone.index(contender)
        return self._start(["--comparison", comparison.name, "--contender", str(number)], contender.environment)

    def _start(self, arguments: list[str], environment: dict[str, str]) -> Run:
        out = self.folder / "measured.json"
        out.unlink(missing_ok=True)
        script = [sys.executable, str(HERE / "_engine_process.py"), self.work.letter, str(self.folder)]
        try:
            done = subprocess.run(
                [*script, *arguments, *self.flags, "--out", str(out)],
                env=os.environ | _OFFLINE | environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                timeout=_LONGEST,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {_LONGEST:,} seconds"}
        if done.returncode == 0 and out.is_file():
            return json.loads(out.read_text(encoding="utf-8"))
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        ending = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        return {"failed": " | ".join([ending, *lines[-3:]])[-600:]}


def measure(processes: Processes, comparison: Comparison, rounds: int, alone: bool) -> dict[str, Any]:
    """All contenders, or Capotune ``alone``, round after round; a table's rows."""
    running = [one for one in comparison.everyone if not alone or one.name == OURS]
    runs: dict[str, list[Run]] = {one.name: [] for one in running}
    for number in range(1, rounds + 1):
        for contender in list(running):
            said = f"{processes.work.letter}, {comparison.name}, round {number} of {rounds}, {contender.name}: "
            print(said, end="", file=sys.stderr, flush=True)
            found = processes.run(comparison, contender)
            runs[contender.name].append(found)
            print(in_short(found), file=sys.stderr, flush=True)
            if "seconds" not in found:
                running.remove(contender)
    ours = runs[OURS][0]
    floor, kernel_floor = (runs.get(name, [{"absent": "not asked for"}]) for name in (FLOOR, KERNEL_FLOOR))
    floors = (FLOOR, KERNEL_FLOOR)
    rows = [row(name, found, ours, processes.work) for name, found in runs.items() if name not in floors]
    with_ratios(rows, floor)
    return {
        "name": comparison.name,
        "batch_size": comparison.batch_size,
        "grouped": comparison.grouped,
        "rounds": rounds,
        "floor": timed(floor) if "seconds" in floor[0] else floor[0],
        "kernel_floor": timed(kernel_floor) if "seconds" in kernel_floor[0] else kernel_floor[0],
        "equal_quality": equal_quality(rows, ours, processes.work),
        "rows": rows,
    }


def in_short(run: Run) -> str:
    """For the progress line."""
    if "seconds" not in run:
        return "; ".join(f"{key}: {value}" for key, value in run.items())
    accuracy = f", accuracy {run['accuracy']:.2%}" if run["accuracy"] is not None else ""
    return f"{run['seconds']:.2f} s, {run['peak_bytes'] / 1e9:.2f} GB{accuracy}"


# --------------------------------------------------------------------------------------------------------- the rows


def row(name: str, runs: list[Run], ours: Run, work: Workload) -> dict[str, Any]:
    """One contender: what it measured and whether it is as good as Capotune."""
    done = [run for run in runs if "seconds" in run]
    if not done:
        return {"name": name, **runs[0]}
    first = done[0]
    found = {
        "name": name,
        **timed(done),
        "tokens_per_second": None if work.solved else round(first["tokens"] / median(done), 1),
        "peak_bytes": max(run["peak_bytes"] for run in done),
        "before_bytes": statistics.median_low(run["before_bytes"] for run in done),
        "loading_peak_bytes": statistics.median_low(run["loading_peak_bytes"] for run in done),
        "threads": first["threads"],
        "accuracy": first["accuracy"],
        "epochs": first["epochs"],
        "loss": {"first": first["losses"][0], "last": first["losses"][-1]} if first["losses"] else None,
    }
    if len(done) < len(runs):
        found["failed"] = next(run for run in runs if "seconds" not in run)["failed"]
    elif name != OURS:
        found |= quality(first, ours, work)
    return found


def timed(runs: list[Run]) -> dict[str, Any]:
    """Seconds of each round, median, and spread: quartiles from four rounds on, else the smallest and largest."""
    seconds = [round(run["seconds"], 4) for run in runs]
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 3 else (min(seconds), 0, max(seconds))
    return {
        "seconds": seconds,
        "median": round(median(runs), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "first_step_seconds": round(statistics.median(run["first_step_seconds"] for run in runs), 4),
    }


def median(runs: list[Run]) -> float:
    """Of the seconds."""
    return statistics.median(run["seconds"] for run in runs)


def quality(peer: Run, ours: Run, work: Workload) -> dict[str, Any]:
    """How far the peer's losses are from Capotune's; ``failed`` where that is too far, or its accuracy is higher."""
    if "seconds" not in ours:
        return {"failed": "capotune itself did not run"}
    if work.solved:
        behind = peer["accuracy"] > ours["accuracy"]
        return {"failed": f"more accurate than capotune ({ours['accuracy']:.2%})"} if behind else {}
    pairs = list(zip(ours["losses"], peer["losses"], strict=False))
    largest = max(abs(mine - theirs) / abs(theirs) for mine, theirs in pairs)
    found: dict[str, Any] = {"largest_relative_difference": largest}
    if len(ours["losses"]) != len(peer["losses"]):
        found["failed"] = f"{len(peer['losses'])} steps, and capotune {len(ours['losses'])}"
    elif not largest <= TOLERANCE:  # NaN too
        at = next(n for n, (mine, theirs) in enumerate(pairs) if not abs(mine - theirs) <= TOLERANCE * abs(theirs))
        found["failed"] = f"losses differ: by {largest:.1e} at most, by over {TOLERANCE:g} first at step {at + 1}"
    return found


def with_ratios(rows: list[dict[str, Any]], floor: list[Run]) -> None:
    """Against Capotune's time and peak, and the floor's part of each contender's time."""
    ours = next(one for one in rows if one["name"] == OURS)
    for one in rows:
        if "seconds" in one and "seconds" in floor[0]:
            one["share_of_floor"] = round(median(floor) / one["median"], 3)
        if "seconds" in one and "seconds" in ours and "failed" not in one and one is not ours:
            one["capotune_times_as_fast"] = round(one["median"] / ours["median"], 2)
            one["times_the_memory"] = round(one["peak_bytes"] / ours["peak_bytes"], 2)


def equal_quality(rows: list[dict[str, Any]], ours: Run, work: Workload) -> dict[str, Any]:
    """For the line above the table."""
    if work.solved or "seconds" not in ours:
        return {"accuracy": ours.get("accuracy")}
    found = [one["largest_relative_difference"] for one in rows if "largest_relative_difference" in one]
    return {
        "largest_relative_difference": max(found, default=None),
        "steps": len(ours["losses"]),
        "first_loss": ours["losses"][0],
        "last_loss": ours["losses"][-1],
    }


# --------------------------------------------------------------------------------------------------------- all of it


def measure_workload(letter: str, options: argparse.Namespace) -> dict[str, Any]:
    """A workload's part of the results."""
    work = workload(letter, quick=options.quick, steps=options.steps)
    flags = ["--quick"] * options.quick + (["--steps", str(options.steps)] if options.steps else [])
    with tempfile.TemporaryDirectory(prefix="capotune-engine-") as folder:
        processes = Processes(work, Path(folder), flags)
        print(f"{letter}, {work.title}: preparing", file=sys.stderr, flush=True)
        prepared = processes.prepare()
        if "environment" not in prepared:
            return {"title": work.title, **prepared}
        chosen = [one for one in work.comparisons if options.comparison in (None, one.name)]
        comparisons = [
            measure(processes, one, options.rounds or one.rounds or work.rounds, options.alone) for one in chosen
        ]
    return {
        "title": work.title,
        "settings": work.words,
        **prepared,
        "date": time.strftime("%Y-%m-%d"),
        "steps": work.steps,
        "whole": work.whole,
        "comparisons": comparisons,
    }


def main() -> None:
    """The workloads named on the command line, or all."""
    letters, everything = [one.letter for one in WORKLOADS], (*WORKLOADS, *GPU_WORKLOADS)
    known = [one.letter for one in everything]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "workloads", nargs="*", metavar="workload", help=f"of {' '.join(known)}; when left out, all but those for a GPU"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of small models, shown and not written")
    parser.add_argument("--alone", action="store_true", help="without the peers and the floors")
    parser.add_argument("--rounds", type=int, help="each contender's runs; each workload has its own number")
    parser.add_argument("--steps", type=int, help="optimiser steps in a run, the first one included")
    parser.add_argument("--comparison", metavar="NAME", help="only this table of each workload, such as 'as it comes'")
    parser.add_argument("--out", type=Path, help="where to write, results/engine.json when left out")
    options = parser.parse_args()
    if unknown := set(options.workloads) - set(known):
        parser.error(f"no workload {', '.join(sorted(unknown))}: there are {' '.join(known)}")
    chosen = [one for one in everything if one.letter in (options.workloads or letters)]
    if options.comparison and not all(options.comparison in [one.name for one in work.comparisons] for work in chosen):
        names = "; ".join(f"{work.letter}: {', '.join(one.name for one in work.comparisons)}" for work in chosen)
        parser.error(f"no table {options.comparison!r} in each of these workloads, which have: {names}")
    path = options.out or (None if options.quick else RESULTS)
    for letter in options.workloads or letters:
        found = measure_workload(letter, options)
        if "comparisons" not in found:
            print(f"{letter} is left out: {found}", file=sys.stderr)
        if path is None:
            print(json.dumps(found, indent=1))
        elif "comparisons" in found:
            before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            if options.comparison and letter in before:
                tables = {one["name"]: one for one in (*before[letter]["comparisons"], *found["comparisons"])}
                found["comparisons"] = list(tables.values())
            path.write_text(json.dumps(dict(sorted({**before, letter: found}.items())), indent=1) + "\n", "utf-8")
            print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
