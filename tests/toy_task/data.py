"""Texts with a number each: a text column and one called ``score``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from capotune.data.columns import TEXT_NAMES, find_column, part_of_each_row
from capotune.data.readers import read_table
from capotune.data.split import hold_out, normalised, refuse_same_source, rows_to_score, split_as_marked
from capotune.data.table import Origin
from capotune.data.wording import bad_rows
from capotune.errors import DataError
from capotune.settings import DataSettings, TrainSettings

NUMBER = "score"


@dataclass(frozen=True)
class NumberedText:
    """``texts[i]`` has the number ``numbers[i]`` and stands on line ``lines[i]`` of ``source``."""

    texts: list[str]
    numbers: list[float]
    lines: list[int]
    source: Origin

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int] | Any) -> NumberedText:
        """The rows at ``indices``, in that order."""
        texts, numbers, lines = ([values[at] for at in indices] for values in (self.texts, self.numbers, self.lines))
        return NumberedText(texts, numbers, lines, self.source)


def is_numbered(settings: DataSettings) -> bool:
    """Whether the first record has a number under ``score``."""
    table = read_table(settings.data, limit=1)
    return NUMBER in table.columns and not math.isnan(_number(table.rows[0].get(NUMBER)))


def load(settings: TrainSettings) -> tuple[NumberedText, NumberedText, str]:
    """Rows to train on, rows to test on, and where the latter are from."""
    if settings.test is not None:
        refuse_same_source(settings.data, settings.test)
    rows, parts = _read(settings.data, settings.text_column)
    second = None if settings.test is None else _read(settings.test, settings.text_column)
    if marked := split_as_marked(rows, parts, second):
        return marked
    if settings.test_fraction == 0:
        return rows, rows.take([]), "none asked for"
    train, test = held_out(rows, settings.test_fraction, settings.seed)
    return rows.take(train), rows.take(test), f"{settings.test_fraction:.0%} of the rows, seed {settings.seed}"


def read_to_score(settings: DataSettings) -> NumberedText:
    """Those that a column ``split`` marks as test, else all."""
    return rows_to_score(*_read(settings.data, settings.text_column))


def held_out(rows: NumberedText, fraction: float, seed: int) -> tuple[Any, Any]:
    """Positions to train on and positions held out; equal texts stay together."""
    return hold_out([0] * len(rows), fraction, seed, [normalised(text) for text in rows.texts])


def _read(source: object, text_column: str | None) -> tuple[NumberedText, list[str]]:
    table = read_table(source)
    column = text_column or find_column(table.columns, TEXT_NAMES)
    if column not in table.columns or NUMBER not in table.columns:
        raise DataError(f"a text column and '{NUMBER}' are needed, found {table.columns}.", where=str(table.source))
    numbers = [_number(row.get(NUMBER)) for row in table.rows]
    bad = {
        line: f"{NUMBER} is {row.get(NUMBER)!r}"
        for line, row, number in zip(table.lines, table.rows, numbers, strict=True)
        if math.isnan(number)
    }
    if bad:
        raise bad_rows(table.source, "rows without a number", bad, "Fill these in or delete the rows.")
    texts = [str(row[column]) for row in table.rows]
    return NumberedText(texts, numbers, table.lines, table.source), part_of_each_row(table, (column, NUMBER))


def _number(value: object) -> float:
    """NaN for what is no finite number."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan
