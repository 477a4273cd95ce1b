"""A model's checkpoint written anew: its weights in 4 bits, or an adapter's change in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from math import sqrt
from typing import Any

from capotune.config import QuantizeSettings
from capotune.errors import SettingError
from capotune.evaluation.divergence import compare_models, read_text
from capotune.files import output_folder, write_atomic
from capotune.models.load import Quantization, Source, find
from capotune.models.quantize import LayerError, write_packed

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
            source, new, packing, trust_remote_code=settings.trust_remote_code, progress=steps(report)
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


def steps(report: Reporter) -> Callable[[int, int], None]:
    """Progress in bytes as events, a hundred of them at most."""
    last = -1

    def progress(done: int, total: int) -> None:
        nonlocal last
        if 100 * done // total > last:
            last = 100 * done // total
            report({"kind": "step", "step": done, "total": total})

    return progress


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
