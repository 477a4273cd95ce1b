"""One process of ``engine.py``: it prepares a workload, or runs one contender and writes what it measured.

    python benchmarks/_engine_process.py LETTER FOLDER [--quick] [--steps N]                        prepare
    python benchmarks/_engine_process.py LETTER FOLDER --comparison NAME --contender NUMBER …       run

Nothing is imported that the contender does not need: its peak memory is measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from _engine_workloads import Workload, workload

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "scikit-learn", "liger-kernel")


def prepare(work: Workload, folder: Path) -> dict[str, Any]:
    """Write base, rows, batches and first weights into ``folder``; returns what is said of them and of the machine."""
    from _engine_data import rows_of
    from _engine_ours import write_labelled, write_start
    from _engine_text import write_text

    from capotune import kernels
    from capotune.device import environment, pick_device

    if work.classifies and not work.data().is_dir():
        return {"absent": f"{work.data()} is not there"}
    rows, source = write_labelled(work, folder) if work.classifies else write_text(work, folder)
    for comparison in work.comparisons:
        content = json.dumps(rows_of(work, comparison, rows))
        (folder / f"{comparison.name}.json").write_text(content, encoding="utf-8")
    if work.method != "feature-extraction":
        write_start(work, folder)
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    described = getattr(kernels, "described", lambda _: "of an earlier version")  # ``engine_profile.py`` profiles one
    machine = environment() | {"kernels": described(pick_device())}
    return {"environment": machine, "versions": versions, "rows": source}


def run(work: Workload, folder: Path, comparison: str, number: int) -> dict[str, Any]:
    """One contender's measurements, or ``absent`` with the reason."""
    import torch
    from _engine_clock import Clock
    from _engine_data import Job

    found = work.comparison(comparison)
    job = Job(work, found, found.everyone[number], folder)
    runner, reason = _runner(job.contender.runner)
    if runner is None or reason is not None:
        return {"absent": reason}
    clock = Clock()
    runner(job, clock)
    return {**clock.record(work.whole), "tokens": job.tokens, "threads": torch.get_num_threads()}


def _runner(name: str) -> tuple[Callable[..., None] | None, str | None]:
    """The function, and why it cannot run here, if so."""
    if name == "capotune":
        from _engine_ours import run as ours

        return ours, None
    if name == "floor":
        from _engine_floor import run_floor

        return run_floor, None
    if name == "kernel floor":
        from _engine_floor import no_kernels, run_kernel_floor

        return run_kernel_floor, no_kernels()
    from _engine_peers import PEERS

    peer, why_not = PEERS[name]
    return peer, why_not()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Writes one JSON object to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("letter")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--comparison")
    parser.add_argument("--contender", type=int)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    work = workload(options.letter, quick=options.quick, steps=options.steps)
    if options.comparison is None:
        found = prepare(work, options.folder)
    else:
        found = run(work, options.folder, options.comparison, options.contender)
    options.out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
