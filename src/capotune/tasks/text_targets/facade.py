"""A base with a head on texts, ready to be asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from capotune.data.batches import TokenRows
from capotune.data.text_columns import Text
from capotune.data.texts import pair_of_line, read_pairs
from capotune.data.wording import count
from capotune.errors import DataError
from capotune.tasks.facade import Predictor
from capotune.tasks.texts import as_pairs, check_texts


class TextPredictor(Predictor):
    """What all kinds share; ``model`` gives outputs (rows, outputs)."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the outputs, in their order."""
        labels: tuple[str, ...] = self._assembled.task.labels
        return labels

    def read_texts(
        self, source: str, text_column: str | None = None, pair_columns: tuple[str, str] | None = None
    ) -> list[Any]:
        """Of pairs two columns, or lines of two texts parted by a tab."""
        if not self._assembled.task.pairs and pair_columns is None:
            return super().read_texts(source, text_column)
        if self._assembled.task.pairs is False or text_column is not None:
            return super().read_texts(source, text_column, pair_columns)
        return list(read_pairs(source, pair_columns))

    def of_arguments(self, texts: Sequence[str]) -> list[Any]:
        """Of pairs two after the other."""
        if not self._assembled.task.pairs:
            return list(texts)
        if len(texts) % 2:
            raise DataError(
                f"the adapter reads pairs of texts, and {count(len(texts), 'text')} cannot be paired.",
                advice="Give the first text and then the second.",
            )
        return list(zip(texts[::2], texts[1::2], strict=True))

    def of_line(self, line: str, where: str) -> Any:
        """Of pairs two texts parted by a tab."""
        return pair_of_line(line, where) if self._assembled.task.pairs else line

    def outputs(self, texts: Sequence[Text]) -> torch.Tensor:
        """(texts, outputs) fp32, as the head gives them. Raises ``DataError`` for what is no text, or no pair of texts
        where the adapter reads pairs."""
        texts = self._checked(texts)
        if not len(texts):
            return torch.zeros(0, len(self.labels))
        task = self._assembled.task
        rows = TokenRows(task.encode(texts), task.pad_id, self._assembled.method.virtual_token_ids)
        outputs: torch.Tensor = task.logits(self._assembled, rows)
        return outputs

    def _checked(self, texts: Sequence[Text]) -> list[Text]:
        pairs = self._assembled.task.pairs
        if pairs is None:
            pairs = bool(len(texts)) and not isinstance(texts[0], str)
        if pairs:
            return list(as_pairs(texts))
        check_texts(texts)  # type: ignore[arg-type]
        return list(texts)

    def cut(self, texts: Sequence[Text]) -> list[int]:
        """Positions of the texts whose end is not read, as they are longer than ``max_length`` in training."""
        task = self._assembled.task
        return [at for at, length in enumerate(task.token_lengths(texts)) if length > task.max_length]


def in_one_line(text: Text) -> str:
    """A text without line breaks; two of them parted by a tab."""
    return " ".join(text.split()) if isinstance(text, str) else "\t".join(" ".join(one.split()) for one in text)
