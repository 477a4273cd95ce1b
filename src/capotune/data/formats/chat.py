"""Conversations of rows: messages in OpenAI's and ShareGPT's forms, instructions, questions with answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from capotune.data.formats.layout import Row, UnusableError
from capotune.data.samples import Conversation
from capotune.data.wording import did_you_mean, kind_of, shorten

__all__ = ["from_conversations", "from_instruction", "from_messages", "from_prompt_messages", "from_question"]

ROLES: Final = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
SHAREGPT_ROLES: Final = {
    **ROLES, "human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool",
}  # fmt: skip


def from_messages(row: Row) -> Conversation:
    """A row in OpenAI's form: ``messages`` with ``role`` and ``content``."""
    return _conversation(_turns(row, "messages", ROLES), row)


def from_conversations(row: Row) -> Conversation:
    """A row in ShareGPT's form: ``conversations`` with ``from`` and ``value``."""
    return _conversation(_after_system(row, _turns(row, "conversations", SHAREGPT_ROLES)), row)


def from_prompt_messages(row: Row) -> Conversation:
    """A row whose ``prompt`` and ``completion`` are lists of messages."""
    prompt, completion = _turns(row, "prompt", ROLES), _turns(row, "completion", ROLES)
    return _conversation([*prompt, *completion], row, answers_from=len(prompt))


def from_instruction(row: Row) -> Conversation:
    """A row in Alpaca's form: ``instruction``, ``input``, ``output``."""
    parts = [text for text in (row.text("instruction"), row.text("input")) if text.strip()]
    if not parts:
        raise UnusableError(f"empty {row.columns['instruction']}")
    return _question_and_answer("\n\n".join(parts), row.filled("output"), row)


def from_question(row: Row) -> Conversation:
    """A row of ``question`` and ``answer``."""
    return _question_and_answer(row.filled("question"), row.filled("answer"), row)


def _conversation(turns: Sequence[dict[str, Any]], row: Row, answers_from: int = 0) -> Conversation:
    if all(turn["role"] != "assistant" for turn in turns[answers_from:]):
        where = f" in {row.columns['completion']}" if answers_from else ""
        raise UnusableError(f"no assistant turn to train on{where}, only {shorten([turn['role'] for turn in turns])}")
    tools = row.value("tools")
    if isinstance(tools, str):
        tools = _from_json(tools, row.columns["tools"]) if tools.strip() else None
    if tools is not None and not _are_objects(tools):
        raise UnusableError(f"{row.columns['tools']} is {kind_of(tools)}, not a list of objects")
    return Conversation(tuple(turns), tuple(tools or ()), answers_from)


def _question_and_answer(question: str, answer: str, row: Row) -> Conversation:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(tuple(_after_system(row, turns)))


def _after_system(row: Row, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns after what stands in the column ``system``."""
    system = row.text("system")
    if not system.strip():
        return turns
    if turns[0]["role"] == "system" and turns[0]["content"] != system:
        raise UnusableError(f"message 1 and the column {row.columns['system']} are two system prompts; keep one")
    return turns if turns[0]["role"] == "system" else [{"role": "system", "content": system}, *turns]


def _turns(row: Row, name: str, roles: dict[str, str]) -> list[dict[str, Any]]:
    value, column = row.value(name), row.columns[name]
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _from_json(value, column)
    if not isinstance(value, list):
        raise UnusableError(f"{column} is {kind_of(value)}, not a list of messages")
    if not value:
        raise UnusableError(f"{column} is an empty list")
    where = "message" if name in ("messages", "conversations") else f"{column} message"
    return [_turn(entry, f"{where} {number}", roles) for number, entry in enumerate(value, start=1)]


def _turn(entry: object, where: str, roles: dict[str, str]) -> dict[str, Any]:
    """One message in OpenAI's form."""
    if not isinstance(entry, dict):
        raise UnusableError(f"{where} is {kind_of(entry)}, not an object with role and content")
    keys = ("from", "value") if roles is SHAREGPT_ROLES and "from" in entry else ("role", "content")
    if keys[0] not in entry:
        raise UnusableError(f"{where} has no {keys[0]!r}, only {shorten(entry)}")
    role, calls = entry[keys[0]], entry.get("tool_calls")
    if not isinstance(role, str) or role not in roles:
        near = did_you_mean(role, list(roles)) if isinstance(role, str) else ""
        raise UnusableError(f"{where} has the unknown role {role!r}. {near}Allowed: {', '.join(roles)}")
    if calls and not _are_objects(calls):
        raise UnusableError(f"{where}: tool_calls is {kind_of(calls)}, not a list of objects")
    content = "" if calls and entry.get(keys[1]) is None else _content(entry.get(keys[1]), where)
    if not content.strip() and not calls and roles[role] in ("user", "assistant"):
        raise UnusableError(f"{where} ({role}) is empty")
    others = {key: value for key, value in entry.items() if key not in keys and value is not None}
    return {"role": roles[role], "content": content, **others}


def _content(value: object, where: str) -> str:
    """The text of a message; parts of text are joined."""
    if value is None:
        raise UnusableError(f"{where} has no content")
    if isinstance(value, list):
        return "".join(_text_part(part, where) for part in value)
    if not isinstance(value, str):
        raise UnusableError(f"{where}: its content is {kind_of(value)}, not text")
    return value


def _text_part(part: object, where: str) -> str:
    if not isinstance(part, dict) or part.get("type", "text") != "text":
        kind = repr(part.get("type")) if isinstance(part, dict) else kind_of(part)
        raise UnusableError(f"{where} holds a part of type {kind}; only text is read")
    return _content(part.get("text"), where)


def _from_json(text: str, column: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        why = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise UnusableError(f"{column} is not JSON ({why}). Write it with json.dumps") from error


def _are_objects(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
