"""Texts of rows as a comparison's page shows them."""

from __future__ import annotations

from collections.abc import Sequence

from capotune.sections import Part


def text_parts(text: str | Sequence[str]) -> list[Part]:
    """Of one text, or of two that are read together, as ``predictions.jsonl`` holds it."""
    if isinstance(text, str):
        return [Part(text)]
    first, second = text
    return [Part(first), Part(" "), Part(second, "second text")]
