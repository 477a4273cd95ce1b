"""Labels as they are written: which of them are one label, and which values are no labels at all."""

from __future__ import annotations

import math
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Final

from capotune.data.columns import value_as_text
from capotune.data.suggest import template_for
from capotune.data.wording import kind_of, quoted, shorten
from capotune.errors import DataError

__all__ = ["are_amounts", "are_joined", "label_text", "one_spelling", "refuse_no_classes", "why_no_label"]

SEPARATORS: Final = ";|,"
"""What may stand between labels, the most telling first."""
_MOST_STEPS: Final = 20  # of a scale in fractions, such as 0.5 to 5 stars: as many may be labels
_FEW_ROWS: Final = 4  # of fewer rows nothing is said by each having its own label


def label_text(value: object) -> str | None:
    """A label as text: composed (NFC), without space around it; as ``value_as_text`` gives it."""
    text = value_as_text(value)
    return None if text is None else unicodedata.normalize("NFC", text)


def why_no_label(value: object, column: str) -> str:
    """Why a value is no label, where ``label_text`` gives None."""
    if isinstance(value, list | tuple):
        return f"label ({column}) is a list; give `task=multi-label` for several labels a text"
    return f"label ({column}) is {kind_of(value)}, neither text nor a number"


def one_spelling(labels: Collection[str], known: Sequence[str] = ()) -> dict[str, str]:
    """For labels that differ only in how a number or a truth value is written (``1`` and ``1.0``, ``True`` and
    ``true``) the one spelling that all of them get; empty where no two do.

    ``known``: labels whose spelling stays; what is written in another way becomes one of these.
    """
    if known:
        known_by_value = {_value(name): name for name in known}
        unknown = set(labels) - set(known)
        return {label: known_by_value[_value(label)] for label in unknown if _value(label) in known_by_value}
    values = {label: _value(label) for label in labels}
    if len(set(values.values())) == len(values):
        return {}
    return {label: value for label, value in values.items() if label != value}


def _value(label: str) -> str:
    if label.lower() in ("true", "false"):
        return label.lower()
    whole = re.fullmatch(r"([+-]?\d+)\.0*", label)
    return whole[1] if whole else label


def refuse_no_classes(labels: Sequence[str], text_column: str, label_column: str, where: str) -> None:
    """Raise a ``DataError`` for labels that are several in one, numbers to predict, or texts to write."""
    names = sorted(set(labels))
    column = f"the column {quoted(label_column)}"
    if joined := _several_in_one(names):
        raise DataError(
            f"{column} holds several labels for one text, such as {quoted(joined)}.",
            where=where,
            advice="Give `task=multi-label`, or keep one label a row.",
        )
    if are_amounts(names, len(labels)):
        raise DataError(
            f"{column} holds numbers, {len(names):,} different ones: {shorten(names, 3)}. These are no classes.",
            where=where,
            advice="Give `task=regression` to predict them, make labels of them, such as 'low' and 'high', or choose "
            "another `label_column`.",
        )
    if _are_texts(names, len(labels)):
        written = template_for([text_column], label_column)
        to_write = f"If this is text to write, give {written}; else choose" if written else "Choose"
        raise DataError(
            f"{column} holds {len(names):,} different values in {len(labels):,} rows, such as {quoted(labels[0])}. A "
            "label needs several rows to be learned from.",
            where=where,
            advice=f"{to_write} another `label_column`.",
        )


def _several_in_one(names: Sequence[str]) -> str | None:
    """A label that is several; None where each seems to be one."""
    if all(name.startswith("[") and name.endswith("]") for name in names):
        return names[0]
    for separator in SEPARATORS:
        if joined := are_joined(names, separator):
            return joined
    return None


def are_joined(names: Collection[str], separator: str) -> str | None:
    """A label that consists of several between which ``separator`` stands; None where each seems to be one."""
    parts = {name: {part.strip() for part in name.split(separator)} for name in names}
    joined = [name for name in names if separator in name]
    in_labels = Counter(part for of_name in parts.values() for part in of_name)
    # with a comma a label may be one ("Korea, North"): then its parts stand in no other
    every = all(in_labels[part] > 1 for name in joined for part in parts[name])
    if joined and (every or (separator != "," and any(parts[name] & set(names) for name in joined))):
        return joined[0]
    return None


def are_amounts(names: Collection[str], rows: int) -> bool:
    """Whether they are numbers with fractions that are no scale of a few steps, or many numbers in few rows."""
    try:
        numbers = [float(name) for name in names]
    except ValueError:
        return False
    if len(names) <= rows / 2:
        has_fractions = any(math.isfinite(number) and number != round(number) for number in numbers)
        return has_fractions and len(names) > _MOST_STEPS
    return len(names) > _MOST_STEPS or any(math.isfinite(number) and number != round(number) for number in numbers)


def _are_texts(names: Collection[str], rows: int) -> bool:
    """Whether every row has a label of its own, or most have one of several words."""
    several_words = statistics.median(len(name.split()) for name in names) >= 4
    return rows >= _FEW_ROWS and (len(names) == rows or (several_words and len(names) > rows / 2))
