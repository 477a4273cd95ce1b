"""The defaults alone against TRL's SFTTrainer with PEFT: SmolLM2, LoRA, four data sets, equal rows and passes.

TRL runs with its own defaults (learning rate 2e-5, batches of 8) and with five other learning rates. Both train in
fp32 on the tokens of the answers, with LoRA of rank 16 and alpha 32 on all linear layers. One scorer, plain
Transformers and PEFT, scores both on the same tokens: those of the answers, of test rows that nothing was chosen by.
What a default was chosen by are other settings of Capotune, scored on rows held out of the training data.

    python benchmarks/defaults.py                 every run that is missing in results/defaults.json
    python benchmarks/defaults.py wikisql trl     of one data set and one side (trl, capotune, choose)
    python benchmarks/defaults.py capotune again  anew, after a change
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from capotune.data.batches import IGNORE_INDEX, Encoded
from capotune.data.generation import load_samples
from capotune.device import environment
from capotune.methods.lora.settings import LoraSettings
from capotune.models.base import find
from capotune.models.gguf.converted import converted
from capotune.runs.run import run
from capotune.settings import TrainSettings
from capotune.tasks.generation.notices import Notices
from capotune.tasks.generation.task import Generation

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "shared" / "data"
RESULTS = HERE / "results" / "defaults.json"
RATES = (2e-3, 4e-3, 1e-3, 5e-4, 2e-4)
PASSES = 1
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def wikisql(part: str) -> list[dict[str, Any]]:
    """The table's columns and a question, and the query: short rows of mlx-examples' sample of WikiSQL."""
    parts = ("train",) if part == "train" else ("test", "valid")
    rows = [json.loads(line)["text"] for part in parts for line in _lines("wikisql", part)]
    pairs = [row.partition("\nA: ") for row in rows if len(row) < 225]
    return [{"prompt": f"{before}\nA:\n", "completion": answer} for before, _, answer in pairs]


def gsm8k(part: str) -> list[dict[str, Any]]:
    """A sum in words and its steps, as a chat: problems of GSM8K with short answers."""
    rows = [json.loads(line) for line in _lines("gsm8k", part)]
    short = [row for row in rows if len(row["question"]) < 140 and len(row["answer"]) < 140]
    return [
        {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]}
        for row in short
    ]


def messages(part: str) -> list[dict[str, Any]]:
    """Customers' messages and the record of each: the demonstration's data."""
    rows = [json.loads(line) for line in (HERE.parent / "examples" / "shop_messages.jsonl").open(encoding="utf-8")]
    return [{"messages": row["messages"]} for row in rows if row["split"] == part]


def chat(part: str) -> list[dict[str, Any]]:
    """Talk of a few turns and short answers on many subjects: the English part of the PyPI package chatterbot-corpus
    (BSD), but for its code. How few rows are held out was chosen on its training part. The test rows are 64 whose
    question no training row begins with."""
    found = find_spec("chatterbot_corpus")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("The set chat is of a package. Run: pip install --no-deps chatterbot-corpus pyyaml")
    files = Path(found.submodule_search_locations[0], "data", "english").glob("*.yml")
    read = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(files) if file.stem != "coding"]
    every = ([str(text or "").strip() for text in talk] for of_file in read for talk in of_file["conversations"])
    talks = [talk for talk in every if len(talk) > 1 and all(talk)]
    by_question = {talk[0].lower().strip(" ?.!"): talk for talk in random.Random(0).sample(talks, len(talks))}
    chosen = list(by_question.values())[:64] if part == "test" else list(by_question.values())[64:]
    return [{"messages": _messages(talk)} for talk in chosen]


def _messages(talk: list[str]) -> list[dict[str, str]]:
    """User and assistant by turns, of eight turns at most, to the last answer."""
    pairs = zip(itertools.cycle(("user", "assistant")), talk[: min(8, len(talk) // 2 * 2)], strict=False)
    return [{"role": role, "content": text} for role, text in pairs]


SETS: dict[str, tuple[Callable[[str], list[dict[str, Any]]], int, int]] = {
    "wikisql": (wikisql, 64, 32),
    "gsm8k": (gsm8k, 64, 32),
    "messages": (messages, 64, 24),
    "chat": (chat, 300, 64),
}
"""Where the rows come from, how many train, and how many test."""


def _lines(name: str, part: str) -> list[str]:
    return (DATA / name / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()


def rows_of(name: str, *, choose: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows to train on and those to score, drawn at random; to ``choose`` by, both from the training data."""
    source, train, test = SETS[name]
    if choose:
        rows = random.Random(1).sample(source("train"), len(source("train")))
        held = len(rows) // 4 if len(rows) < train + test else test
        return rows[held:][:train], rows[:held]
    return (random.Random(0).sample(source("train"), train), random.Random(0).sample(source("test"), test))


def _file(rows: list[dict[str, Any]], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --------------------------------------------------------------------------------------------------- the two sides


def by_capotune(train: list[dict[str, Any]], out: Path, **settings: Any) -> Path:
    """Train by ``capo train lora``'s defaults, or other ``settings``; the adapter's folder."""
    shared = {"validation_fraction": settings.pop("validation_fraction")} if "validation_fraction" in settings else {}
    data = str(_file(train, out.with_name("train.jsonl")))
    base = TrainSettings(model="smollm2", data=data, test_fraction=0, out=out, answers=0, cache=False, **shared)
    run(base, LoraSettings(epochs=PASSES, **settings))
    return out / "adapter"


def by_trl(train: list[dict[str, Any]], out: Path, **settings: Any) -> Path:
    """Train by SFTTrainer; the adapter's folder."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    folder = converted(find("smollm2"), None).folder
    rows = [_with_mask(row) for row in encoded(_file(train, out.with_name("rows.jsonl")))]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=SFTConfig(
            str(out), num_train_epochs=PASSES, bf16=False, gradient_checkpointing=False, use_cpu=True,
            save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no", **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    trainer.model.save_pretrained(str(out))
    return out


def _with_mask(row: Encoded) -> dict[str, Any]:
    """The tokens of a row and which are in the loss, as TRL reads them: every answer's, and no other."""
    return {"input_ids": list(row.ids), "completion_mask": [int(label != IGNORE_INDEX) for label in row.labels]}


# --------------------------------------------------------------------------------------------------- the one scorer


def encoded(test: Path) -> list[Encoded]:
    """The test rows as tokens, with those of the answers marked."""
    samples = load_samples(str(test), test=None, prompt_template=None, completion_column=None, test_fraction=0, seed=0)
    chats = "messages" in test.read_text(encoding="utf-8").partition("\n")[0]
    task = Generation.on(find("smollm2"), None, 0, chat=chats)
    return [one for of_row in task.encode(samples.train, Notices()) for one in of_row]


@torch.no_grad()
def score(adapter: Path | None, test: Path) -> dict[str, float]:
    """Mean loss of the answers' tokens in nats, and the part of the rows whose every token is the most probable one:
    what greedy decoding would write to the letter."""
    from peft import PeftModel

    folder = converted(find("smollm2"), None).folder
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    nats, tokens, exact = 0.0, 0, 0
    rows = encoded(test)
    for row in rows:
        labels = torch.tensor(row.labels[1:])
        at = (labels != IGNORE_INDEX).nonzero()[:, 0]
        logits = model(input_ids=torch.tensor([row.ids])).logits[0, -len(row.ids) :][at]  # a soft prompt's come first
        nats += float(functional.cross_entropy(logits, labels[at], reduction="sum"))
        tokens += len(at)
        exact += bool((logits.argmax(-1) == labels[at]).all())
    return {"loss": nats / tokens, "exact_match": exact / len(rows), "tokens": tokens, "rows": len(rows)}


# --------------------------------------------------------------------------------------------------- all runs


Job = Callable[[list[dict[str, Any]], Path], Path | None]
"""From the training rows and a folder to the adapter's folder; None for the base alone."""

CHOICES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "learning rate 2.6e-3": {"learning_rate": 2.6e-3},
    "fewest rows held out": {"validation_fraction": 0.01},
    "learning rate 6.5e-4": {"learning_rate": 6.5e-4},
    "warm-up 0.2": {"warmup": 0.2},
    "cosine": {"schedule": "cosine"},
    "batches of 2": {"batch_size": 2},
    "batches of 2, learning rate 6.5e-4": {"batch_size": 2, "learning_rate": 6.5e-4},
    "no weight decay": {"weight_decay": 0.0},
}
"""Settings of Capotune that a default was chosen among."""


def jobs() -> dict[str, Job]:
    """Every run of a data set, by its name in the results."""
    found: dict[str, Job] = {"capotune, defaults": by_capotune}
    found |= {f"trl, {rate:g}": partial(by_trl, learning_rate=rate) for rate in RATES}
    found |= {"trl, defaults": by_trl, "base": lambda _train, _out: None}
    return found | {f"choose, {label}": partial(by_capotune, **settings) for label, settings in CHOICES.items()}


def do(name: str, label: str, job: Job) -> dict[str, float]:
    """One run and its score."""
    with tempfile.TemporaryDirectory() as folder:
        train, test = rows_of(name, choose=label.startswith("choose"))
        started = time.perf_counter()
        adapter = job(train, Path(folder) / "out")
        seconds = time.perf_counter() - started
        return {**score(adapter, _file(test, Path(folder) / "test.jsonl")), "seconds": seconds}


def main() -> None:
    """The data sets and sides that are named, or all."""
    named = set(sys.argv[1:])
    for label, job in jobs().items():
        for name in SETS:
            if (named & set(SETS) and name not in named) or (
                named & {"trl", "capotune", "choose", "base"} and label.partition(",")[0] not in named
            ):
                continue
            results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
            part = results.setdefault(name, {"train_rows": SETS[name][1], "passes": PASSES, "runs": {}})
            if label in part["runs"] and "again" not in named:
                continue
            part["runs"][label] = do(name, label, job)
            results["environment"] = environment()
            print(name, label, part["runs"][label], flush=True)
            RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
