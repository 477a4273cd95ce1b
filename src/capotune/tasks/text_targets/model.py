"""A classifier of texts: a backbone, pooling over the text's own tokens, and a linear head."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers.modeling_outputs import SequenceClassifierOutput

from capotune.data.batches import Batch
from capotune.models.sentence_files import Pooling
from capotune.tasks.linear_head import HeadedBackbone, spread_layers


class SequenceClassifier(HeadedBackbone):
    """A backbone, pooling over the text's own tokens, and a linear head.

    Args:
        backbone: a ``PreTrainedModel`` that returns hidden states (batch, tokens, hidden).
        pooling: how hidden states become one vector.
        num_labels: outputs of the head.
        feature_layers: as ``HeadedBackbone`` has it; features are the layers' pooled vectors, side by side.
        problem_type: what Transformers calls the kind of target, which decides on the loss that ``forward`` gives.
    """

    virtual_tokens: int
    """Leading positions that are a soft prompt; attended to, but left out of the pooling."""

    def __init__(
        self,
        backbone: Any,
        pooling: Pooling,
        num_labels: int,
        feature_layers: tuple[int, ...] = (-1,),
        problem_type: str = "single_label_classification",
    ) -> None:
        super().__init__(backbone, num_labels, feature_layers)
        self.config.problem_type = problem_type
        self.pooling = pooling
        self.virtual_tokens = 0

    def features(self, batch: Batch, layers: tuple[int, ...] | None = None) -> torch.Tensor:
        """Pooled vectors (batch, len(layers)·hidden); ``layers`` are the head's own when left out."""
        skip = self.virtual_tokens - batch.sequences.prefix
        layers = layers or self.feature_layers
        pooled = pooled_positions(batch.sequences.starts, self.pooling, skip)
        if pooled is not None:
            pooled = pooled.to(batch.input_ids.device)
        if layers == (-1,):
            states = [batch.states(self.backbone, pooled)]
        else:
            all_states = self.backbone(output_hidden_states=True, **batch.inputs).hidden_states
            flat = [batch.flat(all_states[layer]) for layer in layers]
            states = flat if pooled is None else [state[pooled] for state in flat]
        return torch.cat([pool(state, batch.starts, self.pooling, skip) for state in states], dim=1)

    def logits(self, batch: Batch) -> torch.Tensor:
        """(batch, labels)."""
        found: torch.Tensor = self.classifier(self.features(batch))
        return found

    def logits_of(self, states: torch.Tensor, mask: torch.Tensor, skip: int = 0) -> torch.Tensor:
        """The head on the pooled vector of each row, (rows, labels)."""
        found: torch.Tensor = self.classifier(pool_padded(states, mask, self.pooling, skip))
        return found

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: Any = None,
        token_type_ids: torch.Tensor | None = None,
        **unused: Any,  # noqa: ARG002 - PEFT passes output_attentions, return_dict and the like
    ) -> SequenceClassifierOutput:
        """Logits (batch, labels) as other programs ask for them, of right-padded ids (batch, tokens) or embeddings;
        ``token_type_ids`` (batch, tokens) count where the backbone reads several types. ``past_key_values`` are a deep
        prompt's, which the mask counts too. No step depends on values: it can be traced.

        The mean loss too when ``labels`` are given: positions (batch,), or (batch, labels) 0 or 1, or numbers.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        mask = given.new_ones(given.shape[:2], dtype=torch.long) if attention_mask is None else attention_mask
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "past_key_values": past_key_values}
        if (getattr(self.backbone.config, "type_vocab_size", None) or 0) > 1:
            inputs["token_type_ids"] = token_type_ids
        inputs = {name: value for name, value in inputs.items() if value is not None}
        states = self.states(attention_mask=mask, **inputs)
        skip = 0 if past_key_values is not None else self.virtual_tokens
        logits = self.logits_of(states, mask[:, -given.shape[1] :], skip)
        loss = None if labels is None else _loss(logits, labels, self.config.problem_type)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _loss(logits: torch.Tensor, labels: torch.Tensor, problem_type: str) -> torch.Tensor:
    """As Transformers' own classes compute it."""
    if problem_type == "single_label_classification":
        return functional.cross_entropy(logits, labels)
    loss = functional.mse_loss if problem_type == "regression" else functional.binary_cross_entropy_with_logits
    return loss(logits, labels.view_as(logits).to(logits.dtype))


def pooled_positions(starts: torch.Tensor, pooling: Pooling, skip: int) -> torch.Tensor | None:
    """Which flat positions count, rising; None: all. Row r is tokens starts[r] to starts[r + 1], of which the first
    ``skip`` (a soft prompt) do not."""
    if pooling == "cls":
        return starts[:-1] + skip
    if pooling == "last":
        return starts[1:] - 1
    if not skip:
        return None
    position = torch.arange(int(starts[-1]), device=starts.device)
    row = torch.searchsorted(starts, position, right=True) - 1
    return position[position >= starts[row] + skip]


def pool(states: torch.Tensor, starts: torch.Tensor, pooling: Pooling, skip: int) -> torch.Tensor:
    """One vector per row, (rows, hidden), of the states at ``pooled_positions``, (positions, hidden)."""
    if pooling in ("cls", "last"):
        return states
    starts = starts - skip * torch.arange(len(starts), device=starts.device)
    every = torch.arange(len(states), device=states.device)
    if pooling in ("mean", "max"):
        # not segment_reduce: on a CPU it takes eight times as long
        return functional.embedding_bag(every, states, starts, mode=pooling, include_last_offset=True)
    lengths = starts.diff()
    first = torch.repeat_interleave(starts[:-1], lengths)
    weights = every - first + 1 if pooling == "weightedmean" else torch.ones_like(every)
    whole = lengths * (lengths + 1) / 2 if pooling == "weightedmean" else lengths.sqrt()
    sums = functional.embedding_bag(
        every, states.float(), starts, mode="sum", per_sample_weights=weights.float(), include_last_offset=True
    )
    return (sums / whole[:, None]).to(states.dtype)


def pool_padded(states: torch.Tensor, mask: torch.Tensor, pooling: Pooling, skip: int) -> torch.Tensor:
    """One vector per row, (rows, hidden), of right-padded states (rows, tokens, hidden), of which ``mask`` (rows,
    tokens) says where a token is; the first ``skip`` do not count. Positions are counted in fp32, whatever dtype the
    states have."""
    if pooling == "cls":
        return states[:, skip]
    states, mask = states[:, skip:], mask[:, skip:].float()
    lengths = mask.sum(1, keepdim=True)
    if pooling == "last":
        last = (lengths.long() - 1)[..., None].expand(-1, 1, states.shape[-1])
        return states.gather(1, last)[:, 0]
    if pooling == "max":
        return states.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)
    weights = mask * mask.cumsum(1) if pooling == "weightedmean" else mask
    whole = {"mean": lengths, "weightedmean": weights.sum(1, keepdim=True)}.get(pooling, lengths.sqrt())
    return ((weights[..., None] * states).sum(1) / whole).to(states.dtype)


_MOST_FEATURES = 8192  # a head's features are held in memory for all rows at once


def readable_layers(num_blocks: int, hidden_size: int) -> tuple[int, ...]:
    """Hidden states for a head that reads several: all, or evenly spread ones when all are too wide; the last is in."""
    return spread_layers(num_blocks, _MOST_FEATURES // hidden_size)
