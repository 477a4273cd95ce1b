"""A training step of a workload of ``engine.py`` under PyTorch's profiler: kernels, their time, who sets the pace.

    python benchmarks/_gpu_profile.py 135m-lora [8b-lora …] --out FILE [--quick]

Written for each workload: the step's seconds, how many kernels it launches, the seconds in which the GPU computes
(where much less than the step's, the processor sets the pace), and the kernels that take longest. On a CPU, operations
stand for kernels.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from _engine_clock import Clock
from _engine_data import Job
from _engine_ours import train
from _engine_process import prepare
from _engine_workloads import OURS, workload
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

PROFILED = 2
"""The step, counted from 1: kernels have been compiled and memory taken. Two more follow it, one timed."""
SHOWN = 25


class ProfilingClock(Clock):
    """Has the profiler look at one step."""

    def __init__(self) -> None:
        super().__init__()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self.profiler = profile(activities=activities)

    def step(self) -> None:
        """A step has ended."""
        super().step()
        if len(self.ends) == PROFILED - 1:
            self.profiler.start()
        elif len(self.ends) == PROFILED:
            self.profiler.stop()


def profiled(name: str, quick: bool) -> dict[str, Any]:
    """A workload's step."""
    work = workload(name, quick=quick, steps=PROFILED + 2)
    with tempfile.TemporaryDirectory() as folder:
        said = prepare(work, Path(folder))
        comparison = work.comparisons[0]
        contender = next(one for one in comparison.everyone if one.name == OURS)
        clock = ProfilingClock()
        train(Job(work, comparison, contender, Path(folder)), clock)
    on_gpu = torch.cuda.is_available()
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    kernels = [event for event in clock.profiler.key_averages() if event.device_type == wanted]
    seconds = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6 for event in kernels
    }
    longest = sorted(kernels, key=lambda event: -seconds[event.key])[:SHOWN]
    return {
        "title": work.title,
        **said,
        "step_seconds": clock.ends[-1] - clock.ends[-2],
        "kernels": sum(event.count for event in kernels),
        "computing_seconds": sum(seconds.values()),
        "losses": clock.losses,
        "longest": [
            {"kernel": event.key[:120], "count": event.count, "seconds": seconds[event.key]} for event in longest
        ],
    }


def main() -> None:
    """The workloads named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+")
    parser.add_argument("--quick", action="store_true", help="small models")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found = {}
    for name in options.workloads:
        found[name] = profiled(name, options.quick)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
