"""A model whose attention reads trained keys and values at some positions, whatever its family.

Families of Transformers look their attention function up by a name in the configuration, and give it queries, keys and
values after the rotary embedding and the cache. A prefix is an attribute of the attention module, which the function
finds there; so do packed sequences (``sequence_packing``) and fused blocks (``fusion``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from capotune.kernels.prefix import LayerPrefix

PREFIXED = "capotune_prefixed"
"""What the attention of a model with a prefix is called where sequences are padded."""
_OBSERVED = "capotune_observed"


@dataclass(frozen=True)
class AttentionSeen:
    """One call of attention."""

    module: nn.Module
    keys: torch.Tensor
    """(key-value heads, tokens, head_dim)."""
    values: torch.Tensor


def prefix_of(attention: nn.Module) -> LayerPrefix | None:
    """What was put before the keys and values of an attention module."""
    found: LayerPrefix | None = vars(attention).get("prefix")
    return found


def has_prefix(backbone: Any) -> bool:
    """Whether any attention module of ``backbone`` has one."""
    return any(prefix_of(module) is not None for module in backbone.modules())


def put_prefixes(backbone: Any, prefixes: Sequence[tuple[nn.Module, LayerPrefix]]) -> list[tuple[Any, str]]:
    """Give attention modules of ``backbone`` their prefixes; returns what ``take_prefixes`` needs."""
    _register(PREFIXED, _prefixed)
    for module, prefix in prefixes:
        vars(module)["prefix"] = prefix
    return _rename(backbone, PREFIXED)


def take_prefixes(backbone: Any, names: Sequence[tuple[Any, str]]) -> None:
    """Take all of them away."""
    for module in backbone.modules():
        vars(module).pop("prefix", None)
    for config, name in names:
        config._attn_implementation = name


@torch.no_grad()
def observe_attention(backbone: Any, input_ids: torch.Tensor) -> list[AttentionSeen]:
    """What each attention module reads when ``backbone`` reads one sequence of ids (tokens,), in the order of calls.

    Empty where its attention cannot be looked into: it has none, or one of its own that Transformers' interface does
    not know.
    """
    seen: list[AttentionSeen] = []

    def note(module: nn.Module, query: Any, key: torch.Tensor, value: torch.Tensor, mask: Any, **more: Any) -> Any:
        seen.append(AttentionSeen(module, key[0].clone(), value[0].clone()))
        return sdpa_attention_forward(module, query, key, value, mask, **more)

    if backbone.config._attn_implementation != "sdpa":
        return []
    _register(_OBSERVED, note)
    with _renamed(backbone, _OBSERVED):
        backbone(input_ids=input_ids[None].to(backbone.device))
    return seen


def prefix_places(backbone: Any) -> list[tuple[dict[str, Any], str]]:
    """Where it stands whether ``backbone`` has prefixes, each a table and the name in it, so that who notes what stands
    there can put prefixes in and take them away."""
    configs = {id(part.config): part.config for part in backbone.modules() if hasattr(part, "config")}
    names = [(vars(config), "_attn_implementation_internal") for config in configs.values()]
    return [*((vars(module), "prefix") for module in backbone.modules()), *names]


def _prefixed(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **more: Any
) -> Any:
    """Attention as Transformers calls it, with the module's prefix."""
    prefix = prefix_of(module)
    if prefix is not None:
        key, value = prefix.put_padded(key, value)
    return sdpa_attention_forward(module, query, key, value, mask, **more)


def _register(name: str, attention: Any) -> None:
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)


def _rename(backbone: Any, name: str) -> list[tuple[Any, str]]:
    """Its configurations, each with the name that it had."""
    configs = {id(part.config): part.config for part in backbone.modules() if hasattr(part, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    for config in configs.values():
        config._attn_implementation = name
    return before


@contextmanager
def _renamed(backbone: Any, name: str) -> Iterator[None]:
    before = _rename(backbone, name)
    try:
        yield
    finally:
        for config, own in before:
            config._attn_implementation = own
