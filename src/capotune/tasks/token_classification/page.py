"""What a comparison's page shows of a tagger: entities found and missed by type, and sentences with mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from capotune.sections import Fact, Part, Quote, Quotes, Section, TableSection
from capotune.tasks.token_classification.spans import Entity, EntityCounts, count_by_type, entities

_SHOWN_SENTENCES = 12
_COLUMNS = ["type", "in test rows", "found", "missed", "wrongly predicted", "precision", "recall", "F1"]

Prediction = Mapping[str, Any]
"""A line of predictions.jsonl."""


def page_sections(method: str, predictions: Sequence[Prediction]) -> list[Section]:
    """Of the recommended technique: its counts by type, and the sentences with most mistakes."""
    wrong = sorted((row for row in predictions if row["fp"] + row["fn"]), key=lambda row: -row["fp"] - row["fn"])
    note = (
        f"Test sentences in which {method} made most mistakes. The entities of the data are marked. Read these first: "
        "some will be tags that the data has wrong."
    )
    quotes = [_quote(row) for row in wrong[:_SHOWN_SENTENCES]]
    return [_by_type(method, predictions), Quotes("Sentences with most mistakes", note, quotes)]


def _by_type(method: str, predictions: Sequence[Prediction]) -> TableSection:
    counts: dict[str, EntityCounts] = {}
    for row in predictions:
        for kind, own in count_by_type(row["tags"], row["predicted"]).items():
            counts[kind] = counts.get(kind, EntityCounts()) + own
    rows = sorted(counts.items(), key=lambda item: (-item[1].tp - item[1].fn, item[0]))
    if len(rows) > 1:
        rows.append(("all", sum(counts.values(), EntityCounts())))
    note = "An entity counts as found when its type, first and last word are all right."
    return TableSection(f"What {method} finds", note, _COLUMNS, [_line(kind, own) for kind, own in rows])


def _line(kind: str, counts: EntityCounts) -> list[str]:
    entities_in = (counts.tp + counts.fn, counts.tp, counts.fn, counts.fp)
    shares = (counts.precision, counts.recall, counts.f1)
    return [kind, *(f"{number:,}" for number in entities_in), *(f"{share:.2f}" for share in shares)]


def _quote(row: Prediction) -> Quote:
    """The sentence with its true entities marked, and what was missed and wrongly predicted."""
    words, true, predicted = row["words"], entities(row["tags"]), entities(row["predicted"])
    facts = [Fact("missed", _named(words, one)) for one in true if one not in predicted]
    facts += [Fact("predicted", _named(words, one), wrong=True) for one in predicted if one not in true]
    return Quote(_marked(words, true), facts)


def _marked(words: Sequence[str], marked: Sequence[Entity]) -> list[Part]:
    """The sentence, with ``marked`` entities under their types."""
    parts: list[Part] = []
    at = 0
    for start, end, kind in [*((one.start, one.end, one.type) for one in marked), (len(words), len(words), "")]:
        parts += [Part(_joined(words[at:start])), Part(_joined(words[start:end]), kind)]
        at = end
    with_text = [part for part in parts if part.text]
    return [spaced for part in with_text for spaced in (Part(" "), part)][1:]


def _named(words: Sequence[str], entity: Entity) -> str:
    return f"{_joined(words[entity.start : entity.end])} ({entity.type})"


def _joined(words: Sequence[str]) -> str:
    return " ".join(words)
