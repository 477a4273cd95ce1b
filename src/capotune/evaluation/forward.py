"""Forward passes over many rows: batches of like length, results in the order of the rows.

A model may start above its frozen prefix, where the states that enter there are at hand (``evaluation.resume``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from capotune.adapters.assemble import Assembled
from capotune.adapters.task_model import Objective, Score
from capotune.data.batches import Batch, Targets, TokenRows, sorted_order, taken, tokens_at_once
from capotune.evaluation.resume import BoundaryStates, starting_at
from capotune.events import OnProgress


@dataclass(frozen=True)
class Examples:
    """TokenRows with their targets and, when what is below the lowest trainable block is cached, what enters it."""

    rows: TokenRows
    targets: Targets
    boundary: BoundaryStates | None = None
    where: Callable[[int], str] = "row {}".format
    """Where the row at a position is from, as messages name it."""

    def take(self, rows: torch.Tensor) -> Examples:
        """The rows at these positions, without what was cached of them."""
        chosen, where = rows.tolist(), self.where
        tokens = replace(self.rows, sequences=taken(self.rows.sequences, chosen))
        every = self.targets
        targets = every[rows] if isinstance(every, torch.Tensor) else taken(every, chosen)
        return Examples(tokens, targets, where=lambda at: where(chosen[at]))

    def after(self, prefix: Sequence[int]) -> Examples:
        """The same rows with other tokens before each."""
        return replace(self, rows=replace(self.rows, prefix=prefix), boundary=None)


def batches(
    assembled: Assembled, examples: Examples, progress: OnProgress | None = None
) -> Iterator[tuple[np.ndarray, Batch]]:
    """(positions of the rows, their batch on the model's device), by length. While it is read, the base reads such
    batches only; ``progress`` counts batches."""
    order = sorted_order(examples.rows.lengths, tokens_at_once(assembled.model.device), assembled.packing.group)
    with assembled.reading(), starting_at(assembled, examples.boundary) as give:
        for done, chosen in enumerate(order):
            yield chosen, batch_of(assembled, examples, chosen, give)
            if progress:
                progress(done + 1, len(order))


@torch.no_grad()
def outputs(
    assembled: Assembled, examples: Examples, progress: OnProgress | None = None, objective: Objective | None = None
) -> torch.Tensor:
    """What the objective (the task's, or another) needs of each row, (rows, values) fp32 on the CPU, in the order of
    the rows."""
    objective = objective or assembled.task.objective
    order, found = [], []
    for chosen, batch in batches(assembled, examples, progress):
        order.append(chosen)
        found.append(objective.outputs(assembled.model, batch).float().cpu())
    at = torch.as_tensor(np.concatenate(order))
    return torch.cat(found)[at.argsort()]


def held_out_score(assembled: Assembled, examples: Examples, progress: OnProgress | None = None) -> Score:
    """The objective's score of held-out rows: higher is better, later values decide between equal earlier ones. NaN is
    worse than any value."""
    score = assembled.task.objective.score(outputs(assembled, examples, progress), examples.targets)
    return tuple(-math.inf if math.isnan(one) else one for one in score)


def batch_of(
    assembled: Assembled, examples: Examples, chosen: np.ndarray, give: Callable[[torch.Tensor], None] | None
) -> Batch:
    """The rows on the model's device; cached states, where there are some, are given to the model too."""
    device = assembled.model.device
    first, placeholders = assembled.packing.first_position, assembled.method.virtual_tokens_are_placeholders
    batch = examples.rows.batch(chosen, examples.targets, first, placeholders=placeholders)
    if examples.boundary is not None and give is not None:
        give(batch.laid_out(examples.boundary.flat(chosen)).to(device))
    return batch.to(device)
