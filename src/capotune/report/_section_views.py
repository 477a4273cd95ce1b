"""What the template needs of each kind of section: cut to a readable length, sorted, and named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from capotune.evaluation.metrics import exact_match
from capotune.sections import (
    Answered,
    ConfusionMatrix,
    Part,
    Quote,
    Quotes,
    Reliability,
    ScatterPlot,
    Section,
    SideBySide,
    TableSection,
)

_MATRIX_LABELS = 25
_CONFUSED_PAIRS = 15
_WORST_LABELS = 10
_LONGEST_TEXT = 600
_MOST_LINES = 16
_SQUARE = 200


@dataclass(frozen=True)
class _Answer:
    """One answer as the page shows it; ``exact``: it is the expected one."""

    by: str
    text: str
    exact: bool


def section_views(sections: Sequence[Section], order: Sequence[str]) -> list[dict[str, Any]]:
    """What the template shows of each section, those with nothing to show left out; ``order``: of who answered."""
    views = []
    for number, section in enumerate(sections):
        view = _view(section, order)
        if view["shown"]:
            views.append({"kind": section.kind, "title": section.title, "id": f"section-{number}", **view})
    return views


def _view(section: Section, order: Sequence[str]) -> dict[str, Any]:
    if isinstance(section, ConfusionMatrix):
        return _confusion(section)
    if isinstance(section, Quotes):
        return {"note": section.note, "shown": [_quoted(quote) for quote in section.quotes]}
    if isinstance(section, Reliability):
        return {"note": section.note, "shown": section.points}
    if isinstance(section, SideBySide):
        expects = any(one.expected is not None for one in section.prompts)
        return {
            "note": section.note, "any_expected": expects,
            "shown": [_answered(one, order) for one in section.prompts],
        }  # fmt: skip
    if isinstance(section, ScatterPlot):
        return _scatter(section)
    assert isinstance(section, TableSection)
    return {"note": section.note, "columns": section.columns, "shown": section.rows}


def _scatter(section: ScatterPlot) -> dict[str, Any]:
    """Points and lines in a square of 200 by 200 in which both axes have one scale."""
    values = [*section.x, *section.y]
    low, high = min(values, default=0.0), max(values, default=1.0)
    unit = _SQUARE / (high - low) if high > low else 1.0
    margin = None if section.margin is None else min(_SQUARE, unit * section.margin)
    return {
        "note": section.note, "x_words": section.x_words, "y_words": section.y_words, "margin": margin,
        "ticks": [(0, f"{low:.3g}"), (_SQUARE, f"{high:.3g}")],
        "shown": [(unit * (x - low), unit * (y - low)) for x, y in zip(section.x, section.y, strict=True)],
    }  # fmt: skip


def shortened(text: str) -> str:
    """The text's start: what would fill a screen shows nothing more."""
    end = _end(text)
    return text if end == len(text) else text[:end].rstrip() + " …"


def _end(text: str) -> int:
    """Where a text is cut."""
    return len("\n".join(text.split("\n", _MOST_LINES)[:_MOST_LINES])[:_LONGEST_TEXT])


def _quoted(quote: Quote) -> tuple[list[Part], Quote]:
    """The quote's text cut as ``shortened`` cuts it, and the quote."""
    whole = "".join(part.text for part in quote.parts)
    left = _end(whole)
    parts = []
    for part in quote.parts:
        if left > 0:
            parts.append(Part(part.text[:left], part.mark))
        left -= len(part.text)
    return parts + [Part(" …")] * (left < 0), quote


def _answered(answered: Answered, order: Sequence[str]) -> dict[str, Any]:
    """A prompt and the answers to it: the expected one, the base's, the techniques'."""
    wanted = answered.expected
    given = [
        _Answer(name, shortened(text), wanted is not None and exact_match(text, wanted))
        for name, text in answered.by.items()
    ]
    given.sort(key=lambda answer: order.index(answer.by) if answer.by in order else len(order))
    expected = [] if wanted is None else [_Answer("expected", shortened(wanted), False)]
    return {"prompt": shortened(answered.prompt), "answers": expected + given}


def _confusion(section: ConfusionMatrix) -> dict[str, Any]:
    """With few labels the whole matrix and every label's scores, else the pairs and labels with most mistakes; nothing
    without a mistake."""
    pairs, are_few = _confused_pairs(section), len(section.labels) <= _MATRIX_LABELS
    return {
        "labels": section.labels,
        "matrix": _matrix(section, pairs) if are_few else [],
        "pairs": pairs[:_CONFUSED_PAIRS],
        "label_scores": _label_scores(section)[: None if are_few else _WORST_LABELS],
        "shown": pairs,
    }


def _matrix(
    section: ConfusionMatrix, pairs: Sequence[tuple[str, str, int, int]]
) -> list[tuple[str, list[tuple[int, str, float]]]]:
    """Per true label its cells: count, kind (``right``, ``wrong``, ``none``) and its share of the largest mistake."""
    most = max([4, *(count for _, _, count, _ in pairs)])
    lines = []
    for i, (label, counts) in enumerate(zip(section.labels, section.counts, strict=True)):
        kinds = ["none" if not n else "right" if i == j else "wrong" for j, n in enumerate(counts)]
        lines.append((label, [(n, kind, n / most) for n, kind in zip(counts, kinds, strict=True)]))
    return lines


def _confused_pairs(section: ConfusionMatrix) -> list[tuple[str, str, int, int]]:
    """True label, predicted label, how many rows, of how many; the most frequent first."""
    pairs = [
        (section.labels[i], section.labels[j], count, sum(counts))
        for i, counts in enumerate(section.counts)
        for j, count in enumerate(counts)
        if count and i != j
    ]
    return sorted(pairs, key=lambda pair: (-pair[2], -pair[2] / pair[3]))


def _label_scores(section: ConfusionMatrix) -> list[tuple[str, float, float, float, int]]:
    """Label, F1, precision, recall and test rows; the lowest F1 first. Labels without test rows have no F1."""
    scores = []
    for i, label in enumerate(section.labels):
        right, rows = section.counts[i][i], sum(section.counts[i])
        predicted = sum(counts[i] for counts in section.counts)
        if rows:
            scores.append((label, 2 * right / (rows + predicted), right / (predicted or 1), right / rows, rows))
    return sorted(scores, key=lambda line: line[1])
