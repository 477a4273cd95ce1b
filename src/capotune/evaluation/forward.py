"""Forward passes over many rows: batches of like length, results in the order of the rows.

A model may start above its frozen prefix, where the states that enter there are at hand (``BoundaryStates``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from capotune.adapters.assemble import Assembled
from capotune.adapters.task_model import Score
from capotune.data.batches import Batch, Targets, TokenRows, sorted_order, tokens_at_once
from capotune.events import OnProgress
from capotune.models.architecture import swap


@dataclass(frozen=True)
class BoundaryStates:
    """States (all tokens, hidden) that enter one block, row after row; row r is ``values[starts[r]:starts[r+1]]``."""

    values: torch.Tensor
    starts: np.ndarray

    def flat(self, rows: Sequence[int] | np.ndarray) -> torch.Tensor:
        """(tokens, hidden) of these rows, one after the other."""
        return torch.cat([self.values[self.starts[row] : self.starts[row + 1]] for row in rows])


@dataclass(frozen=True)
class Examples:
    """TokenRows with their targets and, when what is below the lowest trainable block is cached, what enters it."""

    rows: TokenRows
    targets: Targets
    boundary: BoundaryStates | None = None

    def take(self, rows: torch.Tensor) -> Examples:
        """The rows at these positions, without what was cached of them."""
        chosen = rows.tolist()
        tokens = replace(self.rows, sequences=[self.rows.sequences[row] for row in chosen])
        if isinstance(self.targets, torch.Tensor):
            return Examples(tokens, self.targets[rows])
        return Examples(tokens, [self.targets[row] for row in chosen])

    def after(self, prefix: Sequence[int]) -> Examples:
        """The same rows with other tokens before each."""
        return Examples(replace(self.rows, prefix=prefix), self.targets)


def batches(
    assembled: Assembled, examples: Examples, progress: OnProgress | None = None
) -> Iterator[tuple[np.ndarray, Batch]]:
    """(positions of the rows, their batch on the model's device), by length. While it is read, the base reads such
    batches only; ``progress`` counts batches."""
    order = sorted_order(examples.rows.lengths, tokens_at_once(assembled.model.device))
    with assembled.reading(), starting_at(assembled, examples.boundary) as give:
        for done, chosen in enumerate(order):
            yield chosen, batch_of(assembled, examples, chosen, give)
            if progress:
                progress(done + 1, len(order))


@torch.no_grad()
def outputs(assembled: Assembled, examples: Examples, progress: OnProgress | None = None) -> torch.Tensor:
    """What the objective needs of each row, (rows, values) fp32 on the CPU, in the order of the rows."""
    objective = assembled.task.objective
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
    batch = examples.rows.batch(chosen, examples.targets, assembled.packing.first_position)
    if examples.boundary is not None and give is not None:
        give(batch.laid_out(examples.boundary.flat(chosen)).to(device))
    return batch.to(device)


# ------------------------------------------------------------------------------------------------- the frozen prefix


@torch.no_grad()
def compute_boundary(
    assembled: Assembled, block: int, rows: TokenRows, progress: OnProgress | None = None
) -> torch.Tensor:
    """One forward pass up to ``block``: the states that enter it, (all tokens, hidden), without padding."""
    backbone, architecture = assembled.backbone, assembled.architecture
    starts = np.concatenate([[0], np.cumsum(rows.lengths)])
    values = torch.empty(int(starts[-1]), architecture.hidden_size, dtype=next(backbone.parameters()).dtype)
    unknown = Examples(rows, torch.zeros(len(rows.sequences), dtype=torch.long))
    with assembled.reading(), _stop_at(assembled.model, architecture.blocks[block]) as caught:
        for chosen, batch in batches(assembled, unknown, progress):
            with suppress(_BoundaryReachedError):
                backbone(**batch.inputs)
            states = batch.flat(caught.pop()).cpu()
            for row, of_row in zip(chosen, batch.split(states), strict=True):
                values[starts[row] : starts[row + 1]] = of_row
    return values


def starting_at(
    assembled: Assembled, boundary: BoundaryStates | None
) -> AbstractContextManager[Callable[[torch.Tensor], None] | None]:
    """The model as it is, or starting above its frozen prefix when the states that enter there are at hand."""
    if boundary is None:
        return nullcontext()
    return resume_from(assembled, assembled.method.first_trainable_block())


@contextmanager
def resume_from(assembled: Assembled, block: int) -> Iterator[Callable[[torch.Tensor], None]]:
    """Inside, the model starts at ``block``: the blocks below pass through, and its input is what the yielded function
    was last given, laid out as the batch is. Token ids still go in; attention mask and positions come from them."""
    model, architecture = assembled.model, assembled.architecture
    frozen = {path: model.get_submodule(path) for path in architecture.blocks[:block]}
    for path, module in frozen.items():
        swap(model, path, _PassThrough(module))
    current: list[torch.Tensor] = []

    def replace_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": current[0]}
        return (current[0], *args[1:]), kwargs

    def give(states: torch.Tensor) -> None:
        current[:] = [states]

    entered = model.get_submodule(architecture.blocks[block])
    hook = entered.register_forward_pre_hook(replace_input, with_kwargs=True, prepend=True)  # before a method's own
    try:
        yield give
    finally:
        hook.remove()
        for path, module in frozen.items():
            swap(model, path, module)


class _PassThrough(nn.Module):
    """Stands for a block whose work is already done.

    Transformers before 5.4 asks each block for its kind of attention, to choose a mask that is not used here.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(block, "attention_type", None)

    def forward(self, hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return hidden_states


class _BoundaryReachedError(Exception):
    """The forward pass arrived at the boundary; nothing above it is needed."""


@contextmanager
def _stop_at(model: nn.Module, path: str) -> Iterator[list[torch.Tensor]]:
    caught: list[torch.Tensor] = []

    def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        raise _BoundaryReachedError

    hook = model.get_submodule(path).register_forward_pre_hook(catch, with_kwargs=True)
    try:
        yield caught
    finally:
        hook.remove()
