"""From text to tokens: which tokens a record becomes, and which of them are in the loss.

A record is a conversation, a prompt with its completion, or plain text (``data.samples``). It becomes one text, with
the characters of it that are in the loss, and that text is tokenised as a whole. The end of every text is in the loss
too: it is how the model stops.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from capotune.data.batches import IGNORE_INDEX, Encoded
from capotune.data.encoded_rows import EncodedRows
from capotune.data.samples import Conversation, Document, Pair, Sample, Samples
from capotune.errors import SettingError
from capotune.models.base import Base
from capotune.settings import DecodingSettings
from capotune.tasks.generation.chat_template import PLAIN_TEMPLATE, ChatTemplate
from capotune.tasks.generation.conversation import ConversationRenderer
from capotune.tasks.generation.notices import Notices
from capotune.tasks.generation.thinking import with_thinking_apart
from capotune.tasks.generation.tokens import Rendered, Tokens, added_tokens, tokenize, tokenize_parts

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_AT_ONCE = 1000  # samples tokenised together, at most
_CHARACTERS_AT_ONCE = 2**20  # of them; a longer one alone
_CONTEXT = 16  # tokens before an answer that decide how its first ones read, at most
_SHOWN_START = 48  # tokens of a plain text that a model is given to go on from, at most


@dataclass(frozen=True)
class TextEncoder:
    """A base's tokenizer and chat template, and what is trained on."""

    base: Base
    max_length: int
    """Longest sequence in tokens."""
    end_ids: tuple[int, ...]
    """Tokens that end a text; the first is the one that is added where the template writes none."""
    chat_template: str | None
    """Jinja, as Transformers reads it; None: the model has none, and none was needed."""
    template_from: str
    """Where it comes from, in words."""
    learn: Literal["all", "last"] = "all"
    """Which of the assistant's turns are trained on."""
    separator: str = ""
    """What adapters of earlier code were trained with between a plain prompt and its completion; else nothing."""
    chat: bool = False
    """Whether it was trained on conversations."""
    tool_template: str | None = None
    """The template for conversations with tools, where the model has one of its own for them."""

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return self.base.tokenizer

    def encode(self, samples: Samples, notices: Notices | None = None) -> EncodedRows:
        """What each sample becomes: one sequence, several windows for a long plain text, or several texts for a
        conversation of which the chat template writes earlier turns otherwise.

        What the chat template changes or leaves out is added to ``notices``. Raises ``DataError``, with file and line,
        for a conversation that it does not take, and for a text with a token that the base has no embedding for.
        """
        return EncodedRows.of(self.encoded(samples, Notices() if notices is None else notices))

    def encoded(self, samples: Samples, notices: Notices) -> Iterator[Iterable[Encoded]]:
        """The same row by row; the sequences of a row are to be read before the next one is."""
        for rows in _together(samples.facts["characters"]):
            sample = samples.samples[rows[0]] if len(rows) == 1 else None
            if isinstance(sample, Document):
                yield self._windows(
                    self._document(tokenize_parts(self.tokenizer, sample.parts), samples.where(rows[0]))
                )
            else:
                yield from self._some(samples, rows, notices)

    def _some(self, samples: Samples, rows: range, notices: Notices) -> Iterator[Iterable[Encoded]]:
        """What the samples of these rows become, which are tokenised together."""
        some = [samples.samples[row] for row in rows]
        texts = [self._texts(sample, samples.where(row), notices) for sample, row in zip(some, rows, strict=True)]
        tokens = iter(tokenize(self.tokenizer, [text for of_sample in texts for text in of_sample]))
        for sample, row, of_sample in zip(some, rows, texts, strict=True):
            found = [next(tokens) for _ in of_sample]
            for one in found:
                self.base.check_tokens(one.ids, samples.where(row))
            yield [sequence for one in found for sequence in self._encoded(sample, one)]

    def encode_prompt(self, prompt: str) -> list[int]:
        """A plain prompt to go on from: its own tokens, as those of a text that ends there."""
        return self._checked([*self._added[0], *self._tokens(Rendered(self._parted(prompt))).ids])

    def encode_chat(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """A conversation up to where the assistant begins to write.

        Raises ``SettingError`` when there is no chat template or it refuses the messages.
        """
        if self.chat_template is None:
            raise SettingError(
                "the model has no chat template: it continues text and was not made to chat.",
                advice="Let it continue a text with `capo generate`, or train an adapter on conversations first.",
            )
        if self._template.thinking is not None:
            messages = [with_thinking_apart(message) for message in messages]
        return self._asked(self._renderer.asked(messages, tools))

    def encode_question(self, sample: Sample) -> list[int]:
        """What stands before the answer: all before a conversation's last assistant turn; the start of a plain text."""
        if isinstance(sample, Pair):
            return self.encode_prompt(sample.prompt)
        if isinstance(sample, Document):
            ids = self._tokens(Rendered(sample.text)).ids
            return [*self._added[0], *ids[: max(1, min(_SHOWN_START, len(ids) // 2))]]
        return self._asked(self._renderer.question(sample))

    def chat_decoding(self, decoding: DecodingSettings) -> DecodingSettings:
        """The settings for an answer in a conversation: it also ends where the template ends a turn in plain text."""
        stops = [] if self.chat_template is None else self._template.stops
        if more := tuple(stop for stop in stops if stop not in decoding.stop):
            return decoding.model_copy(update={"stop": (*decoding.stop, *more)})
        return decoding

    @property
    def chat_lead(self) -> str:
        """White space that the chat template puts before an answer, which is no part of it."""
        return "" if self.chat_template is None else self._template.lead

    def decode(self, ids: Sequence[int], *, special_tokens: bool = False) -> str:
        """The text of tokens as they stand, without special ones unless they are asked for."""
        text = self.tokenizer.decode(
            list(ids), skip_special_tokens=not special_tokens, clean_up_tokenization_spaces=False
        )
        return str(text)

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """What ``ids`` add to the text of the tokens before them; what was thought as ``<think>…</think>``, where the
        chat template has other markers.

        Tokens read otherwise at the start of a text: ``▁red`` is "red" there and " red" behind a word.
        """
        if self.chat_template is not None and (markers := self._template.thinking):
            text = markers.read(self._added_text(before, ids, special_tokens=True))
            if text is not None:
                return self._template.special_pattern.sub("", text)
        return self._added_text(before, ids)

    def _added_text(self, before: Sequence[int], ids: Sequence[int], *, special_tokens: bool = False) -> str:
        context, decode = list(before[-_CONTEXT:]), partial(self.decode, special_tokens=special_tokens)
        start = decode(context).rstrip("\ufffd")  # a half character that ``ids`` may complete
        whole = decode([*context, *ids])
        return whole[len(start) :] if whole.startswith(start) else decode(ids)

    def without_open_bytes(self, ids: Sequence[int]) -> list[int]:
        """``ids`` without the bytes at their end that SentencePiece writes a character with that it has no token for.

        What a run of them reads like is not known before another token follows: one that is no UTF-8 spoils all.
        """
        end = len(ids)
        while end and _BYTE.fullmatch(self.tokenizer.convert_ids_to_tokens(ids[end - 1]) or ""):
            end -= 1
        return list(ids[:end])

    def special_ids(self, texts: Sequence[str]) -> list[int]:
        """Ids of those texts that are a special token."""
        named = set(self.tokenizer.all_special_tokens) & set(texts) if texts else set()
        return [int(self.tokenizer.convert_tokens_to_ids(one)) for one in sorted(named)]

    @cached_property
    def _added(self) -> tuple[list[int], list[int]]:
        """Tokens that the tokenizer puts before and after a text."""
        return added_tokens(self.tokenizer)

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.chat_template or PLAIN_TEMPLATE, self.tool_template)

    @cached_property
    def _renderer(self) -> ConversationRenderer:
        return ConversationRenderer(self._template, self.tokenizer.convert_ids_to_tokens(self.end_ids[0]), self.learn)

    def _parted(self, prompt: str) -> str:
        """A plain prompt, with the separator where one belongs to the adapter and no white space stands there."""
        return prompt if prompt[-1:].isspace() else prompt + self.separator

    def _texts(self, sample: Sample, where: str, notices: Notices) -> list[Rendered]:
        if isinstance(sample, Document):
            return [Rendered(sample.text, ((0, len(sample.text)),))]
        if isinstance(sample, Pair):
            prompt = self._parted(sample.prompt)
            return [Rendered(prompt + sample.completion, ((len(prompt), len(prompt) + len(sample.completion)),))]
        return self._renderer.trained(sample, where, notices)

    def _encoded(self, sample: Sample, tokens: Tokens) -> list[Encoded]:
        if isinstance(sample, Conversation):
            return [self._cut(*self._labelled(self._chat_front, tokens), tokens.straddles)]
        if isinstance(sample, Document):
            return list(self._windows(self._document([tokens.ids])))
        ids, labels = self._labelled(self._added[0], tokens)
        behind = self._behind(ids)
        return [self._cut(ids + behind, labels + behind, tokens.straddles)]

    def _document(self, parts: Iterable[list[int]], where: str | None = None) -> Iterator[list[int]]:
        """The tokens of a plain text, part by part, and what stands around them."""
        last = front = self._added[0]
        yield front
        for part in parts:
            self.base.check_tokens(part, where)
            last = part or last
            yield part
        yield self._behind(last)

    def _behind(self, ids: list[int]) -> list[int]:
        """What is put after the tokens of a text, whose last ones are ``ids``."""
        behind = self._added[1]
        ends = [*ids, *behind][-1:]
        return behind if ends and ends[0] in self.end_ids else [*behind, self.end_ids[0]]

    def _asked(self, text: str) -> list[int]:
        return self._checked([*self._chat_front, *self._tokens(Rendered(text)).ids])

    def _tokens(self, rendered: Rendered) -> Tokens:
        (tokens,) = tokenize(self.tokenizer, [rendered])
        return tokens

    def _checked(self, ids: list[int]) -> list[int]:
        """``ids``; ``DataError`` for a token that the base has no embedding for."""
        self.base.check_tokens(ids)
        return ids

    @property
    def _chat_front(self) -> list[int]:
        """Tokens before a conversation: none where the model's own template writes them."""
        return self._added[0] if self.chat_template == PLAIN_TEMPLATE else []

    @staticmethod
    def _labelled(front: list[int], tokens: Tokens) -> tuple[list[int], list[int]]:
        """Ids and labels of a text after ``front``."""
        labels = [IGNORE_INDEX] * len(tokens.ids)
        for first, after in tokens.in_loss:
            labels[first:after] = tokens.ids[first:after]
        return [*front, *tokens.ids], [IGNORE_INDEX] * len(front) + labels

    def _windows(self, parts: Iterable[list[int]]) -> Iterator[Encoded]:
        """A plain text of any length, window after window, so that nothing of it is lost."""
        length, ids = self.max_length, list[int]()
        for part in parts:
            ids += part
            sure = max(0, len(ids) - 2) // length * length
            for start in range(0, sure, length):
                yield _window(ids[start : start + length])
            del ids[:sure]
        if len(ids) > length:  # the end alone, which nothing would stand before
            yield _window(ids[: length - 1])
            ids = ids[length - 1 :]
        yield _window(ids)

    def _cut(self, ids: list[int], labels: list[int], straddles: bool) -> Encoded:
        """A sequence that must fit; what is beyond ``max_length`` is lost."""
        lost = [label for label in labels[self.max_length :] if label != IGNORE_INDEX]
        return Encoded(
            ids[: self.max_length],
            [IGNORE_INDEX, *labels[1 : self.max_length]],
            tokens=len(ids),
            answer_cut=any(label not in self.end_ids for label in lost),
            end_cut=any(label in self.end_ids for label in lost),
            straddles=straddles,
        )


def _window(ids: list[int]) -> Encoded:
    return Encoded(ids, [IGNORE_INDEX, *ids[1:]], len(ids))


def _together(characters: NDArray[np.int64]) -> Iterator[range]:
    """The rows that are tokenised together, by how long each is."""
    start = total = 0
    for row, size in enumerate(characters.tolist()):
        if row > start and (row - start == _AT_ONCE or total + size > _CHARACTERS_AT_ONCE):
            yield range(start, row)
            start, total = row, 0
        total += size
    if len(characters):
        yield range(start, len(characters))
