"""What tasks with one class a text share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pydantic
import torch

from capotune.data.classes import CLASSES, class_names, with_known_labels
from capotune.data.inspect.labels import LabelReport, describe_labels, inspect_data
from capotune.data.inspect.measures import Counted
from capotune.data.inspect.texts import TextReport
from capotune.data.labelled import LabelledData, LabelledText
from capotune.data_blocks import Block
from capotune.models.base import Base
from capotune.tasks.solved_head import ClassSolver
from capotune.tasks.text_targets.task import AnyTarget, TextTargetTask


@dataclass(frozen=True)
class ClassesTask(TextTargetTask):
    """The task: its labels and lengths. A target is a position in ``labels``."""

    reading = CLASSES

    @classmethod
    def of_data(
        cls: type[AnyTarget], base: Base, data: LabelledData[str], max_length: int | None, virtual_tokens: int
    ) -> AnyTarget:
        """The labels of the training rows."""
        return cls.on(base, class_names(data.train.labels), max_length, virtual_tokens)

    @classmethod
    def inspected(
        cls,
        data: LabelledData[str],
        lengths: tuple[Sequence[int], Sequence[int]],
        limits: tuple[int, int],
        counted: Sequence[Counted | None],
    ) -> TextReport:
        """A ``LabelReport``."""
        return inspect_data(data, *lengths, *limits, counted)

    def targets(self, labels: Sequence[str]) -> torch.Tensor:
        """(rows,) int64 positions of label names."""
        number = {label: at for at, label in enumerate(self.labels)}
        return torch.tensor([number[label] for label in labels], dtype=torch.long)

    def with_own_labels(self, rows: LabelledText[str]) -> LabelledText[str]:
        """The rows with each label as the task spells it; one that it does not know stays as it is."""
        return with_known_labels(rows, self.labels)

    @property
    def solver(self) -> ClassSolver:
        """Multinomial logistic regression."""
        return ClassSolver(len(self.labels))

    @classmethod
    def describe_data(cls, report: Mapping[str, Any]) -> list[Block]:
        """The report in words, and every label's rows."""
        return describe_labels(pydantic.TypeAdapter(LabelReport).validate_python(report))
