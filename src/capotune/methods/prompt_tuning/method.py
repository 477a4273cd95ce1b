"""Prompt tuning: trained vectors before every block's keys and values (``deep``: ``deep.py``), or before the input
embeddings (Lester et al. 2021, arXiv 2104.08691); no weight changes.

The vectors are handled as words that the vocabulary lacks: virtual token j has id vocab_size + j and stands before the
text like any token, so attention mask, positions and padding need no special case, and the prompt touches its text
wherever the row is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from capotune.errors import AdapterError, SettingError
from capotune.methods.base import Method, Start
from capotune.methods.prompt_tuning.deep import (
    KEY,
    DeepPromptEmbedding,
    can_go_deep,
    key_value_heads,
    learning,
    observe_start,
    observe_words,
)
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.models.architecture import Architecture, swap
from capotune.models.prefix import put_prefixes, take_prefixes


class PromptEmbedding(nn.Module):
    """The frozen token embedding, with ``prompt`` (virtual tokens, hidden) for ids from its size on."""

    def __init__(self, base_layer: nn.Module, prompt: torch.Tensor) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.vocab_size: int = base_layer.num_embeddings  # type: ignore[assignment]
        self.prompt = nn.Parameter(prompt)

    @property
    def weight(self) -> torch.Tensor:
        """The frozen one: some families ask their embedding for its device or dtype."""
        weight: torch.Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """ids (batch, tokens) → vectors (batch, tokens, hidden).

        A virtual token's vector is taken by a product with rows of one 1 and zeros otherwise: the prompt's gradient is
        a product too then, and not a sum over rows that one thread picks up one by one.
        """
        virtual_ids = torch.arange(self.vocab_size, self.vocab_size + len(self.prompt), device=input_ids.device)
        chosen = input_ids[..., None] == virtual_ids  # (batch, tokens, virtual tokens)
        virtual = chosen.any(-1)
        vectors: torch.Tensor = self.base_layer(input_ids.masked_fill(virtual, 0)).masked_fill(virtual[..., None], 0)
        return vectors + (chosen.to(self.prompt.dtype) @ self.prompt).to(vectors.dtype)

    def trained(self) -> dict[str, nn.Parameter]:
        """The prompt under PEFT's key."""
        return {KEY: self.prompt}


class PromptTuning(Method):
    """The token embedding becomes a ``PromptEmbedding`` or a ``DeepPromptEmbedding``."""

    Settings = PromptTuningSettings
    settings: PromptTuningSettings
    identity_at_start = False
    key_prefix = "base_model."  # PEFT wraps a prompt-tuned model once less than a LoRA one
    _stays_shallow = False

    def resolve(self, model: nn.Module, architecture: Architecture, *, has_head: bool) -> None:
        """Whether the prompt is deep, and the learning rate, where they were left out. The rate of vectors before a
        text to write is the standard deviation of the base's token embeddings."""
        chosen: dict[str, Any] = {}
        deep = self.settings.deep
        if deep is None:
            chosen["deep"] = deep = can_go_deep(model.get_submodule(architecture.backbone), len(architecture.blocks))
            self._stays_shallow = not deep
        if self.settings.learning_rate is None:
            embedding: Any = model.get_submodule(architecture.embedding)
            spread = float(f"{float(embedding.weight.float().std()):.2g}")
            chosen["learning_rate"] = (0.1 if deep else 1e-2) if has_head else (0.2 if deep else spread)
        self.settings = self.settings.model_copy(update=chosen)

    def attach(self, model: nn.Module, architecture: Architecture, start: Start) -> None:
        """Swap the token embedding; the vectors start from the embeddings of ``start.token_ids``."""
        self.model, self.architecture = model, architecture
        base: Any = model.get_submodule(architecture.embedding)
        backbone: Any = model.get_submodule(architecture.backbone)
        limit = getattr(backbone.config, "max_position_embeddings", None)
        if limit is not None and limit > 0 and self.settings.virtual_tokens > limit // 2:
            raise SettingError(
                f"leaves few tokens for text: the model has {limit} positions.",
                setting="num_virtual_tokens",
                given=self.settings.num_virtual_tokens,
                allowed=f"1 to {limit // 2}",
            )
        self.embedding: PromptEmbedding | DeepPromptEmbedding = PromptEmbedding(base, self._initial_prompt(base, start))
        self.paths = [path for path, part in model.named_modules(remove_duplicate=False) if _same_table(part, base)]
        self._swap_embedding(self.embedding)
        self._check_further_tables(backbone)
        if self.settings.deep:
            self._go_deep(base, backbone)

    def detach(self) -> None:
        """Put the token embedding back, and attention as it was."""
        self._swap_embedding(self.embedding.base_layer)
        if isinstance(self.embedding, DeepPromptEmbedding):
            take_prefixes(self.model.get_submodule(self.architecture.backbone), self._attention_names)

    @property
    def virtual_token_ids(self) -> range:
        """Ids just beyond the vocabulary."""
        return range(self.embedding.vocab_size, self.embedding.vocab_size + self.settings.virtual_tokens)

    @property
    def virtual_tokens_are_placeholders(self) -> bool:
        """Those of a deep prompt that is attached."""
        return isinstance(vars(self).get("embedding"), DeepPromptEmbedding)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The prompt (virtual tokens, hidden); of a deep one each block's keys and values."""
        return self.embedding.trained()

    def stored(self) -> dict[str, torch.Tensor]:
        """The prompt under PEFT's key."""
        return self.embedding.stored() if isinstance(self.embedding, DeepPromptEmbedding) else super().stored()

    @classmethod
    def trained(
        cls,
        settings: Any,
        tensors: dict[str, torch.Tensor],
        config: Mapping[str, Any],  # noqa: ARG003
    ) -> dict[str, torch.Tensor]:
        """As they are stored. ``AdapterError`` unless there are as many vectors as the settings say."""
        if KEY not in tensors:
            raise AdapterError(f"the tensor '{KEY}' is missing.")
        if tensors[KEY].dim() != 2 or len(tensors[KEY]) != settings.virtual_tokens:
            raise AdapterError(
                f"{KEY} is {tuple(tensors[KEY].shape)}, and the settings say {settings.virtual_tokens} vectors."
            )
        return tensors

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put stored vectors in place of the initial ones."""
        if isinstance(self.embedding, DeepPromptEmbedding):
            self.embedding.load(tensors[KEY])
        else:
            super().load(tensors)

    def notices(self) -> list[str]:
        """Where the default cannot be had."""
        if not self._stays_shallow:
            return []
        return [
            "the base's attention lets no vectors in before its keys and values: they stand before the input alone."
        ]

    def resting(self) -> list[torch.Tensor]:
        """The first vectors of a deep prompt."""
        return self.embedding.resting() if isinstance(self.embedding, DeepPromptEmbedding) else []

    def way_from_start(self) -> Callable[[float], None] | None:
        """A deep prompt's, which costs much on other text."""
        return self.embedding.way_from_start() if isinstance(self.embedding, DeepPromptEmbedding) else None

    def learning_rates(self) -> dict[str, float]:
        """Of a deep prompt each block's keys and values have their own, by how far apart those of the start are."""
        rates = super().learning_rates()
        if not isinstance(self.embedding, DeepPromptEmbedding):
            return rates
        return {key: float(f"{rate * self.embedding.spreads[key]:.3g}") for key, rate in rates.items()}

    def expected_parameters(self) -> int:
        """virtual tokens · embedding size; of a deep prompt those that do not rest · blocks · 2 · key-value width."""
        if self.settings.deep:
            heads, size = key_value_heads(self.model.get_submodule(self.architecture.backbone))
            return learning(self.settings.virtual_tokens) * len(self.architecture.blocks) * 2 * heads * size
        return self.settings.virtual_tokens * self.architecture.embedding_size

    def first_trainable_block(self) -> int:
        """The prompt stands below every block."""
        return 0

    def peft_config(self) -> dict[str, Any]:
        """A PEFT ``PromptTuningConfig``, or ``PrefixTuningConfig``, as it stands in adapter_config.json."""
        backbone: Any = self.model.get_submodule(self.architecture.backbone)
        config = backbone.config
        if self.settings.deep:
            heads, size = key_value_heads(backbone)
            return {
                "peft_type": "PREFIX_TUNING",
                "num_virtual_tokens": self.settings.virtual_tokens,
                "token_dim": heads * size,
                "num_transformer_submodules": 1,
                "num_attention_heads": heads,
                "num_layers": len(self.architecture.blocks),
                "encoder_hidden_size": heads * size,
                "prefix_projection": False,
            }
        return {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": self.settings.virtual_tokens,
            "token_dim": self.architecture.embedding_size,
            "num_transformer_submodules": 1,
            "num_attention_heads": getattr(config, "num_attention_heads", None),  # a state-space model has none
            "num_layers": len(self.architecture.blocks),
            "prompt_tuning_init": "RANDOM",  # the stored vectors replace the start, which needs no tokenizer then
        }

    def nearest_tokens(self, words: int | None = None, count: int = 3) -> list[list[tuple[int, float]]]:
        """For each virtual token the ``count`` vocabulary ids of highest cosine similarity, and that similarity.

        ``words``: ids from here on stand for no word; many models pad their embedding to a round size.
        """
        assert isinstance(self.embedding, PromptEmbedding)
        base: Any = self.embedding.base_layer
        vocabulary = nn.functional.normalize(base.weight[:words].float(), dim=1)
        prompt = nn.functional.normalize(self.embedding.prompt.detach().float(), dim=1)
        values, ids = (prompt @ vocabulary.t()).topk(count, dim=1)
        return [list(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]

    @classmethod
    def trained_count(cls, settings: Any, tensors: Mapping[str, torch.Tensor]) -> int:
        """All but a deep prompt's vectors that rest."""
        count, (vectors, width) = super().trained_count(settings, tensors), tensors[KEY].shape
        return count - (vectors - learning(vectors)) * width if settings.deep else count

    @classmethod
    def stored_facts(cls, settings: Any) -> dict[str, Any] | None:
        """The words of a hard prompt; a soft prompt's nearest tokens need the base, and a deep one's keys and values
        are near no token."""
        if settings.deep:
            return {"deep_prompt": settings.virtual_tokens}
        return {"hard_prompt": settings.init_text} if settings.hard else None

    def facts(self, tokenizer: Any) -> dict[str, Any]:
        """Each vector's nearest real tokens, with their cosine similarity."""
        near = self.nearest_tokens(len(tokenizer))
        named = [[(tokenizer.convert_ids_to_tokens(token), round(cosine, 3)) for token, cosine in one] for one in near]
        return {"nearest_tokens": named}

    def _swap_embedding(self, embedding: nn.Module) -> None:
        for path in self.paths:
            swap(self.model, path, embedding)

    def _go_deep(self, base: Any, backbone: Any) -> None:
        """Put the deep prompt in place of the shallow one that it starts from."""
        try:
            seen = observe_start(backbone, len(self.architecture.blocks), self.virtual_token_ids)
        except SettingError:
            self.detach()
            raise
        words = observe_words(backbone, self.embedding.vocab_size, 2 * self.settings.virtual_tokens)
        self.embedding = DeepPromptEmbedding(base, seen, words)
        self._swap_embedding(self.embedding)
        modules = [one.module for one in seen]
        self._attention_names = put_prefixes(backbone, list(zip(modules, self.embedding.prefixes(), strict=True)))

    @torch.no_grad()
    def _check_further_tables(self, backbone: Any) -> None:
        """``SettingError`` where the model looks tokens up once more, in a table that has nothing for a prompt."""
        tables = (*backbone.named_parameters(), *backbone.named_buffers())
        same_size = [path for path, table in tables if table.dim() and len(table) == self.embedding.vocab_size]
        own = tuple(f"{path.removeprefix(self.architecture.backbone).lstrip('.')}." for path in self.paths)
        further = [path for path in same_size if not path.startswith(own)]
        if not further:
            return
        ids = torch.tensor([[*self.virtual_token_ids]], device=backbone.device)
        try:
            backbone(input_ids=ids)
        except IndexError:
            self.detach()
            raise SettingError(
                f"{type(backbone).__name__} looks tokens up in {further[0]} too, which has no vectors for a prompt.",
                setting="num_virtual_tokens",
                given=self.settings.num_virtual_tokens,
                advice="Train lora or qlora on this base.",
            ) from None

    def _initial_prompt(self, base: Any, start: Start) -> torch.Tensor:
        """(virtual tokens, hidden): sampled words, or a text's tokens shared out evenly over the vectors."""
        count = self.settings.virtual_tokens
        assert start.token_ids, "the caller gives the tokens of the text, the labels, or the data"
        ids = torch.tensor(start.token_ids)
        if self.settings.init == "vocabulary":
            ids = ids[torch.randint(len(ids), (count,), generator=start.generator)]
        elif len(ids) < count:
            ids = ids.repeat(-(-count // len(ids)))[:count]
        # through the layer, not from its weight: some families scale what they look up
        vectors: torch.Tensor = base(ids.to(base.weight.device)).detach().float()
        return torch.stack([share.mean(0) for share in vectors.tensor_split(count)])


def _same_table(part: nn.Module, base: Any) -> bool:
    """Whether ``part`` is the embedding ``base`` or another one with the very same weight (T5 has it twice)."""
    return part is base or (isinstance(part, nn.Embedding) and part.weight is base.weight)
