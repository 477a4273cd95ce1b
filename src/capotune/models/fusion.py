"""Finds out whether a model's blocks are of a form that the kernels know, and puts an executor in their place.

Two forms (``kernels.blocks``), recognised by the names of their parts, whatever the family is called:

- Llama's:  x += o(attention(rotary(q, k), v of norm(x)));  x += down(silu(gate) · up of norm(x))      RMS norms
- BERT's:   x = norm(x + o(attention(q, k, v of x)));       x = norm(x + down(gelu(up(x))))            layer norms

Each linear layer is frozen, with a LoRA delta or without, or trains as a whole. That a model computes just this is not
believed but tried, as in ``models.sequence_packing``: on a few sequences, at early and at late positions, its own
blocks and these must give the same. Blocks work so on packed sequences only; on anything else, as in a block of another
form, the model's own code runs.

Where the caller names the positions that it ``wanted``, the last block computes what comes after its attention for
these alone.

While a model is fused, one thread runs it, and its frozen weights are neither changed nor moved: the executors remember
where they lie, and their prepacked copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.activations import GELUActivation, SiLUActivation

from capotune.kernels.blocks import BERT, LLAMA, Block, Call, Norm, Op, Rotary
from capotune.kernels.composed_block import ComposedBlock
from capotune.kernels.linear import amx_kernels, trained_linear
from capotune.kernels.lora_linear import LinearLayer, LoraModule
from capotune.kernels.memory import Memory
from capotune.kernels.native_block import NativeBlock
from capotune.kernels.nf4 import Linear4bit
from capotune.kernels.prepacked import may_prepack
from capotune.models.architecture import FAILURES, with_forward
from capotune.models.prefix import prefix_of
from capotune.models.sequence_packing import (
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
    probes = probe_sequences(backbone.config)
    # some families treat late tokens in another way than early ones
    late = (getattr(backbone.config, "max_position_embeddings", None) or 0) - max(map(len, probes))
    try:
        with without_dropout(backbone), torch.no_grad(), packed(backbone, packing):
            for first in (packing.first_position, max(packing.first_position, late)):
                expected, windows = forward_packed(backbone, probes, first)
                fusing = Fusing(tuple(_window(block, windows) for block in blocks))
                with fused(blocks, fusing):
                    if why_not := _differs(backbone, probes, first, expected):
                        return Fusing(why_not=why_not)
    except FAILURES as error:  # it was a try
        return Fusing(why_not=f"the model's code does not take the kernels ({error})")
    return fusing


def _differs(backbone: Any, probes: list[torch.Tensor], first: int, expected: torch.Tensor) -> str | None:
    """How the fused blocks compute something else than ``expected`` (tokens, hidden), all or every second token."""
    second = torch.arange(0, len(expected), 2)
    every, subset = (forward_packed(backbone, probes, first, wanted)[0].float() for wanted in (None, second))
    subset = subset if len(subset) == len(second) else subset[second]  # the last block is not fused
    pairs = ((every, expected.float()), (subset, expected.float()[second]))
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
            _form(block, window)
        except NotFusedError as error:
            reasons.append(str(error))
    return reasons


@contextmanager
def fused(blocks: Sequence[nn.Module], fusing: Fusing) -> Iterator[None]:
    """Inside, the kernels compute those of ``blocks`` that they can, as their layers are when this begins, and in the
    others the products of linear layers that train."""
    forwards: dict[nn.Module, Forward] = {}
    weights = sum(weight.numel() for block in blocks for weight in block.parameters())
    memory = Memory() if may_prepack(weights) else None
    for block, window in zip(blocks, fusing.windows, strict=False):
        try:
            forwards[block] = _fuse(block, _form(block, window), last=block is blocks[-1], memory=memory)
        except NotFusedError:
            forwards |= {layer: _trained(layer) for layer in block.modules() if _trains(layer)} if amx_kernels() else {}
    with with_forward(forwards):
        yield


def _window(block: nn.Module, windows: dict[nn.Module, int | None]) -> int | None:
    """Of its attention module, among those of all."""
    return next((windows[module] for module in block.modules() if module in windows), None)


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
        raise NotFusedError("weights below a LoRA delta train")
    if changed.why_not_plain is not None:
        raise NotFusedError(f"{changed.why_not_plain} is not among the kernels")
    return changed.linear_layer()


def _is_dense(layer: Any) -> bool:
    """Whether the frozen weight lies in memory as fp32, (out, in)."""
    base = layer.base_layer if isinstance(layer, LoraModule) else layer
    return isinstance(base, nn.Linear) and base.weight.dtype == torch.float32


class _Form(NamedTuple):
    """What a model's block is."""

    block: Block
    layers: tuple[nn.Module, ...]
    dropouts: tuple[Any, ...] = ()
    """The modules, by the numbers of the ops."""


def _form(block: Any, window: int | None) -> _Form:
    """Raises ``NotFusedError``."""
    children = {name for name, _ in block.named_children()}
    try:
        if children == {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
            return _llama(block, window)
        if children == {"attention", "intermediate", "output"}:
            return _bert(block, window)
    except AttributeError as error:
        raise NotFusedError(f"its blocks are of another form ({error})") from None
    raise NotFusedError("its blocks are of another form")


def _llama(block: Any, window: int | None) -> _Form:
    q, k, v, o = _part(block.self_attn, "q_proj", "k_proj", "v_proj", "o_proj")
    gate, up, down, activation = _part(block.mlp, "gate_proj", "up_proj", "down_proj", "act_fn")
    if not isinstance(activation, nn.SiLU | SiLUActivation):
        raise NotFusedError(f"its activation is {type(activation).__name__}")
    norms = {"norm1": _rms_norm(block.input_layernorm), "norm2": _rms_norm(block.post_attention_layernorm)}
    layers = {"q": q, "k": k, "v": v, "o": o, "gate": gate, "up": up, "down": down}
    return _Form(_bound(LLAMA, layers, norms, block.self_attn, block.self_attn.head_dim, window), (*layers.values(),))


def _bert(block: Any, window: int | None) -> _Form:
    attention, output1 = _part(block.attention, "self", "output")
    q, k, v, _ = _part(attention, "query", "key", "value", "dropout")
    o, norm1, dropout1 = _part(output1, "dense", "LayerNorm", "dropout")
    up, activation = _part(block.intermediate, "dense", "intermediate_act_fn")
    down, norm2, dropout2 = _part(block.output, "dense", "LayerNorm", "dropout")
    if not isinstance(activation, nn.GELU | GELUActivation) or getattr(activation, "approximate", "none") != "none":
        raise NotFusedError(f"its activation is {type(activation).__name__}")
    norms = {"norm1": _layer_norm(norm1), "norm2": _layer_norm(norm2)}
    layers = {"q": q, "k": k, "v": v, "o": o, "up": up, "down": down}
    bound = _bound(BERT, layers, norms, attention, attention.attention_head_size, window)
    return _Form(bound, (*layers.values(),), (dropout1, dropout2))


def _bound(
    ops: tuple[Op, ...], layers: dict[str, nn.Module], norms: dict[str, Norm], attention: Any, head_size: int,
    window: int | None,
) -> Block:  # fmt: skip
    known = {name: _linear(layer) for name, layer in layers.items()}
    prefix = prefix_of(attention)
    return Block(ops, known, norms, head_size, attention.scaling, bool(attention.is_causal), window, prefix)


def _rms_norm(norm: Any) -> Norm:
    if [name for name, _ in norm.named_parameters()] != ["weight"] or not hasattr(norm, "variance_epsilon"):
        raise NotFusedError(f"its norm is {type(norm).__name__}")
    return Norm(norm.weight, None, norm.variance_epsilon)


def _layer_norm(norm: Any) -> Norm:
    if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
        raise NotFusedError(f"its norm is {type(norm).__name__}")
    return Norm(norm.weight, norm.bias, norm.eps)


def _part(module: nn.Module, *names: str) -> list[Any]:
    """The children of those names; there must be no others."""
    children = dict(module.named_children())
    if children.keys() != set(names):
        raise NotFusedError(f"a {type(module).__name__} is of another form")
    return [children[name] for name in names]


# ------------------------------------------------------------------------------------------------------------- forward


def _fuse(module: Any, form: _Form, last: bool, memory: Memory | None) -> Forward:
    """The ``forward`` to put in place of the block's own; with ``memory`` to share, frozen weights may be prepacked."""
    plain, composed = module.forward, ComposedBlock(form.block)
    dense = memory is not None and all(map(_is_dense, form.layers))
    native = NativeBlock(form.block, memory) if memory is not None and dense else None
    rotates = any(isinstance(op, Rotary) for op in form.block.ops)

    def forward(hidden_states: torch.Tensor, *more: Any, **given: Any) -> torch.Tensor:
        """(1, tokens, hidden) → the same, or (1, wanted, hidden)."""
        sequences = given.get("sequences")
        if sequences is None or any(one is not None for one in more):
            return plain(hidden_states, *more, **given)  # type: ignore[no-any-return]
        x = hidden_states[0]
        cos_sin = tuple(one[0].to(x.dtype) for one in given["position_embeddings"]) if rotates else None
        rates = tuple(one.p if one.training else 0.0 for one in form.dropouts)
        call = Call(sequences, cos_sin, rates, given.get("wanted") if last else None)
        if native is not None and native.takes(x, call):
            return native(x, call)[None]
        return composed(x, call)[None]

    return forward


def _trains(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and layer.weight.requires_grad


def _trained(layer: Any) -> Forward:
    """The ``forward`` of a linear layer that trains."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        return trained_linear(x, layer.weight, layer.bias)

    return forward
