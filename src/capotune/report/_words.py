"""Numbers in words, the same in the terminal, the picture and the page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from capotune.files import human_bytes

PROPORTIONS = {"accuracy", "exact_match"}
PERCENTAGES = PROPORTIONS | {"f1", "macro_f1", "micro_f1", "weighted_f1"}


def base_label(task: str) -> str:
    """What the base's own score is called: nothing in it was fine-tuned."""
    return "base (frozen, nearest class mean)" if task == "classification" else "base (not fine-tuned)"


def score_text(value: float, metric: str, digits: int = 1) -> str:
    """A percentage where the metric is one, else four significant digits; a dash for NaN."""
    if math.isnan(value):
        return "-"
    return f"{100 * value:.{digits}f} %" if metric in PERCENTAGES else f"{value:.4g}"


def change_text(value: float, base: float, metric: str) -> str:
    """The change against the base, in percentage points where the metric is a percentage."""
    if math.isnan(value - base):
        return "-"
    return f"{100 * (value - base):+.1f}" if metric in PERCENTAGES else f"{value - base:+.4g}"


def share_text(part: int, whole: int) -> str:
    """A percentage with two significant digits: ``1.2 %``, ``0.034 %``."""
    percent = 100 * part / whole if whole else math.nan
    return "-" if math.isnan(percent) else f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"


def seconds_text(value: float) -> str:
    """A duration for people: ``0.8 s``, ``38 s``, ``6 min 52 s``, ``2 h 05 min``."""
    whole = round(value)
    if whole < 60:
        return f"{value:.1f} s" if value < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def count_text(n: int) -> str:
    """All digits up to ten million, so that seven columns fit beside them."""
    return f"{n:,}" if n < 10_000_000 else f"{n / 1e6:,.1f} M"


def memory_text(n: int) -> str:
    """A peak in bytes; a dash when it was not measured."""
    return human_bytes(n) if n else "-"


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def words(name: str) -> str:
    """A field's name as people write it."""
    return name.replace("_", " ")
