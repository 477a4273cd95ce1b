"""The comparison in the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

from capotune.files import human_bytes
from capotune.report._records import Comparison, ComparisonRow
from capotune.report._words import base_label, change_text, count_text, memory_text, score_text, share_text, words

if TYPE_CHECKING:
    from rich.table import Table

_SHORT = {"perplexity": "perpl.", "exact_match": "exact\nmatch"}


def table(comparison: Comparison) -> Table:
    """The comparison for a terminal of 80 columns or more, with or without colour.

    In generation the further metrics stand where else the comparison with the base does; its own numbers are below.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    further = _further(comparison)
    grid = Table(
        title=Text(_title(comparison)),
        caption=Text(f"\n* {comparison.why}" if comparison.recommended else f"\n{comparison.why}"),
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        caption_style="",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    grid.add_column("technique", no_wrap=True)
    for heading in _headings(further):
        grid.add_column(heading, justify="right", no_wrap=True)
    for row in comparison.rows:
        recommended = row.method == comparison.recommended
        name = Text(f"{'*' if recommended else ' '} {row.method}")
        grid.add_row(name, *_cells(row, comparison, further), style="bold" if recommended else None)
    base = "\n  ".join(textwrap.wrap(base_label(comparison.task), 19, break_on_hyphens=False))
    scores = score_text(comparison.base_score, comparison.metric), *_scores(comparison.base_scores, further)
    grid.add_row(Text(f"  {base}"), *scores, style="dim")
    return grid


def _further(comparison: Comparison) -> list[str]:
    """The metrics that get a column; the loss gets none beside perplexity, its exponential: 80 columns are few."""
    if comparison.task != "generation":
        return []
    names = comparison.further_metrics
    return [name for name in names if name != "loss" or "perplexity" not in (comparison.metric, *names)]


def _title(comparison: Comparison) -> str:
    rows = f"{comparison.test_rows:,} test rows, {comparison.train_rows:,} to train on"
    better = "" if comparison.higher_is_better else " (lower is better)"
    return f"{words(comparison.metric)}{better} on {rows}\n"


def _headings(further: list[str]) -> list[str]:
    costs = ["adapter", "train\n(s)", "peak\nmemory"]
    if not further:
        return ["score", "vs\nbase", "trainable", "of\nbase", *costs]
    return ["score", *(_SHORT.get(name, words(name)) for name in further), "train-\nable", *costs]


def _cells(row: ComparisonRow, comparison: Comparison, further: list[str]) -> list[str]:
    """The row's numbers in the order of ``_headings``."""
    score = score_text(row.score, comparison.metric)
    costs = [
        human_bytes(row.adapter_bytes),
        f"{row.train_seconds:,.1f}" if row.train_seconds < 100 else f"{row.train_seconds:,.0f}",
        memory_text(row.peak_memory_bytes),
    ]
    if further:
        return [score, *_scores(row.scores, further), count_text(row.trainable_parameters, 1_000_000), *costs]
    change = change_text(row.score, comparison.base_score, comparison.metric)
    share = share_text(row.trainable_parameters, row.total_parameters)
    return [score, change, count_text(row.trainable_parameters), share, *costs]


def _scores(scores: Mapping[str, float], names: list[str]) -> list[str]:
    return [score_text(scores[name], name) if name in scores else "-" for name in names]
