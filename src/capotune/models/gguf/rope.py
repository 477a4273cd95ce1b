"""Rotary position embeddings: what a GGUF file says of them, as Transformers' ``rope_parameters``.

A base frequency and a kind of scaling are metadata. Llama 3's scaling is stored as its result, one factor for each
frequency (``rope_freqs``), Phi-3's as two such lists (``rope_factors_long`` and ``_short``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from capotune.models.gguf.file import GgufFile

FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (FREQUENCIES, LONG, SHORT)
"""What is read here, and has no place among a model's weights."""
_NEAR = 1e-3


def rope(file: GgufFile, theta: float = 10_000.0) -> dict[str, Any]:
    """``rope_parameters``; ``theta`` is the base frequency of a file that names none.

    Raises ``ModelError`` for a scaling that Transformers has no words for.
    """
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": float(file.get("rope.freq_base", theta))}
    if FREQUENCIES in file.tensors:
        return found | _llama3(file, found["rope_theta"])
    if LONG in file.tensors and SHORT in file.tensors:
        return found | _longrope(file)
    kind = file.get("rope.scaling.type", "linear" if file.get("rope.scale_linear") else "none")
    factor = float(file.get("rope.scaling.factor", file.get("rope.scale_linear", 1.0)))
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return found
    if kind == "linear":
        return found | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return found | _yarn(file, factor)
    raise file.error(f"its rotary positions are scaled by '{kind}', which is not read here.")


def _yarn(file: GgufFile, factor: float) -> dict[str, Any]:
    """YaRN (Peng et al. 2023); the attention factor is Transformers' and llama.cpp's own, 0.1·ln(factor) + 1."""
    found: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    names = {
        "original_max_position_embeddings": "original_context_length",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
    }
    found |= {name: file.get(f"rope.scaling.{key}") for name, key in names.items() if file.get(f"rope.scaling.{key}")}
    scale = float(file.get("rope.scaling.attn_factor", 1.0))
    return found if scale == 1.0 else found | {"attention_factor": scale * (0.1 * math.log(factor) + 1)}


def _longrope(file: GgufFile) -> dict[str, Any]:
    """LongRoPE (Ding et al. 2024), as Phi-3 has it."""
    found: dict[str, Any] = {
        "rope_type": "longrope",
        "long_factor": file.read(LONG).float().tolist(),
        "short_factor": file.read(SHORT).float().tolist(),
    }
    original = file.get("rope.scaling.original_context_length")
    if original is not None:
        found["original_max_position_embeddings"] = int(original)
    scale = file.get("rope.scaling.attn_factor")
    return found if scale is None else found | {"attention_factor": float(scale)}


def _llama3(file: GgufFile, theta: float) -> dict[str, Any]:
    """The four numbers that make the stored factors; Meta's own, else the ones that a line through them gives."""
    factors = file.read(FREQUENCIES).double()
    if torch.equal(factors, torch.ones_like(factors)):
        return {}
    wavelengths = 2 * math.pi * theta ** (torch.arange(len(factors), dtype=torch.float64) / len(factors))
    factor = float(factors.max())
    for low, high, original in ((1.0, 4.0, 8192), _fitted(factors, wavelengths, factor)):
        if torch.allclose(_llama3_factors(wavelengths, factor, low, high, original), factors, rtol=_NEAR, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise file.error(f"{FREQUENCIES} scales its rotary positions in a way that Llama 3's formula does not give.")


def _llama3_factors(wavelengths: Tensor, factor: float, low: float, high: float, original: int) -> Tensor:
    """Llama 3.1's formula, as a divisor of each frequency."""
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _fitted(factors: Tensor, wavelengths: Tensor, factor: float) -> tuple[float, float, int]:
    """Low, high and original length by least squares over the frequencies in between, with low = 1; only two of the
    three can be told from factors."""
    smooth = (1 / factors - 1 / factor) / (1 - 1 / factor) if factor > 1 else torch.zeros_like(factors)
    between = (smooth > 1e-6) & (smooth < 1 - 1e-6)
    if between.sum() < 2:
        return 1.0, 4.0, 8192
    rows = torch.stack([1 / wavelengths[between], torch.ones_like(wavelengths[between])], dim=1)
    slope, start = torch.linalg.lstsq(rows, smooth[between].unsqueeze(1)).solution.flatten().tolist()
    if start >= 0 or slope <= 0:
        return 1.0, 4.0, 8192
    return 1.0, 1 - 1 / start, round(-slope / start)
