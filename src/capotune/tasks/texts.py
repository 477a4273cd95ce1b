"""Checks of texts that callers give."""

from __future__ import annotations

from collections.abc import Sequence

from capotune.errors import DataError, quoted


def check_texts(texts: Sequence[str]) -> None:
    """``DataError`` for what no tokenizer takes: one string in place of a list, other types, broken UTF-8."""
    if isinstance(texts, str):
        raise DataError(f"a list of texts is needed, found one string: {texts[:40]!r}.", advice="Put it in a list.")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"a string is needed, found {type(text).__name__} {quoted(text)}.", where=f"text {number}")
        try:
            text.encode()
        except UnicodeEncodeError:  # what the shell or a pipe gave was not UTF-8
            raise DataError(
                f"not UTF-8: {text[:40]!r}.", where=f"text {number}", advice="Convert it first, say with iconv."
            ) from None
