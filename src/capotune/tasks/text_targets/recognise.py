"""Which kind of label a file holds, by its columns and the values of its first rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from capotune.data.readers import is_plain_text, read_table
from capotune.data.table import Table
from capotune.data.text_columns import find_pair, without_column
from capotune.settings import DataSettings

_ROWS = 1000
"""Read to see what labels are; whoever reads all of them refuses what is of another kind."""


def recognised(settings: DataSettings, looks_like: Callable[[Table, str | None, Sequence[str]], bool]) -> bool:
    """Whether the data is of the kind that ``looks_like`` tells by a table, the text's column, and those of labels."""
    if is_plain_text(settings.data):
        return False
    table = read_table(settings.data, limit=_ROWS)
    columns = settings.label_columns or ((settings.label_column,) if settings.label_column else ())
    pair = find_pair(table, settings.text_column, settings.pair_columns)
    if pair is not None:
        return looks_like(without_column(table, pair[1]), pair[0], columns)
    return looks_like(table, settings.text_column, columns)
