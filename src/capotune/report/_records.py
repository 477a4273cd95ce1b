"""What a comparison found, as it stands in ``compare.json``, and what only the page shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
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
    interval: tuple[float, float] | None = None
    """The 95 % confidence interval of ``score`` on the test rows; None: Wilson's for a proportion, else unknown."""
    scores: dict[str, float] = field(default_factory=dict)
    """Further metrics on the test rows by name: ``loss``, ``perplexity``, ``rouge_l``, ``macro_f1`` and the like."""

    def to_dict(self) -> dict[str, Any]:
        """A row of ``compare.json``; a number that JSON does not know (NaN, infinity) as ``None``."""
        bounded = self.interval is not None and all(map(math.isfinite, self.interval))
        return asdict(self) | {
            "score": _finite(self.score),
            "interval": self.interval if bounded else None,
            "scores": _finite_values(self.scores),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ComparisonRow:
        """Read back what ``to_dict`` gave; further keys are ignored."""
        values = _known_fields(cls, content)
        interval = values.get("interval")
        return cls(**values | {
            "score": _number(values["score"]),
            "interval": interval and tuple(interval),
            "scores": _numbers(values.get("scores", {})),
        })  # fmt: skip


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
    base_scores: dict[str, float] = field(default_factory=dict)
    """The base's further metrics, as ``ComparisonRow.scores``."""

    @property
    def further_metrics(self) -> list[str]:
        """The metrics that some technique or the base has beside the score, in the order in which they come."""
        every = (row.scores for row in self.rows)
        return [name for name in dict.fromkeys(chain(*every, self.base_scores)) if name != self.metric]

    def to_dict(self, details: PageDetails | None = None) -> dict[str, Any]:
        """The schema of ``compare.json``, NaN as ``None``; ``details``, if given, as one more key of that name."""
        content = asdict(self) | {
            "base_score": _finite(self.base_score),
            "rows": [row.to_dict() for row in self.rows],
            "base_scores": _finite_values(self.base_scores),
        }
        return content if details is None else content | {"details": asdict(details)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Comparison:
        """Read back what ``to_dict`` gave; further keys are ignored."""
        values = _known_fields(cls, content)
        return cls(**values | {
            "base_score": _number(values["base_score"]),
            "rows": tuple(map(ComparisonRow.from_dict, values["rows"])),
            "base_scores": _numbers(values.get("base_scores", {})),
        })  # fmt: skip


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
class Answers:
    """One prompt of the test rows and what was written in answer to it."""

    prompt: str
    """What the model was asked."""
    expected: str | None
    """The answer in the data; None when the data has none, as in plain text."""
    by: dict[str, str]
    """Who answered what: ``base`` and the techniques by their names."""


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
    answers: list[Answers] = field(default_factory=list)
    """In generation some test prompts with everyone's answers; empty in classification."""

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PageDetails:
        """Read back the ``details`` of a ``compare.json``."""
        values = _known_fields(cls, content)
        return cls(**values | {
            "mistakes": [Mistake(**mistake) for mistake in values["mistakes"]],
            "answers": [Answers(**answers) for answers in values.get("answers", [])],
        })  # fmt: skip


def _known_fields(cls: Any, content: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: content[field.name] for field in fields(cls) if field.name in content}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _finite_values(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _finite(value) for name, value in values.items()}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: _number(value) for name, value in values.items()}
