"""Texts with numbers: how these spread."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from capotune.data.inspect.findings import rows_found
from capotune.data.inspect.measures import Counted
from capotune.data.inspect.texts import NOTHING_FOUND, TEXT_CHECKS, TextReport, text_facts, text_findings
from capotune.data.labelled import LabelledData
from capotune.data_blocks import Block, Counts, Finding, Findings

__all__ = ["NumberReport", "NumberSpread", "describe_numbers", "inspect_numbers"]

_FEW_VALUES = 10  # of whole numbers, which may be classes


@dataclass(frozen=True)
class NumberSpread:
    """The numbers of one column in the training rows."""

    name: str
    lowest: float
    median: float
    highest: float
    mean: float
    deviation: float
    different: int
    """Values that occur."""


@dataclass(frozen=True, kw_only=True)
class NumberReport(TextReport):
    """What was found, beside what is true of all labelled texts: how the numbers of each column spread."""

    numbers: list[NumberSpread]


def inspect_numbers(
    data: LabelledData[tuple[float, ...]],
    token_lengths_train: Sequence[int],
    token_lengths_test: Sequence[int],
    max_length: int,
    base_length: int | None = None,
    counted: Sequence[Counted | None] = (None, None),
) -> NumberReport:
    """Measure the data; arguments and errors are those of ``text_facts``."""
    facts = text_facts(data, token_lengths_train, token_lengths_test, max_length, base_length, counted)
    columns = np.array(data.train.labels, dtype=np.float64).T
    return NumberReport(**facts, numbers=[*map(_spread, data.train.label_columns, columns)])


def describe_numbers(report: NumberReport) -> list[Block]:
    """The report in words, and how every column's numbers spread."""
    columns = ["Number", "Lowest", "Median", "Highest", "Mean", "Deviation"]
    lines = [
        [one.name, *(f"{value:.4g}" for value in (one.lowest, one.median, one.highest, one.mean, one.deviation))]
        for one in report.numbers
    ]
    return [Findings(list(_findings(report))), Counts(columns, lines)]


def _spread(name: str, values: NDArray[np.float64]) -> NumberSpread:
    lowest, median, highest = map(float, np.percentile(values, [0, 50, 100]))
    different = len(np.unique(values))
    return NumberSpread(name, lowest, median, highest, float(values.mean()), float(values.std()), different)


def _findings(report: NumberReport) -> Iterable[Finding]:
    yield from text_findings(report)
    yield Finding("Numbers", "predicted as such (regression); the task classification reads them as classes")
    for one in report.numbers:
        if one.different <= _FEW_VALUES:
            yield Finding("Numbers", f"{one.name} has {one.different} different values, which may be classes", True)
    yield from rows_found(report, TEXT_CHECKS, NOTHING_FOUND)
