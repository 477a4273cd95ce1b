"""Predicted tags of a text, and the entities that they mark in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from capotune.tasks.token_classification.spans import as_iob2, entities
from capotune.tasks.token_classification.words import word_spans


@dataclass(frozen=True)
class FoundEntity:
    """A part of a text and what it names."""

    type: str
    text: str
    start: int
    """Its first character in the text."""
    end: int
    """The character after its last one."""
    probability: float
    """Mean probability of its words' tags, from 0 to 1."""


@dataclass(frozen=True)
class Tagging:
    """One text's words, the tag of each, and the entities."""

    text: str
    """As it was given; words that were given as a list are joined by single spaces."""
    words: list[str]
    tags: list[str]
    """In IOB2."""
    probabilities: list[float | None]
    """Of each tag, from 0 to 1; None for a word that the model did not read, whose tag is O."""
    entities: list[FoundEntity]
    cut: int = 0
    """Words at the end that were not read because the text is longer than the model takes."""

    def as_line(self) -> str:
        """The entities with type and probability, and the text, in one line, parted by a tab."""
        found = ", ".join(f"{_flat(one.text)} ({one.type} {one.probability:.3f})" for one in self.entities)
        return f"{found or '-'}\t{_flat(self.text)}"

    def as_json(self) -> dict[str, Any]:
        """The same as plain values, with each word's tag."""
        return {
            "text": self.text,
            "entities": [asdict(one) | {"probability": round(one.probability, 6)} for one in self.entities],
            "words": self.words,
            "tags": self.tags,
            "probabilities": [None if one is None else round(one, 6) for one in self.probabilities],
            "words_not_read": self.cut,
        }


@dataclass(frozen=True)
class Words:
    """A text and where its words stand in it."""

    text: str
    spans: list[tuple[int, int]]
    """Start and end (not included) of each word, in characters."""

    @staticmethod
    def of(given: str | Sequence[str]) -> Words:
        """Of a string, split by ``word_spans``, or of a list of words."""
        if isinstance(given, str):
            return Words(given, word_spans(given))
        starts = list(accumulate((len(word) + 1 for word in given), initial=0))
        return Words(" ".join(given), [(at, at + len(word)) for at, word in zip(starts, given, strict=False)])

    @property
    def words(self) -> list[str]:
        """The words alone."""
        return [self.text[start:end] for start, end in self.spans]

    def tagged(self, tags: Sequence[str], probabilities: Sequence[float | None], cut: int = 0) -> Tagging:
        """With a predicted tag and its probability for each word; tags are brought into IOB2."""
        found = [
            self._entity(entity.type, entity.start, entity.end, probabilities[entity.start : entity.end])
            for entity in entities(tags)
        ]
        return Tagging(self.text, self.words, as_iob2(tags), list(probabilities), found, cut)

    def _entity(self, type_: str, first: int, end: int, probabilities: Sequence[float | None]) -> FoundEntity:
        start, stop = self.spans[first][0], self.spans[end - 1][1]
        known = [one for one in probabilities if one is not None]
        return FoundEntity(type_, self.text[start:stop], start, stop, sum(known) / len(known))


def _flat(text: str) -> str:
    return " ".join(text.split())
