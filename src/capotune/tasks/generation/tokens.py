"""From a text to its tokens, and from some of its characters to the tokens that hold them.

A text is always tokenised as a whole: what is trained on has the ids that the tokenizer gives the text, wherever parts
of it meet. A token is in the loss when it holds a character that is in the loss, so a token across the border of prompt
and completion (``:\\n`` and ``\\n`` may be one) is.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from capotune.models.tokenizer_files import tokens_of

Span = tuple[int, int]
"""From a position up to another, which is not part of it."""

_OVERLAP = 1024
"""Characters of a part that are read once more with the next one, at first."""
_AGREED = 64
_SPACE = "Ġ"  # a space in the tokens of byte-level tokenizers


@dataclass(frozen=True)
class Rendered:
    """A text as a model reads it, and the characters of it that are in the loss."""

    text: str
    in_loss: tuple[Span, ...] = ()
    """Spans of characters, rising, apart from each other."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text, without any that the tokenizer adds to it, and those that are in the loss."""

    ids: list[int]
    in_loss: list[Span]
    """Spans of tokens, one for each span of characters; empty where no token holds one of those."""
    straddles: bool = False
    """Whether the first token of a span also holds characters before it."""


def tokenize(tokenizer: Any, texts: Sequence[Rendered]) -> list[Tokens]:
    """The tokens of each text; one call of the tokenizer for all of them, or two where it knows no offsets."""
    if not texts:  # the tokenizer takes no empty list
        return []
    found = tokens_of(tokenizer, [one.text for one in texts], add_special_tokens=False, verbose=False)
    ids = [list(one) for one in found["input_ids"]]
    if found.encodings:
        return _by_offsets(tokenizer, texts, ids, found.encodings)
    return _by_prefix(tokenizer, texts, ids)


def tokenize_parts(tokenizer: Any, parts: Iterable[str]) -> Iterator[list[int]]:
    """The tokens of a text that is given in parts, part by part, as ``tokenize`` would find them in the whole.

    What a tokenizer makes of a place depends on some characters around it. A part is read with the end of the one
    before it: where both readings agree on ``_AGREED`` tokens in a row, the first one ends and the other begins. They
    are read as one where there is no such place, as in a million times one character, and where the tokenizer knows no
    offsets.
    """
    texts = iter(parts)
    text, least, given = next(texts, ""), 1, 0  # of the tokens of ``text`` so many are given already
    places = _places(tokenizer, text)
    if places is None:
        (whole,) = tokenize(tokenizer, [Rendered("".join([text, *texts]))])
        yield whole.ids
        return
    while part := "".join(_at_least(least, texts)):
        if agreed := _read_on(tokenizer, text, places[given:], part):
            ended, text, places, given = agreed
            yield ended
            least = 1
        else:
            text += part
            places, least = _places(tokenizer, text) or [], len(text)
    yield [token for token, *_ in places[given:]]


def _at_least(characters: int, texts: Iterator[str]) -> Iterator[str]:
    """The next of the texts, until they have so many characters."""
    while characters > 0 and (text := next(texts, "")):
        characters -= len(text)
        yield text


_Place = tuple[int, int, int]
"""A token, and where its characters start and end."""


def _places(tokenizer: Any, text: str) -> list[_Place] | None:
    """The tokens of a text; None where the tokenizer knows no offsets."""
    found = tokens_of(tokenizer, [text], add_special_tokens=False, verbose=False)
    if not found.encodings:
        return None
    (encoding,) = found.encodings
    return [(token, *span) for token, span in zip(encoding.ids, encoding.offsets, strict=True)]


def _read_on(
    tokenizer: Any, text: str, places: Sequence[_Place], part: str
) -> tuple[list[int], str, list[_Place], int] | None:
    """Read the part after a text: the tokens before a place where both agree, what is read from now on, its tokens, and
    how many of them stand before that place. None where there is no such place."""
    overlap = _OVERLAP
    while overlap < len(text):
        following_text = text[-overlap:] + part
        following = _places(tokenizer, following_text) or []
        if middle := _agreement(places, following, len(text) - overlap):
            return [token for token, *_ in places[: middle[0]]], following_text, following, middle[1]
        overlap *= 4
    return None


def _agreement(places: Sequence[_Place], following: Sequence[_Place], offset: int) -> tuple[int, int] | None:
    """The middle of the first ``_AGREED`` tokens in a row, not all alike, that are the same in two readings, as a
    number of tokens in either: ``following`` is of the text from ``offset`` on that ``places`` is of."""
    at = {place: number for number, place in enumerate(places)}
    run, before = 0, -1
    for number, (token, start, end) in enumerate(following):
        same = at.get((token, start + offset, end + offset), -1)
        run = 0 if same < 0 else run + 1 if run and same == before + 1 else 1
        before = same
        if run >= _AGREED and _are_varied(following[number + 1 - _AGREED : number + 1]):
            return same + 1 - _AGREED // 2, number + 1 - _AGREED // 2
    return None


def _are_varied(places: Sequence[_Place]) -> bool:
    """Whether a quarter of the tokens differ: in a text that repeats itself, readings agree by chance."""
    return 4 * len({token for token, *_ in places}) >= len(places)


def added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens that the tokenizer puts before and after a text, such as ``<s>`` and ``</s>``."""
    bare = list(tokens_of(tokenizer, "a", add_special_tokens=False)["input_ids"])
    whole = list(tokens_of(tokenizer, "a")["input_ids"])
    at = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    return whole[:at], whole[at + len(bare) :]


# By the offsets of tokens in their text


def _by_offsets(
    tokenizer: Any, texts: Sequence[Rendered], ids: Sequence[list[int]], encodings: Sequence[Any]
) -> list[Tokens]:
    """``encodings``: the tokenizers library's records of the texts."""
    found = []
    for one, own, encoding in zip(texts, ids, encodings, strict=True):
        places = _Places(tokenizer, one.text, own, encoding)
        spans = [places.tokens_at(*span) for span in one.in_loss]
        straddles = any(
            first < after and places.characters(first)[0] < start
            for (first, after), (start, _) in zip(spans, one.in_loss, strict=True)
        )
        found.append(Tokens(own, spans, straddles))
    return found


@dataclass(frozen=True)
class _Places:
    """Where the tokens of a text stand in it."""

    tokenizer: Any
    text: str
    ids: list[int]
    encoding: Any

    def tokens_at(self, start: int, end: int) -> Span:
        """The tokens that hold characters of a span: those that end after its start and begin before its end."""
        tokens = range(len(self.ids))
        first = bisect_right(tokens, start, key=lambda at: self.characters(at)[1])
        return first, bisect_left(tokens, end, lo=first, key=lambda at: self.characters(at)[0])

    def characters(self, at: int) -> Span:
        """The characters of the token at a position.

        Byte-level tokenizers may leave spaces at a token's ends out of its offsets (``trim_offsets``); they are its
        own all the same.
        """
        start, end = self.encoding.token_to_chars(at)
        shown = self.text[start:end]
        if shown and self.text[start - 1 : start] != " " and self.text[end : end + 1] != " ":
            return start, end
        token = self.tokenizer.convert_ids_to_tokens(self.ids[at])
        before, behind = len(token) - len(token.lstrip(_SPACE)), len(token) - len(token.rstrip(_SPACE))
        if shown and before == len(token):  # a space that the tokenizer put before other characters
            return start, end
        if before and shown[:1] != " ":
            taken = self.encoding.token_to_chars(at - 1)[1] if at else 0
            start = max(start - before, taken)
        return start, end if shown[-1:] in ("", " ") else end + behind


# By the tokens of its beginnings


def _by_prefix(tokenizer: Any, texts: Sequence[Rendered], ids: Sequence[list[int]]) -> list[Tokens]:
    """The same for a tokenizer that knows no offsets.

    Tokens before a border are those that the text up to it has too, from the first one on. Where that text has more,
    the next token holds characters of both sides.
    """
    borders = [one.text[:at] for one in texts for span in one.in_loss for at in span]
    found_before = tokens_of(tokenizer, borders, add_special_tokens=False, verbose=False) if borders else {}
    before = iter(found_before.get("input_ids", []))
    found = []
    for one, own in zip(texts, ids, strict=True):
        both = [_common(next(before), own) for _ in range(2 * len(one.in_loss))]
        starts, ends = both[::2], both[1::2]
        spans = [(first, after + further) for (first, _), (after, further) in zip(starts, ends, strict=True)]
        found.append(Tokens(own, spans, any(further for _, further in starts)))
    return found


def _common(beginning: Sequence[int], whole: Sequence[int]) -> tuple[int, bool]:
    """How many tokens the two have in common from the first one on, and whether the beginning has more."""
    same = zip(beginning, whole, strict=False)
    count = next((at for at, (one, other) in enumerate(same) if one != other), min(len(beginning), len(whole)))
    return count, count < len(beginning)
