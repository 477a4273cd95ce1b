"""How rows of one source are read: their columns under usual names, and the function that makes a sample of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from capotune.data.columns import value_as_text
from capotune.data.sample_facts import facts_of
from capotune.data.samples import Format, Sample, described
from capotune.data.table import Table
from capotune.data.view import View
from capotune.data.wording import SHOWN, bad_rows, kind_of, shorten

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Layout", "Row", "UnusableError", "convert"]


class UnusableError(Exception):
    """A row does not fit; says why."""


@dataclass(frozen=True)
class Row:
    """One row. A column is asked for by its usual name, and named in messages as the source names it."""

    values: dict[str, Any]
    columns: dict[str, str]

    def value(self, name: str) -> Any:
        """What stands in the column, None when nothing does."""
        return self.values.get(self.columns[name]) if name in self.columns else None

    def text(self, name: str) -> str:
        """Text or a number as it is written, ``""`` when the column is absent or empty."""
        value = self.value(name)
        text = value if isinstance(value, str) else value_as_text(value)
        if text is None:
            raise UnusableError(f"{self.columns[name]} is {kind_of(value)}, not text")
        return text

    def filled(self, name: str) -> str:
        """Text that is not blank."""
        text = self.text(name)
        if not text.strip():
            raise UnusableError(f"empty {self.columns[name]}")
        return text


@dataclass(frozen=True)
class Layout:
    """How the rows of one source are read."""

    format: Format
    columns: dict[str, str]  # the usual name of each column, and its name in this source
    optional: frozenset[str]  # usual names that a row may lack
    convert: Callable[[Row], Sample]
    note: str = ""  # what else is to be said of how they are read


def convert(table: Table, layout: Layout) -> tuple[Sequence[Sample], NDArray[Any]]:
    """A sample for each row, made again whenever it is asked for, and their ``facts_of``.

    Raises:
        DataError: rows do not fit; names them and what is wrong.
    """
    needed = [column for name, column in layout.columns.items() if name not in layout.optional]
    bad: dict[int, str] = {}
    unusable = 0

    def sample(row: dict[str, Any]) -> Sample:
        if missing := [column for column in needed if column not in row]:
            raise UnusableError(f"no {shorten(missing)}, which the first row has; only {shorten(row)}")
        values = _without_nulls(row) if table.nulls_are_absent else row
        return layout.convert(Row(values, layout.columns))

    def usable() -> Iterator[Sample]:
        nonlocal unusable
        for line, row in zip(table.lines, table.rows, strict=True):
            try:
                yield sample(row)
            except UnusableError as error:
                unusable += 1
                if len(bad) < SHOWN:
                    bad[line] = str(error)

    facts = facts_of(usable())
    if bad:
        rows = "1 row" if unusable == 1 else f"{unusable:,} of {len(table.rows):,} rows"
        advice = "Correct or delete these rows."
        if unusable > len(table.rows) / 2 and layout.format != "template":
            advice += " Or give a `prompt_template`, if these columns are to be read in another way."
        summary = f"{rows} cannot be used as {described(layout.format, tuple(layout.columns.values()))}"
        raise bad_rows(table.source, summary, bad, advice, unusable)
    return View(len(table.rows), lambda at: sample(table.rows[at])), facts


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
