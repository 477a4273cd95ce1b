"""What a comparison found, as it stands in ``compare.json``, and what only the page shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from typing import Any

from capotune.sections import Answered, ConfusionMatrix, Fact, Part, Quote, Quotes, Section, SideBySide

Interval = tuple[float, float]


@dataclass(frozen=True)
class ComparisonRow:
    """One technique's result; a technique that failed has no row."""

    method: str
    """The technique as the command line names it."""
    score: float
    """The metric on the test rows; NaN when the technique ended without one."""
    trainable_parameters: int
    """How many weights training changed, the head included."""
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
    interval: Interval | None = None
    """The 95 % confidence interval of ``score`` on the test rows; None: Wilson's for a proportion, else unknown."""
    scores: dict[str, float] = field(default_factory=dict)
    """Further metrics on the test rows by name: ``loss``, ``perplexity``, ``rouge_l``, ``macro_f1`` and the like."""
    difference: float | None = None
    """The score minus that of ``Comparison.best``, in the unit of ``score``; None without a score."""
    difference_interval: Interval | None = None
    """The 95 % confidence interval of ``difference``; None for the best itself, and where it is not known."""
    paired_rows: int = 0
    """Test rows that the difference was taken on, row by row; 0 when it comes from the two scores' own intervals."""

    def to_dict(self) -> dict[str, Any]:
        """A row of ``compare.json``; a number that JSON does not know (NaN, infinity) as ``None``."""
        return asdict(self) | {
            "score": _finite(self.score),
            "interval": _bounded(self.interval),
            "scores": _finite_values(self.scores),
            "difference_interval": _bounded(self.difference_interval),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ComparisonRow:
        """Read back what ``to_dict`` gave; further keys are ignored."""
        values = _known_fields(cls, content)
        return cls(**values | {
            "score": _number(values["score"]),
            "interval": _pair(values.get("interval")),
            "scores": _numbers(values.get("scores", {})),
            "difference_interval": _pair(values.get("difference_interval")),
        })  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """The techniques side by side on one data set: the content of ``compare.json``.

    ``report.recommend`` fills in ``recommended``, ``why``, ``best`` and all differences.
    """

    model: str
    """The base, as it was named."""
    task: str
    """The task's name."""
    metric: str
    """What ``score`` counts, for instance ``accuracy``."""
    higher_is_better: bool
    """False for losses and perplexity."""
    train_rows: int
    """Rows that training saw, the part held out for early stopping included."""
    test_rows: int
    """Rows that every score was taken on."""
    base_score: float
    """The base without fine-tuning, as ``base_label`` says. NaN if unknown."""
    rows: tuple[ComparisonRow, ...]
    """One row per finished technique, in the order in which they ran."""
    recommended: str = ""
    """The method to take: the cheapest that is not shown to be worse than ``best``. Empty when none finished, or none
    scored above ``chance``."""
    why: str = ""
    """The rule's outcome in sentences with their numbers."""
    base_scores: dict[str, float] = field(default_factory=dict)
    """The base's further metrics, as ``ComparisonRow.scores``."""
    best: str = ""
    """The method with the best score; among equals the cheapest. Empty as ``recommended`` is."""
    tolerance: float = 0.0
    """Points of the score that a cheaper technique may lose and still be recommended."""
    base_difference: float | None = None
    """The base's score minus that of ``best``."""
    base_difference_interval: Interval | None = None
    """The 95 % confidence interval of ``base_difference``."""
    base_label: str = "base (not fine-tuned)"
    """What the base's own score is called."""
    columns: tuple[str, ...] = ()
    """The further metrics that are worth a column in a small table."""
    metric_why: str = ""
    """Why techniques are compared by ``metric``, a sentence; empty where there was no choice."""
    chance: float = math.nan
    """The score of having learned nothing: 0, or the share of the most frequent label. NaN where it is not known."""
    chance_words: str = ""
    """What ``chance`` is, where it is not 0."""

    @property
    def further_metrics(self) -> list[str]:
        """The metrics that some technique or the base has beside the score, in the order in which they come."""
        every = (row.scores for row in self.rows)
        return [name for name in dict.fromkeys(chain(*every, self.base_scores)) if name != self.metric]

    def to_dict(self, details: PageDetails | None = None) -> dict[str, Any]:
        """The schema of ``compare.json``, NaN as ``None``; ``details``, if given, as one more key of that name."""
        content = asdict(self) | {
            "base_score": _finite(self.base_score),
            "chance": _finite(self.chance),
            "rows": [row.to_dict() for row in self.rows],
            "base_scores": _finite_values(self.base_scores),
            "base_difference_interval": _bounded(self.base_difference_interval),
        }
        return content if details is None else content | {"details": asdict(details)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Comparison:
        """Read back what ``to_dict`` gave; further keys are ignored."""
        values = _known_fields(cls, content)
        return cls(**values | {
            "base_score": _number(values["base_score"]),
            "chance": _number(values.get("chance")),
            "rows": tuple(map(ComparisonRow.from_dict, values["rows"])),
            "base_scores": _numbers(values.get("base_scores", {})),
            "base_difference_interval": _pair(values.get("base_difference_interval")),
            "columns": tuple(values.get("columns", ())),
        })  # fmt: skip


@dataclass(frozen=True)
class Snippet:
    """Code to copy from the page."""

    heading: str
    code: str


@dataclass(frozen=True)
class PageDetails:
    """What only the page shows."""

    settings: dict[str, dict[str, Any]]
    """Every setting per method; a ``seed`` among them is also shown with the scores."""
    data: dict[str, Any]
    """The data report: values and texts by name, nested as needed; ``test_from`` is also shown with the scores."""
    environment: dict[str, str]
    """Versions and machine, by name."""
    command: str
    """The command line that repeats the comparison."""
    sections: list[Section] = field(default_factory=list)
    """What the task has to show: mistakes, answers, and the like."""
    snippets: list[Snippet] = field(default_factory=list)
    """How to use the recommended adapter."""
    base_note: str = "The base as it is, without fine-tuning."
    """How the base's score was obtained."""

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PageDetails:
        """Read back the ``details`` of a ``compare.json``."""
        import pydantic

        values = _known_fields(cls, content)
        if "sections" not in values:
            values["sections"] = _sections_of_version_0_1(content)
        details: PageDetails = pydantic.TypeAdapter(cls).validate_python(values)
        return details


def _sections_of_version_0_1(content: Mapping[str, Any]) -> list[Section]:
    """Labels, confusions, mistakes and answers as a ``compare.json`` of version 0.1.0 holds them."""
    sections: list[Section] = []
    method = content.get("confusion_method", "")
    if content.get("labels"):
        sections.append(ConfusionMatrix(f"What {method} confuses", content["labels"], content["confusion"]))
    if content.get("mistakes"):
        quotes = [
            Quote([Part(one["text"])], [
                Fact("labelled", one["true"]),
                Fact("predicted", one["predicted"], wrong=True),
                Fact("with", f"{100 * one['probability']:.1f} %"),
            ])
            for one in content["mistakes"]
        ]  # fmt: skip
        sections.append(Quotes("Its most confident mistakes", f"Test rows that {method} got wrong.", quotes))
    if content.get("answers"):
        prompts = [Answered(**one) for one in content["answers"]]
        sections.append(SideBySide("The same prompts, answered", "Test rows, not seen in training.", prompts))
    return sections


def _known_fields(cls: Any, content: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: content[field.name] for field in fields(cls) if field.name in content}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _finite_values(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _finite(value) for name, value in values.items()}


def _bounded(interval: Interval | None) -> Interval | None:
    return interval if interval is not None and all(map(math.isfinite, interval)) else None


def _pair(interval: list[float] | None) -> Interval | None:
    return None if interval is None else (interval[0], interval[1])


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: _number(value) for name, value in values.items()}
