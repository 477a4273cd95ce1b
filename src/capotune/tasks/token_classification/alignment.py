"""Words and the sub-words that a tokenizer makes of them.

The words of a sentence are joined by single spaces and tokenised as one text, so that every word has the tokens that
the base knows it by: a byte-level tokenizer writes most words with the space before them, and pieces of SentencePiece
begin with it. Where a tokenizer takes words one by one (``is_split_into_words``), these are the tokens that it makes of
them. The place of a token in the text says which word it belongs to.

A word's tag is predicted at its first sub-word (Devlin et al. 2019, §5.3). A token that holds nothing of the word but
the space before it does not count as one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

from capotune.errors import ModelError
from capotune.models.tokenizer_files import tokens_of

NOWHERE: Final = -1
"""Position of a word that the model does not read."""

_SPACE_ALONE: Final = frozenset({"▁", "Ġ"})
_AT_ONCE: Final = 1024  # sentences that are tokenised together; the tokenizer's own records of them are large


@dataclass(frozen=True)
class Aligned:
    """A sentence as the base reads it."""

    ids: list[int]
    """Token ids, those that mark start and end included."""
    first: list[int]
    """For each word the position in ``ids`` of its first sub-word; ``NOWHERE`` where it was cut off or has none."""
    tokens: int
    """Length before it was cut."""
    cut: int
    """Words at the end that were cut off."""


def align(tokenizer: Any, sentences: Sequence[Sequence[str]], max_length: int, name: str) -> list[Aligned]:
    """Tokens of each sentence and where its words begin, cut before the first word that does not fit ``max_length``.

    A first word that is too long in itself is cut within. Raises ``ModelError`` when the tokenizer of the base ``name``
    does not tell where its tokens are from, as those written in Python do not.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"its tokenizer ({type(tokenizer).__name__}) does not tell which characters a token is made of, so words "
            "cannot be found again in its tokens.",
            setting="model",
            given=name,
            advice="Give a base that has a tokenizer.json.",
        )
    return [
        found
        for at in range(0, len(sentences), _AT_ONCE)
        for found in _align(tokenizer, sentences[at : at + _AT_ONCE], max_length)
    ]


def _align(tokenizer: Any, sentences: Sequence[Sequence[str]], max_length: int) -> Iterator[Aligned]:
    texts = [" ".join(words) for words in sentences]
    encodings = tokens_of(tokenizer, texts, truncation=False, verbose=False).encodings
    for words, encoding in zip(sentences, encodings, strict=True):
        yield _of_one(words, encoding, max_length)


def _of_one(words: Sequence[str], encoding: Any, max_length: int) -> Aligned:
    """``encoding``: the tokenizers library's record of the joined words."""
    ids: list[int] = encoding.ids
    inside = [at for at, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
    start, end = (inside[0], inside[-1] + 1) if inside else (len(ids), len(ids))
    owners = _owners(words, encoding.offsets[start:end])
    stop = start + _fitting(owners, max_length - (len(ids) - len(owners)))
    first = [NOWHERE] * len(words)
    for at in reversed(range(start, stop)):
        if encoding.tokens[at] not in _SPACE_ALONE:
            first[owners[at - start]] = at
    read = owners[stop - start - 1] + 1 if stop > start else 0
    return Aligned(ids[:stop] + ids[end:], first, len(ids), len(words) - read if stop < end else 0)


def _owners(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Of each token the number of the word that holds its last character; of a lone space, the word after it."""
    starts = [0, *accumulate(len(word) + 1 for word in words)]
    owners = []
    for _, end in offsets:
        word = bisect_right(starts, end - 1) - 1
        is_space = end == starts[word + 1]
        owners.append(min(word + is_space, len(words) - 1))
    return owners


def _fitting(owners: Sequence[int], limit: int) -> int:
    """How many tokens remain of a sentence, of which ``limit`` fit: all, or those before a word that does not."""
    if len(owners) <= limit:
        return len(owners)
    whole = next((at for at in range(limit, 0, -1) if owners[at] != owners[at - 1]), 0)
    return whole or limit
