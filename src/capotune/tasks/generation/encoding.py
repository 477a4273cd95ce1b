"""From text to tokens: which tokens a record becomes, and which of them are in the loss.

A record is a conversation, a prompt with its completion, or plain text (``data.samples``). It becomes segments of
text, each in the loss or only read; segments are tokenised one by one, so that a prompt has the same tokens in training
and later when the model is asked. The end of every text is in the loss too: it is how the model stops.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

from jinja2 import TemplateError

from capotune.data.batches import IGNORE_INDEX, Encoded
from capotune.data.samples import Conversation, Document, Pair, Sample, Samples
from capotune.errors import DataError, SettingError
from capotune.models.base import Base

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role.capitalize() + ':\\n' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)
"""Stands in for a chat template where the model has none: each turn under its role's name."""

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SHOWN_START = 48  # tokens of a plain text that a model is given to go on from, at most


@dataclass(frozen=True)
class Segment:
    """A part of a text, tokenised by itself; ``in_loss``: trained on, else only read."""

    text: str
    in_loss: bool


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
    """What stands between a plain prompt and its completion."""
    chat: bool = False
    """Whether it was trained on conversations."""

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return self.base.tokenizer

    def encode(self, samples: Samples) -> list[list[Encoded]]:
        """What each sample becomes: one sequence, or several windows for a long plain text.

        Raises ``DataError``, with file and line, for a conversation that the chat template does not take.
        """
        segments = [self._segments(sample, samples.where(row)) for row, sample in enumerate(samples.samples)]
        ids = iter(self._ids([segment.text for of_sample in segments for segment in of_sample]))
        return [
            self._encoded(sample, [(next(ids), segment.in_loss) for segment in of_sample])
            for sample, of_sample in zip(samples.samples, segments, strict=True)
        ]

    def encode_prompt(self, prompt: str) -> list[int]:
        """A plain prompt to go on from, as prompts stood in training."""
        return [*self._front, *self._ids([self._parted(prompt)])[0]]

    def encode_chat(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """A conversation up to where the assistant begins to write.

        Raises ``SettingError`` when there is no chat template or it refuses the messages.
        """
        if self.chat_template is None:
            raise SettingError(
                "the model has no chat template: it continues text and was not made to chat.",
                advice="Let it continue a text with `capo generate`, or train an adapter on conversations first.",
            )
        return self._asked(messages, tools)

    def encode_question(self, sample: Sample) -> list[int]:
        """What stands before the answer: all before a conversation's last assistant turn; the start of a plain text."""
        if isinstance(sample, Pair):
            return self.encode_prompt(sample.prompt)
        if isinstance(sample, Document):
            ids = self._ids([sample.text])[0]
            return [*self._front, *ids[: max(1, min(_SHOWN_START, len(ids) // 2))]]
        last = self._answers(sample.messages)[-1]
        return self._asked(sample.messages[:last], sample.tools, sample.answers_from)

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Each token as it reads in a text, special ones by name; what is no whole character stays as it is stored."""
        return [self._token_text(token) for token in self.tokenizer.convert_ids_to_tokens(list(ids))]

    def _token_text(self, token: str) -> str:
        if byte := _BYTE.fullmatch(token):  # as SentencePiece writes a character that it has no token for
            return chr(int(byte[1], 16)) if int(byte[1], 16) < 128 else token
        if "▁" in token:
            return token.replace("▁", " ")
        text = str(self.tokenizer.convert_tokens_to_string([token]))
        return token if "\ufffd" in text else text

    @cached_property
    def _front(self) -> list[int]:
        """Tokens that the tokenizer puts before a text, such as ``<s>``."""
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a")["input_ids"]
        at = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
        return list(whole[:at])

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:  # the tokenizer takes no empty list
            return []
        ids = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [list(one) for one in ids]

    def _parted(self, prompt: str) -> str:
        """A plain prompt, parted from what follows."""
        return prompt if prompt[-1:].isspace() else prompt + self.separator

    def _segments(self, sample: Sample, where: str) -> list[Segment]:
        if isinstance(sample, Document):
            return [Segment(sample.text, True)]
        if isinstance(sample, Pair):
            return [Segment(self._parted(sample.prompt), False), Segment(sample.completion, True)]
        turns = self._answers(sample.messages, sample.answers_from)
        turns = turns if self.learn == "all" else turns[-1:]
        try:
            whole = self._render(sample.messages, sample.tools)
            return self._split(whole, sample.messages, sample.tools, turns, where)
        except (TemplateError, TypeError) as error:
            raise DataError(f"the chat template refuses the conversation: {error}", where=where) from None

    @staticmethod
    def _answers(messages: Sequence[dict[str, Any]], answers_from: int = 0) -> list[int]:
        """Positions of the assistant's turns that may be in the loss."""
        return [at for at, turn in enumerate(messages) if at >= answers_from and turn["role"] == "assistant"]

    def _asked(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], answers_from: int = 0
    ) -> list[int]:
        """Tokens of a conversation up to where the assistant writes, in the segments that training cuts it into."""
        turns = self._answers(messages, answers_from) if self.learn == "all" else []
        try:
            segments = self._split(self._render(messages, tools, answer=True), messages, tools, turns)
        except (TemplateError, TypeError) as error:
            raise SettingError(f"the chat template refuses these messages: {error}") from None
        ids = self._ids([segment.text for segment in segments])
        return self._joined([(one, segment.in_loss) for one, segment in zip(ids, segments, strict=True)], chat=True)[0]

    def _split(
        self,
        whole: str,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]],
        turns: list[int],
        where: str | None = None,
    ) -> list[Segment]:
        """A conversation as the template writes it, cut where each of the ``turns`` begins and ends.

        A turn that is written differently once others follow cannot be trained on: ``DataError`` at ``where``. In what
        is only asked (None) it is not cut out.
        """
        done, segments = 0, []
        for at in turns:
            before = self._render(messages[:at], tools, answer=True)
            after = self._render(messages[: at + 1], tools)
            if whole.startswith(after) and after.startswith(before):
                segments += [Segment(whole[done : len(before)], False), Segment(whole[len(before) : len(after)], True)]
                done = len(after)
            elif where is not None and after.startswith(before):
                is_last = at == turns[-1]
                raise DataError(
                    f"the chat template writes turn {at + 1} differently once others follow, so that what is trained "
                    "on is not what the model will see.",
                    where=where,
                    advice="Let the conversation end with its last answer." if is_last else "Give `learn=last`.",
                )
            elif where is not None:
                raise DataError(
                    f"the chat template does not write an answer after the words that ask for it ({before[-40:]!r}), "
                    "so that the part to train on is unknown.",
                    where=where,
                )
        return [segment for segment in [*segments, Segment(whole[done:], False)] if segment.text]

    def _render(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], answer: bool = False) -> str:
        if not messages and not answer:
            return ""
        return str(
            self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=answer,
            )
        )

    def _encoded(self, sample: Sample, segments: list[tuple[list[int], bool]]) -> list[Encoded]:
        is_chat = isinstance(sample, Conversation)
        if not is_chat:
            segments = [*segments[:-1], (segments[-1][0] + [self.end_ids[0]], True)]
        ids, labels = self._joined(segments, is_chat)
        return self._windows(ids) if isinstance(sample, Document) else [self._cut(ids, labels)]

    def _joined(self, segments: list[tuple[list[int], bool]], chat: bool) -> tuple[list[int], list[int]]:
        """Ids and labels of a whole text. Every segment in the loss has an end, and nothing after it is in the loss."""
        own_front = chat and self.chat_template != PLAIN_TEMPLATE  # a model's template writes its own
        front = [] if own_front else self._front
        ids, labels = [*front], [IGNORE_INDEX] * len(front)
        for segment, in_loss in segments:
            wanted = segment[: self._end_in(segment)] if in_loss else []
            if in_loss and not wanted:
                wanted = segment = [*segment, self.end_ids[0]]
            ids += segment
            labels += wanted + [IGNORE_INDEX] * (len(segment) - len(wanted))
        return ids, labels

    def _end_in(self, ids: list[int]) -> int:
        """Position after the last end token; 0 when there is none."""
        return max((at + 1 for at, token in enumerate(ids) if token in self.end_ids), default=0)

    def _windows(self, ids: list[int]) -> list[Encoded]:
        """A plain text of any length, window after window, so that nothing of it is lost."""
        starts = list(range(0, len(ids), self.max_length))
        if len(starts) > 1 and starts[-1] == len(ids) - 1:  # the end alone, which nothing would stand before
            starts[-1] -= 1
        parts = [ids[start:end] for start, end in pairwise([*starts, len(ids)])]
        return [Encoded(part, [IGNORE_INDEX, *part[1:]], len(part)) for part in parts]

    def _cut(self, ids: list[int], labels: list[int]) -> Encoded:
        """A sequence that must fit; what is beyond ``max_length`` is lost."""
        lost = [label for label in labels[self.max_length :] if label != IGNORE_INDEX]
        return Encoded(
            ids[: self.max_length],
            [IGNORE_INDEX, *labels[1 : self.max_length]],
            tokens=len(ids),
            answer_cut=any(label not in self.end_ids for label in lost),
            end_cut=any(label in self.end_ids for label in lost),
        )
