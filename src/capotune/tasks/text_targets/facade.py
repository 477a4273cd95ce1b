"""A base with a head on texts, ready to be asked."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from capotune.data.batches import TokenRows
from capotune.tasks.facade import Predictor
from capotune.tasks.texts import check_texts


class TextPredictor(Predictor):
    """What all kinds share; ``model`` gives outputs (rows, outputs)."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the outputs, in their order."""
        labels: tuple[str, ...] = self._assembled.task.labels
        return labels

    def outputs(self, texts: Sequence[str]) -> torch.Tensor:
        """(texts, outputs) fp32, as the head gives them. Raises ``DataError`` for what is no text."""
        check_texts(texts)
        if not len(texts):
            return torch.zeros(0, len(self.labels))
        task = self._assembled.task
        rows = TokenRows(task.encode(list(texts)), task.pad_id, self._assembled.method.virtual_token_ids)
        outputs: torch.Tensor = task.logits(self._assembled, rows)
        return outputs

    def cut(self, texts: Sequence[str]) -> list[int]:
        """Positions of the texts whose end is not read, as they are longer than ``max_length`` in training."""
        task = self._assembled.task
        return [at for at, length in enumerate(task.token_lengths(texts)) if length > task.max_length]
