"""A prompt template with columns in braces, for rows of no known format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from capotune.data.columns import COMPLETION_NAMES, find_column, given_column
from capotune.data.formats.layout import Layout, Row, UnusableError
from capotune.data.samples import Pair
from capotune.data.table import Table
from capotune.data.view import View
from capotune.data.wording import quoted, shorten
from capotune.errors import SettingError

__all__ = ["template_layout", "with_inner_columns"]

_PART: Final = re.compile(r"\{\{|\}\}|\{(?P<column>[^{}]*)\}|[{}]")


def with_inner_columns(table: Table) -> Table:
    """The table with what stands in objects as columns of their own: ``{"translation": {"en": "…"}}`` becomes
    ``translation.en``."""
    objects = [name for name, value in table.rows[0].items() if isinstance(value, dict)]
    if not objects:
        return table
    inner = dict.fromkeys(name for row in table.rows for name in _inner(row, objects))
    rows = View(len(table.rows), lambda at: table.rows[at] | _inner(table.rows[at], objects))
    return replace(table, columns=[*(name for name in table.columns if name not in objects), *inner], rows=rows)


def _inner(row: dict[str, Any], objects: Sequence[str]) -> dict[str, Any]:
    parts = ((name, part) for name in objects if isinstance(part := row.get(name), dict))
    return {f"{name}.{key}": value for name, part in parts for key, value in part.items()}


def template_layout(table: Table, template: str, completion_column: str | None) -> Layout:
    """How to read rows with a prompt template.

    Raises:
        DataError: a column does not exist.
        SettingError: the template is broken, or it is not clear which column is to be written.
    """
    parts = [
        (literal, name and given_column(table, name, "`prompt_template`")) for literal, name in _parts_of(template)
    ]
    names = list(dict.fromkeys(name for _, name in parts if name))
    completion = _completion(table, names, completion_column)

    def fill_in(row: Row) -> Pair:
        values = {name: row.text(name) for name in names}
        if not any(map(str.strip, values.values())):
            raise UnusableError(f"empty {' and '.join(names)}")
        prompt = "".join(literal + (values[name] if name else "") for literal, name in parts)
        return Pair(prompt, row.filled(completion))

    columns = {name: name for name in (*names, completion)}
    return Layout("template", columns, frozenset(), fill_in)


def _completion(table: Table, names: list[str], given: str | None) -> str:
    """The column to write after a prompt of the columns ``names``."""
    if given is not None:
        completion = given_column(table, given, "`completion_column`")
    else:
        completion = find_column([column for column in table.columns if column not in names], COMPLETION_NAMES) or ""
    if not completion or completion in names:
        why = f"{quoted(completion)} stands in the prompt already" if completion else "It is not found by its name"
        raise SettingError(
            f"which column is to be written after the prompt? {why}.",
            where=str(table.source),
            advice=f"Give `completion_column` with another of the columns {shorten(table.columns)}.",
        )
    return completion


def _parts_of(template: str) -> list[tuple[str, str | None]]:
    """Literal text, each piece with the column that follows it (None: none does)."""
    parts: list[tuple[str, str | None]] = []
    end = 0
    for match in _PART.finditer(template):
        literal, column = _unescaped(template[end : match.start()]), match["column"]
        end = match.end()
        if match[0] in ("{{", "}}"):
            parts.append((literal + match[0][0], None))
        elif column is not None and column.strip():
            parts.append((literal, column))
        else:
            raise SettingError(
                f"the {match[0]} at character {match.start() + 1} names no column.",
                setting="prompt_template",
                given=repr(template),
                allowed="{column}, with {{ and }} for braces that are to stand in the text",
            )
    if not any(column for _, column in parts):
        raise SettingError(
            "holds no column.",
            setting="prompt_template",
            given=repr(template),
            advice="Put one in braces: {question}.",
        )
    return [*parts, (_unescaped(template[end:]), None)]


def _unescaped(literal: str) -> str:
    r"""A shell hands on a typed ``\n`` as two characters."""
    return literal.replace("\\n", "\n")
