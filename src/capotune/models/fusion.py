"""Transformer blocks computed by the kernels, where a block is of a form that they know.

Two forms, told by the names of their parts, whatever the family is called:

- Llama's:  x += o(attention(rotary(q, k), v of norm(x)));  x += down(silu(gate) · up of norm(x))      RMS norms
- BERT's:   x = norm(x + o(attention(q, k, v of x)));       x = norm(x + down(gelu(up(x))))            layer norms

Each linear layer is frozen, with or without a low-rank change, or learns as a whole. That a model computes just this is
not believed but tried, as in ``models.sequence_packing``: on a few sequences, at early and at late positions, its own
blocks and these must give the same. Blocks work so on packed sequences only; on anything else, as in a block of another
form, the model's own code runs.

Where the caller names the positions that it ``wanted``, the last block computes what comes after its attention for
these alone.

While a model is fused, one thread reads with it, and its frozen weights are neither changed nor moved: what the kernels
made of them, and where they lie, is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import GELUActivation, SiLUActivation

from capotune.kernels.attention import packed_attention
from capotune.kernels.bert_block import BertBlock, LayerNorm
from capotune.kernels.gelu import Gelu
from capotune.kernels.layer_norm import add_layer_norm
from capotune.kernels.linear import amx_kernels, trained_linear
from capotune.kernels.lora_linear import LinearLayer, LoraModule, lora_linears
from capotune.kernels.memory import Memory
from capotune.kernels.nf4 import Linear4bit
from capotune.kernels.prepacked import may_prepack
from capotune.kernels.rms_norm import RmsNorm
from capotune.kernels.rotary import rotary
from capotune.kernels.swiglu import SwiGLU
from capotune.models.architecture import with_forward
from capotune.models.sequence_packing import (
    FAILURES,
    TOLERANCE,
    Packing,
    forward_packed,
    packed,
    probe_sequences,
    relative_error,
    without_dropout,
)

Forward = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Fusing:
    """Which blocks the kernels compute."""

    windows: tuple[int | None, ...] = ()
    """Of each block's attention."""
    why_not: str | None = None
    """Why none, in words."""


class NotFusedError(Exception):
    """The block is of another form; says how."""


def try_fusing(backbone: Any, blocks: Sequence[nn.Module], packing: Packing) -> Fusing:
    """Find out by trying: ``backbone`` is a ``PreTrainedModel`` without head that holds ``blocks``."""
    if packing.first_position is None:
        return Fusing(why_not="sequences are padded")
    tried = probe_sequences(backbone.config)
    # some families treat late tokens in another way than early ones
    late = (getattr(backbone.config, "max_position_embeddings", None) or 0) - max(map(len, tried))
    try:
        with without_dropout(backbone), torch.no_grad(), packed(backbone, packing):
            for first in (packing.first_position, max(packing.first_position, late)):
                expected, told = forward_packed(backbone, tried, first)
                fusing = Fusing(tuple(_window(block, told) for block in blocks))
                with fused(blocks, fusing):
                    if why_not := _differs(backbone, tried, first, expected):
                        return Fusing(why_not=why_not)
    except FAILURES as error:  # it was a try
        return Fusing(why_not=f"the model's code does not take the kernels ({error})")
    return fusing


def _differs(backbone: Any, tried: list[torch.Tensor], first: int, expected: torch.Tensor) -> str | None:
    """How the fused blocks compute something else than ``expected`` (tokens, hidden), all or every second token."""
    second = torch.arange(0, len(expected), 2)
    every, some = (forward_packed(backbone, tried, first, wanted)[0].float() for wanted in (None, second))
    some = some if len(some) == len(second) else some[second]  # the last block is not fused
    pairs = ((every, expected.float()), (some, expected.float()[second]))
    off = max(relative_error(found, own) for found, own in pairs)
    alike = off <= TOLERANCE.get(expected.dtype, 1e-4)
    return None if alike else f"the model's blocks compute something else (by {off:.1g})"


def why_not_fused(blocks: Sequence[nn.Module], fusing: Fusing) -> list[str]:
    """For each of the blocks that the kernels do not compute as they are now, the reason in words."""
    if fusing.why_not is not None:
        return [fusing.why_not] * len(blocks)
    reasons: list[str] = []
    for block, window in zip(blocks, fusing.windows, strict=True):
        try:
            _fuse(block, window, last=False, memory=None)
        except NotFusedError as error:
            reasons.append(str(error))
    return reasons


@contextmanager
def fused(blocks: Sequence[nn.Module], fusing: Fusing) -> Iterator[None]:
    """Inside, the kernels compute those of ``blocks`` that they can, as their layers are when this begins, and in the
    others the products of linear layers that train."""
    made: dict[nn.Module, Forward] = {}
    weights = sum(weight.numel() for block in blocks for weight in block.parameters())
    memory = Memory() if may_prepack(weights) else None
    for block, window in zip(blocks, fusing.windows, strict=False):
        try:
            made[block] = _fuse(block, window, last=block is blocks[-1], memory=memory)
        except NotFusedError:
            made |= {layer: _trained(layer) for layer in block.modules() if _trains(layer)} if amx_kernels() else {}
    with with_forward(made):
        yield


def _window(block: nn.Module, told: dict[nn.Module, int | None]) -> int | None:
    return next((told[module] for module in block.modules() if module in told), None)


# ------------------------------------------------------------------------------------------------------------- layers


def _linear(layer: Any) -> LinearLayer:
    """The kernels' layer of a model's."""
    changed = layer if isinstance(layer, LoraModule) else None
    base: Any = layer if changed is None else changed.base_layer
    if type(base) not in (nn.Linear, Linear4bit):
        raise NotFusedError(f"its linear layers are of type {type(base).__name__}")
    if changed is None:
        if isinstance(base, Linear4bit):
            return LinearLayer(base.borrowed_weight, base.bias)
        return LinearLayer(base.weight.to, base.bias, trained_weight=base.weight if base.weight.requires_grad else None)
    if any(weight.requires_grad for weight in base.parameters()):
        raise NotFusedError("weights below a low-rank change train")
    if changed.why_not_plain is not None:
        raise NotFusedError(f"{changed.why_not_plain} is not among the kernels")
    return changed.linear_layer()


def _is_dense(layer: Any) -> bool:
    """Whether the frozen weight lies in memory as fp32, (out, in)."""
    base = layer.base_layer if isinstance(layer, LoraModule) else layer
    return isinstance(base, nn.Linear) and base.weight.dtype == torch.float32


def _fuse(block: Any, window: int | None, last: bool, memory: Memory | None) -> Forward:
    """The ``forward`` to put in place of the block's own; with ``memory`` to share, frozen weights may be kept in the
    kernels' form. Raises ``NotFusedError``."""
    children = {name for name, _ in block.named_children()}
    try:
        if children == {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
            return _llama(block, window, last)
        if children == {"attention", "intermediate", "output"}:
            return _bert(block, window, last, memory)
    except AttributeError as error:
        raise NotFusedError(f"its blocks are of another form ({error})") from None
    raise NotFusedError("its blocks are of another form")


def _part(module: nn.Module, *names: str) -> list[Any]:
    """The children of those names; there must be no others."""
    children = dict(module.named_children())
    if children.keys() != set(names):
        raise NotFusedError(f"a {type(module).__name__} is of another form")
    return [children[name] for name in names]


def _trains(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and layer.weight.requires_grad


def _trained(layer: Any) -> Forward:
    """The ``forward`` of a linear layer that trains."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        return trained_linear(x, layer.weight, layer.bias)

    return forward


# -------------------------------------------------------------------------------------------------------------- Llama


def _llama(block: Any, window: int | None, last: bool) -> Forward:
    q, k, v, o = _part(block.self_attn, "q_proj", "k_proj", "v_proj", "o_proj")
    gate, up, down, activation = _part(block.mlp, "gate_proj", "up_proj", "down_proj", "act_fn")
    if not isinstance(activation, nn.SiLU | SiLUActivation):
        raise NotFusedError(f"its activation is {type(activation).__name__}")
    (norm1, weight1), (norm2, weight2) = map(_rms_norm, (block.input_layernorm, block.post_attention_layernorm))
    qkv, out, gated, narrowed = (
        tuple(map(_linear, layers)) for layers in ((q, k, v), (o,), (gate, up), (down,))
    )  # fmt: skip
    size, scale, causal = block.self_attn.head_dim, block.self_attn.scaling, bool(block.self_attn.is_causal)
    swiglu, plain = SwiGLU(), block.forward

    def forward(hidden_states: torch.Tensor, *more: Any, **how: Any) -> torch.Tensor:
        """(1, tokens, hidden) → the same, or (1, wanted, hidden)."""
        sequences = how.get("sequences")
        if sequences is None or more:
            return plain(hidden_states, *more, **how)  # type: ignore[no-any-return]
        x = hidden_states[0]
        cos, sin = (turn[0].to(x.dtype) for turn in how["position_embeddings"])
        query, key, value = (part.view(len(x), -1, size) for part in lora_linears((x, weight1), qkv, norm1))
        query, key = rotary(query, cos, sin), rotary(key, cos, sin)
        mixed = packed_attention(query, key, value, sequences, causal=causal, scale=scale, window=window).flatten(1)
        if last and (wanted := how.get("wanted")) is not None:
            x, mixed = x[wanted], mixed[wanted]
        x = x + lora_linears((mixed,), out)[0]
        x = x + lora_linears(lora_linears((x, weight2), gated, norm2), narrowed, swiglu)[0]
        return x[None]

    return forward


def _rms_norm(norm: Any) -> tuple[RmsNorm, torch.Tensor]:
    if [name for name, _ in norm.named_parameters()] != ["weight"] or not hasattr(norm, "variance_epsilon"):
        raise NotFusedError(f"its norm is {type(norm).__name__}")
    return RmsNorm(norm.variance_epsilon, learns=norm.weight.requires_grad), norm.weight


# --------------------------------------------------------------------------------------------------------------- BERT


def _bert(block: Any, window: int | None, last: bool, memory: Memory | None) -> Forward:
    attention, output1 = _part(block.attention, "self", "output")
    q, k, v, _ = _part(attention, "query", "key", "value", "dropout")
    o, norm1, dropout1 = _part(output1, "dense", "LayerNorm", "dropout")
    up, activation = _part(block.intermediate, "dense", "intermediate_act_fn")
    down, norm2, dropout2 = _part(block.output, "dense", "LayerNorm", "dropout")
    if not isinstance(activation, nn.GELU | GELUActivation) or getattr(activation, "approximate", "none") != "none":
        raise NotFusedError(f"its activation is {type(activation).__name__}")
    for norm in (norm1, norm2):
        if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
            raise NotFusedError(f"its norm is {type(norm).__name__}")
    qkv, out, widened, narrowed = (
        tuple(map(_linear, layers)) for layers in ((q, k, v), (o,), (up,), (down,))
    )  # fmt: skip
    size, scale, causal = attention.attention_head_size, attention.scaling, bool(attention.is_causal)
    gelu, plain = Gelu(), block.forward
    whole = None
    if memory is not None and window is None and all(_is_dense(layer) for layer in (q, k, v, o, up, down)):
        norms = tuple(LayerNorm(norm.weight, norm.bias, norm.eps) for norm in (norm1, norm2))
        layers = (qkv, out, widened, narrowed)
        whole = BertBlock(layers, norms, size, scale, causal=causal, memory=memory)

    def forward(hidden_states: torch.Tensor, *more: Any, **how: Any) -> torch.Tensor:
        """(1, tokens, hidden) → the same, or (1, wanted, hidden)."""
        sequences = how.get("sequences")
        if sequences is None or any(one is not None for one in more):
            return plain(hidden_states, *more, **how)  # type: ignore[no-any-return]
        x = hidden_states[0]
        wanted = how.get("wanted") if last else None
        if whole is not None and whole.takes(x, sequences, wanted):
            return whole(x, sequences, [one.p if one.training else 0.0 for one in (dropout1, dropout2)], wanted)[None]
        query, key, value = (part.view(len(x), -1, size) for part in lora_linears((x,), qkv))
        mixed = packed_attention(query, key, value, sequences, causal=causal, scale=scale, window=window).flatten(1)
        if wanted is not None:
            x, mixed = x[wanted], mixed[wanted]
        x = _add_norm(dropout1(lora_linears((mixed,), out)[0]), x, norm1)
        wide = lora_linears((x,), widened)
        return _add_norm(dropout2(lora_linears(wide, narrowed, gelu)[0]), x, norm2)[None]

    return forward


def _add_norm(x: torch.Tensor, residual: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    if any(weight.requires_grad for weight in norm.parameters()):
        return functional.layer_norm(x + residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)
