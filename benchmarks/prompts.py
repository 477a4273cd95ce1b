"""Soft prompts, deep prompts and LoRA on SmolLM2: one pass over 64 rows of each of three sets, defaults alone.

The rows and the scorer (Transformers and PEFT alone) are those of ``defaults.py``. Beside the loss on test rows stands
what the adapter costs on general text, and the processor seconds of the whole run.

    python benchmarks/prompts.py                every run that is missing in results/prompts.json
    python benchmarks/prompts.py wikisql deep   of one data set and one technique
    python benchmarks/prompts.py deep again     anew, after a change
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from defaults import PASSES, SETS, _file, rows_of, score

from capotune.adapters.store import read_adapter
from capotune.device import environment
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.runs.run import run
from capotune.settings import TrainingSettings, TrainSettings
from capotune.tasks.generation.general import GeneralText
from capotune.tasks.loading import load_adapter

RESULTS = Path(__file__).parent / "results" / "prompts.json"
NAMES = ("wikisql", "gsm8k", "messages")
POSITIONS = 600
"""Of general text that are compared."""
TECHNIQUES: dict[str, TrainingSettings | None] = {
    "base": None,
    "lora": LoraSettings(epochs=PASSES),
    "deep": PromptTuningSettings(epochs=PASSES, deep=True),
    "shallow": PromptTuningSettings(epochs=PASSES, deep=False),
}


def trained(train: list[dict[str, Any]], settings: TrainingSettings, folder: Path) -> Path:
    """Train; the adapter's folder."""
    data = str(_file(train, folder / "train.jsonl"))
    shared = TrainSettings(model="smollm2", data=data, test_fraction=0, out=folder / "out", answers=0, cache=False)
    run(shared, settings)
    return folder / "out" / "adapter"


def cost(adapter: Path) -> dict[str, Any]:
    """What it costs on general text."""
    assembled = load_adapter(read_adapter(adapter), model=None, device=torch.device("cpu"))
    return GeneralText.read(assembled.task, None, POSITIONS).cost_of(assembled).to_json()


def measured(name: str, settings: TrainingSettings | None) -> dict[str, Any]:
    """One run and its scores."""
    train, test = rows_of(name, choose=False)
    with tempfile.TemporaryDirectory() as temporary:
        folder, started = Path(temporary), time.process_time()
        adapter = None if settings is None else trained(train, settings, folder)
        seconds = time.process_time() - started
        found: dict[str, Any] = score(adapter, _file(test, folder / "test.jsonl"))
        general = {} if adapter is None else {"general": cost(adapter), "bytes": read_adapter(adapter).nbytes}
    return found | general | {"cpu_seconds": seconds}


def wanted(named: set[str]) -> Iterable[tuple[str, str]]:
    """(data set, technique), those named or all."""
    for technique in TECHNIQUES:
        for name in NAMES:
            if (not named & set(SETS) or name in named) and (not named & set(TECHNIQUES) or technique in named):
                yield name, technique


def main() -> None:
    """What is missing, or what is named."""
    named = set(sys.argv[1:])
    for name, technique in wanted(named):
        results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
        runs = results.setdefault(name, {})
        if technique in runs and "again" not in named:
            continue
        runs[technique] = measured(name, TECHNIQUES[technique])
        results["environment"] = environment()
        print(name, technique, runs[technique], flush=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
