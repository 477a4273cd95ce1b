"""Processor seconds of a training step on SmolLM2: LoRA, deep and shallow prompts in turn, on the same rows.

    python benchmarks/prompt_steps.py [--set wikisql] [--rounds 5]

A step is what ``prompts.py`` takes: four rows of a data set of ``defaults.py``, defaults alone, one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from defaults import SETS, _file, encoded, rows_of
from prompts import TECHNIQUES

from capotune.adapters.assemble import Assembled, attach, with_head
from capotune.data.batches import TokenRows
from capotune.device import environment
from capotune.engine.loop import accumulate
from capotune.engine.optimizer import FlatAdamW
from capotune.evaluation.forward import Examples
from capotune.methods import make
from capotune.methods.base import Start, Untouched
from capotune.models.base import find
from capotune.settings import Context, TrainingSettings
from capotune.tasks.generation.task import Generation

RESULTS = Path(__file__).parent / "results" / "prompt_steps.json"
ROWS = 4


def rows_to_read(name: str) -> list[Any]:
    """The tokens of a set's training rows."""
    with tempfile.TemporaryDirectory() as folder:
        return encoded(_file(rows_of(name, choose=False)[0], Path(folder) / "train.jsonl"))


def assembled_with(settings: TrainingSettings, task: Generation, loaded: Any, rows: list[Any]) -> Assembled:
    """SmolLM2, which all techniques share, with one on it."""
    complete = settings.completed(Context(task.base.hidden_size, has_head=False, train_rows=len(rows)))
    assembled = with_head(task, loaded, make(complete))
    attach(assembled, Start(torch.Generator().manual_seed(0), sorted({token for row in rows for token in row.ids})))
    return assembled


def seconds_of_step(assembled: Assembled, rows: list[Any], chosen: np.ndarray) -> float:
    """Gradient and update."""
    settings, weights = assembled.method.settings, assembled.trainable()
    tokens = TokenRows([row.ids for row in rows], assembled.task.pad_id, assembled.method.virtual_token_ids)
    examples = Examples(tokens, [row.labels for row in rows])
    rates = assembled.method.learning_rates()
    with assembled.reading(), FlatAdamW(weights, rates, settings.weight_decay) as optimizer:
        started = process_time()
        optimizer.step(settings.max_grad_norm, accumulate(assembled, examples, chosen, settings))
        return process_time() - started


def main() -> None:
    """All techniques in turn, round after round; the first round is not counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="wikisql", choices=SETS)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows, base = rows_to_read(asked.set), find("smollm2")
    task = Generation.of_model(base)
    loaded = task.load_base(Untouched(), torch.float32, None)
    times: dict[str, list[float]] = {name: [] for name, settings in TECHNIQUES.items() if settings is not None}
    for number in range(asked.rounds + 1):
        chosen = np.arange(number * ROWS, (number + 1) * ROWS)
        for name, of_rounds in times.items():
            settings = TECHNIQUES[name]
            assert settings is not None
            assembled = assembled_with(settings, task, loaded, rows)
            of_rounds.append(seconds_of_step(assembled, rows, chosen))
            assembled.method.detach()
    found = {name: statistics.median(of_rounds[1:]) for name, of_rounds in times.items()}
    ratios = {
        name: statistics.median(one / lora for one, lora in zip(of_rounds[1:], times["lora"][1:], strict=True))
        for name, of_rounds in times.items()
    }
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    results[asked.set] = {"cpu_seconds": found, "ratio_to_lora": ratios, "rounds": asked.rounds}
    RESULTS.write_text(json.dumps(results | {"environment": environment()}, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results[asked.set], indent=2))


if __name__ == "__main__":
    main()
