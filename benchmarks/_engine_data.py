"""What everybody in a comparison is given: rows, batches, and the folder with the base and the first weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _engine_workloads import Comparison, Contender, Workload

from capotune.device import compute_dtype, pick_device

DEVICE = pick_device()
NOT_LEARNED = -100
VIRTUAL_TOKENS = 20


def dtype_of(work: Workload) -> torch.dtype:
    """What everybody computes in: fp32, and language models on a GPU in its 16 bits."""
    return torch.float32 if work.classifies else compute_dtype(DEVICE)


@dataclass(frozen=True)
class Job:
    """One run: a contender in a comparison, with what ``_engine_process.prepare`` has left in ``folder``."""

    workload: Workload
    comparison: Comparison
    contender: Contender
    folder: Path

    @cached_property
    def rows(self) -> dict[str, Any]:
        """``sequences`` of ids, ``targets`` (a class or labels each), ``epochs`` of batches of row numbers."""
        return self._read(f"{self.comparison.name}.json")

    @cached_property
    def base(self) -> dict[str, Any]:
        """``folder`` of the base; of a classifier also ``labels``."""
        return self._read("base.json")

    @cached_property
    def test(self) -> dict[str, Any]:
        """``sequences`` and ``targets`` of a classifier's test rows."""
        return self._read("test.json")

    @property
    def start(self) -> Path:
        """The first weights, by PEFT's keys."""
        return self.folder / "start.safetensors"

    @property
    def steps(self) -> int:
        """Of all epochs."""
        return sum(map(len, self.rows["epochs"]))

    @property
    def tokens(self) -> int:
        """Real tokens in the steps that count: no padding, no virtual tokens."""
        batches = [batch for epoch in self.rows["epochs"] for batch in epoch]
        counted = batches if self.workload.whole else batches[1:]
        return sum(len(self.rows["sequences"][row]) for batch in counted for row in batch)

    def _read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


def rows_of(work: Workload, comparison: Comparison, rows: dict[str, Any]) -> dict[str, Any]:
    """The rows of the first epoch's batches, numbered anew, with the batches of every epoch over them.

    A batch that is not full comes last, as a data loader would have it.
    """
    size, lengths = comparison.batch_size, [len(ids) for ids in rows["sequences"]]
    if comparison.grouped:
        from _engine_ours import grouped_batches

        batches = grouped_batches(lengths, size)
    else:
        batches = random_batches(len(lengths), size, 0)
    chosen = sorted(batches[: work.steps], key=lambda batch: len(batch) < size)
    used = [row for batch in chosen for row in batch]
    at = iter(range(len(used)))
    first = [[next(at) for _ in batch] for batch in chosen]
    return {
        "sequences": [rows["sequences"][row] for row in used],
        "targets": [rows["targets"][row] for row in used],
        "epochs": [first, *(random_batches(len(used), size, epoch) for epoch in range(1, work.epochs))],
    }


def random_batches(count: int, batch_size: int, epoch: int) -> list[list[int]]:
    """All rows in any order."""
    order = np.random.default_rng([0, epoch]).permutation(count).tolist()
    return [order[at : at + batch_size] for at in range(0, count, batch_size)]


def without_dropout(model: torch.nn.Module) -> None:
    """Random masks of two programs do not compare."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
