"""A base with several labels' head, ready to be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from capotune.data.text_columns import Text
from capotune.tasks.text_targets.facade import TextPredictor, in_one_line


@dataclass(frozen=True)
class LabelSet:
    """One text's labels."""

    text: Text
    labels: tuple[str, ...]
    """Those whose probability reaches their threshold, the most probable first."""
    probabilities: dict[str, float]
    """Of every label, from 0 to 1."""

    def as_line(self) -> str:
        """Labels, their probabilities and the text in one line, parted by tabs; a dash where there is no label."""
        names = ", ".join(self.labels) or "-"
        values = ", ".join(f"{self.probabilities[label]:.3f}" for label in self.labels) or "-"
        return f"{names}\t{values}\t{in_one_line(self.text)}"

    def as_json(self) -> dict[str, Any]:
        """The same as plain values, with the probability of every label."""
        rounded = {label: round(p, 6) for label, p in self.probabilities.items()}
        return {"text": self.text, "labels": list(self.labels), "probabilities": rounded}


class MultiLabeller(TextPredictor):
    """A base with an adapter on it, ready to label texts. Made by ``load``; ``model`` gives logits (rows, labels)."""

    @property
    def thresholds(self) -> np.ndarray:
        """(labels,): from which probability on a text has each label."""
        return np.array(self._assembled.task.thresholds)

    def predict_proba(self, texts: Sequence[Text]) -> np.ndarray:
        """(texts, labels) fp32, each label's own probability. Raises ``DataError`` for what is no text."""
        probabilities: np.ndarray = self.outputs(texts).sigmoid().numpy()
        return probabilities

    def predict(self, texts: Sequence[Text]) -> list[tuple[str, ...]]:
        """The labels of each text, the most probable first."""
        return [one.labels for one in self.answer(texts)]

    def answer(self, texts: Sequence[Text]) -> list[LabelSet]:
        """The labels of each text, and every label's probability."""
        return [self._of(text, row) for text, row in zip(texts, self.predict_proba(texts), strict=True)]

    def _of(self, text: Text, probabilities: np.ndarray) -> LabelSet:
        own = [number for number in np.argsort(-probabilities, kind="stable")
               if probabilities[number] >= self.thresholds[number]]  # fmt: skip
        named = {label: float(p) for label, p in zip(self.labels, probabilities, strict=True)}
        return LabelSet(text, tuple(self.labels[number] for number in own), named)
