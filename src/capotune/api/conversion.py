"""A model's checkpoint written anew, an adapter for others, as functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from capotune.conversion_settings import (
    CombineSettings,
    DiffSettings,
    ExportSettings,
    MergeSettings,
    PushSettings,
    QuantizeSettings,
)
from capotune.events import CancelToken, Reporter, ignore
from capotune.settings import build


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
    """Write an adapter's change (no soft prompt) into its base: a Transformers checkpoint in the new folder ``out``.

    Returns what changed, and how far the merged model's answers are from the adapter's. ``settings`` are those of
    ``capo merge --help`` by name (``requantize=True``, ``data="mine.csv"``, ``model="where/the/base/is"``). A
    classifier's head is at ``out/adapter``, an adapter of the merged model. Raises as ``train``, and ``AdapterError``
    where the merged model answers otherwise than rounding explains.
    """
    from capotune.data.readers import as_source
    from capotune.runs import convert

    if settings.get("data") is not None:
        settings["data"] = as_source(settings["data"])
    built = build(MergeSettings, {"adapter": str(adapter), "out": out, **settings})
    return convert.merge(built, (cancel or CancelToken()).watching(progress))


def diff(
    adapter: str | Path,
    other: str | Path,
    *,
    progress: Reporter = ignore,
    cancel: CancelToken | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """What differs between two adapters: ``differing`` settings, weights, and the norms of their ``deltas`` with the
    angle between them, of all and of each block; None where one has none, or they are not of the ``same_base``: by
    content, by name where PEFT wrote one of them.

    With ``data`` (rows as in training) also their ``answers``: how far the distributions are apart, in nats, and the
    losses of base, first and second. ``settings`` are those of ``capo diff --help`` by name. Raises as ``train``.
    """
    from capotune.data.readers import as_source
    from capotune.runs import differ

    if settings.get("data") is not None:
        settings["data"] = as_source(settings["data"])
    built = build(DiffSettings, {"adapter": str(adapter), "other": str(other), **settings})
    return differ.diff(built, (cancel or CancelToken()).watching(progress))


def combine(
    *adapters: str | Path,
    out: str | Path,
    progress: Reporter = ignore,
    cancel: CancelToken | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Make one adapter of several on one base, in the new folder ``out``; returns what was done.

    ``settings`` are those of ``capo combine --help`` by name (``method="ties"``, ``weights=(1, 0.5)``, ``rank=16``).
    ``held`` is the part of the combined change's norm that the rank holds. Raises ``AdapterError`` for adapters that
    cannot be one (another base, task or labels; a method without LoRA deltas), else as ``train``.

    >>> capotune.combine("polite/adapter", "terse/adapter", out="both", weights=(0.7, 0.5))   # doctest: +SKIP
    """
    from capotune.runs import combine as combining

    built = build(CombineSettings, {"adapters": tuple(map(str, adapters)), "out": out, **settings})
    return combining.combine_adapters(built, (cancel or CancelToken()).watching(progress))


def export(
    adapter: str | Path,
    *,
    loader: str,
    out: str | Path,
    progress: Reporter = ignore,
    cancel: CancelToken | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Write an adapter for another program (``"vllm"``, ``"llama.cpp"`` …) into the new folder ``out``.

    Returns what was changed, the command that runs it, and how far what was read back from disk answers from the
    adapter and from the base. ``settings`` are those of ``capo export --help`` by name (``merged=True``,
    ``gguf_type="Q8_0"``, ``data="mine.csv"``). Raises as ``train``, and ``SettingError`` for an adapter that the
    program cannot take, with the nearest way out.
    """
    from capotune.data.readers import as_source
    from capotune.runs import export as exports

    if settings.get("data") is not None:
        settings["data"] = as_source(settings["data"])
    built = build(ExportSettings, {"adapter": str(adapter), "loader": loader, "out": out, **settings})
    return exports.export(built, (cancel or CancelToken()).watching(progress))


def push(
    adapter: str | Path,
    repo: str,
    *,
    progress: Reporter = ignore,
    cancel: CancelToken | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Put an adapter into the repository ``repo`` (OWNER/NAME) of the Hugging Face hub, with a card from its record.

    Names of folders, hashes and texts of yours stay here; ``left_out`` says what. Endpoint and token are
    huggingface_hub's own (``HF_ENDPOINT``, ``hf auth login``). ``settings`` are those of ``capo push --help`` by name
    (``private=True``, ``revision="v2"``, ``model="owner/base"``). Raises as ``train``, and ``HubError`` when the hub
    cannot be reached or refuses.
    """
    from capotune.runs import push as pushes

    built = build(PushSettings, {"adapter": str(adapter), "repo": repo, **settings})
    return pushes.push(built, (cancel or CancelToken()).watching(progress))
