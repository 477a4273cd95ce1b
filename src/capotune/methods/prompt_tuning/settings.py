"""The settings of prompt tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
from pydantic import Field

from capotune.errors import SettingError
from capotune.settings import Context, Count, Positive, TrainingSettings


class PromptTuningSettings(TrainingSettings):
    """Prompt tuning: trained vectors before every block's keys and values, or before the input embeddings; no weight
    changes (Li & Liang 2021; Lester et al. 2021)."""

    method: ClassVar[str] = "prompt-tuning"
    deep: bool | None = None
    """Vectors before every block's keys and values (prefix tuning, Li & Liang 2021) instead of before the input
    embeddings. Left out: yes, where the base's attention lets them in."""
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
    """Peak learning rate of the prompt vectors. Of deep ones in standard deviations of each block's keys and values:
    0.2 for text, 0.1 for labels. Of others: 1e-2 for labels; for text the standard deviation of the base's token
    embeddings, since that is the scale on which vectors differ."""
    head_learning_rate: Positive = 1e-2
    """Peak learning rate of the classification head; with so few other weights the head must do more itself."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay: it draws to zero, which is no word and nothing that a model computes."""
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
        if self.hard and self.deep:
            raise SettingError(
                "words stand before the input alone.", setting="deep", given=True, advice="Leave `hard` out."
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
        del chosen["learning_rate"]  # ``PromptTuning.resolve`` takes it from the base, as it does ``deep``
        if self.hard:
            chosen["deep"] = False
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

    @classmethod
    def of_record(cls, values: dict[str, Any]) -> PromptTuningSettings:
        """Before ``deep`` was a setting, no prompt was."""
        return super().of_record({"deep": False, **values})

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

    @property
    def solves_head_again(self) -> bool:
        """With so few weights of the method's own the head decides most, and steps do not bring it to its best."""
        return True

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
