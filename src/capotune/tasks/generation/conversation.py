"""A conversation as its chat template writes it: one text, and which characters of it the assistant is to write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError

from capotune.data.samples import Conversation
from capotune.errors import DataError, SettingError
from capotune.tasks.generation.tokens import Rendered, Span

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role.capitalize() + ':\\n' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)
"""Stands in for a chat template where the model has none: each turn under its role's name."""


@dataclass(frozen=True)
class ConversationRenderer:
    """A chat template, and which of the assistant's turns are trained on."""

    tokenizer: Any
    template: str | None
    learn: Literal["all", "last"]
    ends: tuple[str, ...]
    """Tokens that end a text; the first is put where the template writes none after an answer."""

    def trained(self, sample: Conversation, where: str) -> Rendered:
        """A conversation with the turns that are in the loss, each from the words that ask for it to its end.

        Raises ``DataError`` at ``where`` for a conversation that the template does not take, and for one whose turns
        cannot be told apart in what it writes.
        """
        turns = _answers(sample.messages, sample.answers_from)
        turns = turns if self.learn == "all" else turns[-1:]
        try:
            whole = self._render(sample.messages, sample.tools)
            return self._ended(whole, self._spans(whole, sample.messages, sample.tools, turns, where))
        except (TemplateError, TypeError) as error:
            raise DataError(f"the chat template refuses the conversation: {error}", where=where) from None

    def asked(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = (), answers_from: int = 0
    ) -> Rendered:
        """A conversation up to where the assistant begins to write, with the earlier turns as they were trained on.

        Raises ``SettingError`` when the template refuses the messages.
        """
        turns = _answers(messages, answers_from) if self.learn == "all" else []
        try:
            whole = self._render(messages, tools, answer=True)
            return self._ended(whole, self._spans(whole, messages, tools, turns))
        except (TemplateError, TypeError) as error:
            raise SettingError(f"the chat template refuses these messages: {error}") from None

    def question(self, sample: Conversation) -> Rendered:
        """What stands before the last of the assistant's turns."""
        last = _answers(sample.messages)[-1]
        return self.asked(sample.messages[:last], sample.tools, sample.answers_from)

    def _ended(self, whole: str, spans: Sequence[Span]) -> Rendered:
        """The spans up to where their answer ends: nothing after its end token is in the loss, and one is put there
        where the template writes none."""
        text, done, ended = "", 0, list[Span]()
        for start, end in spans:
            answer = whole[start:end]
            wanted = answer[: max(answer.rfind(one) + len(one) if one in answer else 0 for one in self.ends)]
            if not wanted:
                wanted = answer = answer + self.ends[0]
            text += whole[done:start]
            ended.append((len(text), len(text) + len(wanted)))
            text, done = text + answer, end
        return Rendered(text + whole[done:], tuple(ended))

    def _spans(
        self,
        whole: str,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]],
        turns: list[int],
        where: str | None = None,
    ) -> tuple[Span, ...]:
        """Where each of the ``turns`` stands in the ``whole``.

        A turn that is written differently once others follow cannot be trained on: ``DataError`` at ``where``. In what
        is only asked (None) it is left out.
        """
        spans: list[Span] = []
        for at in turns:
            before = self._render(messages[:at], tools, answer=True)
            after = self._render(messages[: at + 1], tools)
            if whole.startswith(after) and after.startswith(before):
                spans.append((len(before), len(after)))
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
        return tuple(spans)

    def _render(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], answer: bool = False) -> str:
        if not messages and not answer:
            return ""
        return str(
            self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=answer,
            )
        )


def _answers(messages: Sequence[dict[str, Any]], answers_from: int = 0) -> list[int]:
    """Positions of the assistant's turns that may be in the loss."""
    return [at for at, turn in enumerate(messages) if at >= answers_from and turn["role"] == "assistant"]
