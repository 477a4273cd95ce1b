"""What a task may put on a comparison's page: sections of six kinds, as plain data.

A task gives a list of these; ``report/`` draws each kind and knows no task. They stand in ``compare.json`` under
``details.sections``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = [
    "Answered",
    "ConfusionMatrix",
    "Fact",
    "Part",
    "Point",
    "Quote",
    "Quotes",
    "Reliability",
    "ScatterPlot",
    "Section",
    "SideBySide",
    "TableSection",
]


@dataclass(frozen=True)
class ConfusionMatrix:
    """Which labels are taken for which others; drawn as a matrix, or with many labels as lists of the worst."""

    title: str
    labels: list[str]
    counts: list[list[int]]
    """Test rows by true label (row) and predicted label (column), in the order of ``labels``."""
    kind: Literal["confusion_matrix"] = "confusion_matrix"


@dataclass(frozen=True)
class Part:
    """A stretch of a text; with ``mark`` it is marked, and ``mark`` names what it is."""

    text: str
    mark: str = ""


@dataclass(frozen=True)
class Fact:
    """A few words and the value that they announce: ``labelled``, ``card lost``."""

    words: str
    value: str
    wrong: bool = False
    """Whether the value is what the technique got wrong; it stands out."""


@dataclass(frozen=True)
class Quote:
    """A text from the data, and what there is to say about it in one line."""

    parts: list[Part]
    facts: list[Fact] = field(default_factory=list)


@dataclass(frozen=True)
class Quotes:
    """Texts from the data under each other, such as the mistakes that a technique was surest of."""

    title: str
    note: str
    quotes: list[Quote]
    kind: Literal["quotes"] = "quotes"


@dataclass(frozen=True)
class Answered:
    """One prompt of the test rows and what was written in answer to it."""

    prompt: str
    expected: str | None
    """The answer in the data; None when the data has none, as in plain text."""
    by: dict[str, str]
    """Who answered what: ``base`` and the techniques by their names."""


@dataclass(frozen=True)
class SideBySide:
    """The same prompts, answered by the base and by every technique."""

    title: str
    note: str
    prompts: list[Answered]
    kind: Literal["side_by_side"] = "side_by_side"


@dataclass(frozen=True)
class TableSection:
    """Lines of cells; the first cell of a line names it."""

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]
    kind: Literal["table"] = "table"


@dataclass(frozen=True)
class Point:
    """Test rows of about the same probability."""

    probability: float
    """Their mean, of the predicted label."""
    right: float
    """Share of them that is labelled rightly."""
    rows: int


@dataclass(frozen=True)
class Reliability:
    """Whether probabilities mean what they say; drawn as the share of right rows over the probability."""

    title: str
    note: str
    points: list[Point]
    kind: Literal["reliability"] = "reliability"


@dataclass(frozen=True)
class ScatterPlot:
    """Predicted numbers over true ones, on axes of one scale, with the line on which both are equal."""

    title: str
    note: str
    x_words: str
    y_words: str
    x: list[float]
    y: list[float]
    margin: float | None = None
    """Distance of two more lines from that one; None: there are none."""
    kind: Literal["scatter"] = "scatter"


Section = ConfusionMatrix | Quotes | Reliability | ScatterPlot | SideBySide | TableSection
