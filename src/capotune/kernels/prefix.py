"""Trained keys and values in place of those that attention computes at some positions: a deep prompt, in every block.

They stand where they are read: after the rotary embedding, so that they carry their positions in them (prefix tuning,
Li and Liang 2021, arXiv 2101.00190, §4; P-tuning v2, Liu et al. 2022, arXiv 2110.07602).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Places:
    """Where the placeholders stand in the batch that is read now; the model's embedding looks."""

    rows: torch.Tensor | None = None
    """Their numbers among all positions, row after row: (sequences · virtual tokens,) int64, rising. None: there are
    none, as where a sequence goes on after what is cached."""
    tokens: int = 0
    """Positions of a row."""
    leading: bool = False
    """Whether every row begins with them, whatever ``rows`` says."""


@dataclass(frozen=True, eq=False)
class LayerPrefix:
    """What one block's attention reads at the placeholders."""

    keys: torch.nn.Parameter
    """(virtual tokens, key-value heads, head_dim)."""
    values: torch.nn.Parameter
    """As the keys."""
    places: Places = field(repr=False)
    """Of the whole model."""
    resting: int = 0
    """How many of the first virtual tokens get no gradient, unless it has no others."""

    def put(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v (tokens, key-value heads, head_dim) of all sequences → new ones of the same shapes."""
        rows = self.places.rows
        if rows is None:
            return k, v
        keys, values = self._for(rows, self.keys, k), self._for(rows, self.values, v)
        return k.index_copy(0, rows, keys), v.index_copy(0, rows, values)

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
        if torch.is_grad_enabled():
            flat = self.put(*(x.transpose(1, 2).flatten(0, 1) for x in (k, v)))
            k, v = (x.view(len(k), -1, *x.shape[1:]).transpose(1, 2) for x in flat)
            return k, v
        for x, one in ((k, self.keys), (v, self.values)):
            x[:, :, -tokens:].transpose(1, 2)[rows // tokens, rows % tokens] = self._for(rows, one, x)
        return k, v

    def _for(self, rows: torch.Tensor, one: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """For all the sequences: (sequences · virtual tokens, key-value heads, head_dim)."""
        if len(one) > self.resting:
            one = torch.cat([one[: self.resting].detach(), one[self.resting :]])
        return one.to(like.dtype).repeat(len(rows) // len(one), 1, 1)


def _after(prefix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x (batch, heads, tokens, head_dim) with the prefix (virtual tokens, heads, head_dim) in place of its start."""
    start = prefix.to(x.dtype).transpose(0, 1).expand(x.shape[0], -1, -1, -1)
    return torch.cat([start, x[:, :, len(prefix) :]], 2)
