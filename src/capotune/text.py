"""Numbers as people read them, the same in the terminal, the picture and the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from capotune.files import human_bytes

__all__ = ["count_text", "listed", "memory_text", "seconds_text", "share_text", "times_text", "value_text", "words"]


def share_text(part: int, whole: int) -> str:
    """A percentage with two significant digits: ``1.2 %``, ``0.034 %``; a dash when there is no whole."""
    percent = 100 * part / whole if whole else math.nan
    return "-" if math.isnan(percent) else f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"


def seconds_text(value: float) -> str:
    """A duration: ``0.8 s``, ``38 s``, ``6 min 52 s``, ``2 h 05 min``."""
    whole = round(value)
    if whole < 60:
        return f"{value:.1f} s" if value < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def count_text(n: int, all_digits_below: int = 10_000_000) -> str:
    """All digits of a small count, millions beyond."""
    return f"{n:,}" if n < all_digits_below else f"{n / 1e6:,.1f} M"


def memory_text(n: int) -> str:
    """A peak in bytes; a dash when it was not measured."""
    return human_bytes(n) if n else "-"


def times_text(ratio: float) -> str:
    """A ratio with two significant digits below 3, whole above: ``1.4``, ``2``, ``17``."""
    return f"{ratio:,.0f}" if ratio >= 2.95 else f"{ratio:.1f}".removesuffix(".0")


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def words(name: str) -> str:
    """A field's name with spaces: ``train rows``."""
    return name.replace("_", " ")


def value_text(value: Any, name: Callable[[str], str] = words) -> str:
    """A plain JSON value as text; ``name`` gives what a dictionary's key is called."""
    if value is None or value in ([], (), {}):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping) and {"count", "first"} <= value.keys():
        unit = value.get("unit", "line")
        return f"{value['count']:,} ({unit}s {value_text(value['first'])})" if value["count"] else "0"
    if isinstance(value, Mapping):
        return ", ".join(f"{name(str(key))} {value_text(item, name)}" for key, item in value.items())
    return ", ".join(value_text(item, name) for item in value) if isinstance(value, (list, tuple)) else str(value)
