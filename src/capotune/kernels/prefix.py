"""A deep prompt: trained keys and values that attention reads before a sequence's own, in every block.

They stand where they are read: after the rotary embedding, so that they carry their positions in them (prefix tuning,
Li and Liang 2021, arXiv 2101.00190, §4; P-tuning v2, Liu et al. 2022, arXiv 2110.07602).

Packed sequences have no tokens for them (``Sequences.prefix``). Padded ones have placeholders, so that masks, caches
and positions need no special case, and the keys and values there are replaced.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from capotune.kernels.attention import Sequences, packed_attention


@dataclass
class Places:
    """Where the placeholders stand in the padded batch that is read now; the model's embedding looks."""

    rows: torch.Tensor | None = None
    """Their numbers among all positions, row after row: (sequences · virtual tokens,) int64, rising. None: there are
    none, as where a sequence goes on after what is cached."""
    tokens: int = 0
    """Positions of a row."""
    leading: bool = False
    """Whether every row begins with them, whatever ``rows`` says."""


@dataclass(frozen=True, eq=False)
class LayerPrefix:
    """What one block's attention reads before a sequence's own."""

    keys: torch.nn.Parameter
    """(virtual tokens, key-value heads, head_dim)."""
    values: torch.nn.Parameter
    """As the keys."""
    places: Places = field(repr=False)
    """Of the whole model."""
    resting: int = 0
    """How many of the first virtual tokens get no gradient, unless it has no others."""

    def learned(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, through which gradients reach those that do not rest."""
        keys, values = (self._learned(one) for one in (self.keys, self.values))
        return keys, values

    def put_padded(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v (batch, key-value heads, tokens, head_dim) → the same shapes.

        Without gradients they are changed in place: a cache of keys and values, which k and v may be a part of, holds
        the prefix from then on.
        """
        if self.places.leading:
            return _after(self.keys, k), _after(self.values, v)
        rows, tokens = self.places.rows, self.places.tokens
        if rows is None:
            return k, v
        pairs = zip((k, v), self.learned(), strict=True)
        if torch.is_grad_enabled():
            flat = ((x.transpose(1, 2).flatten(0, 1), one) for x, one in pairs)
            new = (x.index_copy(0, rows, _repeated(one, len(rows), x)) for x, one in flat)
            k, v = (x.view(len(k), -1, *x.shape[1:]).transpose(1, 2) for x in new)
            return k, v
        for x, one in pairs:
            x[:, :, -tokens:].transpose(1, 2)[rows // tokens, rows % tokens] = _repeated(one, len(rows), x)
        return k, v

    def _learned(self, one: torch.Tensor) -> torch.Tensor:
        if len(one) <= self.resting:
            return one
        return torch.cat([one[: self.resting].detach(), one[self.resting :]])


def prefixed_attention_reference(
    prefix: LayerPrefix, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: Sequences,
    *, causal: bool, scale: float, window: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """The definition in plain PyTorch, one sequence of one token or more after the other, where all have a prefix."""
    repeats, outs = q.shape[1] // k.shape[1], []
    for query, key, value in zip(*(torch.split(x, list(sequences.lengths)) for x in (q, k, v)), strict=True):
        both = (torch.cat([one, x]) for one, x in zip(prefix.learned(), (key, value), strict=True))
        keys, values = (x.repeat_interleave(repeats, 1).transpose(0, 1).float() for x in both)
        scores = scale * query.transpose(0, 1).float() @ keys.transpose(1, 2)  # (heads, tokens, prefix + tokens)
        at = torch.arange(keys.shape[1], device=q.device)
        distance = at[-len(query) :, None] - at
        seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
        if window is not None:
            seen &= distance.abs() < window
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outs.append((weights @ values).transpose(0, 1).to(q.dtype))
    return torch.cat(outs)


def prefixed_attention(
    prefix: LayerPrefix | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: Sequences, **how: Any
) -> torch.Tensor:
    """``packed_attention``, where there is a prefix and ``sequences`` leave room for it with its keys and values before
    those of each sequence. Shapes and ``how`` are those of ``packed_attention``.

    The kernels know sequences whose queries are as many as their keys: queries of zeros, whose output nobody reads,
    stand beside the prefix. That is little beside the linear layers, which do not see them.
    """
    if prefix is None or not sequences.prefix:
        assert prefix is None or prefix.places.rows is None, "placeholders stand in padded sequences alone"
        return packed_attention(q, k, v, sequences, **how)
    whole, (of_prefix, own) = sequences.whole, sequences.split_on(q.device)
    query = q.new_zeros(sum(whole.lengths), *q.shape[1:]).index_copy_(0, own, q)
    key, value = (
        x.new_empty(len(query), *x.shape[1:])
        .index_copy_(0, own, x)
        .index_copy_(0, of_prefix, _repeated(one, len(of_prefix), x))
        for x, one in zip((k, v), prefix.learned(), strict=True)
    )
    return packed_attention(query, key, value, whole, **how)[own]


def _repeated(one: torch.Tensor, rows: int, like: torch.Tensor) -> torch.Tensor:
    """One after the other for all sequences: (rows, key-value heads, head_dim)."""
    return one.to(like.dtype).repeat(rows // len(one), 1, 1)


def _after(prefix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x (batch, heads, tokens, head_dim) with the prefix (virtual tokens, heads, head_dim) in place of its start."""
    start = prefix.to(x.dtype).transpose(0, 1).expand(x.shape[0], -1, -1, -1)
    return torch.cat([start, x[:, :, len(prefix) :]], 2)
