"""The comparison in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from capotune.files import human_bytes
from capotune.report._records import Comparison
from capotune.report._words import base_label, change_text, count_text, memory_text, score_text, share_text

if TYPE_CHECKING:
    from rich.table import Table


def table(comparison: Comparison) -> Table:
    """The comparison for a terminal of 80 columns or more, with or without colour."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    metric = comparison.metric
    grid = Table(
        title=Text(f"{metric} on {comparison.test_rows:,} test rows, {comparison.train_rows:,} to train on\n"),
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
    for heading in ("score", "vs\nbase", "trainable", "of\nbase", "adapter", "train\n(s)", "peak\nmemory"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for row in comparison.rows:
        recommended = row.method == comparison.recommended
        grid.add_row(
            Text(f"{'*' if recommended else ' '} {row.method}"),
            score_text(row.score, metric),
            change_text(row.score, comparison.base_score, metric),
            count_text(row.trainable_parameters),
            share_text(row.trainable_parameters, row.total_parameters),
            human_bytes(row.adapter_bytes),
            f"{row.train_seconds:,.1f}" if row.train_seconds < 100 else f"{row.train_seconds:,.0f}",
            memory_text(row.peak_memory_bytes),
            style="bold" if recommended else None,
        )
    base = base_label(comparison.task).replace(", ", ",\n  ")
    grid.add_row(Text(f"  {base}"), score_text(comparison.base_score, metric), style="dim")
    return grid
