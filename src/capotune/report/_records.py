"""What a comparison found, as it stands in ``compare.json``, and what only the page shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class ComparisonRow:
    """One technique's result; a technique that failed has no row."""

    method: str
    """The technique as the command line names it."""
    score: float
    """The metric on the test rows; NaN when the technique ended without one."""
    trainable_parameters: int
    """How many numbers training changed, the head included."""
    total_parameters: int
    """How many parameters the base has: the 100 % of ``trainable_parameters``."""
    adapter_bytes: int
    """The adapter folder's size on disk."""
    train_seconds: float
    """Wall time of training, the computing of cached features included."""
    peak_memory_bytes: int
    """The peak of this technique alone; 0 when it was not measured."""
    epochs: float
    """Passes over the training rows before training stopped."""
    adapter: str
    """The adapter folder, relative to the folder of ``compare.json``."""


@dataclass(frozen=True)
class Comparison:
    """The techniques side by side on one data set: the content of ``compare.json``."""

    model: str
    """The base, as it was named."""
    task: str
    """``classification`` or ``generation``."""
    metric: str
    """What ``score`` counts, for instance ``accuracy``."""
    higher_is_better: bool
    """False for losses and perplexity."""
    train_rows: int
    """Rows that training saw, the part held out for early stopping included."""
    test_rows: int
    """Rows that every score was taken on."""
    base_score: float
    """The base without fine-tuning; in classification, the nearest class mean on frozen features. NaN if unknown."""
    rows: tuple[ComparisonRow, ...]
    """One row per finished technique, in the order in which they ran."""
    recommended: str
    """The method to take, or an empty string when none finished."""
    why: str
    """The rule's outcome as a sentence with its numbers."""

    def to_dict(self, details: PageDetails | None = None) -> dict[str, Any]:
        """The schema of ``compare.json``, NaN as ``None``; ``details``, if given, as one more key of that name."""
        content = asdict(self)
        content["base_score"] = _none_if_nan(self.base_score)
        content["rows"] = [asdict(row) | {"score": _none_if_nan(row.score)} for row in self.rows]
        return content if details is None else content | {"details": asdict(details)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Comparison:
        """Read back what ``to_dict`` gave; further keys are ignored."""
        values = _known_fields(cls, content)
        rows = [_known_fields(ComparisonRow, row) for row in content["rows"]]
        values["rows"] = tuple(ComparisonRow(**row | {"score": _nan_if_none(row["score"])}) for row in rows)
        values["base_score"] = _nan_if_none(content["base_score"])
        return cls(**values)


@dataclass(frozen=True)
class Mistake:
    """A test row that the recommended technique got wrong."""

    text: str
    """The row's text."""
    true: str
    """Its label in the data."""
    predicted: str
    """The label that the technique gave."""
    probability: float
    """The technique's probability of ``predicted``, from 0 to 1."""


@dataclass(frozen=True)
class PageDetails:
    """What only the page shows."""

    labels: list[str]
    """The labels, in the order of the rows and columns of ``confusion``; empty outside classification."""
    confusion: list[list[int]]
    """Test rows by true label (row) and predicted label (column)."""
    confusion_method: str
    """The technique that ``confusion`` and ``mistakes`` belong to."""
    mistakes: list[Mistake]
    """The mistakes with the highest probability, highest first."""
    settings: dict[str, dict[str, Any]]
    """Every setting per method; a ``seed`` among them is also shown with the scores."""
    data: dict[str, Any]
    """The data report: numbers and texts by name, nested as needed; ``test_from`` is also shown with the scores."""
    environment: dict[str, str]
    """Versions and machine, by name."""
    command: str
    """The command line that repeats the comparison."""

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PageDetails:
        """Read back the ``details`` of a ``compare.json``."""
        values = _known_fields(cls, content)
        return cls(**values | {"mistakes": [Mistake(**mistake) for mistake in content["mistakes"]]})


def _known_fields(cls: Any, content: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: content[field.name] for field in fields(cls)}


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def _nan_if_none(value: float | None) -> float:
    return math.nan if value is None else value
