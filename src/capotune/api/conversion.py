"""A model's checkpoint written anew, as functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from capotune.api.training import Reporter
from capotune.config import QuantizeSettings, build


def quantize(model: str, *, out: str | Path, progress: Reporter | None = None, **settings: Any) -> dict[str, Any]:
    """Write a model with its linear weights in 4 bits into the new folder ``out``; returns sizes and errors.

    The folder loads in Transformers with bitsandbytes and trains with qlora. ``settings`` are those of ``capo quantize
    --help`` by name (``quant_type="fp4"``, ``report=True``, ``text="mine.txt"``). ``progress`` is called with events.
    Raises as ``train``.
    """
    from capotune import conversion

    built = build(QuantizeSettings, {"model": model, "out": out, **settings})
    return conversion.quantize(built, progress or (lambda _: None))
