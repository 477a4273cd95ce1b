"""A model's checkpoint written anew, as functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from capotune.events import CancelToken, Reporter, ignore
from capotune.settings import MergeSettings, QuantizeSettings, build


def quantize(
    model: str,
    *,
    out: str | Path,
    progress: Reporter = ignore,
    cancel: CancelToken | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Write a model with its linear weights in 4 bits into the new folder ``out``; returns sizes and errors.

    The folder loads in Transformers with bitsandbytes and trains with qlora. ``settings`` are those of ``capo quantize
    --help`` by name (``quant_type="fp4"``, ``report=True``, ``text="mine.txt"``). ``progress`` is called with events.
    Raises as ``train``.
    """
    from capotune.runs import convert

    built = build(QuantizeSettings, {"model": model, "out": out, **settings})
    return convert.quantize(built, (cancel or CancelToken()).watching(progress))


def merge(
    adapter: str | Path,
    *,
    out: str | Path,
    progress: Reporter = ignore,
    cancel: CancelToken | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Write a lora or qlora adapter's change into its base: a Transformers checkpoint in the new folder ``out``.

    Returns what changed, and how far the merged model's answers are from the adapter's. ``settings`` are those of
    ``capo merge --help`` by name (``requantize=True``, ``text="mine.txt"``, ``model="where/the/base/is"``). A
    classifier's head is at ``out/adapter``, an adapter of the merged model. Raises as ``train``.
    """
    from capotune.runs import convert

    built = build(MergeSettings, {"adapter": Path(adapter), "out": out, **settings})
    return convert.merge(built, (cancel or CancelToken()).watching(progress))
