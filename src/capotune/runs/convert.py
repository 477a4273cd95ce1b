"""A model's checkpoint written anew: its weights in 4 bits, or an adapter's change in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from math import sqrt
from typing import Any

import torch

from capotune.adapters.merge import check_mergeable, save_head, write_merged
from capotune.adapters.store import StoredAdapter, find_base, load_adapter, read_adapter
from capotune.device import pick_device
from capotune.errors import SettingError
from capotune.evaluation.divergence import (
    Divergence,
    answers_of,
    compare_logits,
    compare_models,
    read_text,
    text_windows,
)
from capotune.files import output_folder, write_atomic
from capotune.models.load import Quantization, Source, find, load_causal_lm
from capotune.models.quantize import LayerError, write_packed
from capotune.models.stream import bytes_as_steps
from capotune.settings import MergeSettings, QuantizeSettings

Event = dict[str, Any]
Reporter = Callable[[Event], None]
"""``kind`` and its values: stage(text), step(step, total) in bytes."""


def quantize(settings: QuantizeSettings, report: Reporter) -> dict[str, Any]:
    """Write ``settings.model`` with its linear weights in 4 bits into ``settings.out``; returns what was measured.

    The folder is complete or absent. With ``settings.report`` it holds the same as ``report.json``.

    Raises ``CapotuneError`` subclasses for everything the user can mend.
    """
    if settings.text is not None and not settings.report:
        raise SettingError("--text is what --report measures the model's answers on. Give --report as well.")
    text = read_text(settings.text) if settings.text is not None else None
    source = find(settings.model)
    if source.is_packed:
        raise SettingError(
            f"--model {settings.model}: its weights are in 4 bits already ({source.packing()}). Give the model in full "
            "precision."
        )
    packing = Quantization(settings.quant_type, settings.block_size, settings.double_quant)
    with output_folder(settings.out) as new:
        report({"kind": "stage", "text": f"packing: {packing}"})
        packed = write_packed(
            source, new, packing, trust_remote_code=settings.trust_remote_code, progress=bytes_as_steps(report)
        )
        result = {
            "model": settings.model,
            "out": str(settings.out),
            "packing": asdict(packing),
            "bytes_before": _weight_bytes(source),
            "bytes": _weight_bytes(Source(str(settings.out), new)),
            "packed_weights": packed.packed_weights,
            "all_weights": packed.all_weights,
            **_errors(packed.layers),
        }
        if text is not None:
            report({"kind": "stage", "text": "comparing answers at full precision and in 4 bits"})
            changed = Source(str(settings.out), new)
            result["answers"] = {
                "text": settings.text,
                **asdict(compare_models(source, changed, text, settings.trust_remote_code)),
            }
        if settings.report:
            write_atomic(new / "report.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


def merge(settings: MergeSettings, report: Reporter) -> dict[str, Any]:
    """Write an adapter's base with the adapter's change in its weights into ``settings.out``; says what changed.

    The folder is complete or absent. A classifier's head goes into an adapter inside it.

    Raises ``CapotuneError`` subclasses for everything the user can mend, also for methods that cannot be merged.
    """
    text = read_text(settings.text)
    stored = read_adapter(settings.adapter)
    source = find_base(stored, settings.model)
    check_mergeable(stored, source, settings.requantize)
    with output_folder(settings.out) as new:
        report({"kind": "stage", "text": f"merging into {source.name}{' in 4 bits' if settings.requantize else ''}"})
        changed = write_merged(
            stored,
            source,
            new,
            requantize=settings.requantize,
            trust_remote_code=settings.trust_remote_code,
            progress=bytes_as_steps(report),
        )
        merged = Source(str(settings.out.absolute()), new)
        if stored.task == "classification":
            save_head(stored, merged, settings.out)
        report({"kind": "stage", "text": "comparing answers with the adapter's"})
        return {
            "adapter": str(settings.adapter),
            "base": source.name,
            "out": str(settings.out),
            "requantized": settings.requantize,
            "changed_layers": changed,
            "bytes": _weight_bytes(merged),
            "head": str(settings.out / "adapter") if stored.task == "classification" else None,
            "answers": {"text": settings.text, **asdict(_merged_answers(stored, source, merged, text, settings))},
        }


def _merged_answers(
    stored: StoredAdapter, source: Source, merged: Source, text: str, settings: MergeSettings
) -> Divergence:
    """The merged model's answers against those of the base with the adapter on it."""
    classifies, trust = stored.task == "classification", settings.trust_remote_code
    windows = text_windows(source, text, by_line=classifies, trust=trust)
    on_base = load_adapter(stored, model=settings.model, device=pick_device(), trust_remote_code=trust)
    before = answers_of(on_base.model, windows)
    del on_base
    if classifies:
        head = read_adapter(merged.folder / "adapter")
        after = answers_of(load_adapter(head, model=str(merged.folder), device=pick_device()).model, windows)
    else:
        dtype = getattr(torch, stored.record["trained"].get("dtype", "float32"))
        after = answers_of(load_causal_lm(merged, dtype=dtype, trust_remote_code=trust), windows)
    return compare_logits(before, after)


def _errors(layers: tuple[LayerError, ...]) -> dict[str, Any]:
    """Per layer, the worst first; and over all weights, as if they were one."""
    worst = sorted(layers, key=lambda layer: -layer.relative_error)
    square = sum(layer.difference_norm**2 for layer in layers)
    whole = sum(layer.norm**2 for layer in layers)
    return {
        "relative_error": sqrt(square / whole) if whole else 0.0,
        "layers": [
            {"name": layer.name, "shape": list(layer.shape), "relative_error": layer.relative_error} for layer in worst
        ],
    }


def _weight_bytes(source: Source) -> int:
    return sum(path.stat().st_size for path in source.weight_files)
