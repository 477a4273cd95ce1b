"""A classifier ready to be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from capotune.data.text_columns import Text
from capotune.tasks.text_targets.facade import TextPredictor, in_one_line

NO_LABEL = "none of these"


@dataclass(frozen=True)
class Prediction:
    """The label of one text, or of two that are read together."""

    text: Text
    label: str | None
    """None where no label is sure enough."""
    probability: float
    """Of the most probable label, from 0 to 1."""

    def as_line(self) -> str:
        """Label, probability and text (or both texts) in one line, parted by tabs; ``none of these`` where there is no
        label."""
        label = NO_LABEL if self.label is None else self.label
        return f"{label}\t{self.probability:.3f}\t{in_one_line(self.text)}"

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"text": self.text, "label": self.label, "probability": round(self.probability, 6)}


class Classifier(TextPredictor):
    """A base with an adapter on it, ready to label texts. Made by ``load``; ``model`` gives logits (rows, labels)."""

    def predict_proba(self, texts: Sequence[Text]) -> np.ndarray:
        """(texts, labels) fp32 probabilities, in the order of ``labels``. Raises ``DataError`` for what is no text."""
        probabilities: np.ndarray = self.outputs(texts).softmax(1).numpy()
        return probabilities

    def predict(self, texts: Sequence[Text]) -> list[str | None]:
        """The most probable label of each text; None where the adapter abstains, as ``min_precision`` in training asked
        for."""
        return [prediction.label for prediction in self.answer(texts)]

    def answer(self, texts: Sequence[Text]) -> list[Prediction]:
        """The most probable label of each text, with its probability; no label where that is too low."""
        probabilities = self.predict_proba(texts)
        threshold = self._assembled.task.threshold or 0.0
        best = zip(probabilities.argmax(1), probabilities.max(1).tolist(), strict=True)
        return [
            Prediction(text, self.labels[number] if sure >= threshold else None, sure)
            for text, (number, sure) in zip(texts, best, strict=True)
        ]
