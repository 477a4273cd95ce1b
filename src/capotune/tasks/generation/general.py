"""What an adapter costs elsewhere: base and adapted model on general text that no run trains on.

Both read the same tokens. Reported are the change in mean loss, in nats a token, and the share of positions where both
find the same next token most probable. For qlora the base is the one in 4 bits: what is measured is the adapter's.

The text is a small set of our own (``examples/general.txt``: prose, talk, code, sums, letters, some French and German)
or a file of the user's. A run reads its start, as much as costs a few percent of one pass over the training rows: the
same for every technique of a comparison. Passages of ours stand in an order in which any first part is a mixture.
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
from capotune.evaluation.metrics import mean_interval
from capotune.events import OnProgress
from capotune.tasks.generation.encoding import TextEncoder
from capotune.tasks.generation.objective import NextToken

FEWEST: Final = 128
"""Positions that are compared even where a pass over the training rows is short: fewer would say nothing."""
_SHARE: Final = 0.02
"""General positions for each token of one pass over the training rows. Two forward passes over them cost 3 % of a pass
with LoRA, which computes forward and backward."""
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
    interval: tuple[float, float] | None
    """95 % interval of the change in loss, passages having been drawn; None for a single passage."""
    agreement: float
    """Share of positions where both find the same token most probable."""

    @property
    def words(self) -> str:
        """The cost in half a sentence."""
        change = self.loss - self.base_loss
        nats = f"{abs(change):.2f} nats a token {'worse' if change > 0 else 'better'}"
        if self.interval is not None:
            nats += f" (95 % interval of the change {self.interval[0]:+.2f} to {self.interval[1]:+.2f})"
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
    def read(task: TextEncoder, file: str | None, positions: int) -> GeneralText:
        """The start of the user's ``file`` or of our own text, as much as has so many ``positions`` to compare.

        Raises ``DataError`` for a file that cannot be read or that holds less than two tokens.
        """
        window = min(_WINDOW, task.base.max_length // 2)  # leaves room for any soft prompt
        sequences: list[list[int]] = []
        for passage in _passages(file):
            ids = task.encode_prompt(passage)
            for at in range(0, len(ids), window):
                taken = ids[at : at + min(window, positions + 1)]
                if len(taken) > 1:
                    sequences.append(taken)
                    positions -= len(taken) - 1
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

    def next_tokens_of_base(self, assembled: Assembled, progress: OnProgress | None = None) -> torch.Tensor:
        """The same of the base, whose method is not attached."""
        return self.next_tokens(assembled.bare(), progress)

    def cost_of(self, assembled: Assembled, progress: OnProgress | None = None) -> Cost:
        """Of the adapter on its base; it is off afterwards."""
        adapted = self.next_tokens(assembled, progress)
        assembled.method.detach()
        return self.cost(self.next_tokens_of_base(assembled, progress), adapted)

    def cost(self, base: torch.Tensor, adapted: torch.Tensor) -> Cost:
        """From the ``next_tokens`` of both."""
        (base_losses, base_ids), (losses, ids) = (found.double().chunk(2, dim=1) for found in (base, adapted))
        there = ~base_losses.isnan()
        agreement = (base_ids[there] == ids[there]).double().mean()
        base_loss, loss = (float(found[there].mean()) for found in (base_losses, losses))
        change = (losses - base_losses).nansum(1).tolist()  # of each passage
        interval = mean_interval(change, there.sum(1).tolist())
        return Cost(self.name, int(there.sum()), base_loss, loss, interval, float(agreement))


def positions_for(train_tokens: int) -> int:
    """How many positions a run compares, by the tokens of its training rows."""
    return max(FEWEST, int(_SHARE * train_tokens))


def _passages(file: str | None) -> Sequence[str]:
    if file is None:
        text = files("capotune").joinpath("examples", "general.txt").read_text(encoding="utf-8")
        return text.strip().split("\n\n")
    return read_prompts(file) if is_plain_text(file) else read_texts(file)
