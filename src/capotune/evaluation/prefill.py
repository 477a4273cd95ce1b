"""Prompts of different lengths that are read without padding, before an answer is written after each.

All tokens but the last of each prompt go through the model in one row, packed (``models.sequence_packing``). The keys
and values of that row are then laid out as those of a batch that is padded on the left, and decoding goes on from
there with the last tokens. Whether a model can is tried, on a few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from capotune.adapters.assemble import Assembled
from capotune.evaluation.roomy_cache import RoomyCache
from capotune.kernels.attention import Sequences
from capotune.models.architecture import FAILURES
from capotune.models.prefix import has_prefix
from capotune.models.sequence_packing import TOLERANCE, packed


@torch.no_grad()
def read_packed(assembled: Assembled, prompts: Sequence[Sequence[int]]) -> RoomyCache:
    """Keys and values of every prompt (token ids) but its last token: (rows, heads, longest - 1, head_dim) in each
    layer, on the right; what stands before is 0 and never attended to. ``assembled.packing`` must say that sequences
    are packed, and ``can_read_packed`` that this is the same."""
    sequences, first = Sequences(tuple(len(prompt) - 1 for prompt in prompts)), assembled.packing.first_position
    assert first is not None
    device, cache = assembled.model.device, RoomyCache()
    ids = torch.tensor([[token for prompt in prompts for token in prompt[:-1]]], device=device)
    with packed(assembled.backbone, assembled.packing):
        assembled.backbone(
            input_ids=ids,
            position_ids=sequences.positions(first)[None].to(device),
            sequences=sequences,
            past_key_values=cache,
            use_cache=True,
        )
    width, lengths = max(sequences.lengths), torch.tensor(sequences.lengths)
    rows = torch.arange(len(prompts)).repeat_interleave(lengths).to(device)
    places = (sequences.positions(0) + (width - lengths).repeat_interleave(lengths)).to(device)

    def laid_out(flat: torch.Tensor) -> torch.Tensor:
        """(1, heads, tokens, head_dim) → (rows, heads, width, head_dim)."""
        found = flat.new_zeros(len(prompts), flat.shape[1], width, flat.shape[3])
        found[rows, :, places] = flat[0].transpose(0, 1)
        return found

    for layer in cache.layers:
        layer.keys, layer.values = laid_out(layer.keys), laid_out(layer.values)
    return cache


@torch.no_grad()
def can_read_packed(assembled: Assembled) -> bool:
    """Whether the short one of two prompts that are read so, which goes on without the other (``leaving``), gets the
    scores that it gets alone. Never with a deep prompt: what is cached of a packed row are the keys and values that
    the model computes at its placeholders."""
    if assembled.packing.first_position is None or assembled.packing.changes_beyond is not None:
        return False
    if has_prefix(assembled.backbone):
        return False
    model, pad, virtual = assembled.model, assembled.task.pad_id, assembled.method.virtual_token_ids
    words = [token for token in range(1, 11) if token != pad]
    long, short = [*virtual, *words], [*virtual, *words[-4:]]
    padding = len(long) - len(short)
    both = torch.tensor([long, [pad] * padding + short], device=model.device)
    mask = torch.ones_like(both)
    mask[1, :padding] = 0

    def write(count: int, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> Any:
        asked = GenerationConfig(
            max_new_tokens=count, pad_token_id=pad, output_logits=True, return_dict_in_generate=True
        )
        fixed = {"prefix_allowed_tokens_fn": lambda *_: words[:1]}  # the same first token, so that the second compares
        return model.generate(ids, attention_mask=mask, generation_config=asked, past_key_values=cache, **fixed)

    try:
        alone = torch.cat(write(2, both[1:, padding:], mask[1:, padding:], None).logits).float()
        first = write(1, both, mask, read_packed(assembled, [long, short]))
        first.past_key_values.batch_select_indices(torch.tensor([1], device=model.device))
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        second = write(1, first.sequences[1:], mask[1:], first.past_key_values)
    except FAILURES:
        return False
    beside = torch.cat([first.logits[0][1:], second.logits[0]]).float()
    return bool((alone - beside).abs().max() <= TOLERANCE.get(model.dtype, 1e-4) * alone.std())
