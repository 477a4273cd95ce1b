"""LoRA deltas in the form that every program reads the same: one rank, an integer alpha that means alpha/r, no DoRA.

    delta = (alpha/r)·BA      A (r, in), B (out, r), for each layer

A scale that alpha/r cannot say is folded into B; lesser ranks are padded with zeros; a layer that other blocks
have gets zeros where a program wants its name in every block. DoRA's delta W' − W is written with one factor an
identity matrix: it is exact, at full rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from capotune.adapters.assemble import Assembled
from capotune.adapters.files import CONFIG, WEIGHTS
from capotune.adapters.loaders import Loader
from capotune.errors import AdapterError
from capotune.files import write_atomic
from capotune.kernels.nf4 import Linear4bit
from capotune.methods.base import LowRank, Method
from capotune.models.architecture import linear_shape
from capotune.models.hub import peft_base


@dataclass(frozen=True)
class Portable:
    """An adapter's deltas in that form."""

    layers: dict[str, tuple[Tensor, Tensor]]
    """A (rank, in) and B (out, rank) of each layer, fp32, by its path in the model."""
    rank: int
    alpha: int
    changes: tuple[str, ...] = ()
    """What was changed to get there, a sentence each."""

    def delta(self, path: str) -> Tensor:
        """(out, in), fp32."""
        a, b = self.layers[path]
        return (self.alpha / self.rank) * (b @ a)


def portable(deltas: Mapping[str, LowRank], assembled: Assembled, loader: Loader) -> Portable:
    """The deltas for ``loader``; ``assembled`` is their base with nothing attached."""
    changes: list[str] = []
    plain = dict(deltas)
    if any(one.magnitude is not None for one in deltas.values()):
        plain = {path: _exact(one, _weight(assembled, path)) for path, one in deltas.items()}
        changes.append("DoRA is written as W' − W, an exact LoRA delta of full rank.")
    ranks = {one.rank for one in plain.values()}
    rank = max(*ranks, loader.least_rank)
    if ranks != {rank}:
        shown = ", ".join(map(str, sorted(ranks)))
        changes.append(f"A and B are padded with zeros from rank {shown} to {rank}.")
    scales = {one.scale for one in plain.values()}
    alpha = rank * next(iter(scales))
    folds = len(scales) > 1 or not float(alpha).is_integer()
    if folds:
        alpha = rank
        changes.append(f"the scale is folded into B: alpha and rank are {rank}.")
    layers = {path: _padded(one, rank, one.scale if folds else 1.0) for path, one in plain.items()}
    if loader.uniform:
        blank = _blank(layers, assembled, rank)
        if blank:
            layers |= blank
            changes.append(f"{len(blank)} layers without a delta got one of zeros, so that every block has all names.")
    order = [path for path in assembled.architecture.linears if path in layers]
    return Portable({path: layers[path] for path in order}, rank, int(alpha), tuple(changes))


def write_peft(adapter: Portable, assembled: Assembled, folder: Path, task_type: str, base_name: str) -> None:
    """Write it as PEFT's adapter folder, which vLLM and SGLang read too."""
    prefix = Method.key_prefix
    tensors: dict[str, Tensor] = {}
    for path, (a, b) in adapter.layers.items():
        tensors[f"{prefix}{path}.lora_A.weight"] = a.contiguous()
        tensors[f"{prefix}{path}.lora_B.weight"] = b.contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        **peft_base(base_name),
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "target_modules": assembled.architecture.short_names(adapter.layers),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": any(isinstance(assembled.model.get_submodule(path), Conv1D) for path in adapter.layers),
    }
    write_atomic(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_atomic(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def read_peft(folder: Path) -> Portable:
    """What ``write_peft`` wrote, as a program reads it: alpha, r and the two matrices. ``AdapterError`` when it is
    damaged."""
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(f"what was written cannot be read back ({error}).", where=str(folder)) from None
    end = ".lora_A.weight"
    layers = {
        key.removeprefix(Method.key_prefix).removesuffix(end): (a, tensors[key.replace(".lora_A.", ".lora_B.")])
        for key, a in tensors.items()
        if key.endswith(end)
    }
    return Portable(layers, config["r"], config["lora_alpha"])


def check_same(written: Portable, read: Portable, where: Path) -> None:
    """``AdapterError`` unless what was ``read`` back is what was ``written``, tensor by tensor, bit by bit."""
    same = (written.rank, written.alpha, written.layers.keys()) == (read.rank, read.alpha, read.layers.keys())
    wrong = [
        path
        for path, pair in written.layers.items()
        if not same or not all(torch.equal(one, other) for one, other in zip(pair, read.layers[path], strict=True))
    ]
    if wrong or not same:
        raise AdapterError(f"{', '.join(wrong[:3])} read back otherwise than written.", where=str(where))


def _exact(delta: LowRank, weight: Tensor) -> LowRank:
    change = delta.merged(weight) - weight
    out, into = change.shape
    if out <= into:
        return LowRank(change, torch.eye(out), 1.0)
    return LowRank(torch.eye(into), change, 1.0)


def _padded(delta: LowRank, rank: int, factor: float) -> tuple[Tensor, Tensor]:
    more = rank - delta.rank
    return functional.pad(delta.a, (0, 0, 0, more)), functional.pad(delta.b * factor, (0, more))


def _blank(layers: Mapping[str, Any], assembled: Assembled, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Zeros for every linear layer that has a name of the adapted ones and no delta."""
    names = {_last(path) for path in layers}
    found = {}
    for path in assembled.architecture.linears:
        if _last(path) in names and path not in layers:
            out, into = linear_shape(assembled.model.get_submodule(path))
            found[path] = torch.zeros(rank, into), torch.zeros(out, rank)
    return found


def _weight(assembled: Assembled, path: str) -> Tensor:
    """The frozen weight (out, in), fp32."""
    return dense_weight(assembled.model.get_submodule(path))


def dense_weight(layer: Any) -> Tensor:
    """A linear layer's weight (out, in), fp32, on the CPU."""
    if isinstance(layer, Linear4bit):
        return layer.dense_weight(torch.float32).cpu()
    weight: Tensor = layer.weight.detach().float().cpu()
    return weight.t() if isinstance(layer, Conv1D) else weight


def _last(path: str) -> str:
    return path.rpartition(".")[2]
