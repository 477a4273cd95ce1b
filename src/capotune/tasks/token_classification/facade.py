"""A tagger ready to be asked."""

from __future__ import annotations

from collections.abc import Sequence

from capotune.errors import DataError
from capotune.tasks.facade import Predictor
from capotune.tasks.texts import check_texts
from capotune.tasks.token_classification.score import logits_of, tags_of
from capotune.tasks.token_classification.tagging import FoundEntity, Tagging, Words


class Tagger(Predictor):
    """A base with an adapter on it, ready to find entities. Made by ``load``.

    A text is a string, which is split into words (``words.word_spans``), or a list of words as the training data had.
    """

    @property
    def types(self) -> tuple[str, ...]:
        """Types of entities that it finds."""
        types: tuple[str, ...] = self._assembled.task.types
        return types

    @property
    def labels(self) -> tuple[str, ...]:
        """Tags, in the order of the model's outputs."""
        labels: tuple[str, ...] = self._assembled.task.labels
        return labels

    def cut(self, texts: Sequence[str | Sequence[str]]) -> list[int]:
        """Positions of the texts whose last words are not read, as they are longer than ``max_length`` in training."""
        words = {at: one.words for at, text in enumerate(texts) if (one := Words.of(text)).spans}
        aligned = self._assembled.task.align(list(words.values()))
        return [at for at, one in zip(words, aligned, strict=True) if one.cut]

    def predict(self, texts: Sequence[str | Sequence[str]]) -> list[list[FoundEntity]]:
        """The entities of each text, in order."""
        return [tagging.entities for tagging in self.answer(texts)]

    def answer(self, texts: Sequence[str | Sequence[str]]) -> list[Tagging]:
        """Words, tags with their probabilities, and entities of each text. ``DataError`` for what is no text."""
        check_texts([text if isinstance(text, str) else _joined(text, number) for number, text in enumerate(texts)])
        given = [Words.of(text) for text in texts]
        with_words = [one for one in given if one.spans]
        found = iter(self._tagged(with_words))
        return [next(found) if one.spans else one.tagged([], []) for one in given]

    def _tagged(self, given: Sequence[Words]) -> list[Tagging]:
        if not given:
            return []
        task = self._assembled.task
        aligned = task.align([one.words for one in given])
        examples = task.examples(aligned, None, self._assembled.method.virtual_token_ids)
        rows = tags_of(task.labels, aligned, logits_of(self._assembled, examples))
        return [
            one.tagged(row.tags, row.probabilities, place.cut)
            for one, row, place in zip(given, rows, aligned, strict=True)
        ]


def _joined(words: Sequence[str], number: int) -> str:
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) and word for word in words):
        raise DataError(f"a string or a list of words is needed, found {str(words)[:60]!r}.", where=f"text {number}")
    return " ".join(words)
