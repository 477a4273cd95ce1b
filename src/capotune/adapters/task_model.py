"""A task as the floors below it see one: what it puts on a base, what it optimizes, what it stores.

``tasks.base.Task`` is the whole contract; this is the part that assembling, storing, evaluating and training need.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from capotune.data.batches import Batch, Targets
from capotune.events import OnProgress
from capotune.methods.base import Method
from capotune.models.base import Base

Score = tuple[float, ...]
"""Higher is better; later values decide between equal earlier ones."""


class Objective(ABC):
    """What training minimises, and how held-out rows are scored while it does."""

    metric: ClassVar[str]
    """What the held-out score is called."""
    mixes_lengths: ClassVar[bool] = False
    """Whether each step has rows of all lengths, as where a row counts by its tokens, or rows of like length together,
    which takes less padding."""

    @abstractmethod
    def loss(self, model: Any, batch: Batch, label_smoothing: float) -> torch.Tensor:
        """Sum of all losses of the batch, a scalar; the loop divides by the ``units`` of the whole step."""

    @abstractmethod
    def units(self, targets: Targets, rows: list[int]) -> int:
        """How many losses these rows add to the sum: rows, or tokens in the loss."""

    @abstractmethod
    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """What the score needs of each row, (rows, values) fp32."""

    @abstractmethod
    def score(self, outputs: torch.Tensor, targets: Targets) -> Score:
        """How good the outputs of held-out rows are."""

    @abstractmethod
    def shown(self, score: Score) -> float:
        """The value of a score that people read, in the sense of ``metric``."""


@dataclass(frozen=True)
class CardWords:
    """What an adapter's README says that depends on the task."""

    what: str
    """What the adapter does, a sentence or two."""
    score: str
    """How it scored, without the closing full stop."""
    shell: str
    """A command that uses it; ``ADAPTER`` stands for its folder."""
    python: str
    """The same in Python, where ``adapter`` is its folder."""


class TaskModel(ABC):
    """A task on its base."""

    name: ClassVar[str]
    has_head: ClassVar[bool]
    """Whether it puts a head of its own on the base, whose weights train."""
    shares_base: ClassVar[bool] = True
    """Whether other heads can be put on what ``load_base`` gives, or it has its own."""
    peft_task_type: ClassVar[str]
    """What PEFT calls the task."""
    reads_packed: ClassVar[bool] = True
    """Whether its model takes sequences without padding, where its base does."""
    base: Base
    objective: Objective

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return self.base.tokenizer

    @property
    def pad_id(self) -> int:
        """Id that fills short rows; never attended to, so any valid id does where the tokenizer names none, or one
        that the base has no embedding for."""
        named, size = self.tokenizer.pad_token_id, self.base.vocabulary_size
        return 0 if named is None or (size is not None and named >= size) else int(named)

    @abstractmethod
    def load_base(self, method: Method, dtype: torch.dtype, progress: OnProgress | None) -> Any:
        """The frozen base as ``method`` wants it, without a head of the task's."""

    @abstractmethod
    def put_head(self, loaded: Any, method: Method) -> tuple[Any, str]:
        """A model with a fresh head on what ``load_base`` gave, which other heads may share, and the backbone's path in
        it."""

    def with_model(self, model: Any) -> TaskModel:  # noqa: ARG002 - most tasks need not look
        """The task with what only the loaded model can tell."""
        return self

    def prompt_attached(self, model: Any, virtual_tokens: int) -> None:  # noqa: B027
        """Told how many leading positions of every row are a soft prompt."""

    @abstractmethod
    def head_parameters(self, model: Any) -> dict[str, nn.Parameter]:
        """The task's own trained weights by their path in the model."""

    @abstractmethod
    def expected_head(self, model: Any) -> int:
        """How many they are, by formula."""

    @abstractmethod
    def record(self, model: Any) -> dict[str, Any]:
        """What an adapter's record must hold to make this task again."""

    @classmethod
    @abstractmethod
    def card(cls, record: dict[str, Any]) -> CardWords:
        """What the adapter's README says, from its whole record."""
