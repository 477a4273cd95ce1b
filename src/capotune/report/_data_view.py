"""A task's data report as facts for the page: whatever it holds, under names that people read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from capotune import text
from capotune.report._section_views import shortened
from capotune.text import words

_NAMES = {
    "test_from": "test rows from",
    "p95": "95 % at most",
    "train_truncated": "cut in train",
    "test_truncated": "cut in test",
    "train_empty": "empty in train",
    "test_empty": "empty in test",
    "duplicates": "repeated in train",
    "conflicts": "in train with two labels",
    "leaked": "in both train and test",
    "described": "read as",
    "template_from": "chat template from",
    "loss_part": "what is in the loss",
    "train_sequences": "sequences to train on",
    "max_length": "tokens read at once",
    "base_length": "tokens that the base takes",
    "sequence_tokens": "tokens to train on",
    "loss_tokens": "of them in the loss",
    "loss_share": "share in the loss",
    "train_without_loss": "nothing to train on",
    "test_without_loss": "nothing to score in test",
    "train_answers_cut": "answers cut in train",
    "test_answers_cut": "answers cut in test",
    "train_ends_cut": "end of text cut in train",
    "unanswered": "open at the end in train",
}
_DRAWN = {"bins", "samples"}  # parts of the data report that are drawn, not listed


def facts(data: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """Each fact's name, how to show it (``text``, ``list`` or ``table``), and what."""
    return [_fact(name, value) for name, value in data.items() if name not in _DRAWN]


def bins(data: Mapping[str, Any]) -> list[tuple[str, int, float]]:
    """The lengths of the training rows: from where to where, rows, and percent of the largest bin."""
    found = data.get("bins", [])
    most = max((one["rows"] for one in found), default=0) or 1
    return [
        (f"{value_text(one['low'])} to {value_text(one['high'])}", one["rows"], 100 * one["rows"] / most)
        for one in found
    ]


def samples(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Some training rows as the model gets them."""
    found: list[Mapping[str, Any]] = data.get("samples", [])
    return found


def value_text(value: Any) -> str:
    """A setting or a fact as text."""
    return text.value_text(value, _name)


def _fact(name: str, value: Any) -> tuple[str, str, Any]:
    if name.endswith("_share"):
        return _name(name), "text", f"{100 * value:.0f} %"
    if not isinstance(value, (list, tuple)) or not value:
        return _name(name), "text", value_text(value)
    if all(isinstance(item, Mapping) and item.keys() == value[0].keys() for item in value):
        return _name(name), "table", [dict.fromkeys(value[0]), *value]
    return _name(name), "list", [shortened(value_text(item)) for item in value]


def _name(name: str) -> str:
    return _NAMES.get(name, words(name))
