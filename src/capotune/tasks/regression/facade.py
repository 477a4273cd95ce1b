"""A base with a head for numbers, ready to be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from capotune.data.text_columns import Text
from capotune.tasks.text_targets.facade import TextPredictor, in_one_line


@dataclass(frozen=True)
class Numbers:
    """One text's numbers."""

    text: Text
    numbers: dict[str, float]
    """By the names of the columns that they were learned from."""
    margins: dict[str, float] | None
    """How far each may be off: nine times in ten the true one is no farther. None where that is not known."""

    @property
    def number(self) -> float:
        """The first one."""
        return next(iter(self.numbers.values()))

    def as_line(self) -> str:
        """Number, its interval and the text in one line, parted by tabs; of several numbers one beside the other."""
        shown = "\t".join(self._shown(name, value) for name, value in self.numbers.items())
        return f"{shown}\t{in_one_line(self.text)}"

    def _shown(self, name: str, value: float) -> str:
        margin = "" if self.margins is None else f" ± {self.margins[name]:.4g}"
        return f"{value:.4g}{margin}"

    def as_json(self) -> dict[str, Any]:
        """The same as plain values; ``intervals`` hold the true number nine times in ten."""
        ends = {} if self.margins is None else {
            "intervals": {name: [value - self.margins[name], value + self.margins[name]]
                          for name, value in self.numbers.items()}
        }  # fmt: skip
        return {"text": self.text, "numbers": self.numbers, **ends}


class Regressor(TextPredictor):
    """A base with an adapter on it, ready to give numbers. Made by ``load``; ``model`` gives them (rows, numbers)."""

    def predict(self, texts: Sequence[Text]) -> Any:
        """(texts,) fp32, or of several numbers (texts, numbers). Raises ``DataError`` for what is no text."""
        numbers: np.ndarray = self.outputs(texts).numpy()
        return numbers[:, 0] if len(self.labels) == 1 else numbers

    def intervals(self, texts: Sequence[Text]) -> np.ndarray:
        """(texts, numbers, 2): lower and upper end of what holds the true number nine times in ten; NaN where that is
        not known."""
        margins = np.array(self._assembled.task.margins or [np.nan] * len(self.labels))
        numbers = self.outputs(texts).numpy()
        return np.stack([numbers - margins, numbers + margins], -1)

    def answer(self, texts: Sequence[Text]) -> list[Numbers]:
        """The numbers of each text, and how far they may be off."""
        margins = self._assembled.task.margins
        by_name = None if margins is None else dict(zip(self.labels, margins, strict=True))
        return [
            Numbers(text, dict(zip(self.labels, row, strict=True)), by_name)
            for text, row in zip(texts, self.outputs(texts).tolist(), strict=True)
        ]
