"""A classifier ready to be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from capotune.data.batches import TokenRows
from capotune.tasks.facade import Predictor
from capotune.tasks.texts import check_texts


@dataclass(frozen=True)
class Prediction:
    """One text's label."""

    text: str
    label: str
    probability: float
    """Of ``label``, from 0 to 1."""

    def as_line(self) -> str:
        """Label, probability and text in one line, parted by tabs."""
        return f"{self.label}\t{self.probability:.3f}\t{' '.join(self.text.split())}"

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"text": self.text, "label": self.label, "probability": round(self.probability, 6)}


class Classifier(Predictor):
    """A base with an adapter on it, ready to label texts. Made by ``load``; ``model`` gives logits (rows, labels)."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names, in the order of ``predict_proba``'s columns."""
        labels: tuple[str, ...] = self._assembled.task.labels
        return labels

    def predict_proba(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, labels) fp32 probabilities. Raises ``DataError`` for what is no text."""
        check_texts(texts)
        if not len(texts):
            return np.zeros((0, len(self.labels)), dtype=np.float32)
        task = self._assembled.task
        rows = TokenRows(task.encode(list(texts)), task.pad_id, self._assembled.method.virtual_token_ids)
        probabilities: np.ndarray = task.logits(self._assembled, rows).softmax(1).numpy()
        return probabilities

    def cut(self, texts: Sequence[str]) -> list[int]:
        """Positions of the texts whose end is not read, as they are longer than ``max_length`` in training."""
        task = self._assembled.task
        return [at for at, length in enumerate(task.token_lengths(texts)) if length > task.max_length]

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The most probable label of each text."""
        return [prediction.label for prediction in self.answer(texts)]

    def answer(self, texts: Sequence[str]) -> list[Prediction]:
        """The most probable label of each text, with its probability."""
        probabilities = self.predict_proba(texts)
        best = probabilities.argmax(1)
        return [
            Prediction(text, self.labels[number], float(row[number]))
            for text, number, row in zip(texts, best, probabilities, strict=True)
        ]
