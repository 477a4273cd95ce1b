"""Classification as a task: one label for one text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pydantic
import torch
from torch.nn import functional

from capotune.adapters.assemble import Assembled
from capotune.adapters.store import StoredAdapter
from capotune.adapters.task_model import CardWords, Objective, Score
from capotune.data.batches import Batch, Targets
from capotune.data.classes import CLASSES, class_names, with_known_labels
from capotune.data.inspect.labels import LabelReport, describe_labels, inspect_data
from capotune.data.inspect.measures import Counted
from capotune.data.inspect.texts import TextReport
from capotune.data.labelled import LabelledData, LabelledText
from capotune.data.suspects import LabelCheck
from capotune.data.wording import quoted, shorten
from capotune.data_blocks import Block
from capotune.engine.activation_cache import ActivationCache
from capotune.errors import DataError
from capotune.evaluation.metrics import nearest_mean_logits
from capotune.events import Reporter
from capotune.models.base import Base
from capotune.sections import Section
from capotune.settings import DataSettings, TrainSettings, nearest
from capotune.tasks.base import Scored, untested
from capotune.tasks.classification import page
from capotune.tasks.classification.facade import Classifier
from capotune.tasks.classification.score import scored
from capotune.tasks.solved_head import ClassSolver
from capotune.tasks.text_targets.task import AnyTarget, TextTargetTask, first_labels


class RowCrossEntropy(Objective):
    """Cross-entropy of a row's label; held-out rows are scored by accuracy, then by loss."""

    metric: ClassVar[str] = "accuracy"

    def loss(self, model: Any, batch: Batch, label_smoothing: float) -> torch.Tensor:
        """Sum of the rows' cross-entropies in nats."""
        assert batch.targets is not None
        logits = self.outputs(model, batch)
        return functional.cross_entropy(logits, batch.targets, reduction="sum", label_smoothing=label_smoothing)

    def units(self, targets: Targets, rows: list[int]) -> int:  # noqa: ARG002 - a row is a unit, whatever its label
        """The rows."""
        return len(rows)

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """Logits (rows, labels)."""
        logits: torch.Tensor = model.logits(batch)
        return logits

    def score(self, outputs: torch.Tensor, targets: Targets) -> Score:
        """(accuracy, −cross-entropy)."""
        assert isinstance(targets, torch.Tensor)
        accuracy = float((outputs.argmax(1) == targets).float().mean())
        return accuracy, -float(functional.cross_entropy(outputs, targets))

    def shown(self, score: Score) -> float:
        """The accuracy."""
        return score[0]


@dataclass(frozen=True)
class Classification(TextTargetTask):
    """The task: its labels and lengths. A target is a position in ``labels``."""

    name: ClassVar[str] = "classification"
    title: ClassVar[str] = "labelled text"
    gives: ClassVar[str] = "gives labels and writes no text"
    base_note: ClassVar[str] = (
        "Each test row gets the label whose training rows have the nearest mean, in the frozen base's features; "
        "nothing is trained."
    )
    reading = CLASSES
    objective = RowCrossEntropy()

    # ------------------------------------------------------------------------------------------------------ from data

    @classmethod
    def recognises(cls, settings: DataSettings) -> bool:  # noqa: ARG003
        """What no other task takes."""
        return True

    @classmethod
    def of_data(
        cls: type[AnyTarget], base: Base, data: LabelledData[str], max_length: int | None, virtual_tokens: int
    ) -> AnyTarget:
        """The labels of the training rows."""
        return cls.on(base, class_names(data.train.labels), max_length, virtual_tokens)

    @classmethod
    def find_wrong_labels(
        cls,
        settings: TrainSettings,
        base: Base,
        load: Callable[[Any], tuple[Assembled, ActivationCache]],
        report: Reporter,
    ) -> LabelCheck:
        """By heads on frozen features that have not seen the label."""
        from capotune.tasks.classification.label_check import check_labels

        return check_labels(settings, base, load, report)

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

    def check_labels(self, rows: LabelledText[str]) -> None:
        """``DataError`` for the first label that is not one of the task's."""
        for row, label in enumerate(rows.labels):
            if label not in self.labels:
                raise DataError(
                    f"the label {quoted(label)} is not one the adapter knows.{nearest(label, self.labels)}",
                    advice=f"It knows: {shorten(self.labels)}.",
                    where=rows.where(row),
                )

    # --------------------------------------------------------------------------------------------- the head, and asking

    @property
    def solver(self) -> ClassSolver:
        """Multinomial logistic regression."""
        return ClassSolver(len(self.labels))

    def untrained(self, train: torch.Tensor, targets: torch.Tensor, test: torch.Tensor) -> torch.Tensor:
        """Similarity to each label's mean."""
        return nearest_mean_logits(train, targets, test, len(self.labels))

    def scored(self, rows: LabelledText[str], outputs: torch.Tensor) -> Scored:
        """Accuracy, macro F1 and loss."""
        return scored(self.labels, rows, outputs, self.targets(rows.labels))

    @classmethod
    def of_peft(cls, base: Base, stored: StoredAdapter) -> Classification:
        """The task on the family's own classifier."""
        from capotune.tasks.classification.peft import PeftClassification

        return PeftClassification.of_peft(base, stored)

    def facade(self, assembled: Assembled) -> Classifier:
        """A ``Classifier``."""
        return Classifier(assembled)

    # ------------------------------------------------------------------------------------------------------------ words

    @classmethod
    def describe_data(cls, report: Mapping[str, Any]) -> list[Block]:
        """The report in words, and every label's rows."""
        return describe_labels(pydantic.TypeAdapter(LabelReport).validate_python(report))

    @classmethod
    def card(cls, record: dict[str, Any]) -> CardWords:
        """Labels, accuracy and how to predict."""
        trained = record["trained"]
        score = untested(trained, "accuracy")
        if trained["test_rows"]:
            score = f"Test accuracy {trained['score']:.2%} on {trained['test_rows']:,} rows"
        return CardWords(
            f"Classifies a text into {len(record['labels'])} labels: {first_labels(record)}.",
            score,
            'capo predict ADAPTER "your text"',
            'classifier = capotune.load(adapter)\nclassifier.predict(["your text"])',
        )

    @classmethod
    def chance(cls, metric: str, predictions: Sequence[Mapping[str, Any]]) -> tuple[float, str]:  # noqa: ARG003
        """The share of the most frequent label."""
        most = max(Counter(row["label"] for row in predictions).values(), default=0)
        return most / max(1, len(predictions)), "the share of the most frequent label"

    @classmethod
    def page_sections(
        cls,
        record: dict[str, Any],
        recommended: str,
        predictions: Mapping[str, Sequence[Mapping[str, Any]]],
        of_base: Sequence[Mapping[str, Any]],  # noqa: ARG003
    ) -> list[Section]:
        """The recommended technique's confusions and surest mistakes."""
        return page.sections(record["labels"], recommended, predictions[recommended])
