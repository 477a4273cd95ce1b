"""The forms that text to write is kept in, and how a record in one of them becomes a sample.

A format is known by its columns. For all others a template says how a prompt is put together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from capotune.data.labelled import find_column, given_column, value_as_text
from capotune.data.records import DELIMITERS, JSON_ENDINGS, Records, describe_bad_lines, did_you_mean, shorten
from capotune.errors import DataError, SettingError

__all__ = [
    "Conversation",
    "Document",
    "Format",
    "KnownFormat",
    "Layout",
    "Pair",
    "Sample",
    "convert",
    "described",
    "find_format",
    "known_layout",
    "template_layout",
]

Format = Literal["messages", "conversations", "prompt-completion", "instruction", "question-answer", "text", "template"]

ROLES: Final = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
SHAREGPT_ROLES: Final = {
    **ROLES, "human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool",
}  # fmt: skip
COMPLETION_NAMES: Final = (
    *("completion", "answer", "output", "response", "target", "label", "labels", "reply", "summary"),
    *("translation", "solution"),
)

_TEMPLATE_PART: Final = re.compile(r"\{\{|\}\}|\{(?P<column>[^{}]*)\}|[{}]")


@dataclass(frozen=True)
class Conversation:
    """Turns between people, a model and its tools, to be written out with the model's chat template.

    Attributes:
        messages: in OpenAI's form, ``{"role": "user", "content": "…"}``. Further keys (``tool_calls``, ``name`` …) are
            kept as they are, without those that hold null; ``content`` is always a string.
        tools: the functions that the model may call, as JSON schemas.
        learn_from: assistant turns at this position or later may be learned.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    learn_from: int = 0


@dataclass(frozen=True)
class Pair:
    """Plain text to go on from, and how it goes on. No chat template is used."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Document:
    """Plain text, all of which is learned."""

    text: str


Sample = Conversation | Pair | Document


class _UnusableError(Exception):
    """A row does not fit; says why."""


@dataclass(frozen=True)
class _Row:
    """One record. A column is asked for by its usual name, and named in messages as the file names it."""

    values: dict[str, Any]
    columns: dict[str, str]

    def value(self, name: str) -> Any:
        """What stands in the column, None when nothing does."""
        return self.values.get(self.columns[name]) if name in self.columns else None

    def text(self, name: str) -> str:
        """Text or a number as it is written, ``""`` when the column is absent or empty."""
        value = self.value(name)
        text = value if isinstance(value, str) else value_as_text(value)
        if text is None:
            raise _UnusableError(f"{self.columns[name]} is {_kind(value)}, not text")
        return text

    def filled(self, name: str) -> str:
        """Text that is not blank."""
        text = self.text(name)
        if not text.strip():
            raise _UnusableError(f"empty {self.columns[name]}")
        return text


@dataclass(frozen=True)
class Layout:
    """How the records of one source are read."""

    format: Format
    columns: dict[str, str]  # the usual name of each column, and its name in this source
    optional: frozenset[str]  # usual names that a record may lack
    convert: Callable[[_Row], Sample]


def convert(records: Records, layout: Layout) -> list[Sample]:
    """A sample for each record.

    Raises:
        DataError: records do not fit; names their lines and what is wrong.
    """
    needed = [column for name, column in layout.columns.items() if name not in layout.optional]
    # Arrow gives every record the keys of all others, with null where it has none
    fills_in_nulls = not records.source.lower().endswith((*DELIMITERS, *JSON_ENDINGS))
    samples: list[Sample] = []
    bad: dict[int, str] = {}
    for line, row in zip(records.lines, records.rows, strict=True):
        try:
            if missing := [column for column in needed if column not in row]:
                raise _UnusableError(f"no {shorten(missing)}, which the first record has; only {shorten(row)}")
            values = {name: _without_nulls(value) for name, value in row.items()} if fills_in_nulls else row
            samples.append(layout.convert(_Row(values, layout.columns)))
        except _UnusableError as error:
            bad[line] = str(error)
    if bad:
        unusable = len(records.rows) - len(samples)
        rows = "1 row" if unusable == 1 else f"{unusable:,} of {len(records.rows):,} rows"
        advice = "Correct or delete these lines."
        if unusable > len(records.rows) / 2 and layout.format != "template":
            advice += " Or give a --prompt-template, if these columns are to be read in another way."
        summary = f"{rows} cannot be used as {described(layout.format, tuple(layout.columns.values()))}"
        raise DataError(describe_bad_lines(records.source, summary, bad, advice))
    return samples


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


# Formats


def _from_messages(row: _Row) -> Conversation:
    return _conversation(_turns(row, "messages", ROLES), row)


def _from_conversations(row: _Row) -> Conversation:
    return _conversation(_after_system(row, _turns(row, "conversations", SHAREGPT_ROLES)), row)


def _from_prompt(row: _Row) -> Pair:
    return Pair(row.filled("prompt"), row.filled("completion"))


def _from_prompt_messages(row: _Row) -> Conversation:
    prompt, completion = _turns(row, "prompt", ROLES), _turns(row, "completion", ROLES)
    return _conversation([*prompt, *completion], row, learn_from=len(prompt))


def _from_instruction(row: _Row) -> Conversation:
    parts = [text for text in (row.text("instruction"), row.text("input")) if text.strip()]
    if not parts:
        raise _UnusableError(f"empty {row.columns['instruction']}")
    return _question_and_answer("\n\n".join(parts), row.filled("output"), row)


def _from_question(row: _Row) -> Conversation:
    return _question_and_answer(row.filled("question"), row.filled("answer"), row)


def _from_text(row: _Row) -> Document:
    return Document(row.filled("text"))


@dataclass(frozen=True)
class KnownFormat:
    """A format that its columns tell. Each column is given by the names it may have, the usual one first."""

    format: Format
    columns: tuple[tuple[str, ...], ...]
    optional: frozenset[str]
    convert: Callable[[_Row], Sample]


# The first one that fits is taken: a dataset of messages may have a column "prompt" as well.
KNOWN: Final = (
    KnownFormat("messages", (("messages",), ("tools",)), frozenset({"tools"}), _from_messages),
    KnownFormat(
        "conversations",
        (("conversations", "conversation"), ("system",), ("tools",)),
        frozenset({"system", "tools"}),
        _from_conversations,
    ),
    KnownFormat("prompt-completion", (("prompt",), ("completion", "response")), frozenset(), _from_prompt),
    KnownFormat(
        "instruction",
        (("instruction",), ("input", "context"), ("output", "response"), ("system",)),
        frozenset({"input", "system"}),
        _from_instruction,
    ),
    KnownFormat("question-answer", (("question",), ("answer",)), frozenset(), _from_question),
    KnownFormat("text", (("text",),), frozenset(), _from_text),
)


def find_format(columns: Sequence[str]) -> KnownFormat | None:
    """The format whose columns are all there."""
    for known in KNOWN:
        if all(find_column(columns, names) for names in known.columns if names[0] not in known.optional):
            return known
    return None


def known_layout(records: Records) -> Layout:
    """How to read records of a known format.

    Raises:
        DataError: the columns of the first record are those of none; says which ones there are.
    """
    first = records.rows[0]
    known = find_format(list(first))
    if known is None:
        raise DataError(_cannot_tell(records))
    columns = {}
    for names in known.columns:
        place = records.columns if names[0] in known.optional else list(first)
        column = find_column(place, names)
        if column is not None:
            columns[names[0]] = column
    conversion = known.convert
    if known.format == "prompt-completion" and isinstance(first[columns["prompt"]], list):
        conversion = _from_prompt_messages
        if "tools" in records.columns:
            columns["tools"] = "tools"
    return Layout(known.format, columns, known.optional | {"tools"}, conversion)


def _cannot_tell(records: Records) -> str:
    usual = sorted({name for known in KNOWN for names in known.columns for name in names})
    near = "".join(did_you_mean(column, usual) for column in records.columns if column not in usual)
    column = next((column for column in records.columns if column.lower() != "split"), "question")
    return (
        f"{records.source}: it is not clear how to read its records as text to write. The first one has the columns "
        f"{shorten(records.rows[0])}. {near}Known are: messages; conversations; prompt and completion (or response); "
        "instruction, input (may be absent) and output (or response); question and answer; text alone. For other "
        f'columns give a prompt with columns in braces, such as --prompt-template "{{{column}}}", and with '
        "--completion-column the column to learn to write."
    )


def described(format: Format, columns: Sequence[str]) -> str:
    """Format and columns in words."""
    if format in ("messages", "conversations", "text"):
        return f"{format} (column{'s' * (len(columns) > 1)} {shorten(columns)})"
    if format == "template":
        return f"a prompt of {shorten(columns[:-1])}, completion in {columns[-1]!r}"
    return ", ".join(columns)


# Templates


def template_layout(records: Records, template: str, completion_column: str | None) -> Layout:
    """How to read records with a prompt template.

    Raises:
        DataError: a column does not exist.
        SettingError: the template is broken, or it is not clear which column is to be written.
    """
    parts = [
        (literal, name and given_column(records, name, "--prompt-template"))
        for literal, name in _template_parts(template)
    ]
    names = list(dict.fromkeys(name for _, name in parts if name))
    if completion_column is not None:
        completion = given_column(records, completion_column, "--completion-column")
    else:
        others = [column for column in records.columns if column not in names]
        completion = find_column(others, COMPLETION_NAMES) or ""
    if not completion or completion in names:
        why = f"{completion!r} stands in the prompt already" if completion else "it is not found by its name"
        raise SettingError(
            f"{records.source}: which column is to be written after the prompt? {why[0].upper()}{why[1:]}. Give "
            f"--completion-column with another of the columns {shorten(records.columns)}."
        )

    def fill_in(row: _Row) -> Pair:
        values = {name: row.text(name) for name in names}
        if not any(map(str.strip, values.values())):
            raise _UnusableError(f"empty {' and '.join(names)}")
        prompt = "".join(literal + (values[name] if name else "") for literal, name in parts)
        return Pair(prompt, row.filled(completion))

    columns = {name: name for name in (*names, completion)}
    return Layout("template", columns, frozenset(), fill_in)


def _template_parts(template: str) -> list[tuple[str, str | None]]:
    """Literal text, each piece with the column that follows it (None: none does)."""
    parts: list[tuple[str, str | None]] = []
    end = 0
    for match in _TEMPLATE_PART.finditer(template):
        literal, column = _unescaped(template[end : match.start()]), match["column"]
        end = match.end()
        if match[0] in ("{{", "}}"):
            parts.append((literal + match[0][0], None))
        elif column is not None and column.strip():
            parts.append((literal, column))
        else:
            raise SettingError(
                f"--prompt-template {template!r}: the {match[0]} at character {match.start() + 1} names no column. "
                "Allowed: {column}, with {{ and }} for braces that are to stand in the text."
            )
    if not any(column for _, column in parts):
        raise SettingError(f"--prompt-template {template!r} holds no column. Put one in braces: {{question}}.")
    return [*parts, (_unescaped(template[end:]), None)]


def _unescaped(literal: str) -> str:
    r"""A shell hands on a typed ``\n`` as two characters."""
    return literal.replace("\\n", "\n")


# Messages


def _conversation(turns: Sequence[dict[str, Any]], row: _Row, learn_from: int = 0) -> Conversation:
    if all(turn["role"] != "assistant" for turn in turns[learn_from:]):
        where = f" in {row.columns['completion']}" if learn_from else ""
        raise _UnusableError(f"no assistant turn to learn{where}, only {shorten([turn['role'] for turn in turns])}")
    tools = row.value("tools")
    if isinstance(tools, str):
        tools = _from_json(tools, row.columns["tools"]) if tools.strip() else None
    if tools is not None and not _are_objects(tools):
        raise _UnusableError(f"{row.columns['tools']} is {_kind(tools)}, not a list of objects")
    return Conversation(tuple(turns), tuple(tools or ()), learn_from)


def _question_and_answer(question: str, answer: str, row: _Row) -> Conversation:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(tuple(_after_system(row, turns)))


def _after_system(row: _Row, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns after what stands in the column ``system``."""
    system = row.text("system")
    if not system.strip():
        return turns
    if turns[0]["role"] == "system" and turns[0]["content"] != system:
        raise _UnusableError(f"message 1 and the column {row.columns['system']} are two system prompts; keep one")
    return turns if turns[0]["role"] == "system" else [{"role": "system", "content": system}, *turns]


def _turns(row: _Row, name: str, roles: dict[str, str]) -> list[dict[str, Any]]:
    value, column = row.value(name), row.columns[name]
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _from_json(value, column)
    if not isinstance(value, list):
        raise _UnusableError(f"{column} is {_kind(value)}, not a list of messages")
    if not value:
        raise _UnusableError(f"{column} is an empty list")
    where = "message" if name in ("messages", "conversations") else f"{column} message"
    return [_turn(entry, f"{where} {number}", roles) for number, entry in enumerate(value, start=1)]


def _turn(entry: object, where: str, roles: dict[str, str]) -> dict[str, Any]:
    """One message in OpenAI's form."""
    if not isinstance(entry, dict):
        raise _UnusableError(f"{where} is {_kind(entry)}, not an object with role and content")
    keys = ("from", "value") if roles is SHAREGPT_ROLES and "from" in entry else ("role", "content")
    if keys[0] not in entry:
        raise _UnusableError(f"{where} has no {keys[0]!r}, only {shorten(entry)}")
    role, calls = entry[keys[0]], entry.get("tool_calls")
    if not isinstance(role, str) or role not in roles:
        near = did_you_mean(role, list(roles)) if isinstance(role, str) else ""
        raise _UnusableError(f"{where} has the unknown role {role!r}. {near}Allowed: {', '.join(roles)}")
    if calls and not _are_objects(calls):
        raise _UnusableError(f"{where}: tool_calls is {_kind(calls)}, not a list of objects")
    content = "" if calls and entry.get(keys[1]) is None else _content(entry.get(keys[1]), where)
    if not content.strip() and not calls and roles[role] in ("user", "assistant"):
        raise _UnusableError(f"{where} ({role}) is empty")
    others = {key: value for key, value in entry.items() if key not in keys and value is not None}
    return {"role": roles[role], "content": content, **others}


def _content(value: object, where: str) -> str:
    """The text of a message; parts of text are joined."""
    if value is None:
        raise _UnusableError(f"{where} has no content")
    if isinstance(value, list):
        return "".join(_text_part(part, where) for part in value)
    if not isinstance(value, str):
        raise _UnusableError(f"{where}: its content is {_kind(value)}, not text")
    return value


def _text_part(part: object, where: str) -> str:
    if not isinstance(part, dict) or part.get("type", "text") != "text":
        kind = repr(part.get("type")) if isinstance(part, dict) else _kind(part)
        raise _UnusableError(f"{where} holds a part of type {kind}; only text is read")
    return _content(part.get("text"), where)


def _from_json(text: str, column: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        why = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise _UnusableError(f"{column} is not JSON ({why}). Write it with json.dumps") from error


def _are_objects(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _kind(value: object) -> str:
    """What a value is, in words that a reader of JSON knows."""
    names = {str: "text", list: "a list", dict: "an object", bool: "true or false", int: "a number", float: "a number"}
    return "missing" if value is None else names.get(type(value), type(value).__name__)
