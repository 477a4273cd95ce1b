"""Milliseconds to switch between two LoRA adapters on SmolLM2 in place, and seconds that golden answers take.

python benchmarks/switch.py [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

import capotune
from capotune.adapters.assemble import assemble, attach
from capotune.adapters.store import save_adapter
from capotune.device import environment
from capotune.methods.base import Start
from capotune.methods.lora.settings import LoraSettings
from capotune.models.base import find
from capotune.settings import Context
from capotune.tasks.generation.task import Generation
from capotune.tasks.golden import golden_answers

RESULTS = Path(__file__).parent / "results" / "switch.json"
TRAINED = {"score": None, "held_out_score": 2.0, "test_rows": 0, "train_rows": 0, "scores": {}}


def make(folder: Path, seed: int) -> float:
    """An adapter with random weights; returns the seconds that its golden answers took."""
    base = find("smollm2")
    settings = LoraSettings().completed(Context(base.hidden_size, has_head=False))
    assembled = assemble(Generation.of_model(base), settings, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    attach(assembled, Start(generator))
    with torch.no_grad():
        for weight in assembled.trainable().values():
            weight += 0.01 * torch.randn(weight.shape, generator=generator)
    started = time.perf_counter()
    golden = golden_answers(assembled)
    seconds = time.perf_counter() - started
    save_adapter(folder, assembled, TRAINED, golden)
    return seconds


def main() -> None:
    """Switch to and fro."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="capotune-switch-") as folder:
        folders = {str(seed): Path(folder) / str(seed) for seed in range(2)}
        golden = [make(path, int(name)) for name, path in folders.items()]
        adapters = capotune.load_adapters(folders)
        times = []
        for number in range(rounds):
            started = time.perf_counter()
            adapters.use(str(number % 2))
            times.append(1000 * (time.perf_counter() - started))
    content = {
        "environment": environment(),
        "date": time.strftime("%Y-%m-%d"),
        "rounds": rounds,
        "switch_ms": {"median": round(statistics.median(times), 2), "high": round(max(times), 2)},
        "golden_answers_seconds": [round(seconds, 2) for seconds in golden],
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
