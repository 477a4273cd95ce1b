"""Parquet files, and the label names that the datasets library writes into them."""

from __future__ import annotations

import json
from typing import Any

from capotune.data.columns import refuse_duplicates
from capotune.data.table import Origin, Table
from capotune.data.wording import first_line
from capotune.errors import DataError, needs_extra

__all__ = ["name_classes", "read_parquet"]


def read_parquet(raw: bytes, source: str, limit: int | None) -> Table:
    """The rows of a parquet file's bytes. ``DataError`` when it is damaged or names a column twice,
    ``MissingLibraryError`` without pyarrow."""
    with needs_extra("parquet"):
        import pyarrow
        import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(raw))
        columns = [str(name) for name in table.column_names]
        refuse_duplicates(columns, source)
        rows = table.slice(0, limit).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"is not whole parquet ({first_line(error)}).", where=source, advice="Write it again."
        ) from error
    written_by_datasets = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    name_classes(rows, written_by_datasets.get("info", {}).get("features") or {})
    return Table(columns, rows, list(range(1, len(rows) + 1)), Origin(source), nulls_are_absent=True)


def name_classes(rows: list[dict[str, Any]], features: dict[str, Any]) -> None:
    """Put the names of ``ClassLabel`` columns, and of columns with lists of such, where their numbers stand; -1 is how
    such a column says 'no label'."""
    for column, feature in features.items():
        while isinstance(feature, dict) and "feature" in feature:  # of a list, what is in it
            feature = feature["feature"]
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names"):
            names = dict(enumerate(feature["names"]))
            for row in rows:
                if column in row:
                    row[column] = _named(row[column], names)


def _named(value: Any, names: dict[int, str]) -> Any:
    return [_named(one, names) for one in value] if isinstance(value, list) else names.get(value)
