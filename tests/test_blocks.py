"""Blocks as data: the lists of ops hang together, and the autograd functions compute what plain PyTorch does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from capotune.kernels.attention import Sequences
from capotune.kernels.blocks import BERT, LLAMA, Block, Call, Linear, Norm, Op, inputs, outputs, reference
from capotune.kernels.composed_block import ComposedBlock
from capotune.kernels.lora_linear import LinearLayer

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS, KEY_HEADS, SIZE, INNER = 4, 2, 8, 44
HIDDEN = HEADS * SIZE
SEQUENCES = Sequences((5, 9, 1))
TOKENS = sum(SEQUENCES.lengths)
FAMILIES: dict[str, tuple[Op, ...]] = {"bert": BERT, "llama": LLAMA}
SHAPES = {
    "q": (HIDDEN, HIDDEN), "o": (HIDDEN, HIDDEN), "gate": (INNER, HIDDEN), "up": (INNER, HIDDEN),
    "down": (HIDDEN, INNER), "k": (KEY_HEADS * SIZE, HIDDEN), "v": (KEY_HEADS * SIZE, HIDDEN),
}  # fmt: skip


class Made:
    """A block of random layers, whose every second one has a LoRA delta."""

    def __init__(self, family: str) -> None:
        self.random, ops = torch.Generator().manual_seed(0), FAMILIES[family]
        names = [name for op in ops if isinstance(op, Linear) for name in op.layers]
        layers = {name: self.layer(*SHAPES[name], adapted=number % 2 == 0) for number, name in enumerate(names)}
        norms = {name: self.norm(bias=family == "bert") for name in ("norm1", "norm2")}
        causal = family == "llama"
        self.block = Block(ops, layers, norms, head_size=SIZE, scale=SIZE**-0.5, causal=causal)
        angles = self.normal(TOKENS, SIZE // 2).repeat(1, 2)
        self.call = Call(SEQUENCES, rotation=(angles.cos(), angles.sin()), dropout=(0.0, 0.0))
        self.x = self.normal(TOKENS, HIDDEN)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def layer(self, out: int, into: int, *, adapted: bool) -> LinearLayer:
        weight, bias = self.normal(out, into) / into**0.5, self.normal(out)
        if not adapted:
            return LinearLayer(weight.to, bias)
        a, b = self.normal(3, into).requires_grad_(), self.normal(out, 3).requires_grad_()
        return LinearLayer(weight.to, bias, a, b, 0.5)

    def norm(self, *, bias: bool) -> Norm:
        return Norm(1 + 0.1 * self.normal(HIDDEN), 0.1 * self.normal(HIDDEN) if bias else None, 1e-5)

    def with_gradients(self, execute: Any, call: Call) -> list[Tensor]:
        """The output, and the gradients of x and of what is trained."""
        x = self.x.clone().requires_grad_()
        layers = self.block.layers.values()
        trained = [one for layer in layers for one in (layer.lora_a, layer.lora_b) if one is not None]
        norms = [norm.weight for norm in self.block.norms.values() if norm.weight.requires_grad]
        torch.manual_seed(1)
        y = execute(x, call)
        parts = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        return [y.detach(), *torch.autograd.grad((y * parts).sum(), [x, *trained, *norms])]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_value_is_given_once_and_before_it_is_read(family: str) -> None:
    known = {"x"}
    for op in FAMILIES[family]:
        assert set(inputs(op)) <= known
        assert not set(outputs(op)) & known
        known |= set(outputs(op))
    assert "y" in known


@pytest.mark.parametrize("rows", [None, [4, 0, 14]])
@pytest.mark.parametrize("rates", [(0.0, 0.0), (0.3, 0.6)])
@pytest.mark.parametrize("family", FAMILIES)
def test_composed_block_matches_the_reference(family: str, rates: tuple[float, float], rows: list[int] | None) -> None:
    made = Made(family)
    call = replace(made.call, dropout=rates, rows=None if rows is None else torch.tensor(rows))
    expected = made.with_gradients(lambda x, call: reference(made.block, x, call), call)
    found = made.with_gradients(ComposedBlock(made.block), call)
    assert len(found[0]) == (TOKENS if rows is None else len(rows))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_that_train_get_gradients(family: str) -> None:
    made = Made(family)
    made.block.norms["norm1"].weight.requires_grad_()
    expected = made.with_gradients(lambda x, call: reference(made.block, x, call), made.call)
    found = made.with_gradients(ComposedBlock(made.block), made.call)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
