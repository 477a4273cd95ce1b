"""Conversations of rows: messages in OpenAI's and ShareGPT's forms, instructions, questions with answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from capotune.data.formats.layout import Row, UnusableError
from capotune.data.formats.message import Turn, are_objects, parse_json, read_turn
from capotune.data.samples import Conversation
from capotune.data.wording import kind_of, shorten

__all__ = ["from_conversations", "from_instruction", "from_messages", "from_prompt_messages", "from_question"]


def from_messages(row: Row) -> Conversation:
    """A row in OpenAI's form: ``messages`` with ``role`` and ``content``."""
    return _conversation(_after_system(row, _turns(row, "messages")), row)


def from_conversations(row: Row) -> Conversation:
    """A row in ShareGPT's form: ``conversations`` with ``from`` and ``value``."""
    return _conversation(_after_system(row, _turns(row, "conversations")), row)


def from_prompt_messages(row: Row) -> Conversation:
    """A row whose ``prompt`` and ``completion`` are lists of messages; only the completion's are trained on."""
    prompt, completion = _turns(row, "prompt"), _turns(row, "completion")
    if all(turn.role != "assistant" for turn in completion):
        raise _nothing_to_train_on(completion, f" in {row.columns['completion']}")
    return _conversation([*(replace(turn, trained=False) for turn in prompt), *completion], row)


def from_instruction(row: Row) -> Conversation:
    """A row in Alpaca's form: ``instruction``, ``input``, ``output``; or in Dolly's, with ``context``."""
    parts = [text for text in map(row.text, ("instruction", "input", "context")) if text.strip()]
    if not parts:
        raise UnusableError(f"empty {row.columns['instruction']}")
    return _question_and_answer("\n\n".join(parts), row.filled("output"), row)


def from_question(row: Row) -> Conversation:
    """A row of ``question`` and ``answer``, after what stands in ``context``. Of several answers the first is taken, as
    a list or in SQuAD's form, ``{"text": ["…"], "answer_start": [0]}``."""
    parts = [text for text in (row.text("context"), row.filled("question")) if text.strip()]
    return _question_and_answer("\n\n".join(parts), _first_answer(row), row)


def _first_answer(row: Row) -> str:
    value, column = row.value("answer"), row.columns["answer"]
    if isinstance(value, dict):
        value = value.get("text")
    if isinstance(value, list):
        value = next((one for one in value if isinstance(one, str) and one.strip()), None)
        if value is None:
            raise UnusableError(f"{column} holds no text")
    if value is row.value("answer"):
        value = row.filled("answer")
    if not isinstance(value, str) or value.startswith("{'text':"):
        raise UnusableError(f"{column} is {'an object written as text' if value else 'an object without text'}")
    return value


def _conversation(turns: Sequence[Turn], row: Row) -> Conversation:
    read_only = {at for at, turn in enumerate(turns) if turn.role == "assistant" and not turn.trained}
    conversation = Conversation(tuple(turn.message for turn in turns), _tools(row), frozenset(read_only))
    if not conversation.answers:
        raise _nothing_to_train_on(turns)
    return conversation


def _nothing_to_train_on(turns: Sequence[Turn], where: str = "") -> UnusableError:
    if any(turn.role == "assistant" for turn in turns):
        return UnusableError(f"no assistant turn to train on{where}: every one is marked not to be trained on")
    return UnusableError(f"no assistant turn to train on{where}, only {shorten([turn.role for turn in turns])}")


def _tools(row: Row) -> tuple[dict[str, Any], ...]:
    tools = row.value("tools")
    if isinstance(tools, str):
        tools = parse_json(tools, row.columns["tools"]) if tools.strip() else None
    if tools is not None and not are_objects(tools):
        raise UnusableError(f"{row.columns['tools']} is {kind_of(tools)}, not a list of objects")
    return tuple(tools or ())


def _question_and_answer(question: str, answer: str, row: Row) -> Conversation:
    turns = [Turn({"role": "user", "content": question}), Turn({"role": "assistant", "content": answer})]
    return _conversation(_after_system(row, turns), row)


def _after_system(row: Row, turns: list[Turn]) -> list[Turn]:
    """The turns after what stands in the column ``system``."""
    system = row.text("system")
    if not system.strip():
        return turns
    if turns[0].role != "system":
        return [Turn({"role": "system", "content": system}), *turns]
    if turns[0].message["content"] != system:
        raise UnusableError(f"message 1 and the column {row.columns['system']} are two system prompts; keep one")
    return turns


def _turns(row: Row, name: str) -> list[Turn]:
    value, column = row.value(name), row.columns[name]
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value, column)
    if not isinstance(value, list):
        raise UnusableError(f"{column} is {kind_of(value)}, not a list of messages")
    if not value:
        raise UnusableError(f"{column} is an empty list")
    where = "message" if name in ("messages", "conversations") else f"{column} message"
    return [read_turn(entry, f"{where} {number}") for number, entry in enumerate(value, start=1)]
