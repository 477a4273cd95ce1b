"""A batch of texts whose rows leave it once their answer has ended, so that the others go on without them.

Transformers' ``generate`` computes a row to the end of the longest one. Here it is stopped when enough rows are done,
and called again for the others, with their keys and values. Whether a model can go on so is tried, on a few tokens.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import EosTokenCriteria, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from capotune.models.architecture import FAILURES
from capotune.models.sequence_packing import TOLERANCE

_PART = 4
"""Rows leave once they are a fourth of the batch: going on takes a copy of the others' keys and values."""


class ByRow(ABC):
    """A processor or criterion that knows which rows it is asked for."""

    @abstractmethod
    def of(self, rows: Sequence[int]) -> Any:
        """The same for these rows of its own alone."""


def write_leaving(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    configuration: GenerationConfig,
    processors: Sequence[Any],
    criteria: Sequence[Any],
    cache: Any = None,
) -> list[list[int]]:
    """What ``model.generate`` writes after ``ids`` (rows, width), of each row; more may follow its end.

    ``cache`` holds the keys and values of all but the last of ``ids``; None: of none.

    ``configuration`` draws nothing and follows no beams. ``processors`` and ``criteria`` that are ``ByRow`` are asked
    for the rows that are still there.
    """
    width, most = ids.shape[1], int(configuration.max_new_tokens)
    rows = list(range(len(ids)))
    written: list[list[int]] = [[] for _ in rows]
    while rows:
        leave = _Leave(configuration.eos_token_id, _of(criteria, rows))
        asked = copy.copy(configuration)
        asked.max_new_tokens, asked.return_dict_in_generate = width + most - ids.shape[1], True
        output = model.generate(
            ids,
            attention_mask=mask,
            generation_config=asked,
            logits_processor=LogitsProcessorList(_of(processors, rows)),
            stopping_criteria=StoppingCriteriaList([leave]),
            past_key_values=cache,
        )
        longer = output.sequences
        is_last = longer.shape[1] == width + most
        for row, own, is_done in zip(rows, longer[:, width:].tolist(), leave.done.tolist(), strict=True):
            if is_last or is_done:
                written[row] = own
        left = [at for at, is_done in enumerate(leave.done.tolist()) if not is_done and not is_last]
        rows, cache = [rows[at] for at in left], output.past_key_values
        if rows:
            chosen = torch.tensor(left, device=ids.device)
            cache.batch_select_indices(chosen)
            new = mask.new_ones(len(left), longer.shape[1] - ids.shape[1])
            ids, mask = longer[chosen], torch.cat([mask[chosen], new], 1)
    return written


@torch.no_grad()
def can_leave(model: Any, pad: int) -> bool:
    """Whether a row that goes on without another gets the scores that it gets beside it."""
    words = [token for token in range(1, 11) if token != pad]
    ids = torch.tensor([words, words[::-1]], device=model.device)
    mask, found = torch.ones_like(ids), list[torch.Tensor]()

    def write(count: int, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> Any:
        asked = GenerationConfig(
            max_new_tokens=count, pad_token_id=pad, output_logits=True, return_dict_in_generate=True
        )
        fixed = {"prefix_allowed_tokens_fn": lambda *_: words[:1]}  # the same tokens, so that the last compare
        return model.generate(ids, attention_mask=mask, generation_config=asked, past_key_values=cache, **fixed)

    try:
        found.append(write(3, ids, mask, None).logits[2][1:])
        first = write(1, ids, mask, None)
        first.past_key_values.batch_select_indices(torch.tensor([1], device=model.device))
        longer = first.sequences[1:]
        found.append(write(2, longer, torch.ones_like(longer), first.past_key_values).logits[1])
    except FAILURES:
        return False
    beside, alone = (logits.float() for logits in found)
    return bool((beside - alone).abs().max() <= TOLERANCE.get(model.dtype, 1e-4) * beside.std())


class _Leave(StoppingCriteria):  # type: ignore[misc]
    """Stops all rows once enough of them are done."""

    def __init__(self, ends: list[int] | None, criteria: list[Any]) -> None:
        self.criteria = [*([EosTokenCriteria(ends)] if ends else []), *criteria]
        self.done = torch.zeros(0, dtype=torch.bool)
        """Of each row whether its answer has ended."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **named: Any) -> torch.Tensor:
        """ids (rows, tokens so far) → which rows are done (rows,)."""
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for criterion in self.criteria:
            done |= criterion(input_ids, scores, **named)
        self.done = done | self.done.to(done.device) if len(self.done) else done
        enough = int(self.done.sum()) * _PART >= len(done)
        return torch.ones_like(done) if enough else self.done


def _of(parts: Sequence[Any], rows: Sequence[int]) -> list[Any]:
    return [part.of(rows) if isinstance(part, ByRow) else part for part in parts]
