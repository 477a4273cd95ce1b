"""The contract between a task and everything that trains, scores, or stores.

A task knows how a record becomes tokens, a target, a loss and a metric. It knows no method: what is trained inside the
backbone is none of its business, its own head is.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import nn


class Task(Protocol):
    """What the loop, the evaluation and the store ask of a task."""

    name: ClassVar[str]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, cut at the longest length."""

    def loss(self, output: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
        """Mean loss of a batch's model output against its targets: a scalar."""

    def head_parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The task's own trained weights by their path in ``model``."""

    def record(self) -> dict[str, Any]:
        """What must be stored beside an adapter to use it again."""
