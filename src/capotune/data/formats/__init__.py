"""The forms that text to write is kept in. A format is known by its columns; for all others there is a template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from capotune.data.columns import CONTEXT_NAMES, find_column, plain_name
from capotune.data.formats.chat import (
    from_conversations,
    from_instruction,
    from_messages,
    from_prompt_messages,
    from_question,
)
from capotune.data.formats.layout import Layout, Row
from capotune.data.label_columns import refuse_preferences
from capotune.data.samples import Document, Format, Pair, Sample
from capotune.data.suggest import suggested_template, template_for
from capotune.data.table import Table
from capotune.data.wording import did_you_mean, quoted, shorten
from capotune.errors import DataError

__all__ = ["KnownFormat", "find_format", "known_layout"]


def _from_prompt(row: Row) -> Pair:
    return Pair(row.filled("prompt"), row.filled("completion"))


def _from_text(row: Row) -> Document:
    return Document(row.filled("text"))


@dataclass(frozen=True)
class KnownFormat:
    """A format that is known by its columns. Each column is given by the names it may have, the usual one first."""

    format: Format
    columns: tuple[tuple[str, ...], ...]
    optional: frozenset[str]
    convert: Callable[[Row], Sample]


_ANSWERS: Final = ("answer", "answers", "output", "response")
_SYSTEM: Final = ("system", "system_prompt")
_WRITTEN_AFTER_TEXT: Final = (
    *("completion", "answer", "answers", "output", "response", "reply", "summary", "highlights", "translation", "tgt"),
)  # beside a ``text`` these are what is to be written, and never to be left out unsaid

# The first one that fits is taken: a dataset of messages may have a column "prompt" as well.
KNOWN: Final = (
    KnownFormat("messages", (("messages",), _SYSTEM, ("tools",)), frozenset({"system", "tools"}), from_messages),
    KnownFormat(
        "conversations",
        (("conversations", "conversation"), _SYSTEM, ("tools",)),
        frozenset({"system", "tools"}),
        from_conversations,
    ),
    KnownFormat("prompt-completion", (("prompt",), ("completion", *_ANSWERS)), frozenset(), _from_prompt),
    KnownFormat(
        "instruction",
        (("instruction",), ("input",), CONTEXT_NAMES, ("output", *_ANSWERS), _SYSTEM),
        frozenset({"input", "context", "system"}),
        from_instruction,
    ),
    KnownFormat(
        "question-answer",
        (CONTEXT_NAMES, ("question", "query", "input"), _ANSWERS, _SYSTEM),
        frozenset({"context", "system"}),
        from_question,
    ),
    KnownFormat("text", (("text",),), frozenset(), _from_text),
)


def find_format(columns: Sequence[str]) -> KnownFormat | None:
    """The format whose columns are all there."""
    for known in KNOWN:
        if all(find_column(columns, names) for names in known.columns if names[0] not in known.optional):
            return known
    return None


def known_layout(table: Table) -> Layout:
    """How to read rows of a known format.

    Raises:
        DataError: the columns of the first row are those of none; says which ones there are.
    """
    first = table.rows[0]
    known = find_format(list(first))
    if known is None:
        refuse_preferences(table)
        raise _cannot_tell(table)
    columns = _columns_of(known, table)
    _refuse_to_leave_out(known, columns, table)
    conversion, note = known.convert, ""
    if known.format == "prompt-completion" and isinstance(first[columns["prompt"]], list):
        conversion = from_prompt_messages
        if "tools" in table.columns:
            columns["tools"] = "tools"
    if known.format == "question-answer" and isinstance(first[columns["answer"]], list | dict):
        note = f"of several {columns['answer']} the first"
    return Layout(known.format, columns, known.optional | {"tools"}, conversion, note)


def _columns_of(known: KnownFormat, table: Table) -> dict[str, str]:
    """The format's columns that are there: usual name, and name in the table."""
    found: dict[str, str] = {}
    for names in known.columns:
        place = table.columns if names[0] in known.optional else list(table.rows[0])
        column = find_column([one for one in place if one not in found.values()], names)
        if column is not None:
            found[names[0]] = column
    return found


def _refuse_to_leave_out(known: KnownFormat, columns: dict[str, str], table: Table) -> None:
    """Raise a ``DataError`` where a column stands beside those of the format that plainly belongs to what is asked or
    answered, and the format has no place for it."""
    others = [column for column in table.columns if column not in columns.values()]
    context = find_column(others, CONTEXT_NAMES)
    if known.format == "prompt-completion" and context and isinstance(table.rows[0][columns["prompt"]], str):
        prompt, completion = columns["prompt"], columns["completion"]
        used, unused = (template_for(read, completion) for read in ([context, prompt], [prompt]))
        what = f"is the column {quoted(context)} part of the prompt?"
        advice = f"If so, give {used}; if the prompt is whole without it, give {unused}."
    elif known.format == "question-answer" and (choices := _choices(others)):
        what = f"are the columns {shorten(choices)} part of the question?"
        used = template_for([columns["question"], *choices], columns["answer"])
        unused = template_for([columns["question"]], columns["answer"])
        advice = f"If so, give {used} (a list must be made text first); if not, give {unused}."
    elif known.format == "text" and (written := find_column(others, _WRITTEN_AFTER_TEXT)):
        what = f"is the column {quoted(written)} to be written after {quoted(columns['text'])}?"
        advice = (
            f"If so, give {template_for([columns['text']], written)}; if the text alone is to be learned, remove the "
            "column."
        )
    else:
        return
    raise DataError(what, where=str(table.source), advice=advice)


def _choices(columns: Sequence[str]) -> list[str]:
    """The columns that hold the answers to choose from."""
    lettered = [column for column in columns if plain_name(column) in ("a", "b", "c", "d", "e")]
    named = find_column(columns, ("choices", "options"))
    return [named] if named else lettered if len(lettered) > 1 else []


def _cannot_tell(table: Table) -> DataError:
    usual = sorted({name for known in KNOWN for names in known.columns for name in names})
    near = "".join(did_you_mean(column, usual) for column in table.columns if column not in usual)
    column = next((column for column in table.columns if column.lower() != "split" and len(column) < 60), "question")
    suggested = suggested_template(table)
    return DataError(
        "it is not clear how to read its rows as text to write. The first one has the columns "
        f"{shorten(table.rows[0])}. {near}Known are: messages; conversations; prompt and completion (or response); "
        "instruction, input (may be absent) and output (or response); question and answer (or query and response, or "
        "input and output), with or without context; text alone.",
        where=str(table.source),
        advice=f"These columns would be read by {suggested}."
        if suggested
        else f'For other columns give a prompt with columns in braces, such as `prompt_template="{{{column}}}"`, and '
        "with `completion_column` the column to write after it.",
    )
