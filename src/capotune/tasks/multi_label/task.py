"""Multi-label classification as a task: of each label a yes or no for each text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar

import pydantic
import torch

from capotune.adapters.assemble import Assembled
from capotune.adapters.store import StoredRecord
from capotune.adapters.task_model import CardWords
from capotune.data.classes import class_names
from capotune.data.inspect.measures import Counted
from capotune.data.inspect.several_labels import SeveralReport, describe_several, inspect_several
from capotune.data.inspect.texts import TextReport
from capotune.data.label_values import one_spelling
from capotune.data.labelled import LabelledData, LabelledText
from capotune.data.several_labels import COLUMNS, SEVERAL_LABELS, looks_like_several, respelled
from capotune.data_blocks import Block
from capotune.evaluation.neighbours import neighbours_mean
from capotune.models.base import Base
from capotune.sections import Section
from capotune.settings import DataSettings
from capotune.tasks.base import Scored
from capotune.tasks.multi_label import page
from capotune.tasks.multi_label.facade import MultiLabeller
from capotune.tasks.multi_label.objective import LabelCrossEntropy
from capotune.tasks.multi_label.score import same_for_all, scored
from capotune.tasks.multi_label.thresholds import choose_thresholds
from capotune.tasks.solved_head import ClassSolver
from capotune.tasks.text_targets.recognise import recognised
from capotune.tasks.text_targets.task import (
    AnyTarget,
    TextTargetRecord,
    TextTargetTask,
    TrainedRows,
    as_choices,
    first_labels,
)

_SUREST_NEIGHBOURS = 1e-3
"""A share of 0 or 1 among neighbours counts as one this far from it: a logit must be finite."""

Row = tuple[str, ...]


class _Record(TextTargetRecord):
    form: str
    thresholds: list[float]

    @pydantic.model_validator(mode="after")
    def _a_threshold_for_each_label(self) -> _Record:
        if len(self.thresholds) != len(self.labels):
            raise ValueError(f"{len(self.thresholds)} thresholds for {len(self.labels)} labels")
        return self


@dataclass(frozen=True)
class MultiLabel(TextTargetTask):
    """The task: its labels, their thresholds, and lengths. A target is 1 where a row has the label, else 0."""

    form: str = ""
    """How the training rows' labels were written (``data.several_labels``)."""
    thresholds: tuple[float, ...] = ()
    """From which probability on a text has each label."""

    name: ClassVar[str] = "multi-label"
    title: ClassVar[str] = "text with several labels"
    gives: ClassVar[str] = "gives labels and writes no text"
    base_label: ClassVar[str] = "base (frozen, nearest neighbours)"
    base_note: ClassVar[str] = (
        "Each test row gets the labels that half of the ten training rows have which are nearest to it in the frozen "
        "base's features; nothing is trained."
    )
    problem_type: ClassVar[str] = "multi_label_classification"
    data_settings: ClassVar[frozenset[str]] = TextTargetTask.data_settings | {"label_columns"}
    of_the_answer: ClassVar[frozenset[str]] = TextTargetTask.of_the_answer | {"form", "thresholds"}
    Record: ClassVar[type[StoredRecord]] = _Record
    reading = SEVERAL_LABELS
    objective = LabelCrossEntropy()

    # ------------------------------------------------------------------------------------------------------ from data

    @classmethod
    def recognises(cls, settings: DataSettings) -> bool:
        """Lists of labels, text with a separator, or columns of 0 and 1."""
        return recognised(settings, looks_like_several)

    @classmethod
    def of_data(
        cls: type[AnyTarget], base: Base, data: LabelledData[Row], max_length: int | None, virtual_tokens: int
    ) -> AnyTarget:
        """The labels of the training rows."""
        names = class_names(chain.from_iterable(data.train.labels))
        halves = (0.5,) * len(names)
        return cls.on(base, names, max_length, virtual_tokens, form=data.train.form, thresholds=halves)

    @classmethod
    def inspected(
        cls,
        data: LabelledData[Row],
        lengths: tuple[Sequence[int], Sequence[int]],
        limits: tuple[int, int],
        counted: Sequence[Counted | None],
    ) -> TextReport:
        """A ``SeveralReport``."""
        return inspect_several(data, *lengths, *limits, counted)

    def targets(self, labels: Sequence[Row]) -> torch.Tensor:
        """(rows, labels) fp32, 1 where a row has the label."""
        number = {label: at for at, label in enumerate(self.labels)}
        targets = torch.zeros(len(labels), len(self.labels))
        for row, names in enumerate(labels):
            targets[row, [number[name] for name in names]] = 1
        return targets

    def with_own_labels(self, rows: LabelledText[Row]) -> LabelledText[Row]:
        """The rows with each label as the task spells it."""
        return respelled(rows, one_spelling({*chain.from_iterable(rows.labels)}, self.labels))

    # --------------------------------------------------------------------------------------------- the head, and asking

    @property
    def solver(self) -> ClassSolver:
        """A logistic regression for each label."""
        return ClassSolver(len(self.labels))

    @property
    def own_columns(self) -> tuple[str, ...]:
        """Where each label had a column of 0 and 1, these."""
        return self.labels if self.form == COLUMNS else ()

    @property
    def label_form(self) -> str:
        """That of the training rows."""
        return self.form

    def untrained(self, train: torch.Tensor, targets: torch.Tensor, test: torch.Tensor) -> torch.Tensor:
        """The logit of the share of the nearest training rows that have each label."""
        return torch.logit(neighbours_mean(train, targets, test), eps=_SUREST_NEIGHBOURS)

    def settled(self, model: Any, rows: TrainedRows) -> MultiLabel:  # noqa: ARG002 - the head stays as it is
        """With the thresholds that are best for the held-out rows."""
        return replace(self, thresholds=tuple(choose_thresholds(rows.held_outputs(), rows.targets[rows.held])))

    def scored(self, rows: LabelledText[Row], outputs: torch.Tensor) -> Scored:
        """Micro and macro F1."""
        return scored(self.labels, self.thresholds, rows, outputs, self.targets(rows.labels))

    def distributions(self, outputs: torch.Tensor) -> torch.Tensor:
        """(rows·labels, 2): no and yes of each."""
        return as_choices(outputs)

    def own(self) -> dict[str, Any]:
        """How labels are written, and their thresholds."""
        return {"form": self.form, "thresholds": list(self.thresholds)}

    @classmethod
    def own_of(cls, record: dict[str, Any]) -> dict[str, Any]:
        """The same from a record."""
        return {"form": record["form"], "thresholds": tuple(record["thresholds"])}

    def facade(self, assembled: Assembled) -> MultiLabeller:
        """A ``MultiLabeller``."""
        return MultiLabeller(assembled)

    # ------------------------------------------------------------------------------------------------------------ words

    @classmethod
    def describe_data(cls, report: Mapping[str, Any]) -> list[Block]:
        """The report in words, and every label's rows."""
        return describe_several(pydantic.TypeAdapter(SeveralReport).validate_python(report))

    @classmethod
    def card(cls, record: dict[str, Any]) -> CardWords:
        """Labels, F1 and how to predict."""
        return replace(
            super().card(record),
            what=f"Gives a text any of {len(record['labels'])} labels, or none: {first_labels(record)}.",
            python='labeller = capotune.load(adapter)\nlabeller.predict(["your text"])',
        )

    @classmethod
    def facts(cls, record: dict[str, Any]) -> dict[str, Any]:
        """Labels, thresholds, pooling and length."""
        return {**super().facts(record), "thresholds": record["thresholds"]}

    @classmethod
    def facts_in_words(cls, facts: dict[str, Any]) -> list[tuple[str, str]]:
        """The first labels with their thresholds, and what is read of a text."""
        pairs = zip(facts["labels"], facts["thresholds"], strict=True)
        shown = [f"{label} from {threshold:.2f}" for label, threshold in pairs]
        more = ", …" if len(shown) > 12 else ""
        _, *others = super().facts_in_words(facts)
        return [("labels", f"{len(shown)}, each from a probability on: {', '.join(shown[:12])}{more}"), *others]

    @classmethod
    def further_columns(cls, metric: str, scores: Mapping[str, float]) -> tuple[str, ...]:  # noqa: ARG003
        """Macro F1."""
        return tuple(name for name in ("macro_f1",) if name in scores)

    @classmethod
    def chance(cls, metric: str, predictions: Sequence[Mapping[str, Any]]) -> tuple[float, str]:  # noqa: ARG003
        """The F1 of giving every row the same labels, the most frequent ones."""
        rows = [set(row["labels"]) for row in predictions]
        return same_for_all(rows), "that of the same labels for every row"

    @classmethod
    def page_sections(
        cls,
        record: dict[str, Any],
        recommended: str,
        predictions: Mapping[str, Sequence[Mapping[str, Any]]],
        of_base: Sequence[Mapping[str, Any]],  # noqa: ARG003
    ) -> list[Section]:
        """The recommended technique's labels, and its worst mistakes."""
        return page.sections(record, recommended, predictions[recommended])
