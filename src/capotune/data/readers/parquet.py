"""Parquet files, and the label names that the datasets library writes into them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from capotune.data.columns import refuse_duplicates
from capotune.data.table import Origin, Table, TakesRows
from capotune.data.wording import first_line
from capotune.errors import DataError, needs_extra

__all__ = ["class_names", "named", "read_parquet"]

_AT_ONCE, _LARGEST, _MOST_TIMES = 2**14, 10**9, 100
"""Rows; bytes that any file's values may take, and how many times its size otherwise: text shrinks to a tenth."""


def read_parquet(path: Path, source: str, limit: int | None, rows: TakesRows) -> Table:
    """The rows of a parquet file, put into ``rows``. ``DataError`` when it is damaged or names a column twice,
    ``MissingLibraryError`` without pyarrow."""
    with needs_extra("parquet"):
        import pyarrow
        import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(at).num_rows for at in range(file.metadata.num_row_groups)]
            if min(groups, default=0) < 0 or sum(groups) != file.metadata.num_rows:  # at which pyarrow would abort
                raise pyarrow.ArrowInvalid("it contradicts itself in the number of its rows")
            columns = [str(name) for name in file.schema_arrow.names]
            refuse_duplicates(columns, source)
            names = class_names(_features((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")))
            batches = islice(file.iter_batches(limit), 1) if limit is not None else file.iter_batches(_AT_ONCE)
            room = max(_LARGEST, _MOST_TIMES * path.stat().st_size)
            for batch in _within(room, batches, source):
                for values in zip(*_values(batch, columns, names), strict=True):
                    rows.add(len(rows) + 1, columns, values)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # text need not be text
        raise DataError(
            f"is not whole parquet ({first_line(error)}).", where=source, advice="Write it again."
        ) from error
    return Table(columns, rows.rows(), rows.lines, Origin(source), nulls_are_absent=True)


def _values(batch: Any, columns: Sequence[str], names: dict[str, dict[int, str]]) -> Iterator[list[Any]]:
    """Each column's values."""
    for at, column in enumerate(columns):
        values: list[Any] = batch.column(at).to_pylist()
        yield [named(value, names[column]) for value in values] if column in names else values


def _within(room: int, batches: Iterable[Any], source: str) -> Iterator[Any]:
    """The batches; ``DataError`` once their values take more than ``room`` bytes."""
    for batch in batches:
        room -= batch.nbytes
        if room < 0:
            raise DataError(
                f"holds more than {_MOST_TIMES} times the values that its size lets expect; reading it would "
                "fill the memory.",
                where=source,
                advice="If it is sound, write it as several files, or without compression.",
            )
        yield batch


def _features(written_by_datasets: bytes) -> dict[str, Any]:
    """The kinds of columns in the metadata that datasets writes; none where it is not as that library writes it."""
    found: Any = None
    with suppress(ValueError, RecursionError):
        found = json.loads(written_by_datasets)
    for name in ("info", "features"):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def class_names(features: dict[str, Any]) -> dict[str, dict[int, str]]:
    """By column, the names that stand for the numbers of ``ClassLabel`` columns and of columns with lists of such."""
    found: dict[str, dict[int, str]] = {}
    for column, feature in features.items():
        while isinstance(feature, dict) and "feature" in feature:  # of a list, what is in it
            feature = feature["feature"]
        names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
        if isinstance(names, list) and names:
            found[column] = dict(enumerate(names))
    return found


def named(value: Any, names: dict[int, str]) -> Any:
    """The name that a number stands for; -1 is how such a column says 'no label'."""
    if isinstance(value, list):
        return [named(one, names) for one in value]
    return names.get(value) if isinstance(value, int) else value
