"""Texts without labels, to be answered: a column of a file with rows, or a plain text file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from capotune.data.columns import TEXT_NAMES, find_column, given_column
from capotune.data.readers import is_plain_text, read_table, read_text
from capotune.data.table import Table
from capotune.data.text_columns import find_pair
from capotune.data.wording import bad_rows, count, did_you_mean, quoted, shorten
from capotune.errors import DataError

__all__ = ["pair_of_line", "read_pairs", "read_prompts", "read_texts"]

PROMPT_NAMES: Final = ("prompt", "question", "instruction", "input", "text")


def read_texts(source: str, text_column: str | None = None) -> list[str]:
    """Texts to label: a column of a csv, tsv, jsonl or parquet file, or the lines of any other file but blank ones.

    Raises:
        DataError: there is no such file or column, or a row has no text.
    """
    content = _plain_content(source)
    if content is not None:
        return [line for line in content.split("\n") if line.strip()]
    return _column(source, text_column, TEXT_NAMES, "text_column")


def read_pairs(source: str, pair_columns: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """Pairs of texts to label: two columns of a csv, tsv, jsonl or parquet file, or the lines of any other file but
    blank ones, each two texts parted by a tab.

    Raises:
        DataError: there is no such file or column, or a row has no two texts.
    """
    content = _plain_content(source)
    if content is not None:
        lines = enumerate(content.split("\n"), start=1)
        return [pair_of_line(line, f"{source}:{number}") for number, line in lines if line.strip()]
    table = read_table(source)
    columns = find_pair(table, None, pair_columns)
    if columns is None:
        raise DataError(
            f"it is not clear which columns hold the two texts. The columns are {shorten(table.columns)}.",
            where=source,
            advice="The adapter was trained on pairs of texts: give `pair_columns`.",
        )
    first, second = (_checked_texts(table, column) for column in columns)
    return list(zip(first, second, strict=True))


def pair_of_line(line: str, where: str) -> tuple[str, str]:
    """Two texts parted by a tab. ``DataError`` where there are others."""
    texts = [text for text in line.rstrip("\r\n").split("\t") if text.strip()]
    if len(texts) != 2:
        raise DataError(
            f"two texts parted by a tab are needed, found {count(len(texts), 'text')}.",
            where=where,
            advice="The adapter was trained on pairs of texts.",
        )
    return texts[0], texts[1]


def read_prompts(source: str, prompt_column: str | None = None) -> list[str]:
    """Prompts to continue: a column of a csv, tsv, jsonl or parquet file, or any other file as one prompt.

    Raises:
        DataError: as ``read_texts``.
    """
    content = _plain_content(source)
    if content is not None:
        return [content.removesuffix("\n")]
    return _column(source, prompt_column, PROMPT_NAMES, "prompt_column")


def _plain_content(source: str) -> str | None:
    """The text of a file that holds no rows, by its ending; None: it holds rows."""
    path = Path(source).expanduser()
    if not path.exists():
        near = did_you_mean(path.name, [one.name for one in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise DataError("no such file.", where=source, advice=f"{near}Give a file of texts.")
    return read_text(source) if is_plain_text(source) else None


def _column(source: str, given: str | None, names: Sequence[str], setting: str) -> list[str]:
    """A column's texts; without a name the first of ``names`` that is there, or the only one."""
    table = read_table(source)
    if given is not None:
        column = given_column(table, given, f"`{setting}`")
    else:
        only = table.columns[0] if len(table.columns) == 1 else None
        column = find_column(table.columns, names) or only or ""
    if not column:
        raise DataError(
            f"it is not clear which column holds the text. The columns are {shorten(table.columns)}.",
            where=source,
            advice=f"Give `{setting}`.",
        )
    return _checked_texts(table, column)


def _checked_texts(table: Table, column: str) -> list[str]:
    """A column's texts. ``DataError`` for a row that has none."""
    texts = table.column(column)
    bad = {
        line: f"the column {quoted(column)} holds {quoted(text)}"
        for line, text in zip(table.lines, texts, strict=True)
        if not isinstance(text, str) or not text.strip()
    }
    if bad:
        raise bad_rows(table.source, "rows without a text", bad, "Fill these in or delete the rows.")
    return texts
