"""One message of a conversation, read to OpenAI's form whoever wrote it.

Roles, thinking, tool calls and the flags that say what is trained on have many names; here each gets one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from capotune.data.formats.layout import UnusableError
from capotune.data.wording import did_you_mean, kind_of, shorten

__all__ = ["Turn", "are_objects", "parse_json", "read_turn"]

ROLES: Final = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "chatbot", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "tool_result"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
"""Names of roles, ShareGPT's and others' among them, in any case. ``call``: an assistant turn whose text is a call."""

ROLE_KEYS: Final = ("role", "from")
CONTENT_KEYS: Final = ("content", "value", "text")
THINKING_KEYS: Final = ("reasoning_content", "thinking", "reasoning")
CALL_KEYS: Final = ("tool_calls", "function_call")
FLAG_KEYS: Final = ("weight", "train", "training", "train_on_turn", "trainable", "loss", "loss_mask")
"""Flags on assistant turns that say whether the turn is trained on: OpenAI, axolotl, ms-swift, Tinker, verl."""

_TEXT_PARTS: Final = ("text", "input_text", "output_text")
_THINKING_PARTS: Final = ("thinking", "reasoning")
_READ: Final = frozenset((*ROLE_KEYS, *CONTENT_KEYS, *THINKING_KEYS, *CALL_KEYS, *FLAG_KEYS, "mask", "masked"))


@dataclass(frozen=True)
class Turn:
    """A message, and whether it may be trained on."""

    message: dict[str, Any]
    trained: bool = True

    @property
    def role(self) -> str:
        """``system``, ``developer``, ``user``, ``assistant`` or ``tool``."""
        return str(self.message["role"])


def read_turn(entry: object, where: str) -> Turn:
    """A message as the data holds it. ``where`` names it in messages.

    Raises:
        UnusableError: it has no known role or no text, or holds what cannot be trained on.
    """
    if not isinstance(entry, dict):
        raise UnusableError(f"{where} is {kind_of(entry)}, not an object with role and content")
    if not all(isinstance(key, str) for key in entry):
        raise UnusableError(f"{where} has a key that is not text")
    role, given = _role(entry, where)
    calls = _calls(entry, where)
    content, thinking = _texts(entry, where, optional=bool(calls))
    if role == "call":
        role, calls, content = "assistant", *_called(content, where)
    if not content.strip() and not calls and not thinking and role in ("user", "assistant"):
        raise UnusableError(f"{where} ({given}) is empty")
    found = {"reasoning_content": thinking, "tool_calls": calls} if role == "assistant" else {}
    others = {key: value for key, value in entry.items() if key not in _READ and value is not None}
    message = {"role": role, "content": content, **others, **{key: value for key, value in found.items() if value}}
    return Turn(message, role != "assistant" or _is_trained(entry, where))


def are_objects(value: object) -> bool:
    """Whether it is a list of objects."""
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def parse_json(text: str, name: str) -> Any:
    """What a text holds as JSON; ``name`` says where it stands. Raises ``UnusableError`` when it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        why = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise UnusableError(f"{name} is not JSON ({why}). Write it with json.dumps") from error


def _role(entry: dict[str, Any], where: str) -> tuple[str, str]:
    """The role, and how it is written."""
    key = next((key for key in ROLE_KEYS if entry.get(key) is not None), "role")
    if key not in entry:
        raise UnusableError(f"{where} has no 'role', only {shorten(entry)}")
    given = entry[key]
    role = ROLES.get(given.strip().lower()) if isinstance(given, str) else None
    if role is None:
        near = did_you_mean(given, list(ROLES)) if isinstance(given, str) else ""
        raise UnusableError(f"{where} has the unknown role {given!r:.60}. {near}Allowed: {', '.join(ROLES)}")
    return role, given


def _texts(entry: dict[str, Any], where: str, *, optional: bool) -> tuple[str, str]:
    """Content and thinking."""
    thinking = next((entry[key] for key in THINKING_KEYS if entry.get(key)), "")
    if not isinstance(thinking, str):
        raise UnusableError(f"{where}: its thinking is {kind_of(thinking)}, not text")
    value = next((entry[key] for key in CONTENT_KEYS if entry.get(key) is not None), None)
    if value is None and not optional and not thinking:
        raise UnusableError(f"{where} has no content")
    if isinstance(value, list):
        parts = [_part(part, where) for part in value]
        thinking += "".join(text for is_thinking, text in parts if is_thinking)
        return "".join(text for is_thinking, text in parts if not is_thinking), thinking
    if not isinstance(value, str | None):
        raise UnusableError(f"{where}: its content is {kind_of(value)}, not text")
    return value or "", thinking


def _part(part: object, where: str) -> tuple[bool, str]:
    """Whether a part of a message is thinking, and its text."""
    if isinstance(part, str):
        return False, part
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind not in (*_TEXT_PARTS, *_THINKING_PARTS):
        shown = repr(kind) if isinstance(part, dict) else kind_of(part)
        raise UnusableError(f"{where} holds a part of type {shown}; only text is read")
    text = part.get("text") if kind in _TEXT_PARTS else part.get(kind, part.get("text"))
    if isinstance(text, list):  # as Mistral writes thinking
        text = "".join(inner for _, inner in (_part(one, where) for one in text))
    if not isinstance(text, str):
        raise UnusableError(f"{where} has a part without text")
    return kind in _THINKING_PARTS, text


def _calls(entry: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form, from its own key, its older one, or a list that is written as JSON."""
    calls = entry.get("tool_calls")
    if isinstance(calls, str) and calls.strip():
        calls = parse_json(calls, f"{where}: tool_calls")
    if not calls and entry.get("function_call"):
        calls = [entry["function_call"]]
    if calls and not are_objects(calls):
        raise UnusableError(f"{where}: tool_calls is {kind_of(calls)}, not a list of objects")
    return [_call(call, f"{where}, tool call {number}") for number, call in enumerate(calls or [], start=1)]


def _called(text: str, where: str) -> tuple[list[dict[str, Any]], str]:
    """The calls that a ShareGPT turn holds as JSON, or its text when it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return [], text
    found = found if isinstance(found, list) else [found]
    if not found or not all(isinstance(call, dict) and "name" in call for call in found):
        return [], text
    return [_call(call, f"{where}, tool call {number}") for number, call in enumerate(found, start=1)], ""


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UnusableError(f"{where} has no function with a name")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = parse_json(arguments, f"{where}: arguments") if arguments.strip() else {}
    if not isinstance(arguments, dict | None):
        raise UnusableError(f"{where}: arguments is {kind_of(arguments)}, not an object")
    outer = {key: value for key, value in call.items() if key in ("id", "index") and value is not None}
    return {**outer, "type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}


def _is_trained(entry: dict[str, Any], where: str) -> bool:
    """What the flags of an assistant turn say; without any it is trained on."""
    if entry.get("mask") is not None:
        raise UnusableError(
            f"{where}: 'mask' does not say whether the turn is trained on or left out. Write \"weight\": 1 or 0"
        )
    flags = {key: entry[key] for key in (*FLAG_KEYS, "masked") if entry.get(key) is not None}
    for key, value in flags.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UnusableError(f"{where}: {key} is {value!r:.60}. Allowed: 1 or true (trained on), 0 or false (not)")
    said = {key: bool(value) != (key == "masked") for key, value in flags.items()}
    if len(set(said.values())) > 1:
        written = ", ".join(f"{key} {flags[key]!r}" for key in said)
        raise UnusableError(f"{where}: {written} contradict each other")
    return all(said.values())
