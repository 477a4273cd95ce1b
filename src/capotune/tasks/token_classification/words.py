"""Words of a text that comes as a string."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from itertools import groupby


def word_spans(text: str) -> list[tuple[int, int]]:
    """Start and end (not included) of each word, in characters.

    A word is a run of letters, digits, marks, underscores and invisible joiners of any script, or one other visible
    character: ``"It isn't 3.5%"`` has the words ``It isn ' t 3 . 5 %``. White space and control characters part words.
    Scripts that write no spaces between words come out as long runs; give such text as a list of words.
    """
    return list(_spans(text))


def _spans(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    for kind, run in groupby(text, key=_kind):
        end = start + len(list(run))
        if kind == "word":
            yield start, end
        elif kind == "single":
            yield from ((at, at + 1) for at in range(start, end))
        start = end


def _kind(character: str) -> str:
    category = unicodedata.category(character)
    if category[0] in "LMN" or category == "Cf" or character == "_":
        return "word"
    return "space" if category[0] in "ZC" else "single"
