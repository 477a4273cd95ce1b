"""A model that starts above its frozen prefix, where the states that enter there are at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from capotune.adapters.assemble import Assembled
from capotune.models.architecture import swap


@dataclass(frozen=True)
class BoundaryStates:
    """States (all tokens, hidden) that enter one block, row after row; row r is ``values[starts[r]:starts[r+1]]``."""

    values: torch.Tensor
    starts: np.ndarray
    outputs: int = 0
    """Of how many values a block's output is a tuple, the states first; 0: it is the states alone."""

    def flat(self, rows: Sequence[int] | np.ndarray) -> torch.Tensor:
        """(tokens, hidden) of these rows, one after the other."""
        return torch.cat([self.values[self.starts[row] : self.starts[row + 1]] for row in rows])


def starting_at(
    assembled: Assembled, boundary: BoundaryStates | None
) -> AbstractContextManager[Callable[[torch.Tensor], None] | None]:
    """The model as it is, or starting above its frozen prefix when the states that enter there are at hand."""
    if boundary is None:
        return nullcontext()
    return resume_from(assembled, assembled.method.first_trainable_block(), boundary.outputs)


@contextmanager
def resume_from(assembled: Assembled, block: int, outputs: int = 0) -> Iterator[Callable[[torch.Tensor], None]]:
    """Inside, the model starts at ``block``: the blocks below pass through, and its input is what the yielded function
    was last given, laid out as the batch is. Token ids still go in; attention mask and positions come from them.

    ``outputs`` as in ``BoundaryStates``.
    """
    model, architecture = assembled.model, assembled.architecture
    frozen = {path: model.get_submodule(path) for path in architecture.blocks[:block]}
    for path, module in frozen.items():
        swap(model, path, _PassThrough(module, outputs))
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

    def __init__(self, block: nn.Module, outputs: int) -> None:
        super().__init__()
        self.attention_type = getattr(block, "attention_type", None)
        self.outputs = outputs

    def forward(self, hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return (hidden_states, *[None] * (self.outputs - 1)) if self.outputs else hidden_states


class BoundaryReachedError(Exception):
    """The forward pass arrived at the boundary; nothing above it is needed."""


@contextmanager
def stop_at(model: nn.Module, path: str) -> Iterator[list[torch.Tensor]]:
    """Inside, a forward pass ends with ``BoundaryReachedError`` at the block, whose input is in the list then."""
    caught: list[torch.Tensor] = []

    def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        raise BoundaryReachedError

    hook = model.get_submodule(path).register_forward_pre_hook(catch, with_kwargs=True)
    try:
        yield caught
    finally:
        hook.remove()
