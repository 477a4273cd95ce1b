"""Numbers in words, the same in the terminal, the picture and the page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from capotune.files import human_bytes

PROPORTIONS = {"accuracy", "exact_match"}
PERCENTAGES = PROPORTIONS | {"f1", "macro_f1", "micro_f1", "weighted_f1", "rouge_l"}
_NAMES = {"rouge_l": "ROUGE-L", "macro_f1": "macro F1"}


def base_label(task: str) -> str:
    """What the base's own score is called: nothing in it was fine-tuned."""
    return "base (frozen, nearest class mean)" if task == "classification" else "base (not fine-tuned)"


def score_text(value: float, metric: str, digits: int = 1) -> str:
    """A percentage with ``digits`` decimals where the metric is one, else ``digits`` + 2 significant digits.

    A dash for NaN.
    """
    if math.isnan(value):
        return "-"
    return f"{100 * value:.{digits}f} %" if metric in PERCENTAGES else f"{value:,.{_decimals(value, digits + 2)}f}"


def score_with_name(value: float, metric: str) -> str:
    """A score that says what it is, since a bare number could be anything: ``94.1 %``, ``perplexity 12.3``."""
    return score_text(value, metric) if metric in PERCENTAGES else f"{words(metric)} {score_text(value, metric)}"


def change_text(value: float, base: float, metric: str) -> str:
    """The change against the base, in percentage points where the metric is a percentage."""
    if not math.isfinite(value - base):
        return "-"
    if metric in PERCENTAGES:
        return f"{100 * (value - base):+.1f}"
    return f"{value - base:+,.{_decimals(max(value, base, key=abs))}f}"


def _decimals(value: float, significant: int = 3) -> int:
    """How many decimals show this many significant digits; none are cut before the point."""
    before = math.floor(math.log10(abs(value))) + 1 if math.isfinite(value) and value else 1
    return max(0, significant - before)


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


def count_text(n: int, all_digits_below: int = 10_000_000) -> str:
    """All digits of small numbers, millions beyond."""
    return f"{n:,}" if n < all_digits_below else f"{n / 1e6:,.1f} M"


def memory_text(n: int) -> str:
    """A peak in bytes; a dash when it was not measured."""
    return human_bytes(n) if n else "-"


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def words(name: str) -> str:
    """A field's name as people write it."""
    return _NAMES.get(name, name.replace("_", " "))
