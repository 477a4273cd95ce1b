"""A language model ready to write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from capotune.adapters.assemble import Assembled
from capotune.adapters.store import read_adapter
from capotune.data.formats.layout import UnusableError
from capotune.data.formats.message import read_turn
from capotune.errors import DataError
from capotune.evaluation.generate import context_length, generate, stream, tokens_left
from capotune.events import Reporter, ignore
from capotune.methods.base import Untouched
from capotune.settings import DecodingSettings, build
from capotune.tasks.facade import Facade
from capotune.tasks.texts import check_texts

Messages = Sequence[dict[str, Any]]
"""Turns of a conversation, or tools, in OpenAI's form."""


def user_turn(text: str) -> dict[str, Any]:
    """A text as a message of the user's."""
    return {"role": "user", "content": text}


class Generator(Facade):
    """A language model, with or without an adapter, ready to write. Made by ``load`` and ``load_model``.

    ``decoding`` are the settings of ``capo generate --help`` by name (``max_tokens=64``). Every method raises
    ``SettingError`` for a setting out of range and for a prompt that leaves no token in the model's context.
    """

    def __init__(self, assembled: Assembled) -> None:
        super().__init__(assembled)
        self._adapters: Any = None
        """What ``use`` switches with, once it was called."""
        self._count = count()

    @property
    def chats(self) -> bool:
        """Whether the adapter was trained on conversations."""
        return bool(self._assembled.task.chat)

    @property
    def has_chat_template(self) -> bool:
        """Whether ``chat`` can be used."""
        return self._assembled.task.chat_template is not None

    @property
    def context_length(self) -> int:
        """Most tokens that the model can hold, prompt and answer together."""
        return context_length(self._assembled)

    def generate(
        self, prompts: Sequence[str], *, progress: Callable[[int, int], None] | None = None, **decoding: Any
    ) -> list[str]:
        """What the model writes after each text, without the text itself. ``progress``: (answered, all)."""
        check_texts(prompts)
        starts = [self._assembled.task.encode_prompt(text) for text in prompts]
        return generate(self._assembled, starts, build(DecodingSettings, decoding), progress)

    def stream(self, prompt: str, **decoding: Any) -> Iterator[str]:
        """As ``generate`` for one text, in pieces as they are written. Close the iterator to stop the model."""
        check_texts([prompt])
        return stream(self._assembled, self._assembled.task.encode_prompt(prompt), build(DecodingSettings, decoding))

    def chat(self, messages: Messages, tools: Messages = (), **decoding: Any) -> str:
        """The assistant's next turn in a conversation: ``[{"role": "user", "content": "…"}]``.

        ``tools`` are the functions that the model may call, as JSON schemas. Raises ``SettingError`` when the model has
        no chat template.
        """
        prompt = self._encode_chat(messages, tools)
        return self._answers([prompt], decoding)[0]

    def stream_chat(self, messages: Messages, tools: Messages = (), **decoding: Any) -> Iterator[str]:
        """As ``chat``, in pieces as they are written. Close the iterator to stop the model."""
        pieces = stream(self._assembled, self._encode_chat(messages, tools), self._chat_settings(decoding))
        return _without_start(pieces, self._assembled.task.chat_lead)

    def chat_each(
        self, prompts: Sequence[str], *, progress: Callable[[int, int], None] | None = None, **decoding: Any
    ) -> list[str]:
        """The answer to each text as a conversation of its own, in batches."""
        check_texts(prompts)
        questions = [self._encode_chat([user_turn(text)], ()) for text in prompts]
        return self._answers(questions, decoding, progress)

    def tokens_left(self, messages: Messages, tools: Messages = ()) -> int:
        """Tokens that the context leaves for the next turn of a conversation; none or fewer when it is too long."""
        return tokens_left(self._assembled, self._encode_chat(messages, tools))

    def use(self, adapter: str | Path | None, *, report: Reporter = ignore) -> None:
        """Put another adapter on in place of the one there is; None: the base alone.

        Without a chat template of its own the new one is asked in the template of the one before, so that a
        conversation can go on. ``report`` is told what the user should know of how it was read. Raises ``AdapterError``
        when it is for another task or base; the model is then as it was.
        """
        from capotune.tasks.several import Adapters

        stored = None if adapter is None else read_adapter(adapter)
        if self._adapters is None:
            first = None if isinstance(self._assembled.method, Untouched) else "first"
            self._adapters = Adapters(self._assembled, first)
        adapters, before, last = self._adapters, self._assembled.task, self._adapters.in_use
        name = None if stored is None else f"{stored.folder} {next(self._count)}"
        if stored is not None and name is not None:
            adapters.add(name, stored, report)
        switched = adapters.use(name)._assembled
        if last is not None:
            adapters.remove(last)
        if switched.task.chat_template is None:
            names = ("chat_template", "tool_template", "template_from", "end_ids")
            task = replace(switched.task, **{name: getattr(before, name) for name in names})
            switched = replace(switched, task=task)
        self._assembled = switched

    def _encode_chat(self, messages: Messages, tools: Messages) -> list[int]:
        if isinstance(messages, str) or not all(isinstance(turn, dict) and "role" in turn for turn in messages):
            raise DataError(
                'a list of messages is needed, such as [{"role": "user", "content": "Hello"}]; found '
                f"{str(messages)[:60]!r}."
            )
        try:
            turns = [read_turn(turn, f"message {number}").message for number, turn in enumerate(messages, start=1)]
        except UnusableError as error:
            raise DataError(f"{error}.") from None
        check_texts([turn["content"] for turn in turns])
        ids: list[int] = self._assembled.task.encode_chat(turns, tools)
        return ids

    def _answers(
        self, prompts: list[list[int]], decoding: dict[str, Any], progress: Callable[[int, int], None] | None = None
    ) -> list[str]:
        texts = generate(self._assembled, prompts, self._chat_settings(decoding), progress)
        return [text.removeprefix(self._assembled.task.chat_lead) for text in texts]

    def _chat_settings(self, decoding: dict[str, Any]) -> DecodingSettings:
        settings: DecodingSettings = self._assembled.task.chat_decoding(build(DecodingSettings, decoding))
        return settings


def _without_start(pieces: Iterator[str], start: str) -> Iterator[str]:
    """``pieces`` of a text without ``start``, where it begins so. Closing the iterator closes ``pieces``."""
    text = ""
    with closing(pieces):  # type: ignore[type-var]
        for piece in pieces:
            text += piece
            if len(text) < len(start) and start.startswith(text):
                continue
            if rest := text.removeprefix(start):
                yield rest
            yield from pieces
            return
    if text:
        yield text
