"""What stands in a conversation and not in the text that the chat template makes of it.

Templates leave out without a word what they have no place for: a tool's answer, a call, a system turn, thinking. A part
that is not found in the text where it is to be expected is left out when the text stays the same without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from capotune.errors import DataError
from capotune.tasks.generation.chat_template import TOLD, ChatTemplate, Message, RefusedError, Tools


def refuse_left_out(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Tools,
    text: str,
    answers: Mapping[int, str],
    where: str,
) -> None:
    """``DataError`` at ``where`` for a turn or a tool call that the template leaves out of ``text``.

    ``answers`` are the texts of the assistant's turns that are trained on, by position.
    """
    found = _found_in_order(template, messages, text)
    for at, message in enumerate(messages):
        has_text = bool(_visible(message).strip())
        if has_text and not found and not _matters(template, messages, tools, text, at, {"content": TOLD}):
            raise DataError(
                f"the chat template leaves out message {at + 1} ({message['role']}).",
                where=where,
                advice="Delete the turn or write it into another one, or give a base whose template has such turns.",
            )
        for number, call in enumerate(message.get("tool_calls", ())):
            others = [*message["tool_calls"][:number], *message["tool_calls"][number + 1 :]]
            is_there = template.has_calls and _call_stands_in(call["function"], answers.get(at, text))
            if not is_there and not _matters(template, messages, tools, text, at, {"tool_calls": others or None}):
                raise DataError(
                    f"the chat template leaves out a tool call of message {at + 1}.",
                    where=where,
                    advice="Write the call into the content, as the model is to write it, or give a base whose "
                    "template has tool calls.",
                )


def leaves_out_thinking(
    template: ChatTemplate, messages: Sequence[Message], tools: Tools, text: str, start: int
) -> bool:
    """Whether what is thought in the last turn, which begins at ``start`` of ``text``, is not there."""
    at, message = len(messages) - 1, messages[-1]
    inside = message["content"].partition("<think>")[2].partition("</think>")[0]
    if not _stands_in(inside, text[start:]):
        return not _matters(template, messages, tools, text, at, {"content": _visible(message)})
    thought = message.get("reasoning_content", "")
    return not _stands_in(thought, text[start:]) and not _matters(
        template, messages, tools, text, at, {"reasoning_content": None}
    )


def leaves_out_tools(template: ChatTemplate, messages: Sequence[Message], tools: Tools, text: str) -> bool:
    """Whether the functions that the model may call are not in ``text``."""
    return bool(tools) and not template.has_tools and _rendered(template, messages, ()) == text


def _found_in_order(template: ChatTemplate, messages: Sequence[Message], text: str) -> bool:
    """Whether the text of each message stands after that of the one before it, in roles that the template has."""
    end = 0
    for message in messages:
        if message["role"] == "tool" and not template.has_tool_turns:
            return False
        said = _visible(message).strip()
        at = text.find(said, end)
        if at < 0:
            return False
        end = at + len(said)
    return True


def _visible(message: Message) -> str:
    """The content without what was thought before it."""
    content: str = message["content"]
    return content.rpartition("</think>")[2] if message["role"] == "assistant" else content


def _call_stands_in(function: Mapping[str, Any], text: str) -> bool:
    values = [value if isinstance(value, str) else json.dumps(value) for value in function["arguments"].values()]
    return function["name"] in text and all(_stands_in(value, text) for value in values)


def _stands_in(part: str, text: str) -> bool:
    part = part.strip()
    return not part or part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text


def _matters(
    template: ChatTemplate, messages: Sequence[Message], tools: Tools, text: str, at: int, other: Mapping[str, Any]
) -> bool:
    """Whether the text changes when the message at ``at`` holds ``other`` (None: lacks it)."""
    changed = {key: value for key, value in {**messages[at], **other}.items() if value is not None}
    return _rendered(template, [*messages[:at], changed, *messages[at + 1 :]], tools) != text


def _rendered(template: ChatTemplate, messages: Sequence[Message], tools: Tools) -> str | None:
    try:
        return template.render(messages, tools)
    except RefusedError:
        return None
