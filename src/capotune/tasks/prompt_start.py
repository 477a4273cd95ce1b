"""What a soft prompt starts from, where a task predicts names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from capotune.errors import SettingError
from capotune.models.tokenizer_files import tokens_of
from capotune.settings import TrainingSettings


def prompt_tokens(
    tokenizer: Any, names: Sequence[str], method: TrainingSettings, sequences: Sequence[Sequence[int]]
) -> list[int]:
    """Tokens that a soft prompt starts from: those of the predicted ``names``, of a text, or all in the rows.

    Raises ``SettingError`` for a text of which the tokenizer makes no token.
    """
    if method.starts_from is None:
        return []
    if method.starts_from == "vocabulary":
        return sorted({token for sequence in sequences for token in sequence})
    text = method.start_text or ", ".join(name.replace("_", " ") for name in names)
    tokens = tokens_of(tokenizer, text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    if not tokens:
        raise SettingError("the tokenizer makes no token of it.", setting="init_text", given=text, advice="Give words.")
    return list(tokens)
