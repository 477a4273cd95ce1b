"""Checks of texts that callers give."""

from __future__ import annotations

from collections.abc import Sequence

from capotune.errors import DataError, quoted


def check_texts(texts: Sequence[str]) -> None:
    """``DataError`` for what no tokenizer takes: one string in place of a list, other types, broken UTF-8."""
    _refuse_one_string(texts)
    for number, text in enumerate(texts):
        _check_text(text, f"text {number}")


def as_pairs(pairs: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """Pairs of texts as tuples. ``DataError`` as ``check_texts``, and for what is no pair."""
    _refuse_one_string(pairs)
    found = []
    for number, pair in enumerate(pairs):
        if isinstance(pair, str) or len(pair) != 2:
            raise DataError(
                f"a pair of texts is needed, found {quoted(pair)}.",
                where=f"text {number}",
                advice="The adapter was trained on pairs: give each as a tuple of two texts.",
            )
        first, second = pair
        _check_text(first, f"text {number}, the first of two")
        _check_text(second, f"text {number}, the second of two")
        found.append((first, second))
    return found


def _refuse_one_string(texts: object) -> None:
    if isinstance(texts, str):
        raise DataError(f"a list of texts is needed, found one string: {texts[:40]!r}.", advice="Put it in a list.")


def _check_text(text: object, place: str) -> None:
    if not isinstance(text, str):
        advice = None
        if isinstance(text, list | tuple) and len(text) == 2:
            advice = "The adapter was trained on single texts: give one text a row."
        raise DataError(f"a string is needed, found {type(text).__name__} {quoted(text)}.", where=place, advice=advice)
    try:
        text.encode()
    except UnicodeEncodeError:  # what the shell or a pipe gave was not UTF-8
        raise DataError(f"not UTF-8: {text[:40]!r}.", where=place, advice="Convert it first, say with iconv.") from None
