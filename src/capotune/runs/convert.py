"""A model's checkpoint written anew: its weights in 4 bits, or an adapter's change in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from math import sqrt
from typing import Any

from capotune.adapters.assemble import Assembled
from capotune.adapters.files import RECORD
from capotune.adapters.fingerprint import fingerprint
from capotune.adapters.store import StoredAdapter, find_base, is_own_base, read_adapter
from capotune.conversion_settings import MergeSettings, QuantizeSettings
from capotune.data.batches import Encoded
from capotune.device import pick_device
from capotune.errors import SettingError
from capotune.evaluation.agreement import agreement, computes_in, least, precision_of
from capotune.evaluation.divergence import (
    compare_logits,
    compare_models,
    read_text,
)
from capotune.events import Reporter, Stage, Warned, alive, bytes_as_progress
from capotune.files import output_folder, write_atomic
from capotune.models.base import Base, Quantization, find
from capotune.models.quantize import LayerError, write_quantized
from capotune.runs.asking import ask, ask_with_and_without, rows_to_ask
from capotune.runs.merging import HEAD, check_can_merge, load_merged_model, on_merged_weights, write_merged_model
from capotune.tasks.loading import load_adapter, report_notices, task_on

DIFFERENT_BASE = "different_base.json"
"""In a merged model whose base is not the one that the adapter was trained on: both fingerprints."""


def quantize(settings: QuantizeSettings, report: Reporter) -> dict[str, Any]:
    """Write ``settings.model`` with its linear weights in 4 bits into ``settings.out``; returns what was measured.

    The folder is complete or absent. With ``settings.report`` it holds the same as ``report.json``.

    Raises ``CapotuneError`` subclasses for everything the user can mend.
    """
    if settings.text is not None and not settings.report:
        raise SettingError(
            "it is what `report` measures the model's answers on.", setting="text", advice="Give `report=True` as well."
        )
    text = read_text(settings.text) if settings.text is not None else None
    base = find(settings.model, trust_remote_code=settings.trust_remote_code, report=report)
    if base.is_quantized:
        raise SettingError(
            f"its weights are in 4 bits already ({base.quantization}).",
            setting="model",
            given=settings.model,
            advice="Give the model in full precision.",
        )
    quantization = Quantization(settings.quant_type, settings.block_size, settings.double_quant)
    with output_folder(settings.out) as new:
        report(Stage(text=f"quantizing: {quantization}"))
        if (base.folder / HEAD / RECORD).is_file():
            report(Warned(text=f"the head in {HEAD}/ was trained on these weights as they are, and stays behind."))
        written = write_quantized(base, new, quantization, progress=bytes_as_progress(report))
        changed = Base(str(settings.out), new, settings.trust_remote_code)
        result = {
            "model": settings.model,
            "out": str(settings.out),
            "quantization": asdict(quantization),
            "bytes_before": base.weight_bytes,
            "bytes": changed.weight_bytes,
            "quantized_weights": written.quantized_weights,
            "all_weights": written.all_weights,
            **_errors(written.layers),
        }
        if text is not None:
            report(Stage(text="comparing answers at full precision and in 4 bits"))
            result["answers"] = {"text": settings.text, **asdict(compare_models(base, changed, text, alive(report)))}
        if settings.report:
            stored = {name: value for name, value in result.items() if name != "out"}  # the folder may move
            write_atomic(new / "report.json", json.dumps(stored, indent=2, ensure_ascii=False) + "\n")
    return result


def merge(settings: MergeSettings, report: Reporter) -> dict[str, Any]:
    """Write an adapter's base with the adapter's change in its weights into ``settings.out``; says what changed.

    The folder is complete or absent. A task's head goes into an adapter inside it.

    Raises ``CapotuneError`` subclasses for everything the user can mend, also for methods that cannot be merged.
    """
    stored = read_adapter(settings.adapter, allow_different_base=settings.allow_different_base)
    base = find_base(stored, settings.model, trust_remote_code=settings.trust_remote_code, report=report)
    check_can_merge(stored, base, settings.requantize, report)
    rows = rows_to_ask(task_on(stored, base), settings.data)
    with output_folder(settings.out) as new:
        report(Stage(text=f"merging into {base.name}{' in 4 bits' if settings.requantize else ''}"))
        merged = Base(str(settings.out.absolute()), new, settings.trust_remote_code)
        changed, notices = write_merged_model(stored, base, merged, requantize=settings.requantize, report=report)
        for notice in notices:
            report(Warned(text=notice))
        is_own = is_own_base(stored, base)
        if not is_own:
            write_atomic(new / DIFFERENT_BASE, _different_base(stored, base))
        report(Stage(text="comparing answers with the adapter's"))
        answers = _compared(stored, base, merged, rows, settings, report)
        return {
            "adapter": str(settings.adapter),
            "base": base.name,
            "different_base": not is_own,
            "out": str(settings.out),
            "requantized": settings.requantize,
            "changed_layers": changed,
            "bytes": merged.weight_bytes,
            "head": str(settings.out / HEAD) if (new / HEAD / RECORD).is_file() else None,
            "answers": answers,
        }


def _different_base(stored: StoredAdapter, base: Base) -> str:
    trained_on = stored.record["base"]["fingerprint"]
    return json.dumps({"trained_on": trained_on, "merged_into": fingerprint(base)}, indent=2) + "\n"


def _compared(
    stored: StoredAdapter,
    base: Base,
    merged: Base,
    rows: Sequence[Encoded],
    settings: MergeSettings,
    report: Reporter,
) -> dict[str, Any]:
    """How far the merged model, read back from disk, answers from the adapter on the weights that it was merged into,
    and from these alone. ``AdapterError`` where it is farther than rounding explains.

    An adapter that was trained over 4 bits and is merged into full precision answers otherwise as it was trained:
    ``over_4_bits`` says how far that is from the merged model, and is what the base's quantization costs.
    """
    there = on_merged_weights(stored, base, settings.requantize)
    on_base = _on_base(there, base)
    report_notices(stored, on_base, report)
    adapter, alone = ask_with_and_without(on_base, rows, report)
    task = on_base.task
    del on_base
    result = ask(task, load_merged_model(stored, merged), rows, report)
    found = agreement(rows, adapter, alone, result)
    precision = least(precision_of(merged), computes_in(stored.dtype))
    found.check(precision, str(settings.out))
    values = {"data": str(settings.data) if settings.data is not None else None, **asdict(found)}
    if there.settings is not stored.settings:
        trained = ask(task, _on_base(stored, base).model, rows, report)
        values["over_4_bits"] = compare_logits(trained, result).kl_divergence
    return values


def _on_base(stored: StoredAdapter, base: Base) -> Assembled:
    return load_adapter(stored, model=base.name, device=pick_device(), trust_remote_code=base.trust_remote_code)


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
