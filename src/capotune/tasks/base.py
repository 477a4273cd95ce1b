"""The contract between a task and the training loop: what a batch costs, what it gives, and how that is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import nn

from capotune.data.batches import Batch, Targets
from capotune.settings import TaskName

Score = tuple[float, ...]
"""Higher is better; later numbers decide between equal earlier ones."""


class Task(ABC):
    """How a record becomes tokens, what is learned from them, and what is stored of it beside an adapter."""

    name: ClassVar[TaskName]
    metric: ClassVar[str]
    """What the held-out score is called."""
    tokenizer: Any
    max_length: int

    @property
    def pad_id(self) -> int:
        """Id that fills short rows; never attended to, so any valid id does where the tokenizer names none."""
        return int(self.tokenizer.pad_token_id or 0)

    @abstractmethod
    def loss(self, model: Any, batch: Batch, label_smoothing: float) -> torch.Tensor:
        """Sum of the losses of everything the batch learns; the loop divides by the whole step's ``units``."""

    @abstractmethod
    def units(self, targets: Targets, rows: list[int]) -> int:
        """How many losses the rows add to the sum: rows, or learned tokens."""

    @abstractmethod
    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """What is kept of each row for the score, (rows, numbers) fp32."""

    @abstractmethod
    def score(self, outputs: torch.Tensor, targets: Targets) -> Score:
        """How good the outputs of held-out rows are."""

    @abstractmethod
    def shown(self, score: Score) -> float:
        """The number of a score that people read, in the sense of ``metric``."""

    @abstractmethod
    def head_parameters(self, model: Any) -> dict[str, nn.Parameter]:
        """The task's own trained weights by their path in the model."""

    @abstractmethod
    def expected_head(self, model: Any) -> int:
        """How many they are, by formula."""

    @abstractmethod
    def record(self, model: Any) -> dict[str, Any]:
        """What an adapter's record must hold to make this task again."""
