"""Pairs of texts: do two customers' questions want the same? Against Transformers' Trainer on the same rows.

``python benchmarks/pairs.py [TRAIN TEST]``: rows are pairs of Banking77's questions (300 and 300 by default), half with
one intent, half with two intents whose names share a word. Every way sees the training rows three times, with MiniLM:
Capotune's LoRA and feature extraction, Trainer with all weights, and Trainer with PEFT's LoRA of the same rank, each
on ``tokenizer(first, second)``. Writes ``benchmarks/results/pairs.json``. Needs ``../shared/data`` and accelerate.
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import capotune
from capotune.models.base import find

ROOT = Path(__file__).parents[1]
BANKING = ROOT / "../shared/data/banking77"
RESULTS = ROOT / "benchmarks/results/pairs.json"
PASSES, RANK, SEED = 3, 16, 0
RATES = {"all weights": 5e-5, "PEFT LoRA": 1e-3}

Row = dict[str, str]


def main() -> None:
    torch.set_num_threads(1)
    sizes = list(map(int, sys.argv[1:])) or [300, 300]
    train, test = (pairs(BANKING / f"{part}.csv", size) for part, size in zip(("train", "test"), sizes, strict=True))
    result: dict[str, Any] = {"train_rows": len(train), "test_rows": len(test), "passes": PASSES, "ways": {}}
    ways = {"feature-extraction": ours, "lora": ours, "all weights": peer, "PEFT LoRA": peer}
    for name, way in ways.items():
        before = time.process_time()
        accuracy = way(name, train, test)
        result["ways"][name] = {"accuracy": accuracy, "cpu_seconds": round(time.process_time() - before, 1)}
        print(name, result["ways"][name], flush=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def pairs(file: Path, count: int) -> list[Row]:
    """Pairs of questions: half with one intent, half with two whose names share most words."""
    rng = np.random.default_rng(SEED)
    with file.open(encoding="utf-8", newline="") as rows:
        texts: dict[str, list[str]] = {}
        for row in csv.DictReader(rows):
            texts.setdefault(row["category"], []).append(row["text"])
    near = {name: _nearest(name, texts) for name in texts}
    names = [name for name in texts if near[name]]
    found = []
    for number in range(count):
        name = names[rng.integers(len(names))]
        other = name if number % 2 else near[name][rng.integers(len(near[name]))]
        first = texts[name][rng.integers(len(texts[name]))]
        second = texts[other][rng.integers(len(texts[other]))]
        found.append({"text_a": first, "text_b": second, "label": "same" if other == name else "other"})
    return found


def _nearest(name: str, others: Iterable[str]) -> list[str]:
    """Those that share most words with ``name``; none where no word is shared."""
    shared = {other: len(set(name.lower().split("_")) & set(other.lower().split("_"))) for other in others}
    del shared[name]
    most = max(shared.values())
    return [other for other, words in shared.items() if words == most > 0]


def ours(method: str, train: list[Row], test: list[Row]) -> float:
    own = {} if method == "feature-extraction" else {"rank": RANK, "epochs": PASSES}
    with tempfile.TemporaryDirectory() as folder:
        run = capotune.train(method, data=train, test=test, out=Path(folder) / "run", seed=SEED, cache=False, **own)
    return float(run["result"]["score"])


def peer(name: str, train: list[Row], test: list[Row]) -> float:
    torch.manual_seed(SEED)
    folder = find("minilm").folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    if name == "PEFT LoRA":
        linear = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
        config = peft.LoraConfig(task_type="SEQ_CLS", r=RANK, lora_alpha=2 * RANK, target_modules=linear)
        model = peft.get_peft_model(model, config)

    def encoded(rows: list[Row]) -> list[dict[str, Any]]:
        found = tokenizer([row["text_a"] for row in rows], [row["text_b"] for row in rows], truncation=True)
        labels = [int(row["label"] == "same") for row in rows]
        return [
            {**{key: values[at] for key, values in found.items()}, "labels": label} for at, label in enumerate(labels)
        ]

    with tempfile.TemporaryDirectory() as out:
        settings = TrainingArguments(
            out, per_device_train_batch_size=32, num_train_epochs=PASSES, learning_rate=RATES[name], warmup_steps=2,
            seed=SEED, save_strategy="no", logging_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, settings, train_dataset=encoded(train), processing_class=tokenizer)
        trainer.train()
        found = trainer.predict(encoded(test))
    return float((found.predictions.argmax(1) == found.label_ids).mean())


if __name__ == "__main__":
    main()
