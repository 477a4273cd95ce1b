"""What an adapter costs elsewhere: base and adapted model on general text that no run trains on.

Both read the same tokens. Reported are the change in mean loss, in nats a token, and the share of positions where both
find the same next token most probable. With 4 bits the base is the one in 4 bits: what is measured is the adapter's.

The text is a small set of our own (``examples/general.txt``: prose, talk, code, sums, letters, some French and German),
of which a run reads as much as costs it a few percent, or a file of the user's. Passages stand in an order in which any
first part of them is a mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import torch

from capotune.adapters.assemble import Assembled
from capotune.data.batches import IGNORE_INDEX, TokenRows
from capotune.data.readers import is_plain_text
from capotune.data.texts import read_prompts, read_texts
from capotune.errors import DataError
from capotune.evaluation.forward import Examples, outputs
from capotune.events import OnProgress
from capotune.tasks.generation.encoding import TextEncoder
from capotune.tasks.generation.objective import NextToken

_FEWEST, _MOST = 256, 4096
_SHARE: Final = 0.05
"""General tokens for each token that training reads: both models' forward passes cost a few percent of training."""
_WINDOW: Final = 512
"""Tokens that a model reads at once."""
_SHOWN: Final = 0.005
"""Nats; less is zero in words."""


@dataclass(frozen=True)
class Cost:
    """Of an adapted model against its base, on the same positions."""

    text: str
    """The file's name; empty for the text that comes with the package."""
    tokens: int
    """Positions that were compared."""
    base_loss: float
    """Mean, in nats a token."""
    loss: float
    """Of the adapted model."""
    agreement: float
    """Share of positions where both find the same token most probable."""

    @property
    def words(self) -> str:
        """The cost in half a sentence."""
        change = self.loss - self.base_loss
        nats = f"{abs(change):.2f} nats a token {'worse' if change > 0 else 'better'}"
        how = "as good as the base" if abs(change) < _SHOWN else nats
        where = f"'{self.text}'" if self.text else "general text"
        return f"on {where} {how}, the same next token at {100 * self.agreement:.0f} % of {self.tokens:,} positions"

    def to_json(self) -> dict[str, Any]:
        """For a run's record."""
        return {**asdict(self), "words": self.words}


@dataclass(frozen=True)
class GeneralText:
    """Passages as tokens; none where the tokenizer makes no tokens of our text."""

    name: str
    """As ``Cost.text``."""
    sequences: list[list[int]]

    @staticmethod
    def for_run(task: TextEncoder, file: str | None, trained_tokens: int) -> GeneralText:
        """The user's ``file``, at most its first 4,096 tokens, or as much of our own text as fits ``trained_tokens``,
        the tokens that training reads in all its passes.

        Raises ``DataError`` for a file that cannot be read or that holds less than two tokens.
        """
        most = _MOST if file else min(_MOST, max(_FEWEST, int(_SHARE * trained_tokens)))
        window = min(_WINDOW, task.max_length)
        sequences: list[list[int]] = []
        for passage in _passages(file):
            ids = task.encode_prompt(passage)
            for at in range(0, len(ids), window):
                taken = ids[at : at + min(window, most)]
                if len(taken) > 1:
                    sequences.append(taken)
                    most -= len(taken)
        if file and not sequences:
            raise DataError("it holds less than two tokens of text.", setting="general", given=file)
        return GeneralText(Path(file).name if file else "", sequences)

    def next_tokens(self, assembled: Assembled, progress: OnProgress | None = None) -> torch.Tensor:
        """Of the model as it is, (rows, 2 · width) as ``NextToken`` gives it."""
        task = assembled.task
        rows = TokenRows(self.sequences, task.pad_id, assembled.method.virtual_token_ids)
        labels = [[IGNORE_INDEX, *ids[1:]] for ids in self.sequences]
        width = max(map(len, self.sequences)) - 1
        objective = NextToken(task.objective.backbone, task.objective.plain_head, width)
        return outputs(assembled, Examples(rows, labels), progress, objective)

    def cost(self, base: torch.Tensor, adapted: torch.Tensor) -> Cost:
        """From the ``next_tokens`` of both."""
        (base_losses, base_ids), (losses, ids) = (found.double().chunk(2, dim=1) for found in (base, adapted))
        there = ~base_losses.isnan()
        agreement = (base_ids[there] == ids[there]).double().mean()
        base_loss, loss = (float(found[there].mean()) for found in (base_losses, losses))
        return Cost(self.name, int(there.sum()), base_loss, loss, float(agreement))


def _passages(file: str | None) -> Sequence[str]:
    if file is None:
        text = files("capotune").joinpath("examples", "general.txt").read_text(encoding="utf-8")
        return text.strip().split("\n\n")
    return read_prompts(file) if is_plain_text(file) else read_texts(file)
