"""A conversation as its chat template writes it: texts, and which characters of them the assistant is to write.

A turn is trained on as the model will see it when it is to write it, that is with the turn as the last one. Most
templates write a turn the same whatever follows, and the whole conversation is one text. Some write an earlier turn
differently (Qwen3 and gpt-oss leave out what was thought); then a conversation becomes several texts, each with the
turns that stand in it as they will be asked for, and every turn is in the loss in one of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from capotune.data.samples import Conversation
from capotune.errors import DataError, SettingError
from capotune.tasks.generation.chat_template import ANSWERED, ChatTemplate, Message, RefusedError, Tools, same_start
from capotune.tasks.generation.notices import Notices
from capotune.tasks.generation.omissions import leaves_out_thinking, leaves_out_tools, refuse_left_out
from capotune.tasks.generation.tokens import Rendered

_THINKING_TAG = re.compile(r"</?think>")


@dataclass(frozen=True)
class _Turn:
    """An answer in the text that ends with it."""

    text: str
    start: int
    """Where the assistant begins to write."""
    stop: int
    """After the end of the turn."""
    closed: bool
    """Whether the template wrote an end."""


@dataclass(frozen=True)
class ConversationRenderer:
    """A chat template, and which of the assistant's turns are trained on."""

    template: ChatTemplate
    end: str
    """The token that is put after a last answer where the template ends turns in no token of its own."""
    learn: Literal["all", "last"] = "all"

    def trained(self, sample: Conversation, where: str, notices: Notices) -> list[Rendered]:
        """The texts of a conversation, each with turns in the loss, from where the assistant writes to their end.

        Raises ``DataError`` at ``where`` for a conversation that the template does not take or leaves a turn or a call
        of out. What is changed or left out otherwise goes into ``notices``.
        """
        sample = self._fitted(sample, where, notices)
        answers = sample.answers if self.learn == "all" else sample.answers[-1:]
        try:
            whole = self.template.render(sample.messages, sample.tools)
            turns = {at: self._turn(sample.messages[: at + 1], sample.tools, where, notices) for at in answers}
        except RefusedError as error:
            raise self._refused(error, where) from None
        own = {at: turn.text[turn.start : turn.stop] for at, turn in turns.items()}
        refuse_left_out(self.template, sample.messages, sample.tools, whole, own, where)
        self._note(sample, whole, turns, where, notices)
        return self._texts(whole, list(turns.values()))

    def asked(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        """A conversation up to where the assistant begins to write.

        Raises ``SettingError`` when the template refuses the messages.
        """
        sample = self._fitted(Conversation(tuple(map(dict, messages)), tuple(map(dict, tools))), "", Notices())
        try:
            return self.template.render(sample.messages, sample.tools, ask=True)
        except RefusedError as error:
            raise SettingError(f"the chat template refuses these messages: {error}") from None

    def question(self, sample: Conversation) -> str:
        """What stands before the last of the assistant's turns."""
        last = max(at for at, message in enumerate(sample.messages) if message["role"] == "assistant")
        if last > 0:
            return self.asked(sample.messages[:last], sample.tools)
        try:
            turn = self._turn(sample.messages[:1], sample.tools, "", Notices())
        except RefusedError as error:
            raise SettingError(f"the chat template refuses these messages: {error}") from None
        return turn.text[: turn.start]

    # ---------------------------------------------------------------------------------------------------- one answer

    def _turn(self, messages: Sequence[Message], tools: Tools, where: str, notices: Notices) -> _Turn:
        """The last of the ``messages``, an answer."""
        text = self.template.render(messages, tools)
        before = self.template.render(messages[:-1], tools, ask=True) if len(messages) > 1 else ""
        start = len(before)
        if not before or not text.startswith(before):
            start = self._header_end(text, messages, tools)
            if before and not _asks_for(text, start, before):
                raise DataError(
                    f"the chat template does not write an answer after the words that ask for it ({before[-40:]!r}), "
                    "so that the part to train on is unknown.",
                    where=where,
                    advice="Write turns of one role that follow each other as one, or give a base with another chat "
                    "template.",
                )
            if before:
                notices.add("asked otherwise", where)
                start = min(start, same_start(text, before))
        end = self.template.turn_end
        if text.endswith(end.tail):
            text_end = len(text) - len(end.tail)
            return _Turn(text, start, text_end + len(end.end), bool(end.end))
        return _Turn(text, start, len(text.rstrip()), self.template.closing_token(text[start:]) is not None)

    def _header_end(self, text: str, messages: Sequence[Message], tools: Tools) -> int:
        """Where the words of an answer begin, after what the template writes before each."""
        other = self.template.render([*messages[:-1], {"role": "assistant", "content": ANSWERED}], tools)
        end = min(same_start(text, other), other.find(ANSWERED) if ANSWERED in other else len(other))
        if len(messages) > 1:
            return end
        found = (text.rfind(words, 0, end) + len(words) for words in self.template.openings if words in text[:end])
        return next(found, end)

    # ---------------------------------------------------------------------------------------------------- its texts

    def _texts(self, whole: str, turns: Sequence[_Turn]) -> list[Rendered]:
        """As few texts as hold each turn as it will be asked for; one alone where that is the whole conversation."""
        found: dict[str, list[tuple[int, int, bool]]] = {whole: []}
        for turn in reversed(turns):
            text = next((text for text in found if text[: turn.stop] == turn.text[: turn.stop]), turn.text)
            stop = turn.stop if turn.closed else self._stop_in(text, turn.stop)
            found.setdefault(text, []).append((turn.start, stop, turn.closed))
        rendered = []
        for text, spans in sorted(found.items(), key=lambda item: len(item[0])):
            if spans:
                start, stop, closed = max(spans)
                if not closed and stop == len(text):
                    spans.remove((start, stop, closed))
                    text += self.template.turn_end.token or self.end
                    spans.append((start, len(text), True))
                rendered.append(Rendered(text, tuple(sorted((start, stop) for start, stop, _ in spans))))
        return rendered

    def _stop_in(self, text: str, stop: int) -> int:
        """Where a turn ends that the template writes no end after: with what begins the next one, or with the text."""
        rest, following = text[stop:], self.template.turn_end.next
        if not rest.strip():
            return len(text)
        if following and rest.startswith(following):
            return stop + len(following)
        begins = self.template.special_pattern.match(rest.lstrip())
        return stop + len(rest) - len(rest.lstrip()) + begins.end() if begins else stop

    # ---------------------------------------------------------------------------------------------------- before it

    def _fitted(self, sample: Conversation, where: str, notices: Notices) -> Conversation:
        """The conversation with the roles that the template has: without a system turn its text is the user's."""
        roles = {message["role"] for message in sample.messages}
        if "developer" in roles and not self.template.has_developer:
            notices.add("developer", where)
            as_system = [{**one, "role": "system"} if one["role"] == "developer" else one for one in sample.messages]
            sample = replace(sample, messages=tuple(as_system))
            roles = roles - {"developer"} | {"system"}
        if "system" in roles and not self.template.has_system:
            notices.add("system", where)
            sample = _without_system(sample)
        return sample

    def _note(self, sample: Conversation, whole: str, turns: dict[int, _Turn], where: str, notices: Notices) -> None:
        """What is left out or read otherwise, and is no reason to refuse the conversation."""
        for at, turn in turns.items():
            if leaves_out_thinking(self.template, sample.messages[: at + 1], sample.tools, turn.text, turn.start):
                notices.add("thinking", f"{where}, message {at + 1}")
        if leaves_out_tools(self.template, sample.messages, sample.tools, whole):
            notices.add("tools", where)
        for at, message in enumerate(sample.messages):
            text = message["content"] + message.get("reasoning_content", "")
            text = _THINKING_TAG.sub("", text) if message["role"] == "assistant" else text
            if found := self.template.special_pattern.search(text):
                notices.add("control token", f"{where}, message {at + 1}: {found[0]}")

    @staticmethod
    def _refused(error: RefusedError, where: str) -> DataError:
        return DataError(
            f"the chat template refuses the conversation: {error}",
            where=where,
            advice="Change the conversation to one that it takes, or give a base with another chat template.",
        )


def _asks_for(text: str, start: int, before: str) -> bool:
    """Whether ``before`` asks for the answer that begins at ``start`` in ``text``: it goes on after the words before
    the answer, or differs from them by tags of thinking alone (``<think>`` and ``<think></think>``)."""
    if before.startswith(text[:start]):
        return True
    same = same_start(text, before)
    return not any(_THINKING_TAG.sub("", rest).strip() for rest in (text[same:start], before[same:]))


def _without_system(sample: Conversation) -> Conversation:
    """Each system turn's text before that of the user turn that follows it."""
    messages: list[dict[str, Any]] = []
    read_only: set[int] = set()
    waiting: list[dict[str, Any]] = []
    for at, message in enumerate(sample.messages):
        if message["role"] == "system":
            waiting.append(message)
            continue
        if message["role"] == "user" and waiting:
            texts = [one["content"] for one in (*waiting, message) if one["content"].strip()]
            message, waiting = {**message, "content": "\n\n".join(texts)}, []
        if at in sample.read_only:
            read_only.add(len(messages))
        messages.append(message)
    return Conversation((*messages, *waiting), sample.tools, frozenset(read_only))
