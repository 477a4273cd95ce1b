"""The cache of what a run's frozen layers compute: where it is, and all that its entries depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch

from capotune.adapters.assemble import Assembled
from capotune.engine.activation_cache import ActivationCache
from capotune.events import Reporter
from capotune.files import cache_folder
from capotune.kernels import described
from capotune.settings import RunSettings


def activation_cache(
    settings: RunSettings,
    base: Mapping[str, str],
    assembled: Assembled,
    dtype: torch.dtype,
    report: Reporter,
    *,
    stores: bool | None = None,
) -> ActivationCache:
    """For a base with the record ``base`` (``base_record``); it stores nothing where the settings say so. ``stores`` as
    ``ActivationCache`` has it."""
    folder = cache_folder() / "activations" if settings.cache else None
    made_of = {"base": assembled.base.name, "data": str(settings.data)}
    return ActivationCache(folder, _identity(base, assembled, dtype), made_of, report, stores)


def _identity(base: Mapping[str, str], assembled: Assembled, dtype: torch.dtype) -> dict[str, Any]:
    """All that cached activations depend on, besides the tokens."""
    quantization = assembled.method.quantization
    return {
        "base": base["fingerprint"],
        "config": base["config"],
        "quantization": asdict(quantization) if quantization else None,
        "device": assembled.model.device.type,
        "dtype": str(dtype),
        "torch": torch.__version__,
        # these decide how sequences are read and what computes the blocks, and so the last bits
        "transformers": metadata.version("transformers"),
        "kernels": described(assembled.model.device),
    }
