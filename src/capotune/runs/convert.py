"""A model's checkpoint written anew: its weights in 4 bits, or an adapter's change in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from math import sqrt
from typing import Any

import torch

from capotune import methods
from capotune.adapters.assemble import assemble, attach
from capotune.adapters.fingerprint import fingerprint
from capotune.adapters.merge import check_mergeable, write_merged
from capotune.adapters.store import RECORD, StoredAdapter, find_base, is_own_base, read_adapter, save_adapter
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
from capotune.events import Reporter, Stage, Warned, alive, bytes_as_progress
from capotune.files import output_folder, write_atomic
from capotune.methods.base import Start
from capotune.models.base import Base, Quantization, find
from capotune.models.load import load_causal_lm
from capotune.models.quantize import LayerError, write_quantized
from capotune.settings import Context, MergeSettings, QuantizeSettings
from capotune.tasks.loading import load_adapter, task_class, task_on

HEAD = "adapter"
"""Folder of a merged model's head."""
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
    text = read_text(settings.text)
    stored = read_adapter(settings.adapter, allow_different_base=settings.allow_different_base)
    base = find_base(stored, settings.model, trust_remote_code=settings.trust_remote_code, report=report)
    check_mergeable(stored, base, settings.requantize, report)
    has_head = task_class(stored).has_head
    if stored.is_foreign and has_head:
        raise SettingError(
            "PEFT wrote this classifier, whose head is Transformers' own: it is not merged here.",
            where=str(stored.folder),
            advice="Use it as it is, or merge it with merge_and_unload() in PEFT.",
        )
    with output_folder(settings.out) as new:
        report(Stage(text=f"merging into {base.name}{' in 4 bits' if settings.requantize else ''}"))
        progress = bytes_as_progress(report)
        changed = write_merged(stored, base, new, requantize=settings.requantize, progress=progress)
        merged = Base(str(settings.out.absolute()), new, settings.trust_remote_code)
        for notice in task_on(stored, base).write_merged_files(new):
            report(Warned(text=notice))
        if has_head:
            save_head(stored, merged)
        is_own = is_own_base(stored, base)
        if not is_own:
            write_atomic(new / DIFFERENT_BASE, _different_base(stored, base))
        report(Stage(text="comparing answers with the adapter's"))
        return {
            "adapter": str(settings.adapter),
            "base": base.name,
            "different_base": not is_own,
            "out": str(settings.out),
            "requantized": settings.requantize,
            "changed_layers": changed,
            "bytes": merged.weight_bytes,
            "head": str(settings.out / HEAD) if has_head else None,
            "answers": {
                "text": settings.text,
                **asdict(_merged_answers(stored, base, merged, text, has_head, alive(report))),
            },
        }


def _different_base(stored: StoredAdapter, base: Base) -> str:
    trained_on = stored.record["base"]["fingerprint"]
    return json.dumps({"trained_on": trained_on, "merged_into": fingerprint(base)}, indent=2) + "\n"


def save_head(stored: StoredAdapter, merged: Base) -> None:
    """A task's head as an adapter of the ``merged`` base.

    The head was trained on the last layer; the stored one reads every layer and weighs all but the last with zero.
    """
    task = task_class(stored).restore(merged, stored.record)
    context = Context(merged.hidden_size, has_head=True)
    settings = methods.get("feature-extraction").Settings(trainable_layers=0).completed(context)  # type: ignore[call-arg]
    assembled = assemble(task, settings, device=torch.device("cpu"))
    prefix = methods.get(stored.settings.method).key_prefix
    with torch.no_grad():
        for path, weight in task.head_parameters(assembled.model).items():
            trained = stored.tensors[prefix + path]
            weight.zero_()
            weight[..., -trained.shape[-1] :] = trained
    attach(assembled, Start(torch.Generator()))
    save_adapter(merged.folder / HEAD, assembled, stored.record["trained"])


def _merged_answers(
    stored: StoredAdapter, base: Base, merged: Base, text: str, has_head: bool, alive: Callable[[], object]
) -> Divergence:
    """The merged model's answers against those of the base with the adapter on it."""
    windows = text_windows(base, text, by_line=has_head)
    trust, device = base.trust_remote_code, pick_device()
    on_base = load_adapter(stored, model=base.name, device=device, trust_remote_code=trust)
    before = answers_of(on_base.model, windows, alive)
    del on_base
    if has_head:
        head = read_adapter(merged.folder / HEAD)
        after = answers_of(load_adapter(head, model=str(merged.folder), device=device).model, windows, alive)
    else:
        after = answers_of(load_causal_lm(merged, dtype=stored.dtype), windows, alive)
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
