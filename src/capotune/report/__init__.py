"""What a comparison leaves for people: the rule that recommends, the table, the picture and the page."""

from __future__ import annotations

import json
from pathlib import Path

from capotune.evaluation.metrics import wilson_interval
from capotune.files import write_atomic
from capotune.report._page import page
from capotune.report._plot import plot
from capotune.report._records import Answers, Comparison, ComparisonRow, Mistake, PageDetails
from capotune.report._rule import recommend
from capotune.report._table import table

__all__ = [
    "Answers",
    "Comparison",
    "ComparisonRow",
    "Mistake",
    "PageDetails",
    "page",
    "plot",
    "recommend",
    "table",
    "wilson_interval",
    "write",
]


def write(comparison: Comparison, details: PageDetails, folder: str | Path) -> None:
    """Write ``compare.json``, ``compare.png`` and ``compare.html`` into ``folder``, each complete or absent."""
    folder = Path(folder)
    content = json.dumps(comparison.to_dict(details), indent=2, default=str) + "\n"
    write_atomic(folder / "compare.json", content)
    plot(comparison, folder / "compare.png")
    page(comparison, details, folder / "compare.html")
