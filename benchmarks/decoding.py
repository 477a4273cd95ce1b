"""Tokens a second: capotune with an adapter against Transformers' ``generate`` with the merged model.

SmolLM2-135M-Instruct with a LoRA adapter of every linear layer (rank 16, random weights: which ones changes nothing of
the work), and 64 questions of WikiSQL. Both get the same prompts in one batch, padded on the left, and write the same
number of tokens, alternating in one process, with the same dtype. On one thread seconds are the processor's, so that
other work on the machine counts little; on more they are the wall clock's, which wants a quiet machine.

- *to the limit*: no token ends an answer, all rows write as much as is allowed;
- *as the model ends*: an answer ends with its first line, as one to such a question does.

    python benchmarks/decoding.py [--rounds N] [--tokens N] [--threads N]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from capotune.adapters.assemble import Assembled, assemble, attach
from capotune.device import environment
from capotune.evaluation.generate import generate
from capotune.methods.base import Start
from capotune.methods.lora.settings import LoraSettings
from capotune.models.base import find
from capotune.settings import DecodingSettings
from capotune.tasks.generation.task import Generation

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "decoding.json"
QUESTIONS = HERE.parents[1] / "shared" / "data" / "wikisql" / "test.jsonl"
PROMPTS = 64


def with_adapter() -> Assembled:
    """The base with an adapter that changes what it writes a little."""
    task = Generation.on(find("smollm2"), None, 0)
    settings = LoraSettings(learning_rate=1e-3, epochs=1)
    assembled = assemble(task, settings, device=torch.device("cpu"))
    attach(assembled, Start(torch.Generator().manual_seed(0)))
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in assembled.method.parameters().values():
            weight.normal_(0, 0.002)
    return assembled


def questions(task: Generation) -> list[list[int]]:
    """Token ids of the prompts."""
    rows = [json.loads(row)["text"] for row in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    return [task.encode_prompt(row.partition("\nA: ")[0] + "\nA:") for row in rows[:: len(rows) // PROMPTS][:PROMPTS]]


def of_transformers(model: Any, prompts: list[list[int]], tokens: int, ends: list[int], pad: int) -> list[list[int]]:
    """Its own ``generate``, one batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    asked = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=ends or None, pad_token_id=pad)
    written = model.generate(ids, attention_mask=mask, generation_config=asked)[:, width:].tolist()
    return [row[: next((at for at, token in enumerate(row) if token in ends), len(row))] for row in written]


def measure(rounds: int, tokens: int) -> dict[str, Any]:
    """Seconds of every round, and how many tokens were written."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    ours = with_adapter()
    prompts = questions(ours.task)
    theirs = copy.deepcopy(ours)
    theirs.method.merge()
    theirs.model.generation_config = GenerationConfig()
    newline = ours.task.tokenizer.encode("\n", add_special_tokens=False)
    found: dict[str, Any] = {}
    for name, ends in (("to the limit", []), ("as the model ends", [*newline, *ours.task.end_ids])):
        mine = replace(ours, task=replace(ours.task, end_ids=tuple(ends)))
        seconds: dict[str, list[float]] = {"capotune": [], "transformers": []}
        for _ in range(rounds):
            start = clock()
            reference = of_transformers(theirs.model, prompts, tokens, ends, ours.task.pad_id)
            middle = clock()
            texts = generate(mine, prompts, DecodingSettings(max_tokens=tokens))
            end = clock()
            seconds["transformers"].append(middle - start)
            seconds["capotune"].append(end - middle)
            print(name, {key: round(value[-1], 2) for key, value in seconds.items()}, flush=True)
        expected = [ours.task.decode_after(prompt, ids) for prompt, ids in zip(prompts, reference, strict=True)]
        written = sum(map(len, reference))
        found[name] = {
            "tokens": written,
            "equal_answers": sum(a == b for a, b in zip(texts, expected, strict=True)),
            "seconds": seconds,
            "tokens_per_second": {key: written / statistics.median(values) for key, values in seconds.items()},
            "ratio": statistics.median(
                b / a for a, b in zip(seconds["capotune"], seconds["transformers"], strict=True)
            ),
        }
    return found


def main() -> None:
    """Measure, and write ``results/decoding.json``, which holds one thread and more side by side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    results["one thread" if given.threads == 1 else "more threads"] = {
        "environment": environment(),
        "prompts": PROMPTS,
        "most_tokens": given.tokens,
        "rounds": given.rounds,
        "threads": given.threads,
        "results": measure(given.rounds, given.tokens),
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
