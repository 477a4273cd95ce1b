"""What checkpoints cost a training step: the training thread's own work for them, and that of the thread that writes.

    OMP_NUM_THREADS=1 python benchmarks/checkpoints.py [--steps N]

LoRA by its defaults on MiniLM (tickets) and SmolLM2 (messages), with a checkpoint every few steps, so that there are
enough to measure. Work is counted in CPU seconds of each thread, which a busy machine does not change; with one thread
for PyTorch the training thread's are those of the step. From them follows the share at other intervals: a training
thread does a little for every step (it asks whether a checkpoint is due, lets signals wait, notes the generator's
state), and for each checkpoint copies the trained weights and their moments.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from capotune.device import environment
from capotune.engine import loop, saving
from capotune.engine import state as states
from capotune.events import Event, StepTaken
from capotune.methods.lora.settings import LoraSettings
from capotune.runs.run import run
from capotune.settings import TrainSettings

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "checkpoints.json"
EXAMPLES = HERE.parent / "src" / "capotune" / "examples"
WORK = {"minilm": HERE.parent / "examples" / "support_tickets.csv", "smollm2": EXAMPLES / "shop_messages.jsonl"}
EVERY = 5
DEFAULT_SECONDS = 300
MOST = 0.01


class Work:
    """CPU seconds of each call of some functions, in whichever thread calls them."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._undo: list[Callable[[], None]] = []

    def count(self, name: str, owner: Any, attribute: str) -> None:
        """Count the calls of ``owner.attribute`` as ``name``."""
        original, found = getattr(owner, attribute), self.seconds.setdefault(name, [])

        def counted(*given: Any, **named: Any) -> Any:
            began = time.thread_time()
            try:
                return original(*given, **named)
            finally:
                found.append(time.thread_time() - began)

        setattr(owner, attribute, counted)
        self._undo.append(lambda: setattr(owner, attribute, original))

    def stop(self) -> None:
        """Leave the functions as they were."""
        for undo in self._undo:
            undo()


def signals_wait() -> float:
    """Seconds of one ``uninterrupted`` block."""
    began = time.thread_time()
    for _ in range(10_000):
        with loop.uninterrupted():
            pass
    return (time.thread_time() - began) / 10_000


def measure(model: str, steps: int) -> dict[str, Any]:
    """One run of so many steps, then stopped."""
    work, ends = Work(), [0.0]
    work.count("due", saving.CheckpointSaver, "due")
    work.count("take", loop, "capture")
    work.count("hand over", saving.CheckpointSaver, "save")
    work.count("generator", states, "random_state")
    work.count("write", saving, "save_checkpoint")

    def report(event: Event) -> None:
        if isinstance(event, StepTaken):
            ends.append(time.thread_time())
            if event.step == steps:
                raise KeyboardInterrupt

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        settings = TrainSettings(data=str(WORK[model]), model=model, out=out, save_every=str(EVERY))
        try:
            run(settings, LoraSettings(epochs=100, patience=100), report)
        except KeyboardInterrupt:
            work.stop()
        newest = max((out / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        size = sum(path.stat().st_size for path in newest.iterdir())
    return summary(work.seconds, [after - before for before, after in pairwise(ends[1:])], size)


def summary(work: dict[str, list[float]], steps: list[float], size: int) -> dict[str, Any]:
    """Medians, and what follows from them."""
    step, due, generator = (statistics.median(values) for values in (steps, work["due"], work["generator"]))
    take = statistics.median(work["take"]) + statistics.median(work["hand over"])
    write = statistics.median(work["write"])
    each_step = due + generator + signals_wait()
    return {
        "checkpoint_bytes": size,
        "step_cpu_seconds": round(step, 5),
        "each_step_cpu_seconds": round(each_step, 7),
        "taken_cpu_seconds": round(take, 6),
        "written_cpu_seconds": round(write, 6),
        "share_of_a_step_without_checkpoints": round(each_step / step, 6),
        "share_at_the_default_interval": round(each_step / step + take / DEFAULT_SECONDS, 6),
        "share_with_the_writing_thread": round(each_step / step + (take + write) / DEFAULT_SECONDS, 6),
        "fewest_steps_between_checkpoints_for_1_percent": max(1, round(take / (MOST * step - each_step) + 0.5)),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    results = {model: measure(model, steps) for model in WORK}
    for model, found in results.items():
        print(model, json.dumps(found, indent=2))
        assert found["share_at_the_default_interval"] <= MOST
    RESULTS.write_text(json.dumps({"steps": steps, "environment": environment(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
