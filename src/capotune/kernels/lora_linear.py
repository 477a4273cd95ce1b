"""Linear layers, frozen with a LoRA delta or without, or trained: y = xWᵀ + bias + scale·(xAᵀ)Bᵀ.

``lora_linears`` is one autograd function for all layers that share an input (query, key and value; gate and up). Of
all that autograd would save for the plain expression (``lora_reference``) it saves x once, the small products xAᵀ, and
A and B in x's dtype. It computes no gradient of a frozen W, takes the small products of all layers in one, adds every
delta in place, and asks for the dense W anew in backward, so that a 4-bit W is never dense between the two.

Where x is itself cheap to compute from what must be saved anyway (a norm of the block's input, an activation), a
``Prologue`` computes it inside the function, and recomputes it in backward; then x is not saved either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from capotune.kernels import policy
from capotune.kernels.linear import LinearInput, input_gradient, weight_gradient
from capotune.kernels.low_rank import gather, project, update

FrozenWeight = Callable[[torch.dtype], torch.Tensor]
"""Gives the dense weight (out, in) in the asked dtype."""


@dataclass(frozen=True)
class LinearLayer:
    """One layer: ``weight``, ``bias`` (out,), trained ``lora_a`` (rank, in) and ``lora_b`` (out, rank), both None
    without a delta. ``trained_weight`` is the weight itself where it trains; the bias trains where it requires a
    gradient."""

    weight: FrozenWeight
    bias: torch.Tensor | None
    lora_a: torch.Tensor | None = None
    lora_b: torch.Tensor | None = None
    scale: float = 1.0
    trained_weight: torch.Tensor | None = None

    @property
    def is_frozen(self) -> bool:
        """Whether nothing but A and B trains."""
        return self.trained_weight is None and not (self.bias is not None and self.bias.requires_grad)


class LoraModule(nn.Module):
    """A module around a frozen layer, which may have a LoRA delta.

    A base class and no protocol: since Python 3.12 ``isinstance`` with a protocol does not see a module's children.
    """

    base_layer: nn.Module

    @property
    def why_not_plain(self) -> str | None:
        """What it does in training beside W and the LoRA delta, if anything."""
        raise NotImplementedError

    def linear_layer(self) -> LinearLayer:
        """The layer for ``lora_linears``."""
        raise NotImplementedError


class Prologue(Protocol):
    """What computes the input of linear layers, (rows, in), from tensors that are saved for backward."""

    def forward(self, *sources: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The input, and what else ``backward`` needs."""

    def backward(
        self, grad: torch.Tensor, saved: tuple[torch.Tensor, ...], *, recompute: bool
    ) -> tuple[tuple[torch.Tensor | None, ...], torch.Tensor | None]:
        """Gradients of the sources, and the input again where it is to be recomputed. ``saved``: the sources, and what
        ``forward`` added.

        It may write over ``grad``, and over sources that nobody else reads.
        """


def lora_reference(
    x: torch.Tensor, weight: FrozenWeight, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """The definition of one layer in plain PyTorch. Shapes as in ``lora_linear``."""
    delta = functional.linear(functional.linear(x, a.to(x.dtype)), b.to(x.dtype))
    return functional.linear(x, weight(x.dtype), bias) + scale * delta


def lora_linear(
    x: torch.Tensor, weight: FrozenWeight, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """The same, faster: x (..., in), a (rank, in), b (out, rank), bias (out,) frozen → (..., out) in x's dtype.

    a and b may be fp32 while x is bf16; their gradients come back in their own dtype.
    """
    return lora_linears((x,), (LinearLayer(weight, bias, a, b, scale),))[0]


def lora_linear_of_few(x: torch.Tensor, layer: LinearLayer) -> torch.Tensor:
    """The same for ``few_rows``, without gradients: x (..., in) → (..., out).

    What a text is written with, a token of each row at a time: there calling the kernels takes longer than their work.
    """
    assert layer.lora_a is not None
    assert layer.lora_b is not None
    rows = x.reshape(-1, x.shape[-1])
    y = functional.linear(rows, layer.weight(x.dtype), layer.bias)
    y.addmm_(rows @ layer.lora_a.to(x.dtype).t(), layer.lora_b.to(x.dtype).t(), alpha=layer.scale)
    return y.view(*x.shape[:-1], y.shape[-1])


def few_rows(x: torch.Tensor) -> bool:
    """Whether nothing trains and x (..., in) has so few rows that ``lora_linear_of_few`` is faster."""
    return not torch.is_grad_enabled() and x.numel() <= policy.FEW_ROWS * x.shape[-1]


def lora_linears(
    sources: Sequence[torch.Tensor], layers: Sequence[LinearLayer], prologue: Prologue | None = None
) -> tuple[torch.Tensor, ...]:
    """Several layers on one input: x (..., in) → (..., out) of each.

    ``sources`` is x alone, or what the ``prologue`` computes x from, of which the first then is (rows, any).
    """
    a = [layer.lora_a for layer in layers if layer.lora_a is not None]
    b = [layer.lora_b for layer in layers if layer.lora_b is not None]
    weights = [layer.trained_weight for layer in layers if layer.trained_weight is not None]
    biases = [layer.bias for layer in layers if layer.bias is not None and layer.bias.requires_grad]
    trained = [*a, *b, *weights, *biases]
    return _LoraLinears.apply(tuple(layers), prologue, len(sources), *sources, *trained)  # type: ignore[no-any-return, no-untyped-call]


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layers: tuple[LinearLayer, ...], prologue: Prologue | None, count: int, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        sources, trained, shape = tensors[:count], tensors[count:], tensors[0].shape
        extra: tuple[torch.Tensor, ...] = ()
        if prologue is None:
            x = sources[0].reshape(-1, shape[-1])
            sources = (x,)
        else:
            x, extra = prologue.forward(*sources)
        # in x's dtype, for backward too: in bf16 a copy, which the loop's fp32 weights need once then
        adapted = sum(layer.lora_a is not None for layer in layers)
        a = _stacked(trained[:adapted]).to(x.dtype) if adapted else None
        b = [one.to(x.dtype) for one in trained[adapted : 2 * adapted]]
        xa = None if a is None else project(x, a)  # (rows, all ranks)
        shared, outs, next_b = LinearInput(x), [], iter(b)
        for layer, own_xa in zip(layers, _by_rank(xa, layers), strict=True):
            y = shared.linear(layer.weight(x.dtype), layer.bias)
            if layer.lora_b is not None:
                update(y, own_xa, next(next_b).t(), layer.scale)
            # no view, which PyTorch would let nobody change in place (a model may: ``x += …``)
            outs.append(torch.ops.aten._unsafe_view(y, [*shape[:-1], y.shape[-1]]))
        ctx.save_for_backward(*sources, *extra, xa, a, *b)
        ctx.call = layers, prologue, len(sources), len(sources) + len(extra), shape
        return tuple(outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layers, prologue, count, count_saved, shape = ctx.call
        if prologue is not None and getattr(ctx, "ran_backward", False):  # it may have written over what was saved
            raise RuntimeError("a second backward through lora_linears with a prologue: run the forward pass again")
        ctx.ran_backward = True
        everything = ctx.saved_tensors  # once: checkpointing gives them no second time
        saved, (xa, a, *b) = everything[:count_saved], everything[count_saved:]
        grad_xa: Any = None if xa is None else torch.empty_like(xa)
        needs_input = any(ctx.needs_input_grad[3 : 3 + count])
        grad_x: Any = None
        grads_b: list[torch.Tensor] = []
        next_b = iter(b)
        grad_rows = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        for layer, grad, own_xa, own_grad_xa in zip(
            layers, grad_rows, _by_rank(xa, layers), _by_rank(grad_xa, layers), strict=True
        ):
            if layer.lora_b is not None:
                project(grad, next(next_b).t(), layer.scale, out=own_grad_xa)
                grads_b.append(gather(own_xa, grad, layer.scale).t().to(layer.lora_b.dtype))
            if needs_input:  # not below the lowest layer that trains
                grad_x = input_gradient(grad, layer.weight(grad.dtype), accumulate_into=grad_x)
        if grad_x is not None and a is not None:
            update(grad_x, grad_xa, a)
        if prologue is None:
            grad_sources, x = (None if grad_x is None else grad_x.view(shape),), saved[0]
        elif grad_x is None:
            grad_sources, x = (None,) * count, prologue.forward(*saved[:count])[0]
        else:
            needs_x = a is not None or any(layer.trained_weight is not None for layer in layers)
            grad_sources, x = prologue.backward(grad_x, saved, recompute=needs_x)
        return None, None, None, *grad_sources, *_trained_gradients(layers, grad_rows, x, grad_xa, grads_b)


def _trained_gradients(
    layers: Sequence[LinearLayer],
    grads: Sequence[torch.Tensor],
    x: Any,
    grad_xa: torch.Tensor | None,
    grads_b: Sequence[torch.Tensor],
) -> Iterator[torch.Tensor]:
    """Of every A, every B, and the weights and biases that train, from the gradients of the outputs."""
    a = [layer.lora_a for layer in layers if layer.lora_a is not None]
    if grad_xa is not None:
        yield from torch.split(gather(grad_xa, x).to(a[0].dtype), [len(one) for one in a])
    yield from grads_b
    for layer, grad in zip(layers, grads, strict=True):
        if layer.trained_weight is not None:
            yield weight_gradient(grad, x)
    for layer, grad in zip(layers, grads, strict=True):
        if layer.bias is not None and layer.bias.requires_grad:
            yield grad.sum(0)


def _stacked(a: Sequence[torch.Tensor]) -> torch.Tensor:
    """Every layer's A one below the other, (all ranks, in)."""
    return a[0] if len(a) == 1 else torch.cat(tuple(a))


def _by_rank(xa: torch.Tensor | None, layers: tuple[LinearLayer, ...]) -> tuple[Any, ...]:
    """(rows, all ranks) → views (rows, rank), one for each layer; None for all where there are no ranks."""
    if xa is None:
        return (None,) * len(layers)
    return torch.split(xa, [0 if layer.lora_a is None else layer.lora_a.shape[0] for layer in layers], dim=1)
