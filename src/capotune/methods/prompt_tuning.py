"""Prompt tuning: trained vectors before the input embeddings; no weight changes (Lester et al. 2021, arXiv 2104.08691).

The vectors are handled as words that the vocabulary lacks: virtual token j has id vocab_size + j and stands before the
text like any token, so attention mask, positions and padding need no special case, and the prompt touches its text
wherever the row is padded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
import torch
from torch import nn

from capotune.errors import SettingError
from capotune.methods.base import Method, Start
from capotune.models.architecture import Architecture, swap
from capotune.settings import Context, Count, Positive, TrainingSettings


class PromptTuningSettings(TrainingSettings):
    """Prompt tuning (Lester et al. 2021): trained vectors before the input embeddings; no weight changes."""

    method: ClassVar[str] = "prompt-tuning"
    num_virtual_tokens: Count | None = None
    """Vectors put before every text. Left out: 20, or with `candidates` or `hard` as many as the words have tokens."""
    init: Literal["labels", "text", "vocabulary"] | None = None
    """Where the vectors start: the embeddings of the label names, of `init_text`, or of sampled words. Left out: the
    label names, or for text sampled words."""
    init_text: str | None = None
    """Words whose embeddings start the prompt (with init text)."""
    candidates: str | None = None
    """Generation: a file with one prompt a line, written by people. Each is tried on held-out rows; the vectors start
    from the best."""
    hard: bool = False
    """Keep the best of the `candidates` (or `init_text`) as it is and train nothing."""
    learning_rate: Positive | None = None
    """Peak learning rate of the prompt vectors. Left out: 1e-2 for labels; for text the standard deviation of the
    base's token embeddings, since that is the scale on which vectors differ."""
    head_learning_rate: Positive = 1e-2
    """Peak learning rate of the classification head; with so few other weights the head must do more itself."""
    epochs: Count | None = None
    """Most passes over the training rows; training stops earlier when the held-out score no longer rises. Left out: 3.
    """

    @pydantic.model_validator(mode="after")
    def _what_belongs_together_is_given_together(self) -> PromptTuningSettings:
        if (self.init == "text") != (self.init_text is not None):
            raise SettingError("`init=text` needs `init_text`, and `init_text` needs `init=text`.")
        if self.hard and self.candidates is None and self.init_text is None:
            raise SettingError(
                "keeps the best of some candidates.",
                setting="hard",
                advice="Give `candidates`, a file with one prompt a line.",
            )
        if self.candidates is not None and (self.init is not None or self.num_virtual_tokens is not None):
            raise SettingError(
                "the best of them decides where the vectors start and how many there are.",
                setting="candidates",
                advice="Leave `init` and `num_virtual_tokens` out.",
            )
        return self

    def _defaults(self, context: Context) -> dict[str, Any]:
        chosen = {**super()._defaults(context), "epochs": 3}
        if context.has_head:
            chosen["learning_rate"] = 1e-2
        else:
            del chosen["learning_rate"]  # ``PromptTuning.resolve`` takes it from the base's embeddings
        if self.candidates is not None or self.hard:  # the words themselves give the number once they are known
            return chosen
        return {**chosen, "num_virtual_tokens": 20, "init": "labels" if context.has_head else "vocabulary"}

    def completed(self, context: Context) -> PromptTuningSettings:
        """As for every method; ``SettingError`` for what does not fit the task."""
        if context.has_head and (self.candidates is not None or self.hard):
            name = "candidates" if self.candidates is not None else "hard"
            raise SettingError(
                "hard prompts are for text that a model writes; this data has labels.",
                setting=name,
                advice="Leave it out.",
            )
        if not context.has_head and self.init == "labels":
            raise SettingError(
                "this data is text to write and has no labels.",
                setting="init",
                given="labels",
                allowed="vocabulary or text",
            )
        return super().completed(context)

    @property
    def virtual_tokens(self) -> int:
        """The number of vectors."""
        return self.num_virtual_tokens or 0

    @property
    def starts_from(self) -> Literal["labels", "text", "vocabulary"] | None:
        """Where the vectors start."""
        return "text" if self.init_text is not None else self.init

    @property
    def start_text(self) -> str | None:
        """The words whose embeddings the vectors start from."""
        return self.init_text

    @property
    def trains(self) -> bool:
        """A hard prompt stays as it is."""
        return not self.hard

    def candidate_prompts(self) -> list[str]:
        """The lines of ``candidates``, each once; a typed \\n stands for a line break. ``hard`` alone: its text."""
        if self.candidates is None:
            return [self.init_text] if self.hard and self.init_text else []
        try:
            lines = Path(self.candidates).expanduser().read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingError(
                f"cannot be read as UTF-8 text ({error}).",
                setting="candidates",
                given=self.candidates,
                advice="Give a text file.",
            ) from None
        found = [line.replace("\\n", "\n") for line in lines if line.strip()]
        if not found:
            raise SettingError(
                "holds no prompt.", setting="candidates", given=self.candidates, advice="Write one on each line."
            )
        return list(dict.fromkeys(found))

    def with_prompt(self, text: str, tokens: int) -> PromptTuningSettings:
        """These settings with the vectors starting from ``text``, one for each of its ``tokens``."""
        chosen = {"candidates": None, "init": "text", "init_text": text, "num_virtual_tokens": tokens}
        return self.model_copy(update=chosen)


class PromptEmbedding(nn.Module):
    """The frozen token embedding, with ``prompt`` (virtual tokens, hidden) for ids from its size on."""

    def __init__(self, base_layer: nn.Module, prompt: torch.Tensor) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.vocab_size: int = base_layer.num_embeddings  # type: ignore[assignment]
        self.prompt = nn.Parameter(prompt)

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


class PromptTuning(Method):
    """The token embedding becomes a ``PromptEmbedding``."""

    Settings = PromptTuningSettings
    settings: PromptTuningSettings
    identity_at_start = False
    key_prefix = "base_model."  # PEFT wraps a prompt-tuned model once less than a LoRA one

    def resolve(self, model: nn.Module, architecture: Architecture) -> None:
        """Where the learning rate was left out, it is the standard deviation of the base's token embeddings."""
        if self.settings.learning_rate is None:
            embedding: Any = model.get_submodule(architecture.embedding)
            spread = float(f"{float(embedding.weight.float().std()):.2g}")
            self.settings = self.settings.model_copy(update={"learning_rate": spread})

    def attach(self, model: nn.Module, architecture: Architecture, start: Start) -> None:
        """Swap the token embedding; the vectors start from the embeddings of ``start.token_ids``."""
        self.model, self.architecture = model, architecture
        base: Any = model.get_submodule(architecture.embedding)
        backbone: Any = model.get_submodule(architecture.backbone)
        limit = getattr(backbone.config, "max_position_embeddings", None)
        if limit is not None and self.settings.virtual_tokens > limit // 2:
            raise SettingError(
                f"leaves few tokens for text: the model has {limit} positions.",
                setting="num_virtual_tokens",
                given=self.settings.num_virtual_tokens,
                allowed=f"1 to {limit // 2}",
            )
        self.embedding = PromptEmbedding(base, self._initial_prompt(base, start))
        swap(model, architecture.embedding, self.embedding)

    def detach(self) -> None:
        """Put the token embedding back."""
        swap(self.model, self.architecture.embedding, self.embedding.base_layer)

    @property
    def virtual_token_ids(self) -> range:
        """Ids just beyond the vocabulary."""
        return range(self.embedding.vocab_size, self.embedding.vocab_size + self.settings.virtual_tokens)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The prompt (virtual tokens, hidden) under PEFT's key."""
        return {"prompt_embeddings": self.embedding.prompt}

    def expected_parameters(self) -> int:
        """virtual tokens · hidden."""
        return self.settings.virtual_tokens * self.architecture.hidden_size

    def first_trainable_block(self) -> int:
        """The prompt stands below every block."""
        return 0

    def peft_config(self) -> dict[str, Any]:
        """A PEFT ``PromptTuningConfig`` as it stands in adapter_config.json."""
        backbone: Any = self.model.get_submodule(self.architecture.backbone)
        config = backbone.config
        return {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": self.settings.virtual_tokens,
            "token_dim": self.architecture.hidden_size,
            "num_transformer_submodules": 1,
            "num_attention_heads": config.num_attention_heads,
            "num_layers": config.num_hidden_layers,
            "prompt_tuning_init": "RANDOM",  # the stored vectors replace the start, which needs no tokenizer then
        }

    def nearest_tokens(self, words: int | None = None, count: int = 3) -> list[list[tuple[int, float]]]:
        """For each virtual token the ``count`` vocabulary ids of highest cosine similarity, and that similarity.

        ``words``: ids from here on stand for no word; many models pad their embedding to a round size.
        """
        base: Any = self.embedding.base_layer
        vocabulary = nn.functional.normalize(base.weight[:words].float(), dim=1)
        prompt = nn.functional.normalize(self.embedding.prompt.detach().float(), dim=1)
        values, ids = (prompt @ vocabulary.t()).topk(count, dim=1)
        return [list(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]

    @classmethod
    def stored_facts(cls, settings: Any) -> dict[str, Any] | None:
        """The words of a hard prompt; a soft prompt's nearest tokens need the base."""
        return {"hard_prompt": settings.init_text} if settings.hard else None

    def facts(self, tokenizer: Any) -> dict[str, Any]:
        """Each vector's nearest real tokens, with their cosine similarity."""
        near = self.nearest_tokens(len(tokenizer))
        named = [[(tokenizer.convert_ids_to_tokens(token), round(cosine, 3)) for token, cosine in one] for one in near]
        return {"nearest_tokens": named}

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
