"""A deep prompt: trained vectors before every block's keys and values (Li and Liang 2021, §4; Liu et al. 2022).

Virtual tokens stand in a padded sequence as for a shallow prompt, as placeholders: positions, masks and caches need no
special case. In each block's attention the trained keys and values replace those computed at the placeholders, which is
what PEFT's ``past_key_values`` of prefix tuning compute. Packed sequences go without placeholders (``kernels.prefix``).

The vectors start from the keys and values that the base computes of a shallow prompt's start, real activations (Li and
Liang 2021, §7.4). The first one stays there: a causal model's attention rests on a sequence's first position wherever
it finds nothing better (Xiao et al. 2024, arXiv 2309.17453, §3.1), so that what is learned there goes into every text.
A part of what was learned can be given back after training: on the straight line to the start the loss on other text
falls faster than that on the trained kind rises (Wortsman et al. 2022, arXiv 2109.01903, §4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from capotune.errors import SettingError
from capotune.kernels.prefix import LayerPrefix, Places
from capotune.models.prefix import AttentionSeen, observe_attention

KEY = "prompt_embeddings"
"""What PEFT calls them."""
RESTING = 1
"""Vectors at the start of a prefix that stay as they were, where it has more."""


def learning(virtual_tokens: int) -> int:
    """How many of so many vectors train."""
    return virtual_tokens - RESTING if virtual_tokens > RESTING else virtual_tokens


class DeepPromptEmbedding(nn.Module):
    """The frozen token embedding, with placeholders for ids from its size on, and the prefix of every block.

    Args:
        base_layer: the embedding.
        seen: what each block's attention reads of the start, block by block.
        words: what it reads of the vocabulary.
    """

    def __init__(self, base_layer: nn.Module, seen: Sequence[AttentionSeen], words: Sequence[AttentionSeen]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.vocab_size: int = base_layer.num_embeddings  # type: ignore[assignment]
        # (virtual tokens, key-value heads, head_dim) for each block
        self.keys = nn.ParameterList(one.keys.transpose(0, 1).float().contiguous() for one in seen)
        self.values = nn.ParameterList(one.values.transpose(0, 1).float().contiguous() for one in seen)
        spreads = [_spread(one.keys) for one in words] + [_spread(one.values) for one in words]
        self.spreads = dict(zip(self.trained(), spreads, strict=True))
        """How far the base's own keys and values lie from their mean, by key: the scale on which they differ."""
        self._start = {key: one.detach().clone() for key, one in self.trained().items()}
        self._places = Places()

    @property
    def weight(self) -> torch.Tensor:
        """The frozen one: some families ask their embedding for its device or dtype."""
        weight: torch.Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """ids (batch, tokens) → vectors (batch, tokens, hidden); nothing that is read comes from the placeholders'."""
        virtual = input_ids >= self.vocab_size
        self._places.leading = torch.compiler.is_exporting()  # a graph's shapes come from no values
        if not self._places.leading:
            rows = virtual.flatten().nonzero()[:, 0]
            self._places.rows, self._places.tokens = (rows if len(rows) else None), input_ids.shape[1]
        vectors: torch.Tensor = self.base_layer(input_ids.masked_fill(virtual, 0))
        return vectors

    def prefixes(self) -> list[LayerPrefix]:
        """One for each block."""
        return [LayerPrefix(k, v, self._places, RESTING) for k, v in zip(self.keys, self.values, strict=True)]

    def trained(self) -> dict[str, nn.Parameter]:
        """Each block's keys and values apart, so that each trains at a rate of its own scale."""
        named = (("keys", self.keys), ("values", self.values))
        return {f"{KEY}.{number}.{name}": one for name, many in named for number, one in enumerate(many)}

    def resting(self) -> list[torch.Tensor]:
        """The first of each block's keys and values (1, key-value heads, head_dim), where it has others."""
        return [one.detach()[:RESTING] for one in self.trained().values() if len(one) > RESTING]

    def way_from_start(self) -> Callable[[float], None]:
        """As ``Method`` has it: a straight line."""
        weights = self.trained()
        end = {key: one.detach().clone() for key, one in weights.items()}

        @torch.no_grad()
        def go(part: float) -> None:
            for key, one in weights.items():
                one.copy_(self._start[key].to(one.device).lerp(end[key], part))

        return go

    def stored(self) -> dict[str, torch.Tensor]:
        """PEFT's one tensor (virtual tokens, blocks · 2 · key-value width): keys, then values, block by block."""
        pairs = zip(self.keys, self.values, strict=True)
        return {KEY: torch.cat([one.detach().cpu().flatten(1) for pair in pairs for one in pair], dim=1)}

    @torch.no_grad()
    def load(self, stored: torch.Tensor) -> None:
        """What ``stored`` gave. ``ValueError`` for another shape."""
        expected = self.stored()[KEY].shape
        if stored.shape != expected:
            raise ValueError(f"{KEY} is {tuple(stored.shape)}, expected {tuple(expected)}")
        count, heads, size = self.keys[0].shape
        parts = stored.view(count, len(self.keys), 2, heads, size)
        for number, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            keys.copy_(parts[:, number, 0])
            values.copy_(parts[:, number, 1])


def observe_start(backbone: Any, blocks: int, ids: range) -> list[AttentionSeen]:
    """What every block's attention reads of the virtual tokens ``ids``, which the embedding knows.

    Raises ``SettingError`` for a model whose blocks have no keys and values of one shape each.
    """
    seen = observe_attention(backbone, torch.tensor(ids))
    shapes = {tuple(part.shape) for one in seen for part in (one.keys, one.values)}
    modules = {id(one.module) for one in seen}
    if len(seen) == len(modules) == blocks:
        heads, size = key_value_heads(backbone)
        if shapes == {(heads, len(ids), size)}:
            return seen
    raise SettingError(
        f"{type(backbone).__name__} has not the same keys and values in each of its {blocks} blocks, or keeps them to "
        "itself.",
        setting="deep",
        given=True,
        advice="Leave it out: vectors before the input can be trained on this base.",
    )


def key_value_heads(backbone: Any) -> tuple[int, int]:
    """Key-value heads of a block and the size of one, by the configuration of a model with attention."""
    config = backbone.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(getattr(config, "num_key_value_heads", None) or heads), int(size)


def can_go_deep(backbone: Any, blocks: int) -> bool:
    """Whether ``observe_start`` finds keys and values in each of its blocks."""
    try:
        observe_start(backbone, blocks, range(1))
    except SettingError:
        return False
    return True


def observe_words(backbone: Any, vocab_size: int, count: int) -> list[AttentionSeen]:
    """What every block's attention reads of ``count`` words from all over the vocabulary."""
    return observe_attention(backbone, torch.linspace(0, vocab_size - 1, count).long())


def _spread(vectors: torch.Tensor) -> float:
    """Standard deviation of (heads, tokens, head_dim) around the mean token's, to two digits."""
    return float(f"{float((vectors - vectors.mean(1, keepdim=True)).float().square().mean().sqrt()):.2g}")
