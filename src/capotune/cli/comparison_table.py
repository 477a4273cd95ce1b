"""The comparison in the terminal."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from capotune import api
from capotune.files import human_bytes
from capotune.text import count_text, memory_text, share_text

if TYPE_CHECKING:
    from capotune.api import Comparison, ComparisonRow


def comparison_table(comparison: Comparison) -> Group:
    """The comparison for a terminal of 80 columns or more, with or without colour.

    First the score, the difference from the best with its interval, and what each technique costs; then what trains and
    the further metrics; then what is recommended, and why.
    """
    note = f"{'* ' if comparison.recommended else ''}{comparison.why}"
    return Group(_results(comparison), Text(), _further(comparison), Text(), Text(note))


def _results(comparison: Comparison) -> Table:
    known = api.metric(comparison.metric)
    grid = _table(_title(comparison))
    for heading in ("score", "vs\nbest", "95 %\ninterval", "train\n(s)", "adapter", "peak\nmemory"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for row in comparison.rows:
        grid.add_row(_name(row, comparison), *_cells(row, comparison), style=_style(row, comparison))
    base = known.text(comparison.base_score), _points(comparison.base_difference, comparison)
    grid.add_row(_base_name(comparison), *base, style="dim")
    return grid


def _title(comparison: Comparison) -> str:
    known = api.metric(comparison.metric)
    better = "" if comparison.higher_is_better else " (lower is better)"
    unit = "; differences in points" if known.is_percentage else ""
    rows = f"{comparison.test_rows:,} test rows, {comparison.train_rows:,} to train on"
    return f"{known.words}{better} on {rows}{unit}\n"


def _further(comparison: Comparison) -> Table:
    """What trains, and the further metrics that are worth a column."""
    metrics = [api.metric(name) for name in comparison.columns]
    grid = _table(None)
    for heading in ("trainable", "of base", *("\n".join(known.words.split(maxsplit=1)) for known in metrics)):
        grid.add_column(heading, justify="right", no_wrap=True)
    for row in comparison.rows:
        share = share_text(row.trainable_parameters, row.total_parameters)
        texts = [known.text(row.scores.get(known.name, math.nan)) for known in metrics]
        cells = count_text(row.trainable_parameters), share, *texts
        grid.add_row(_name(row, comparison), *cells, style=_style(row, comparison))
    if metrics:
        base = [known.text(comparison.base_scores.get(known.name, math.nan)) for known in metrics]
        grid.add_row(_base_name(comparison), "", "", *base, style="dim")
    return grid


def _table(title: str | None) -> Table:
    grid = Table(
        title=Text(title) if title else None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        show_edge=False, pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    grid.add_column("technique", no_wrap=True)
    return grid


def _name(row: ComparisonRow, comparison: Comparison) -> Text:
    return Text(f"{'*' if row.method == comparison.recommended else ' '} {row.method}")


def _base_name(comparison: Comparison) -> Text:
    return Text("  " + "\n  ".join(textwrap.wrap(comparison.base_label, 19, break_on_hyphens=False)))


def _style(row: ComparisonRow, comparison: Comparison) -> str | None:
    return "bold" if row.method == comparison.recommended else None


def _cells(row: ComparisonRow, comparison: Comparison) -> list[str]:
    """The row's values in the order of the headings."""
    is_best = row.method == comparison.best
    ends = [_points(end, comparison) for end in row.difference_interval or ()]
    return [
        api.metric(comparison.metric).text(row.score),
        "best" if is_best else _points(row.difference, comparison),
        " to ".join(ends),
        f"{row.train_seconds:,.1f}" if row.train_seconds < 100 else f"{row.train_seconds:,.0f}",
        human_bytes(row.adapter_bytes),
        memory_text(row.peak_memory_bytes),
    ]


def _points(difference: float | None, comparison: Comparison) -> str:
    """A difference from the best; a dash where there is none."""
    beside = next((row.score for row in comparison.rows if row.method == comparison.best), comparison.base_score)
    return "-" if difference is None else api.metric(comparison.metric).difference_text(difference, beside)
