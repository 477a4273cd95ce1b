"""One reader for each kind of source; ``read_table`` picks it.

Nothing is guessed and nothing is repaired: a row that does not fit is named, with its place and what to do about it.
"""

from __future__ import annotations

import os
from pathlib import Path

from capotune.data.readers.files import Place, no_such_file, read_file
from capotune.data.readers.hub import is_hub_id, read_hub
from capotune.data.readers.memory import as_source, table_of
from capotune.data.readers.text import is_plain_text, read_text, read_text_parts
from capotune.data.table import RowsBuilder, Table
from capotune.data.wording import shorten
from capotune.errors import DataError
from capotune.memory_table import MemoryTable

__all__ = ["as_source", "is_hub_id", "is_plain_text", "read_table", "read_text", "read_text_parts"]


def read_table(
    source: object, split: str | None = None, *, limit: int | None = None, place: Place = RowsBuilder
) -> Table:
    """Read every row of a csv, tsv, jsonl/ndjson, json or parquet file, of a dataset on the hub, or of data in memory.

    Text is UTF-8, or UTF-16 with a byte-order mark. A csv file may be separated by commas, semicolons, tabs or bars,
    as its header line shows. Blank lines, and csv lines whose fields are all blank, are left out. A csv column without
    a name is called by its place: ``column 3``.

    Args:
        source: a path, ``owner/name`` or ``owner/name:split``, where what stands on disk wins over the hub; or rows in
            memory, as ``as_source`` takes them.
        split: the part of a hub dataset; without it all parts are read and, where there are several, a column
            ``split`` says which one a row is from.
        limit: stop after so many rows (of each split). Lines further down are not checked, and of a large text file
            only the start is read.
        place: makes where the rows go: into memory, or a ``RowStore`` for what may be larger. Rows in memory stay where
            they are.

    Raises:
        DataError: the source does not exist or cannot be read, holds no rows, or has lines that do not fit.
    """
    source = as_source(source)
    if isinstance(source, MemoryTable):
        return table_of(source, limit)
    path = Path(source).expanduser()
    if not os.path.exists(path):  # noqa: PTH110 - Path.exists raises on a name that is too long
        if not is_hub_id(source):
            raise no_such_file(source, path)
        table = read_hub(source, split, limit, place())
    elif split is not None:
        raise DataError(
            f"is a file, and split={split!r} chooses a part of a hub dataset.", where=source, advice="Leave it out."
        )
    else:
        table = read_file(path, source, limit, place)
    if not table.rows:
        held = f"only the header {shorten(table.columns)}" if table.columns else "nothing but brackets"
        raise DataError(f"holds no rows, {held}.", where=source, advice="Add rows, or give another file.")
    return table
