"""A base with a head for labels of an order, ready to be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from capotune.data.text_columns import Text
from capotune.tasks.ordinal.score import median_label
from capotune.tasks.text_targets.facade import TextPredictor, in_one_line


@dataclass(frozen=True)
class OrdinalLabel:
    """One text's label."""

    text: Text
    label: str
    probabilities: dict[str, float]
    """Of every label, from the lowest to the highest."""

    def as_line(self) -> str:
        """Label, its probability and the text in one line, parted by tabs."""
        return f"{self.label}\t{self.probabilities[self.label]:.3f}\t{in_one_line(self.text)}"

    def as_json(self) -> dict[str, Any]:
        """The same as plain values, with the probability of every label."""
        rounded = {label: round(p, 6) for label, p in self.probabilities.items()}
        return {"text": self.text, "label": self.label, "probabilities": rounded}


class OrdinalClassifier(TextPredictor):
    """A base with an adapter on it, ready to label texts. Made by ``load``; ``model`` gives logits (rows, labels).

    A text's label is the median of its probabilities, which is expected to be fewest steps from the true one.
    """

    def predict_proba(self, texts: Sequence[Text]) -> np.ndarray:
        """(texts, labels) fp32 probabilities, in the order of ``labels``. Raises ``DataError`` for what is no text."""
        probabilities: np.ndarray = self.outputs(texts).softmax(1).numpy()
        return probabilities

    def predict(self, texts: Sequence[Text]) -> list[str]:
        """The label of each text."""
        return [one.label for one in self.answer(texts)]

    def answer(self, texts: Sequence[Text]) -> list[OrdinalLabel]:
        """The label of each text, and every label's probability."""
        probabilities = self.predict_proba(texts)
        chosen = median_label(torch.from_numpy(probabilities)).tolist()
        return [
            OrdinalLabel(text, self.labels[number], dict(zip(self.labels, map(float, row), strict=True)))
            for text, number, row in zip(texts, chosen, probabilities, strict=True)
        ]
