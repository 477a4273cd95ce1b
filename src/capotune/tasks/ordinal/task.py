"""Ordinal classification as a task: one label of an order for one text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from capotune.adapters.assemble import Assembled
from capotune.adapters.task_model import CardWords
from capotune.data.labelled import LabelledData, LabelledText
from capotune.data.wording import quoted, shorten
from capotune.errors import SettingError
from capotune.evaluation.metrics import confusion
from capotune.evaluation.neighbours import neighbours_mean
from capotune.sections import ConfusionMatrix, Section
from capotune.settings import DataSettings, TrainSettings
from capotune.tasks.base import Scored
from capotune.tasks.ordinal.facade import OrdinalClassifier
from capotune.tasks.ordinal.objective import OrdinalCrossEntropy
from capotune.tasks.ordinal.score import scored
from capotune.tasks.text_targets.classes import ClassesTask

_LEAST_SHARE = 1e-6
"""Of neighbours with a label, so that its logarithm is finite."""


@dataclass(frozen=True)
class Ordinal(ClassesTask):
    """The task: its labels from the lowest to the highest, and lengths.

    The head learns each label's probability, as for classes; the order decides which label is given (the median) and
    how a miss counts.
    """

    name: ClassVar[str] = "ordinal"
    title: ClassVar[str] = "text with labels of an order"
    gives: ClassVar[str] = "gives labels and writes no text"
    base_label: ClassVar[str] = "base (frozen, nearest neighbours)"
    base_note: ClassVar[str] = (
        "Each test row gets the median label of the ten training rows that are nearest to it in the frozen base's "
        "features; nothing is trained."
    )
    data_settings: ClassVar[frozenset[str]] = ClassesTask.data_settings | {"label_order"}
    objective = OrdinalCrossEntropy()

    @classmethod
    def recognises(cls, settings: DataSettings) -> bool:  # noqa: ARG003
        """No data shows that its labels have an order: it is asked for by name."""
        return False

    def asked(self, data: LabelledData[str], settings: TrainSettings) -> Ordinal:  # noqa: ARG002
        """With the labels in the order that is given, else by number. ``SettingError`` where neither is one of all."""
        order = settings.label_order
        if order is None:
            return replace(self, labels=tuple(sorted(self.labels, key=self._number)))
        if sorted(order) != sorted(self.labels):
            other = sorted(set(order) ^ set(self.labels))
            raise SettingError(
                f"must name every label of the training rows once, and no other: {shorten(other or order)}.",
                setting="label_order",
                given=" ".join(order),
                allowed=f"an order of {shorten(self.labels)}",
            )
        return replace(self, labels=order)

    def _number(self, label: str) -> float:
        try:
            return float(label)
        except ValueError:
            raise SettingError(
                f"is needed for labels that are no numbers, such as {quoted(label)}.",
                setting="label_order",
                allowed=f"an order of {shorten(self.labels)}, from the lowest to the highest",
            ) from None

    def untrained(self, train: torch.Tensor, targets: torch.Tensor, test: torch.Tensor) -> torch.Tensor:
        """The logarithm of each label's share among the nearest training rows."""
        each = functional.one_hot(targets, len(self.labels)).float()
        return neighbours_mean(train, each, test).clamp_min(_LEAST_SHARE).log()

    def scored(self, rows: LabelledText[str], outputs: torch.Tensor) -> Scored:
        """Steps off, kappa, accuracy and loss."""
        return scored(self.labels, rows, outputs, self.targets(rows.labels))

    def facade(self, assembled: Assembled) -> OrdinalClassifier:
        """An ``OrdinalClassifier``."""
        return OrdinalClassifier(assembled)

    @classmethod
    def card(cls, record: dict[str, Any]) -> CardWords:
        """The order, scores and how to predict."""
        labels = record["labels"]
        return replace(
            super().card(record),
            what=f"Gives a text one of {len(labels)} labels of an order: {' < '.join(labels)}.",
            python='classifier = capotune.load(adapter)\nclassifier.predict(["your text"])',
        )

    @classmethod
    def facts_in_words(cls, facts: dict[str, Any]) -> list[tuple[str, str]]:
        """The order, and what is read of a text."""
        _, *others = super().facts_in_words(facts)
        return [("labels", " < ".join(facts["labels"])), *others]

    @classmethod
    def further_columns(cls, metric: str, scores: Mapping[str, float]) -> tuple[str, ...]:  # noqa: ARG003
        """Kappa and accuracy."""
        return tuple(name for name in ("kappa", "accuracy") if name in scores)

    @classmethod
    def chance(cls, metric: str, predictions: Sequence[Mapping[str, Any]]) -> tuple[float, str]:  # noqa: ARG003
        """The middle label for every row."""
        places = np.array([row["place"] for row in predictions] or [0])
        return float(np.abs(places - np.median(places)).mean()), "the middle label for every row"

    @classmethod
    def page_sections(
        cls,
        record: dict[str, Any],
        recommended: str,
        predictions: Mapping[str, Sequence[Mapping[str, Any]]],
        of_base: Sequence[Mapping[str, Any]],  # noqa: ARG003
    ) -> list[Section]:
        """What the recommended technique takes for what."""
        number = {label: at for at, label in enumerate(record["labels"])}
        rows = predictions[recommended]
        predicted, true = (np.array([number[row[name]] for row in rows]) for name in ("predicted", "label"))
        counts = confusion(predicted, true, len(number))
        return [ConfusionMatrix(f"What {recommended} confuses", record["labels"], counts)]
