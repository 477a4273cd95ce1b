"""Linear layers, frozen ones with a low-rank change or without, and such that learn: y = xWᵀ + bias + scale·(xAᵀ)Bᵀ.

``lora_linears`` is one autograd function for all layers that share an input (query, key and value; gate and up). Of
all that autograd would keep for the plain expression (``lora_reference``) it keeps x once, the small products xAᵀ, and
A and B in x's dtype. It asks for no gradient of a frozen W, takes the small products of all layers in one, adds every
change in place, and asks for the dense W anew in the backward pass, so that a 4-bit W never lives between the two.

Where x is itself cheap to compute from what must be kept anyway (a norm of the block's input, an activation), a
``Prologue`` computes it inside the function, and once more on the way back; then x is not kept either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from capotune.kernels.linear import Rows, input_gradient, weight_gradient
from capotune.kernels.low_rank import gather, project, update

FrozenWeight = Callable[[torch.dtype], torch.Tensor]
"""Gives the dense weight (out, in) in the asked dtype."""


@dataclass(frozen=True)
class LowRank:
    """One layer: ``weight``, ``bias`` (out,), trained ``a`` (rank, in) and ``b`` (out, rank); without a change, both
    are None. ``learned`` is the weight itself where it trains; the bias trains where it requires a gradient."""

    weight: FrozenWeight
    bias: torch.Tensor | None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0
    learned: torch.Tensor | None = None

    @property
    def is_frozen(self) -> bool:
        """Whether nothing but A and B trains."""
        return self.learned is None and not (self.bias is not None and self.bias.requires_grad)


class LowRankLayer(nn.Module):
    """A module around a frozen layer that may be such a one.

    A base class and no protocol: since Python 3.12 ``isinstance`` with a protocol does not see a module's children.
    """

    base_layer: nn.Module

    @property
    def why_not_plain(self) -> str | None:
        """What it does in training beside W and the low-rank change, if anything."""
        raise NotImplementedError

    def low_rank(self) -> LowRank:
        """The layer as this file knows it."""
        raise NotImplementedError


class Prologue(Protocol):
    """What turns tensors that are kept into the input of linear layers, (rows, in)."""

    def forward(self, *sources: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The input, and what else ``backward`` needs."""

    def backward(
        self, grad: torch.Tensor, kept: tuple[torch.Tensor, ...], *, rows: bool
    ) -> tuple[tuple[torch.Tensor | None, ...], torch.Tensor | None]:
        """Gradients of the sources, and with ``rows`` the input once more. ``kept``: the sources, and what ``forward``
        added.

        It may write over ``grad``, and over sources that nobody else reads.
        """


def lora_reference(
    x: torch.Tensor, weight: FrozenWeight, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """The definition of one layer in plain PyTorch. Shapes as in ``lora_linear``."""
    change = functional.linear(functional.linear(x, a.to(x.dtype)), b.to(x.dtype))
    return functional.linear(x, weight(x.dtype), bias) + scale * change


def lora_linear(
    x: torch.Tensor, weight: FrozenWeight, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """The same, faster: x (..., in), a (rank, in), b (out, rank), bias (out,) frozen → (..., out) in x's dtype.

    a and b may be fp32 while x is bf16; their gradients come back in their own dtype.
    """
    return lora_linears((x,), (LowRank(weight, bias, a, b, scale),))[0]


def lora_linears(
    sources: Sequence[torch.Tensor], layers: Sequence[LowRank], prologue: Prologue | None = None
) -> tuple[torch.Tensor, ...]:
    """Several layers on one input: x (..., in) → (..., out) of each.

    ``sources`` is x alone, or what the ``prologue`` computes x from, of which the first then is (rows, any).
    """
    ranked = [layer for layer in layers if layer.a is not None]
    learned = [layer.learned for layer in layers if layer.learned is not None]
    biases = [layer.bias for layer in layers if layer.bias is not None and layer.bias.requires_grad]
    trained = [*(layer.a for layer in ranked), *(layer.b for layer in ranked), *learned, *biases]
    return _LoraLinears.apply(tuple(layers), prologue, len(sources), *sources, *trained)  # type: ignore[no-any-return, no-untyped-call]


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layers: tuple[LowRank, ...], prologue: Prologue | None, count: int, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        sources, trained, shape = tensors[:count], tensors[count:], tensors[0].shape
        kept: tuple[torch.Tensor, ...] = ()
        if prologue is None:
            rows = sources[0].reshape(-1, shape[-1])
            sources = (rows,)
        else:
            rows, kept = prologue.forward(*sources)
        # in x's dtype, for the way back too: of bf16's a copy, which the loop's fp32 weights need once then
        ranked = sum(layer.a is not None for layer in layers)
        a = _stacked(trained[:ranked]).to(rows.dtype) if ranked else None
        b = [one.to(rows.dtype) for one in trained[ranked : 2 * ranked]]
        low = None if a is None else project(rows, a)  # (rows, all ranks)
        shared, outs, b_in_turn = Rows(rows), [], iter(b)
        for layer, low_part in zip(layers, _by_rank(low, layers), strict=True):
            y = shared.linear(layer.weight(rows.dtype), layer.bias)
            if layer.b is not None:
                update(y, low_part, next(b_in_turn).t(), layer.scale)
            outs.append(y.view(*shape[:-1], y.shape[-1]))
        ctx.save_for_backward(*sources, *kept, low, a, *b)
        ctx.how = layers, prologue, len(sources), len(sources) + len(kept), shape
        return tuple(outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layers, prologue, count, count_kept, shape = ctx.how
        if prologue is not None and getattr(ctx, "went_back", False):  # it may have written over what was kept
            raise RuntimeError("a second way back through lora_linears with a prologue: run the forward pass again")
        ctx.went_back = True
        saved = ctx.saved_tensors  # once: checkpointing gives them no second time
        kept, (low, a, *b) = saved[:count_kept], saved[count_kept:]
        grad_low: Any = None if low is None else torch.empty_like(low)
        needs_input = any(ctx.needs_input_grad[3 : 3 + count])
        grad_x: Any = None
        grads_b: list[torch.Tensor] = []
        b_in_turn = iter(b)
        rows_of_grads = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        for layer, grad, low_part, grad_low_part in zip(
            layers, rows_of_grads, _by_rank(low, layers), _by_rank(grad_low, layers), strict=True
        ):
            if layer.b is not None:
                project(grad, next(b_in_turn).t(), layer.scale, out=grad_low_part)
                grads_b.append(gather(low_part, grad, layer.scale).t().to(layer.b.dtype))
            if needs_input:  # not below the lowest layer that trains
                grad_x = input_gradient(grad, layer.weight(grad.dtype), onto=grad_x)
        if grad_x is not None and a is not None:
            update(grad_x, grad_low, a)
        learns = any(layer.learned is not None for layer in layers)
        if prologue is None:
            grad_sources, rows = (None if grad_x is None else grad_x.view(shape),), kept[0]
        elif grad_x is None:
            grad_sources, rows = (None,) * count, prologue.forward(*kept[:count])[0]
        else:
            grad_sources, rows = prologue.backward(grad_x, kept, rows=learns or a is not None)
        return None, None, None, *grad_sources, *_trained_gradients(layers, rows_of_grads, rows, grad_low, grads_b)


def _trained_gradients(
    layers: Sequence[LowRank],
    grads: Sequence[torch.Tensor],
    rows: Any,
    grad_low: torch.Tensor | None,
    grads_b: Sequence[torch.Tensor],
) -> Iterator[torch.Tensor]:
    """Of every A, every B, the weights that learn and the biases that do, from the gradients of the outputs."""
    ranked = [layer.a for layer in layers if layer.a is not None]
    if grad_low is not None:
        yield from torch.split(gather(grad_low, rows).to(ranked[0].dtype), [len(one) for one in ranked])
    yield from grads_b
    for layer, grad in zip(layers, grads, strict=True):
        if layer.learned is not None:
            yield weight_gradient(grad, rows)
    for layer, grad in zip(layers, grads, strict=True):
        if layer.bias is not None and layer.bias.requires_grad:
            yield grad.sum(0)


def _stacked(a: Sequence[torch.Tensor]) -> torch.Tensor:
    """Every layer's A one below the other, (all ranks, in)."""
    return a[0] if len(a) == 1 else torch.cat(tuple(a))


def _by_rank(low: torch.Tensor | None, layers: tuple[LowRank, ...]) -> tuple[Any, ...]:
    """(rows, all ranks) → views (rows, rank), one for each layer; None for all where there are no ranks."""
    if low is None:
        return (None,) * len(layers)
    return torch.split(low, [0 if layer.a is None else layer.a.shape[0] for layer in layers], dim=1)
