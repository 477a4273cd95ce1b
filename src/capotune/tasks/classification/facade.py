"""A classifier ready to be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from capotune.data.text_columns import Text
from capotune.tasks.text_targets.facade import TextPredictor, in_one_line


@dataclass(frozen=True)
class Prediction:
    """The label of one text, or of two that are read together."""

    text: Text
    label: str
    probability: float
    """Of ``label``, from 0 to 1."""

    def as_line(self) -> str:
        """Label, probability and text (or both texts) in one line, parted by tabs."""
        return f"{self.label}\t{self.probability:.3f}\t{in_one_line(self.text)}"

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"text": self.text, "label": self.label, "probability": round(self.probability, 6)}


class Classifier(TextPredictor):
    """A base with an adapter on it, ready to label texts. Made by ``load``; ``model`` gives logits (rows, labels)."""

    def predict_proba(self, texts: Sequence[Text]) -> np.ndarray:
        """(texts, labels) fp32 probabilities, in the order of ``labels``. Raises ``DataError`` for what is no text."""
        probabilities: np.ndarray = self.outputs(texts).softmax(1).numpy()
        return probabilities

    def predict(self, texts: Sequence[Text]) -> list[str]:
        """The most probable label of each text."""
        return [prediction.label for prediction in self.answer(texts)]

    def answer(self, texts: Sequence[Text]) -> list[Prediction]:
        """The most probable label of each text, with its probability."""
        probabilities = self.predict_proba(texts)
        best = probabilities.argmax(1)
        return [
            Prediction(text, self.labels[number], float(row[number]))
            for text, number, row in zip(texts, best, probabilities, strict=True)
        ]
