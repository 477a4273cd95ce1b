"""The forms that text to write is kept in. A format is known by its columns; for all others there is a template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from capotune.data.columns import find_column
from capotune.data.formats.chat import (
    from_conversations,
    from_instruction,
    from_messages,
    from_prompt_messages,
    from_question,
)
from capotune.data.formats.layout import Layout, Row
from capotune.data.samples import Document, Format, Pair, Sample
from capotune.data.table import Table
from capotune.data.wording import did_you_mean, shorten
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


# The first one that fits is taken: a dataset of messages may have a column "prompt" as well.
KNOWN: Final = (
    KnownFormat("messages", (("messages",), ("tools",)), frozenset({"tools"}), from_messages),
    KnownFormat(
        "conversations",
        (("conversations", "conversation"), ("system",), ("tools",)),
        frozenset({"system", "tools"}),
        from_conversations,
    ),
    KnownFormat("prompt-completion", (("prompt",), ("completion", "response")), frozenset(), _from_prompt),
    KnownFormat(
        "instruction",
        (("instruction",), ("input", "context"), ("output", "response"), ("system",)),
        frozenset({"input", "system"}),
        from_instruction,
    ),
    KnownFormat("question-answer", (("question",), ("answer",)), frozenset(), from_question),
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
        raise _cannot_tell(table)
    columns = {}
    for names in known.columns:
        place = table.columns if names[0] in known.optional else list(first)
        column = find_column(place, names)
        if column is not None:
            columns[names[0]] = column
    conversion = known.convert
    if known.format == "prompt-completion" and isinstance(first[columns["prompt"]], list):
        conversion = from_prompt_messages
        if "tools" in table.columns:
            columns["tools"] = "tools"
    return Layout(known.format, columns, known.optional | {"tools"}, conversion)


def _cannot_tell(table: Table) -> DataError:
    usual = sorted({name for known in KNOWN for names in known.columns for name in names})
    near = "".join(did_you_mean(column, usual) for column in table.columns if column not in usual)
    column = next((column for column in table.columns if column.lower() != "split"), "question")
    return DataError(
        "it is not clear how to read its rows as text to write. The first one has the columns "
        f"{shorten(table.rows[0])}. {near}Known are: messages; conversations; prompt and completion (or response); "
        "instruction, input (may be absent) and output (or response); question and answer; text alone.",
        where=str(table.source),
        advice=f'For other columns give a prompt with columns in braces, such as `prompt_template="{{{column}}}"`, and '
        "with `completion_column` the column to write after it.",
    )
