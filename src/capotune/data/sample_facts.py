"""What is to be known of every sample before any is tokenised, worked out when its row is read: some 40 bytes a row.

Texts are compared by hashes of 64 bits: that two of ten million differ and have one hash is likely once in 400,000
times, and then a row counts as a repeat of another.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from capotune.data.samples import Document, Pair, Sample, answer_of, asked
from capotune.data.split import normalised

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FACTS", "facts_of"]

FACTS: Final = np.dtype(
    [
        ("question", np.uint64),  # of all that is asked
        ("answer", np.uint64),  # of the answer, of no text where there is none
        ("row", np.uint64),  # of all of it
        ("characters", np.int64),
        ("read_only", np.int32),  # assistant turns that are not trained on
        ("answered", np.bool_),  # there is an answer to compare with
        ("joined", np.bool_),  # no white space between a prompt and a completion that begins with a letter
        ("open", np.bool_),  # it goes on after the last answer
    ]
)
"""The hashes are of texts as they are compared (``normalised``)."""


def facts_of(samples: Iterable[Sample]) -> NDArray[Any]:
    """Those of each sample, an array of ``FACTS``."""
    return np.fromiter(map(_facts, samples), dtype=FACTS)


def _facts(sample: Sample) -> tuple[int, int, int, int, int, bool, bool, bool]:
    answer = answer_of(sample)
    answered = _hash([normalised(answer or "")])
    if isinstance(sample, Document):
        question = _hash(_normalised_parts(sample.parts))
        return question, answered, question, sum(map(len, sample.parts)), 0, False, False, False
    question = _hash([normalised(asked(sample))])
    if isinstance(sample, Pair):
        size = len(sample.prompt) + len(sample.completion)
        return (
            question,
            answered,
            _hash([f"{question} {answered}"]),
            size,
            0,
            answer is not None,
            _joined(sample),
            False,
        )
    messages = [{**message, "content": normalised(message["content"])} for message in sample.messages]
    text = json.dumps(messages)
    is_open = sample.messages[-1]["role"] != "assistant"
    return question, answered, _hash([text]), len(text), len(sample.read_only), answer is not None, False, is_open


def _hash(parts: Iterable[str]) -> int:
    """Of a text, which may be given in parts."""
    total = blake2b(digest_size=8)
    for part in parts:
        total.update(part.encode())
    return int.from_bytes(total.digest(), "little")


def _normalised_parts(parts: Iterable[str]) -> Iterator[str]:
    """``normalised`` of a text in parts, in parts."""
    word, between = "", ""
    for part in parts:
        text = word + part
        words = text.split()
        word = words.pop() if words and not text[-1].isspace() else ""
        if words:
            yield between + normalised(" ".join(words))
            between = " "
    if word:
        yield between + normalised(word)


def _joined(sample: Pair) -> bool:
    """Scripts without capitals, many of which put no space between words, are left out."""
    if sample.prompt[-1:].isspace():
        return False
    return sample.completion[:1].lower() != sample.completion[:1].upper()
