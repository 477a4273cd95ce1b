"""What a comparison leaves for people: the rule that recommends, the picture and the page.

It knows no task and no method but by the data that they give: metrics (``evaluation/metrics.py``), sections of the page
(``sections.py``) and words.
"""

from __future__ import annotations

import json
from pathlib import Path

from capotune.files import write_atomic
from capotune.report._page import page
from capotune.report._plot import plot
from capotune.report._records import Comparison, ComparisonRow, PageDetails, Snippet
from capotune.report._rule import recommend

__all__ = ["Comparison", "ComparisonRow", "PageDetails", "Snippet", "page", "plot", "recommend", "write"]


def write(comparison: Comparison, details: PageDetails, folder: str | Path) -> None:
    """Write ``compare.json``, ``compare.png`` and ``compare.html`` into ``folder``, each complete or absent."""
    folder = Path(folder)
    content = json.dumps(comparison.to_dict(details), indent=2, default=str) + "\n"
    write_atomic(folder / "compare.json", content)
    plot(comparison, folder / "compare.png")
    page(comparison, details, folder / "compare.html")
