"""How many tokens of a text fit beside a soft prompt."""

from __future__ import annotations

from capotune.errors import SettingError
from capotune.models.base import Base

LONGEST_UNASKED = 4096
"""Tokens of a text that are read where nobody says how many: as many as go through the model at a time in training
(``micro_batch_tokens``). Bases for 32,000 to a million tokens would otherwise take memory for as many."""


def text_length(base: Base, longest: int | None, virtual_tokens: int, marks: int) -> int:
    """Tokens for text, ``marks`` of them for its start and end: ``longest``, or where that is None at most
    ``LONGEST_UNASKED``, and never more than the base takes beside the ``virtual_tokens`` of a soft prompt.

    Raises ``SettingError`` when ``longest`` does not fit the base, or the prompt takes more than half of it.
    """
    limit = base.max_length
    if virtual_tokens > limit // 2:
        raise SettingError(
            f"leaves few tokens for text: the base takes {limit} tokens.",
            setting="num_virtual_tokens",
            given=virtual_tokens,
            allowed=f"1 to {limit // 2}",
        )
    if longest is not None and not marks < longest <= limit:
        raise SettingError(
            f"this base takes at most {limit} tokens, and {marks} of them mark start and end of a text.",
            setting="max_length",
            given=longest,
            allowed=f"{marks + 1} to {limit}",
        )
    return min(longest or LONGEST_UNASKED, limit - virtual_tokens)
