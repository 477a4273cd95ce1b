"""Regression as a task: one number for each text, or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pydantic
import torch

from capotune.adapters.assemble import Assembled
from capotune.adapters.store import StoredRecord
from capotune.adapters.task_model import CardWords, Objective
from capotune.data.inspect.measures import Counted
from capotune.data.inspect.numbers import NumberReport, describe_numbers, inspect_numbers
from capotune.data.inspect.texts import TextReport
from capotune.data.labelled import LabelledData, LabelledText
from capotune.data.numbers import NUMBERS, looks_like_numbers
from capotune.data_blocks import Block
from capotune.evaluation.neighbours import neighbours_mean
from capotune.models.base import Base
from capotune.sections import Section
from capotune.settings import DataSettings
from capotune.tasks.base import Scored
from capotune.tasks.regression import page
from capotune.tasks.regression.facade import Regressor
from capotune.tasks.regression.intervals import LEVEL, choose_margins
from capotune.tasks.regression.objective import SquaredError
from capotune.tasks.regression.score import scored
from capotune.tasks.regression.solver import RidgeSolver
from capotune.tasks.text_targets.recognise import recognised
from capotune.tasks.text_targets.task import AnyTarget, TextTargetRecord, TextTargetTask, TrainedRows, as_choices

Row = tuple[float, ...]
_Scale = pydantic.PositiveFloat


class _Record(TextTargetRecord):
    centers: list[pydantic.FiniteFloat]
    scales: list[_Scale]
    margins: list[pydantic.NonNegativeFloat] | None

    @pydantic.model_validator(mode="after")
    def _one_for_each_number(self) -> _Record:
        if any(len(one) != len(self.labels) for one in (self.centers, self.scales, self.margins or self.labels)):
            raise ValueError(f"not as many centers, scales or margins as there are numbers: {len(self.labels)}")
        return self


@dataclass(frozen=True)
class Regression(TextTargetTask):
    """The task: what its numbers are called, how they spread, and lengths.

    A target is a number in standard deviations from the mean of the training rows. The head is trained for these, and
    gives numbers in their own units once it is: whoever reads an adapter need know nothing of it.
    """

    centers: tuple[float, ...] = ()
    """Mean of each number in the training rows."""
    scales: tuple[float, ...] = ()
    """Standard deviation of each."""
    margins: tuple[float, ...] | None = None
    """Half the width of each number's interval; None where too few rows were held out to tell."""

    name: ClassVar[str] = "regression"
    title: ClassVar[str] = "text with numbers"
    gives: ClassVar[str] = "gives numbers and writes no text"
    base_label: ClassVar[str] = "base (frozen, nearest neighbours)"
    base_note: ClassVar[str] = (
        "Each test row gets the mean number of the ten training rows that are nearest to it in the frozen base's "
        "features; nothing is trained."
    )
    problem_type: ClassVar[str] = "regression"
    data_settings: ClassVar[frozenset[str]] = TextTargetTask.data_settings | {"label_columns"}
    of_the_answer: ClassVar[frozenset[str]] = TextTargetTask.of_the_answer | {"centers", "scales", "margins"}
    Record: ClassVar[type[StoredRecord]] = _Record
    reading = NUMBERS

    # ------------------------------------------------------------------------------------------------------ from data

    @classmethod
    def recognises(cls, settings: DataSettings) -> bool:
        """Numbers with fractions, or many different ones."""
        return recognised(settings, looks_like_numbers)

    @classmethod
    def of_data(
        cls: type[AnyTarget], base: Base, data: LabelledData[Row], max_length: int | None, virtual_tokens: int
    ) -> AnyTarget:
        """The columns of the numbers, and how these spread in the training rows."""
        numbers = np.array(data.train.labels, dtype=np.float64)
        centers, scales = (tuple(values.tolist()) for values in (numbers.mean(0), numbers.std(0)))
        return cls.on(base, data.train.label_columns, max_length, virtual_tokens, centers=centers, scales=scales)

    @classmethod
    def inspected(
        cls,
        data: LabelledData[Row],
        lengths: tuple[Sequence[int], Sequence[int]],
        limits: tuple[int, int],
        counted: Sequence[Counted | None],
    ) -> TextReport:
        """A ``NumberReport``."""
        return inspect_numbers(data, *lengths, *limits, counted)

    def targets(self, labels: Sequence[Row]) -> torch.Tensor:
        """(rows, numbers) fp32, standardised."""
        numbers = torch.tensor(labels, dtype=torch.float64).view(-1, len(self.labels))
        return self._standardised(numbers).float()

    def _standardised(self, numbers: torch.Tensor) -> torch.Tensor:
        centers, scales = (torch.tensor(one, dtype=torch.float64) for one in (self.centers, self.scales))
        return (numbers.double() - centers) / scales

    @property
    def own_columns(self) -> tuple[str, ...]:
        """Those of several numbers; one is found as in training."""
        return self.labels if len(self.labels) > 1 else ()

    # --------------------------------------------------------------------------------------------- the head, and asking

    @property
    def objective(self) -> Objective:  # type: ignore[override]
        """Squared error of standardised numbers."""
        return SquaredError(self.scales)

    @property
    def solver(self) -> RidgeSolver:
        """Ridge regression."""
        return RidgeSolver()

    def untrained(self, train: torch.Tensor, targets: torch.Tensor, test: torch.Tensor) -> torch.Tensor:
        """The mean of the nearest training rows' numbers, in their own units."""
        return neighbours_mean(train, targets, test) * torch.tensor(self.scales) + torch.tensor(self.centers)

    def settled(self, model: Any, rows: TrainedRows) -> Regression:
        """With the intervals that hold the true numbers of nine in ten held-out rows. The head then gives numbers in
        their own units."""
        margins = choose_margins(rows.held_outputs(), rows.targets[rows.held])
        head = model.classifier
        scales, centers = (torch.tensor(one, device=head.weight.device) for one in (self.scales, self.centers))
        with torch.no_grad():
            head.weight.mul_(scales[:, None])
            head.bias.mul_(scales).add_(centers)
        if margins is None:
            return self
        return replace(self, margins=tuple(own * scale for own, scale in zip(margins, self.scales, strict=True)))

    def undecided(self) -> str:
        """That too few rows are held out for intervals."""
        return "" if self.margins is not None else (
            f"too few rows are held out to say how far a number may be off {LEVEL:.0%} of the time: there are no "
            "intervals. Give more rows, or hold out more of them (`validation_fraction`)."
        )  # fmt: skip

    def scored(self, rows: LabelledText[Row], outputs: torch.Tensor) -> Scored:
        """Errors, correlations, and how many true numbers are in their interval."""
        return scored(self.labels, rows, outputs.double().numpy(), self.scales, self.margins)

    def distributions(self, outputs: torch.Tensor) -> torch.Tensor:
        """(rows·numbers, 2): a standardised number as the logit of a yes, so that what differs by a part of a standard
        deviation differs as a distribution does."""
        return as_choices(self._standardised(outputs).float())

    def own(self) -> dict[str, Any]:
        """How the numbers spread, and their intervals."""
        margins = None if self.margins is None else list(self.margins)
        return {"centers": list(self.centers), "scales": list(self.scales), "margins": margins}

    @classmethod
    def own_of(cls, record: dict[str, Any]) -> dict[str, Any]:
        """The same from a record."""
        margins = None if record["margins"] is None else tuple(record["margins"])
        return {"centers": tuple(record["centers"]), "scales": tuple(record["scales"]), "margins": margins}

    def facade(self, assembled: Assembled) -> Regressor:
        """A ``Regressor``."""
        return Regressor(assembled)

    # ------------------------------------------------------------------------------------------------------------ words

    @classmethod
    def describe_data(cls, report: Mapping[str, Any]) -> list[Block]:
        """The report in words, and how every column's numbers spread."""
        return describe_numbers(pydantic.TypeAdapter(NumberReport).validate_python(report))

    @classmethod
    def card(cls, record: dict[str, Any]) -> CardWords:
        """Names of the numbers, errors and how to predict."""
        return replace(
            super().card(record),
            what=f"Gives numbers for a text: {', '.join(record['labels'])}.{_within(record)}",
            python='regressor = capotune.load(adapter)\nregressor.predict(["your text"])',
        )

    @classmethod
    def facts(cls, record: dict[str, Any]) -> dict[str, Any]:
        """Names, spread, intervals, pooling and length."""
        return super().facts(record) | {name: record[name] for name in ("centers", "scales", "margins")}

    @classmethod
    def facts_in_words(cls, facts: dict[str, Any]) -> list[tuple[str, str]]:
        """The numbers and their spread, and what is read of a text."""
        margins = facts["margins"] or [None] * len(facts["labels"])
        each = zip(facts["labels"], facts["centers"], facts["scales"], margins, strict=True)
        _, *others = super().facts_in_words(facts)
        return [*((name, _spread(*spread)) for name, *spread in each), *others]

    @classmethod
    def further_columns(cls, metric: str, scores: Mapping[str, float]) -> tuple[str, ...]:  # noqa: ARG003
        """Correlation and coverage."""
        return tuple(name for name in ("pearson", "coverage") if name in scores)

    @classmethod
    def chance(cls, metric: str, predictions: Sequence[Mapping[str, Any]]) -> tuple[float, str]:  # noqa: ARG003
        """The error of the test rows' own mean; of several numbers about one standard deviation."""
        if not predictions or len(predictions[0]["numbers"]) > 1:
            return 1.0, "the mean of every number"
        numbers = [next(iter(row["numbers"].values())) for row in predictions]
        return float(np.std(numbers)), "the mean for every row"

    @classmethod
    def page_sections(
        cls,
        record: dict[str, Any],
        recommended: str,
        predictions: Mapping[str, Sequence[Mapping[str, Any]]],
        of_base: Sequence[Mapping[str, Any]],  # noqa: ARG003
    ) -> list[Section]:
        """The recommended technique's numbers beside the true ones, and its largest errors."""
        return page.sections(record, recommended, predictions[recommended])


def _spread(center: float, scale: float, margin: float | None) -> str:
    interval = "" if margin is None else f"; nine in ten are within {margin:.4g} of what is predicted"
    return f"{center:.4g} ± {scale:.4g} in training{interval}"


def _within(record: Mapping[str, Any]) -> str:
    if record["margins"] is None:
        return ""
    each = (f"{margin:.4g} ({name})" for name, margin in zip(record["labels"], record["margins"], strict=True))
    return f" Nine in ten are to be within {', '.join(each)} of it."
