"""What the tensors of an adapter that PEFT wrote do to its base. Everything that PEFT trains reduces to three forms:

    low-rank     W' = W + scale·BA, with DoRA each row rescaled to its magnitude       a linear layer; stays unmerged
    change       W' = f(W)            (IA)³'s factors, rows of trained tokens, an embedding's delta, a bias of B
    replacement  W' = trained W       biases, modules_to_save, heads, embeddings stored whole

Which form a tensor has is read from its key, and not from what the configuration says was trained: some write a head
and name none. ``loralib``'s keys (``lora_A`` without ``.weight``) are read as well.

Sources: PEFT 0.21 ``tuners/lora/layer.py``, ``tuners/ia3/layer.py``, ``tuners/trainable_tokens/layer.py``,
``utils/save_and_load.py``; (IA)³: Liu et al. 2022 (arXiv 2205.05638, §3.3).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from capotune.errors import AdapterError, quoted
from capotune.methods.base import LowRank
from capotune.methods.patterns import path_pattern

Change = Callable[[Tensor], Tensor]
"""From a weight (out, in), an embedding (words, width) or a bias (out,), fp32, to what it becomes."""
PROMPT = "prompt_embeddings"
_PREFIXES = ("base_model.model.", "base_model.")
_WRAPPERS = {"base_layer", "modules_to_save", "token_adapter", "default"}
"""What PEFT puts between a module's path and its weight."""
_ENDING = re.compile(
    r"^(?P<path>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|ia3_l"
    r"|trainable_tokens_delta)(?P<rest>(\.default)?(\.weight|\.bias)?)$"
)
_LARGEST_ALPHA = 1e30
_LONGEST_PATH, _MOST_PATTERNS = 200, 1_000


@dataclass
class Parts:
    """What an adapter does to the parts of its base, by their path in the model that it was trained in."""

    low_rank: dict[str, LowRank] = field(default_factory=dict)
    """By a linear layer's path."""
    changes: dict[str, list[Change]] = field(default_factory=lambda: defaultdict(list))
    """By a parameter's path; in order, after a replacement. A bias that the base lacks counts as zeros."""
    replaced: dict[str, Tensor] = field(default_factory=dict)
    """By a parameter's path, laid out as the base stores it."""
    embeddings: dict[str, LowRank] = field(default_factory=dict)
    """By an embedding's path: A (rank, words), B (width, rank)."""
    bare: bool = False
    """Whether deltas have loralib's names, which an embedding's shares with a linear layer's."""
    tied: set[str] = field(default_factory=set)
    """Parameters whose change holds for every layer that shares them, as an output layer does the embedding."""
    prompt: Tensor | None = None
    """(virtual tokens, width): vectors before every text."""
    copies: list[str] = field(default_factory=list)
    """Keys of weights of the base that PEFT stores beside a copy that was trained; they change nothing."""

    def paths(self) -> set[str]:
        """Every parameter that is touched."""
        layers = (*self.low_rank, *self.embeddings)
        return {*(f"{path}.weight" for path in layers), *self.changes, *self.replaced}

    def leave_out(self, path: str) -> None:
        """Forget what is done to a parameter."""
        layer = path.rpartition(".")[0]
        for table, key in ((self.low_rank, layer), (self.changes, path), (self.replaced, path)):
            table.pop(key, None)


def read_parts(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Parts:
    """The parts of ``tensors``, as ``adapter_config.json`` scales them.

    Raises ``AdapterError`` for tensors that lack a part, have no or unequal ranks, or whose scale is not stated.
    """
    parts, prompts, layers = Parts(), dict[str, Tensor](), defaultdict[str, dict[str, Tensor]](dict)
    for key, tensor in tensors.items():
        name = _without_prefix(key)
        found = _ENDING.match(name)
        if name == PROMPT:
            _store_once(prompts, name, tensor, name)
            parts.prompt = _matrix(key, tensor)
        elif found is not None:
            ending = ".bias" if found["rest"].endswith(".bias") else ""
            path, part = _unwrapped(found["path"]), found["part"] + ending
            _store_once(layers[path], part, tensor, f"{path}.{part}")
            parts.bare |= found["part"] in ("lora_A", "lora_B") and not found["rest"]
        elif "original_module" in name.split("."):
            parts.copies.append(key)
        else:
            _store_once(parts.replaced, _unwrapped(name), tensor, _unwrapped(name))
    for path, found_parts in layers.items():
        _read_layer(parts, path, found_parts, config)
    return parts


def _store_once(table: dict[str, Tensor], key: str, tensor: Tensor, name: str) -> None:
    """Under ``key``. ``AdapterError`` where other values stand there: two keys of a file may be spellings of one."""
    first = table.setdefault(key, tensor)
    if first.shape != tensor.shape or not torch.equal(first.float(), tensor.float()):
        raise AdapterError(f"{name} is stored twice, with other values.")


def _without_prefix(key: str) -> str:
    for prefix in _PREFIXES:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def _unwrapped(path: str) -> str:
    return ".".join(name for name in path.split(".") if name not in _WRAPPERS)


def _read_layer(parts: Parts, path: str, found: dict[str, Tensor], config: Mapping[str, Any]) -> None:
    weight = f"{path}.weight"
    if "ia3_l" in found:
        factor = found.pop("ia3_l").float()
        if factor.dim() != 2 or 1 not in factor.shape:
            raise AdapterError(f"{path}.ia3_l is {tuple(factor.shape)}; (out, 1) or (1, in) is expected.")
        parts.changes[weight].append(partial(_multiplied, factor, weight))
        if factor.shape[1] == 1:
            parts.changes[f"{path}.bias"].append(partial(_multiplied, factor[:, 0], f"{path}.bias"))
    if "trainable_tokens_delta" in found:
        rows = found.pop("trainable_tokens_delta").float()
        parts.changes[weight].append(partial(_rows_replaced, rows, _token_ids(config, path, len(rows)), weight))
        parts.tied.add(weight)
    for kind, where in (("lora_", parts.low_rank), ("lora_embedding_", parts.embeddings)):
        pair = [found.pop(f"{kind}{side}", None) for side in "AB"]
        if pair == [None, None]:
            continue
        if pair[0] is None or pair[1] is None:
            raise AdapterError(f"{path} has one of {kind}A and {kind}B, and the other is missing.")
        magnitude = found.pop("lora_magnitude_vector", None)
        if magnitude is None and config.get("use_dora") is True:
            raise AdapterError(f"{path} has no lora_magnitude_vector, and adapter_config.json says use_dora.")
        where[path] = _low_rank(path, pair[0], pair[1], magnitude, config)
    bias = found.pop("lora_B.bias", None)
    if bias is None and path in parts.low_rank and config.get("lora_bias") is True:
        raise AdapterError(f"{path} has no lora_B.bias, and adapter_config.json says lora_bias.")
    if bias is not None and path in parts.low_rank:
        parts.changes[f"{path}.bias"].append(partial(_added, bias.float() * parts.low_rank[path].scale, f"{path}.bias"))
    if found:
        raise AdapterError(f"{path}: {', '.join(sorted(found))} without lora_A and lora_B.")


def _low_rank(path: str, a: Tensor, b: Tensor, magnitude: Tensor | None, config: Mapping[str, Any]) -> LowRank:
    a, b = _matrix(path, a), _matrix(path, b)
    stated = _by_pattern(config, "rank_pattern", path, config.get("r"))
    if not (len(a) == b.shape[1] == stated and len(a)):
        raise AdapterError(
            f"{path}: lora_A is {tuple(a.shape)} and lora_B {tuple(b.shape)}, and adapter_config.json says rank "
            f"{stated}; they do not fit together."
        )
    alpha = _by_pattern(config, "alpha_pattern", path, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < _LARGEST_ALPHA:
        raise AdapterError(f"{path}: adapter_config.json must state a lora_alpha above 0, and says {quoted(alpha)}.")
    if magnitude is not None and magnitude.numel() != len(b):
        raise AdapterError(f"{path}: lora_magnitude_vector is {tuple(magnitude.shape)}; ({len(b)},) is expected.")
    wide = None if magnitude is None else magnitude.float().flatten()
    scale = alpha / (math.sqrt(len(a)) if config.get("use_rslora") is True else len(a))
    return LowRank(a, b, scale, wide)


def _matrix(path: str, tensor: Tensor) -> Tensor:
    if tensor.dim() != 2:
        raise AdapterError(f"{path} has a tensor of shape {tuple(tensor.shape)} where a matrix is expected.")
    return tensor.float()


def _by_pattern(config: Mapping[str, Any], name: str, path: str, default: Any) -> Any:
    """The value of the first pattern that the path ends in, as PEFT matches them, else ``default``."""
    if len(path) > _LONGEST_PATH:
        raise AdapterError(f"{quoted(path)} is too long for a layer's name.")
    table = config.get(name) or {}
    if len(table) > _MOST_PATTERNS:
        raise AdapterError(f"{name} has {len(table):,} entries; at most {_MOST_PATTERNS:,} are tried.")
    return next((value for pattern, value in table.items() if path_pattern(name, pattern).match(path)), default)


def _token_ids(config: Mapping[str, Any], path: str, count: int) -> Tensor:
    """Ids of the rows that were trained; the configuration has one list, or one for each layer by its name."""
    stated = config.get("trainable_token_indices", config.get("token_indices"))
    if isinstance(stated, dict):
        stated = next((ids for name, ids in stated.items() if path == name or path.endswith(f".{name}")), None)
    whole = isinstance(stated, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in stated)
    if not whole or len(stated or ()) != count or not all(0 <= one < 2**63 for one in stated or ()):
        raise AdapterError(f"{path}: adapter_config.json must state the ids of the {count} trained tokens.")
    return torch.tensor(stated, dtype=torch.long)


def embedding_delta(low: LowRank, path: str) -> Change:
    """W (words, width) → Wᵀ + scale·BA, transposed back; with DoRA each component of the vectors has a magnitude."""

    def change(weight: Tensor) -> Tensor:
        _check_shape(path, low.shape[::-1], weight.shape)
        return low.merged(weight.t()).t()

    return change


def _added(delta: Tensor, path: str, weight: Tensor) -> Tensor:
    _check_shape(path, delta.shape, weight.shape)
    return weight + delta


def _multiplied(factor: Tensor, path: str, weight: Tensor) -> Tensor:
    fits = factor.dim() == weight.dim() and all(
        one in (1, two) for one, two in zip(factor.shape, weight.shape, strict=True)
    )
    if not fits:
        raise AdapterError(
            f"{path} is {tuple(weight.shape)} in the base, and the adapter's factor {tuple(factor.shape)}."
        )
    return weight * factor


def _rows_replaced(rows: Tensor, ids: Tensor, path: str, weight: Tensor) -> Tensor:
    if rows.shape[1:] != weight.shape[1:] or int(ids.max()) >= len(weight):
        raise AdapterError(
            f"{path} is {tuple(weight.shape)} in the base; the adapter trains rows of {tuple(rows.shape[1:])}, up to "
            f"row {int(ids.max())}.",
            advice="It was trained on a base with other tokens.",
        )
    return weight.index_copy(0, ids.to(weight.device), rows.to(weight.device))


def _check_shape(path: str, found: Any, expected: Any) -> None:
    if tuple(found) != tuple(expected):
        raise AdapterError(f"{path} is {tuple(expected)} in the base and {tuple(found)} in the adapter.")
