"""Cross-entropy per token in the loss. Logits exist where a token is in the loss, nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from capotune.adapters.task_model import Objective, Score
from capotune.data.batches import IGNORE_INDEX, Batch, Targets
from capotune.kernels.cross_entropy import linear_cross_entropy

_ALIKE = 0.02
"""Part of their spread that logits may differ by where they stand for the same, for 16 bits."""
_POSITIONS = 512
"""Positions whose logits exist at a time."""


@dataclass(frozen=True)
class TokenCrossEntropy(Objective):
    """The objective of a causal language model."""

    backbone: str = ""
    """Path in the model of the transformer that reads text."""
    plain_head: bool = False
    """Whether logits are the output layer's product with the last hidden states and nothing more."""

    metric: ClassVar[str] = "perplexity"
    mixes_lengths: ClassVar[bool] = True

    def loss(self, model: Any, batch: Batch, label_smoothing: float) -> torch.Tensor:
        """Sum of the cross-entropies, in nats, of the tokens in the loss."""
        return self._losses(model, batch, label_smoothing)[0].sum()

    def units(self, targets: Targets, rows: list[int]) -> int:
        """The tokens in the loss."""
        return sum(label != IGNORE_INDEX for row in rows for label in targets[row])

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """Of each row the sum of its losses and the number of its tokens in the loss, (rows, 2) on the CPU: a GPU would
        add them in any order."""
        losses, row = (found.cpu() for found in self._losses(model, batch, 0.0))
        sums = torch.zeros(len(batch.starts) - 1, 2)
        return sums.index_add_(0, row, torch.stack([losses, torch.ones_like(losses)], 1))

    def score(self, outputs: torch.Tensor, targets: Targets) -> Score:  # noqa: ARG002 - the outputs hold the losses
        """(−mean loss per token in the loss,)."""
        nats, tokens = outputs.double().sum(0).tolist()
        return (-nats / max(tokens, 1.0),)

    def shown(self, score: Score) -> float:
        """The perplexity."""
        return float(torch.tensor(-score[0], dtype=torch.float64).exp())

    def _logits(self, model: Any, batch: Batch, at: torch.Tensor) -> Iterator[torch.Tensor]:
        """Logits after the flat positions ``at`` (n,), some positions at a time: (positions, vocabulary)."""
        if not self.plain_head:
            yield batch.flat(model(**batch.inputs).logits)[at]
            return
        head = model.get_output_embeddings()
        states = batch.states(model.get_submodule(self.backbone), at).to(head.weight.dtype)
        yield from map(head, torch.split(states, _POSITIONS))

    def _losses(self, model: Any, batch: Batch, label_smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses (tokens in the loss,) and the row of each."""
        in_loss = batch.in_loss
        assert batch.targets is not None
        assert in_loss is not None
        wanted = batch.targets[in_loss]
        row = torch.searchsorted(batch.starts, in_loss, right=True) - 1
        at = in_loss - 1  # a token is predicted at the one before it; the first of a row is never in the loss
        if not self.plain_head:
            logits = batch.flat(model(**batch.inputs).logits)[at].float()
            return functional.cross_entropy(logits, wanted, reduction="none", label_smoothing=label_smoothing), row
        states = batch.states(model.get_submodule(self.backbone), at)
        head = model.get_output_embeddings()
        return linear_cross_entropy(states.to(head.weight.dtype), head.weight, head.bias, wanted, label_smoothing), row


@dataclass(frozen=True)
class GreedyMatch(TokenCrossEntropy):
    """Whether greedy decoding would write a row's last answer to the letter: each of its tokens, the end too, is the
    most probable one after those before it."""

    metric: ClassVar[str] = "exact_match"

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """(rows, 1) on the CPU, 1 where it would."""
        in_loss = batch.in_loss
        assert batch.targets is not None
        assert in_loss is not None
        row = torch.searchsorted(batch.starts, in_loss, right=True) - 1
        # an answer is a run of neighbouring positions; the last one of a row holds the row's last position
        answer = torch.cat([in_loss.new_zeros(1), ((in_loss.diff() != 1) | (row.diff() != 0)).cumsum(0)])
        rows = torch.arange(len(batch.starts) - 1, device=row.device)
        last = answer[torch.searchsorted(row, rows, right=True) - 1]
        most_probable = torch.cat([logits.argmax(-1) for logits in self._logits(model, batch, in_loss - 1)])
        wrong = (most_probable != batch.targets[in_loss]) & (answer == last[row])
        misses = torch.zeros(len(last), device=wrong.device).index_add_(0, row, wrong.float())
        return (misses == 0).float()[:, None].cpu()


@dataclass(frozen=True)
class NextToken(TokenCrossEntropy):
    """The loss at each position, and the token that is most probable there."""

    width: int = 0
    """The most positions in the loss of any row."""

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """(rows, 2 · width) on the CPU: losses in nats, then token ids, each filled up with NaN. An id is exact in fp32
        up to 2²⁴."""
        in_loss = batch.in_loss
        assert batch.targets is not None
        assert in_loss is not None
        pairs = []
        parts = torch.split(batch.targets[in_loss], _POSITIONS if self.plain_head else len(in_loss))
        for logits, wanted in zip(self._logits(model, batch, in_loss - 1), parts, strict=True):
            losses = functional.cross_entropy(logits.float(), wanted, reduction="none")
            pairs.append(torch.stack([losses, logits.argmax(-1).float()], 1))
        row = (torch.searchsorted(batch.starts, in_loss, right=True) - 1).cpu()
        found = torch.full((len(batch.starts) - 1, 2, self.width), torch.nan)
        first = torch.searchsorted(row, row)  # where each position's row begins among the positions
        found[row, :, torch.arange(len(row)) - first] = torch.cat(pairs).cpu()
        return found.flatten(1)


@torch.no_grad()
def looks_ahead(model: Any) -> bool:
    """Whether the logits at a token depend on the token after it."""
    ids = torch.tensor([[0, 1], [0, 2]], device=model.device)
    one, other = model(input_ids=ids).logits[:, 0].float()
    return bool((one - other).abs().max() > _ALIKE * one.std())


@torch.no_grad()
def head_is_plain(model: Any, backbone: str) -> bool:
    """Whether the logits of two tokens are the output layer's product with the backbone's last states, and no more.

    Some families scale or cap them (Gemma 2, Cohere, Granite); their loss is then taken from the model's own logits.
    """
    caught: list[Any] = []
    reads = model.get_submodule(backbone)
    hook = reads.register_forward_hook(lambda _module, _given, output: caught.append(output))
    logits = model(input_ids=torch.tensor([[0, 1]], device=model.device)).logits
    hook.remove()
    states, head = getattr(caught[0], "last_hidden_state", None) if caught else None, model.get_output_embeddings()
    if states is None or type(head) is not nn.Linear or states.shape[-1] != head.in_features:
        return False
    return torch.equal(head(states), logits)
