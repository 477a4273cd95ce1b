"""A model's chat template: what it takes, what it writes, and how a turn ends in it.

Templates are asked, not recognised: a few made-up turns are written with each, and what becomes of them tells whether
it has a system turn, in what form it takes texts and tool calls, and what it writes after an answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from capotune.tasks.generation.sandbox import render
from capotune.tasks.generation.thinking import OPENED, ThinkingMarkers

Message = Mapping[str, Any]
"""A turn, as ``data.samples.Conversation`` holds it."""
Tools = Sequence[Mapping[str, Any]]
"""Functions that the model may call, as JSON schemas."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role.capitalize() + ':\\n' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)
"""Stands in for a chat template where the model has none: each turn under its role's name."""

ASKED, ANSWERED, ASKED_AGAIN, TOLD = "qwkasked", "qwkanswered", "qwkagain", "qwktold"  # words that no template writes

_USER, _ANSWER = {"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}
_CALLS = [{"id": "qwkcall00", "type": "function", "function": {"name": "qwkname", "arguments": {"qwkkey": "qwkvalue"}}}]
_CALL = {"role": "assistant", "content": "", "tool_calls": _CALLS}
_BEGUN_MARKER = re.compile(r"[<\[][^<>\[\]\s]*$")
"""A marker that is plain text to the tokenizer, cut short: ``<|`` of ``<|return|>``."""
_LAST_MARKER = re.compile(r"<[^<>\s]+>$")
_OF_TEMPLATES = (
    TemplateError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
)
"""What a template may raise: it calls methods of texts and lists."""


class RefusedError(Exception):
    """A chat template does not take the messages; says why."""


@dataclass(frozen=True)
class TurnEnd:
    """What stands after an answer."""

    tail: str
    """All that the template writes after the last turn's text."""
    end: str
    """The part of it that ends the turn, with what stands before that: ``<|im_end|>``. Empty: it writes no end."""
    next: str
    """Where it writes no end: what the next turn begins with, which ends this one: ``<|user|>``, ``\\n\\nUser:``."""
    token: str | None
    """The special token to stop at."""

    @property
    def stop(self) -> str | None:
        """The text to stop at where no special token ends a turn."""
        return None if self.token else self.end.strip() or self.next or None


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with its tokenizer."""

    tokenizer: Any
    template: str
    """Jinja, as Transformers reads it."""
    tool_use: str | None = None
    """The one that a model has for conversations with tools, where it has several."""

    def render(self, messages: Sequence[Message], tools: Tools = (), *, ask: bool = False) -> str:
        """The messages as one text; with ``ask`` up to where the assistant begins to write.

        Raises ``RefusedError`` when the template does not take them.
        """
        return self._render([self._fitted(message) for message in messages], tools, ask)

    def _render(self, messages: list[dict[str, Any]], tools: Tools = (), ask: bool = False) -> str:
        template = self.tool_use if tools and self.tool_use is not None else self.template
        try:
            return render(template, messages, tools or None, self._special_tokens, ask=ask)
        except _OF_TEMPLATES as error:
            raise RefusedError(str(error).strip() or type(error).__name__) from None

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        """``bos_token``, ``eos_token`` and the others that a template names."""
        return {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}

    # ------------------------------------------------------------------------------------------------- what it takes

    @cached_property
    def has_system(self) -> bool:
        """Whether it writes a system turn; some refuse one, some leave it out without a word."""
        return self._writes([{"role": "system", "content": TOLD}, _USER, _ANSWER], TOLD)

    @cached_property
    def has_developer(self) -> bool:
        """Whether it writes a developer turn."""
        return self._writes([{"role": "developer", "content": TOLD}, _USER, _ANSWER], TOLD)

    @cached_property
    def has_tool_turns(self) -> bool:
        """Whether it writes a tool's answer."""
        return self._writes([_USER, _CALL, {"role": "tool", "name": "qwkname", "content": TOLD}, _ANSWER], TOLD)

    @cached_property
    def has_calls(self) -> bool:
        """Whether it writes a tool call, alone and beside a text."""
        beside = {**_CALL, "content": ANSWERED}
        return all(self._writes([_USER, call], "qwkname", "qwkvalue") for call in (_CALL, beside))

    @cached_property
    def has_tools(self) -> bool:
        """Whether it writes the functions that a model may call."""
        function = {"name": "qwkname", "description": "qwkwhat", "parameters": {"type": "object", "properties": {}}}
        tools = [{"type": "function", "function": function}]
        try:
            return "qwkname" in self.render([_USER, _ANSWER], tools)
        except RefusedError:
            return False

    @cached_property
    def openings(self) -> list[str]:
        """The words that ask for an answer, from each special token before them on; the longest first."""
        asking = self._after(ASKED, [_USER], ask=True)
        return [asking[match.start() :] for match in self.special_pattern.finditer(asking)]

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether it takes a content as a list of parts alone, as templates of models that also see do."""
        texts, parts = [_USER, _ANSWER], [_in_parts(_USER), _in_parts(_ANSWER)]
        return not self._writes_as_is(texts, ASKED, ANSWERED) and self._writes_as_is(parts, ASKED, ANSWERED)

    @cached_property
    def _takes_json(self) -> bool:
        """Whether it takes a call's arguments as JSON alone, not as an object."""
        words = ("qwkname", "qwkvalue")
        return not self._writes_as_is([_USER, _CALL], *words) and self._writes_as_is([_USER, _with_json(_CALL)], *words)

    def _writes(self, messages: list[dict[str, Any]], *words: str) -> bool:
        return self._writes_as_is([self._fitted(message) for message in messages], *words)

    def _writes_as_is(self, messages: list[dict[str, Any]], *words: str) -> bool:
        try:
            text = self._render(messages)
        except RefusedError:
            return False
        return all(word in text for word in words)

    def _fitted(self, message: Message) -> dict[str, Any]:
        """A message in the form that the template takes."""
        fitted = dict(message)
        if "reasoning_content" in fitted:
            fitted.setdefault("thinking", fitted["reasoning_content"])  # as gpt-oss reads it
        if "tool_calls" in fitted and self._takes_json:
            fitted = _with_json(fitted)
        return _in_parts(fitted) if self._takes_parts else fitted

    @cached_property
    def lead(self) -> str:
        """White space that it writes between the words that ask for an answer and the answer; no part of the answer."""
        asking, answered = self._after(ASKED, [_USER], ask=True), self._after(ASKED, [_USER, _ANSWER])
        lead = answered[len(asking) :].partition(ANSWERED)[0]
        return lead if answered.startswith(asking) and lead.isspace() else ""

    @cached_property
    def thinking(self) -> ThinkingMarkers | None:
        """The markers around what was thought, where they are others than ``<think>`` and ``</think>``."""
        asking = self._after(ASKED, [_USER], ask=True)
        alone, thought = ({**_ANSWER, **more} for more in ({}, {"reasoning_content": TOLD}))
        written, plain = (self._after(ASKED, [_USER, answer]) for answer in (thought, alone))
        if not (written.startswith(asking) and plain.startswith(asking)):
            return None
        before, told, rest = written[len(asking) :].partition(TOLD)
        between, answered, _ = rest.partition(ANSWERED)
        if not (told and answered and before.strip() and between.strip()) or OPENED in before:
            return None
        return ThinkingMarkers(before, between, plain[len(asking) :].partition(ANSWERED)[0])

    # ---------------------------------------------------------------------------------------------- how a turn ends

    @cached_property
    def turn_end(self) -> TurnEnd:
        """How an answer ends, found in what the template writes after one."""
        tail = self._after(ANSWERED, [_USER, _ANSWER])
        again = {"role": "user", "content": ASKED_AGAIN}
        between = self._after(ANSWERED, [_USER, _ANSWER, again, _ANSWER]).partition(ASKED_AGAIN)[0]
        both = self._common(tail, between) if between else tail
        end = self._through_last_special(both) or both.rstrip()
        if not end:  # in the middle another one than at the end, or none
            end = self._through_first_special(tail)
        following = "" if end else self._through_first_special(between)
        specials = self.special_pattern.findall(end or following)
        return TurnEnd(tail, end, following, specials[-1] if specials else None)

    @cached_property
    def call_end(self) -> str | None:
        """The special token that ends a turn with a tool call; None: as any turn, or the template has no calls."""
        behind = self._after("qwkvalue", [_USER, _CALL])
        return None if behind.endswith(self.turn_end.tail) else self.closing_token(behind)

    @cached_property
    def stops(self) -> list[str]:
        """The texts to stop at where no special token ends a turn: one with a tool call may end otherwise."""
        found = [self.turn_end.stop] if self.turn_end.stop else []
        behind = self._after("qwkvalue", [_USER, _CALL])
        if self.turn_end.stop and not behind.endswith(self.turn_end.tail) and self.call_end is None:
            found += [marker[0] for marker in [_LAST_MARKER.search(behind.rstrip())] if marker]
        return found

    def closing_token(self, text: str) -> str | None:
        """The special token at the end of a text, white space aside."""
        specials = list(self.special_pattern.finditer(text.rstrip()))
        return specials[-1][0] if specials and specials[-1].end() == len(text.rstrip()) else None

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches the tokenizer's special tokens in a text."""
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        tokens = sorted({*added, *self.tokenizer.all_special_tokens}, key=len, reverse=True)
        return re.compile("|".join(re.escape(token) for token in tokens if token) or r"(?!)")

    def _after(self, word: str, messages: list[dict[str, Any]], *, ask: bool = False) -> str:
        try:
            return self.render(messages, ask=ask).partition(word)[2]
        except RefusedError:
            return ""

    def _common(self, one: str, other: str) -> str:
        """What both texts begin with; a special token or another marker is whole or no part of it."""
        text = ""
        for left, right in zip(self._pieces(one), self._pieces(other), strict=False):
            if left != right:
                special = self.special_pattern.fullmatch(left) or self.special_pattern.fullmatch(right)
                return text if special else text + _BEGUN_MARKER.sub("", left[: same_start(left, right)])
            text += left
        return text

    def _pieces(self, text: str) -> list[str]:
        """The text cut into special tokens and what stands between them."""
        return [piece for piece in re.split(f"({self.special_pattern.pattern})", text) if piece]

    def _through_last_special(self, text: str) -> str:
        ends = [match.end() for match in self.special_pattern.finditer(text)]
        return text[: ends[-1]] if ends else ""

    def _through_first_special(self, text: str) -> str:
        """Up to the first special token; without it where other text stands before it."""
        found = self.special_pattern.search(text)
        if found is None:
            return text.rstrip()
        before = text[: found.start()]
        return before.rstrip() if before.strip() else text[: found.end()]


def same_start(one: str, other: str) -> int:
    """How many characters both texts begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))


def _in_parts(message: Message) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _with_json(message: Message) -> dict[str, Any]:
    """The message with the arguments of its calls as JSON."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}
