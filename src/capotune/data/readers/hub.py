"""Datasets of the Hugging Face hub. No code from the hub is run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from capotune.data.readers.endings import ALLOWED, ENDINGS, TEXT_ENDINGS
from capotune.data.readers.parquet import class_names, named
from capotune.data.table import Origin, Table, TakesRows
from capotune.data.wording import did_you_mean, first_line, shorten
from capotune.errors import DataError, needs_extra

__all__ = ["is_hub_id", "join_splits", "read_hub"]

_AT_ONCE: Final = 1000  # rows
_HUB_ID: Final = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<split>\w[\w.-]*))?")


def is_hub_id(source: str) -> bool:
    """Whether ``source`` is written like a hub dataset (``owner/name`` or ``owner/name:split``), not like a file."""
    match = _HUB_ID.fullmatch(source)
    return match is not None and Path(match["name"]).suffix.lower() not in (*ENDINGS, *TEXT_ENDINGS)


def read_hub(source: str, split: str | None, limit: int | None, place: TakesRows) -> Table:
    """The rows of a hub dataset, put into ``place``: of one split, or of all with a column ``split``; at most ``limit``
    of each.

    Raises:
        DataError: there is no such dataset or no network, or splits are named twice.
    """
    match = _HUB_ID.fullmatch(source)
    assert match is not None
    if split is not None and match["split"] not in (None, split):
        raise DataError(
            f"names a split, and split={split!r} names another.", where=source, advice="Give one of the two."
        )
    parts = _load(source, match["name"], split or match["split"])
    columns, rows = join_splits(parts, source, limit)
    for line, row in enumerate(rows, start=1):
        place.add(line, tuple(row), tuple(row.values()))
    return Table(columns, place.rows(), place.lines, Origin(source), nulls_are_absent=True)


def join_splits(parts: dict[str, Any], source: str, limit: int | None) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """Columns and rows of ``datasets.Dataset``s by split, some read at a time; of several, with a column ``split``.

    Raises:
        DataError: there are several, and a column ``split`` as well.
    """
    columns = dict.fromkeys(column for part in parts.values() for column in part.column_names)
    if len(parts) > 1:
        if "split" in columns:
            advice = f"Choose one: {shorten(parts)}."
            raise DataError("has several splits and a column 'split'.", where=source, advice=advice)
        columns["split"] = None
    return list(columns), _rows(parts, limit)


def _rows(parts: dict[str, Any], limit: int | None) -> Iterator[dict[str, Any]]:
    for name, part in parts.items():
        marked = {"split": name} if len(parts) > 1 else {}
        names_of = class_names(part.features.to_dict())
        count = len(part) if limit is None else min(limit, len(part))
        for start in range(0, count, _AT_ONCE):
            for row in part.select(range(start, min(start + _AT_ONCE, count))).to_list():
                yield marked | row | {column: named(row[column], names) for column, names in names_of.items()}


def _load(source: str, name: str, split: str | None) -> dict[str, Any]:
    """The parts of a hub dataset by name."""
    with needs_extra("hub"):
        import datasets
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import HTTPError  # of whichever library it speaks HTTP with

    try:
        if not constants.HF_HUB_OFFLINE:
            HfApi().dataset_info(name, timeout=10)  # without a network load_dataset would try for half a minute
        loaded = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        path = Path(name)
        in_folder = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
        raise DataError(
            "no such file, and no such dataset on the hub; both were tried. The hub's answer: "
            f"{first_line(error)}. {did_you_mean(path.name, in_folder)}".rstrip(),
            where=source,
            allowed=ALLOWED,
            advice="Check the spelling and the network, or download the data and give the file.",
        ) from error
    return {split: loaded} if split is not None else dict(loaded)
