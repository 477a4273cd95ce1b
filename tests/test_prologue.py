"""Linear layers whose input is computed inside them: values, gradients, and what is kept; oneDNN's layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from capotune.kernels import native as native_module
from capotune.kernels.gelu import GeluPrologue, gelu_reference
from capotune.kernels.lora_linear import FrozenWeight, LinearLayer, Prologue, lora_linears
from capotune.kernels.rms_norm import RmsNormPrologue, rms_norm_reference
from capotune.kernels.swiglu import SwiGLUPrologue, swiglu_reference

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, WIDTH = 13, 20
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float64: 1e-13}
"""Of the largest number. fp32: some tens of terms in another order, roundings of 2^-24. bf16: a few roundings of 2^-9
one after the other, where the plain expression rounds at other places."""


@pytest.fixture(params=["native", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on the C kernels and again without them."""
    if request.param == "reference":
        monkeypatch.setattr(native_module, "library", lambda _: None)
    elif native_module.library("elementwise_cpu") is None:
        pytest.skip("no C compiler here")
    return request.param


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclass(frozen=True)
class Case:
    """A way to come from sources to the input of the layers. A ``norm``'s weight
    is the last source."""

    sources: int
    prologue: Callable[[torch.dtype], Prologue | None]
    plain: Callable[..., Tensor]
    norm: bool = False


def norm_weight(dtype: torch.dtype) -> Tensor:
    return (1 + 0.3 * random(WIDTH, seed=50)).to(dtype)


CASES = {
    "none": Case(1, lambda _: None, lambda x: x),
    "rms norm": Case(
        1,
        lambda _: RmsNormPrologue(1e-5, trains=True),
        lambda x, weight: rms_norm_reference(x, weight, 1e-5),
        norm=True,
    ),
    "swiglu": Case(2, lambda _: SwiGLUPrologue(), swiglu_reference),
    "gelu": Case(1, lambda _: GeluPrologue(), gelu_reference),
}
KINDS = {
    "one": [3],
    "several": [3, 1, 8],
    "mixed": [None, 3, None, 5],
    "frozen": [None, None],
    "only the first": [4, None],
    "learned": [0, 0],
    "learned among others": [0, 3, None],
}
"""Ranks of the layers; None: without a change; 0: weight and bias learn."""
PAIRS = list(product(CASES, KINDS))
OUTPUTS = (9, 16, 7, 11)


def layers_of(
    ranks: Sequence[int | None],
    dtype: torch.dtype = torch.float32,
    width: int = WIDTH,
    frozen: Callable[[Tensor], FrozenWeight] = lambda weight: weight.to,
) -> tuple[list[LinearLayer], list[Tensor]]:
    """Layers with outputs, biases and scales of their own, and their dense weights."""
    made, weights = [], []
    for at, rank in enumerate(ranks):
        out = OUTPUTS[at]
        weight = (random(out, width, seed=10 + at) / width**0.5).to(dtype)
        bias = random(out, seed=20 + at, dtype=dtype) if at % 2 == 0 else None
        layer = LinearLayer(frozen(weight), bias)
        if rank == 0:
            for one in (weight, bias):
                if one is not None:
                    one.requires_grad_()
            layer = replace(layer, trained_weight=weight)
        elif rank is not None:
            trained = torch.promote_types(dtype, torch.float32)
            a = (random(rank, width, seed=30 + at) / width**0.5).to(trained).requires_grad_()
            b = random(out, rank, seed=40 + at).to(trained).requires_grad_()
            layer = replace(layer, lora_a=a, lora_b=b, scale=0.7 + at)
        made.append(layer)
        weights.append(weight)
    return made, weights


def plainly(x: Tensor, layers: Sequence[LinearLayer], weights: Sequence[Tensor]) -> list[Tensor]:
    """The definition, for autograd."""
    outs = []
    for layer, weight in zip(layers, weights, strict=True):
        y = functional.linear(x, weight, layer.bias)
        if layer.lora_a is not None and layer.lora_b is not None:
            change = functional.linear(functional.linear(x, layer.lora_a.to(x.dtype)), layer.lora_b.to(x.dtype))
            y = y + layer.scale * change
        outs.append(y)
    return outs


def trained_of(layers: Sequence[LinearLayer]) -> list[Tensor]:
    own = [one for layer in layers for one in (layer.lora_a, layer.lora_b, layer.trained_weight) if one is not None]
    return own + [layer.bias for layer in layers if layer.bias is not None and layer.bias.requires_grad]


def sources_of(case: Case, dtype: torch.dtype = torch.float32, rows: int = ROWS) -> list[Tensor]:
    sources = [random(rows, WIDTH, seed=at, dtype=dtype) for at in range(case.sources)]
    return [*sources, norm_weight(dtype)] if case.norm else sources


def results(
    function: Callable[..., Sequence[Tensor]], sources: Sequence[Tensor], layers: Sequence[LinearLayer],
    needs: bool = True,
) -> list[Tensor]:  # fmt: skip
    """Outputs, then the gradients of the sources (if these ``needs`` such) and of all that trains in layers. The
    function gets copies of the sources, which it may write over on the way back."""
    leaves = [one.detach().clone().requires_grad_(needs) for one in sources]
    outs = function(*(one * 1 for one in leaves))
    wanted = [*(leaves if needs else []), *trained_of(layers)]
    if not wanted:
        return [out.detach() for out in outs]
    loss = sum(((out * random(*out.shape, seed=60 + at).to(out.dtype)).sum() for at, out in enumerate(outs)))
    found = [out.detach().clone() for out in outs]
    return [*found, *torch.autograd.grad(loss, wanted)]  # type: ignore[arg-type]


def assert_alike(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Relative to the largest number of each."""
    for at, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.dtype == other.dtype, at
        assert one.shape == other.shape, at
        largest = max(float(other.abs().max()), 1e-3) if other.numel() else 1.0
        torch.testing.assert_close(
            one, other, rtol=0, atol=tolerance * largest, msg=lambda text, at=at: f"{at}: {text}"
        )


# ------------------------------------------------------------------------------------------------- values, gradients


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("needs", [True, False], ids=["trained below", "nothing below"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_prologue_matches_plain_composition(name: str, kind: str, dtype: torch.dtype, needs: bool) -> None:
    case = CASES[name]
    layers, weights = layers_of(KINDS[kind], dtype)
    sources = sources_of(case, dtype)
    prologue = case.prologue(dtype)
    found = results(lambda *given: lora_linears(given, layers, prologue), sources, layers, needs)
    expected = results(lambda *given: plainly(case.plain(*given), layers, weights), sources, layers, needs)
    assert_alike(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(("name", "kind"), [pair for pair in PAIRS if pair[0] != "rms norm"])
def test_fp64_matches_plain_composition(name: str, kind: str) -> None:
    """Where PyTorch computes, to its last digits; the norm computes in fp32 whatever it is given."""
    case = CASES[name]
    layers, weights = layers_of(KINDS[kind], torch.float64)
    sources = sources_of(case, torch.float64)
    prologue = case.prologue(torch.float64)
    found = results(lambda *given: lora_linears(given, layers, prologue), sources, layers)
    expected = results(lambda *given: plainly(case.plain(*given), layers, weights), sources, layers)
    assert_alike(found, expected, TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", ["none", "swiglu", "gelu"])
def test_gradients_match_finite_differences(name: str) -> None:
    """Without autograd in between. Not by ``gradcheck``, which goes back twice over what the first time overwrote."""
    case = CASES[name]
    layers, _ = layers_of([2, None, 3], torch.float64)
    sources, prologue = sources_of(case, torch.float64, rows=3), case.prologue(torch.float64)

    def loss() -> float:
        with torch.no_grad():
            outs = lora_linears([one.clone() for one in sources], layers, prologue)
        return float(sum((out * random(*out.shape, seed=60 + at).double()).sum() for at, out in enumerate(outs)))

    grads = results(lambda *given: lora_linears(given, layers, prologue), sources, layers)[len(layers) :]
    step = 1e-6
    for number, (leaf, grad) in enumerate(zip([*sources, *trained_of(layers)], grads, strict=True)):
        for at in ((0, 0), (1, 1), (-1, -1)):
            value = float(leaf.detach()[at])
            found = []
            for moved in (value + step, value - step):
                leaf.data[at] = moved
                found.append(loss())
            leaf.data[at] = value
            assert (found[0] - found[1]) / (2 * step) == pytest.approx(float(grad.detach()[at]), abs=1e-7), (number, at)


@pytest.mark.usefixtures("path")
def test_swiglu_reads_slices() -> None:
    """Gate and up as columns of one matrix."""
    layers, weights = layers_of([3, None])
    both = random(ROWS, 2 * WIDTH)
    found = results(lambda both: lora_linears(both.split(WIDTH, dim=1), layers, SwiGLUPrologue()), [both], layers)
    expected = results(
        lambda both: plainly(swiglu_reference(*both.split(WIDTH, dim=1)), layers, weights), [both], layers
    )
    assert_alike(found, expected, TOLERANCE[torch.float32])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", CASES)
def test_gradient_of_one_output_alone_matches(name: str) -> None:
    """The others' are zero, and so are those of their A and B."""
    case = CASES[name]
    layers, weights = layers_of([3, 2, None])
    found = results(
        lambda *x: lora_linears(x, layers, case.prologue(torch.float32))[1:2], sources_of(case), layers[1:2]
    )
    expected = results(lambda *x: plainly(case.plain(*x), layers, weights)[1:2], sources_of(case), layers[1:2])
    assert_alike(found, expected, TOLERANCE[torch.float32])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("at", [0, 1])
def test_gradient_of_one_source_alone_matches(at: int) -> None:
    layers, weights = layers_of([3])
    sources, grads = sources_of(CASES["swiglu"]), []
    for function in (
        lambda *x: lora_linears(x, layers, SwiGLUPrologue()),
        lambda *x: plainly(swiglu_reference(*x), layers, weights),
    ):
        leaf = sources[at].clone().requires_grad_()
        given = [one.clone() for one in sources]
        given[at] = leaf * 1
        out = function(*given)[0]
        grads.append(torch.autograd.grad(out.square().sum(), [leaf, *trained_of(layers)]))
    assert_alike(grads[0], grads[1], TOLERANCE[torch.float32])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", CASES)
def test_no_rows_give_empty_outputs(name: str) -> None:
    """As where nothing of a batch is learned."""
    case = CASES[name]
    layers, _ = layers_of([3, None])
    sources = sources_of(case, rows=0)
    found = results(lambda *x: lora_linears(x, layers, case.prologue(torch.float32)), sources, layers)
    assert [one.shape for one in found[:2]] == [(0, OUTPUTS[0]), (0, OUTPUTS[1])]
    assert not any(one.any() for one in found)


@pytest.mark.usefixtures("path")
def test_more_dimensions_match_without_a_prologue() -> None:
    layers, weights = layers_of([3, None, 2])
    x = random(2, 3, 5, WIDTH)
    found = results(lambda x: lora_linears((x,), layers), [x], layers)
    assert found[0].shape == (2, 3, 5, OUTPUTS[0])
    assert_alike(found, results(lambda x: plainly(x, layers, weights), [x], layers), TOLERANCE[torch.float32])


# ------------------------------------------------------------------------------------------------------ what is kept


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", CASES)
def test_saved_tensors_are_sources_and_small_products(name: str) -> None:
    """The sources where they lie, every B, all A as one matrix, the small products, for a norm one number a row; not
    what is computed of the sources, and no weight."""
    case = CASES[name]
    layers, _ = layers_of([3, None, 2])
    sources = [one.requires_grad_() for one in sources_of(case)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        lora_linears(sources, layers, case.prologue(torch.float32))
    known = {one.data_ptr() for one in (*sources, *trained_of(layers)[1::2])}
    assert {one.data_ptr() for one in kept} > known
    new = [tuple(one.shape) for one in kept if one.data_ptr() not in known]
    assert sorted(new) == sorted([(ROWS, 5), (5, WIDTH), *([(ROWS,)] if name == "rms norm" else [])])


@pytest.mark.parametrize("name", CASES)
def test_frozen_layers_ask_for_the_weight_once_each_way(name: str) -> None:
    """And without anything trained below, not at all on the way back."""
    case, asked = CASES[name], []

    def frozen(weight: Tensor) -> FrozenWeight:
        def dense(dtype: torch.dtype) -> Tensor:
            asked.append(dtype)
            return weight.to(dtype)

        return dense

    layers, _ = layers_of([3, None], frozen=frozen)
    for needs, times in ((True, 4), (False, 2)):
        asked.clear()
        results(lambda *x: lora_linears(x, layers, case.prologue(torch.float32)), sources_of(case), layers, needs)
        assert asked == [torch.float32] * times


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("needs", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_checkpointed_gradients_match(name: str, needs: bool) -> None:
    """Computed again on the way back: the same bits, though the way back writes over what it was given."""
    case = CASES[name]
    layers, _ = layers_of([3, 0, 2])
    below, _ = layers_of([None, None], width=WIDTH)
    below = [replace(one, weight=random(WIDTH, WIDTH, seed=at).to, bias=None) for at, one in enumerate(below)]

    def block(x: Tensor, *norm: Tensor) -> tuple[Tensor, ...]:
        sources = lora_linears((x,), below[: case.sources])
        return lora_linears((*sources, *norm), layers, case.prologue(torch.float32))

    given = [random(ROWS, WIDTH), *sources_of(case)[case.sources :]]
    plain = results(block, given, layers, needs)
    again = results(lambda *given: checkpoint(block, *given, use_reentrant=False), given, layers, needs)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", CASES)
def test_without_gradients_the_sources_stay(name: str) -> None:
    case = CASES[name]
    layers, _ = layers_of([3, None])
    sources = sources_of(case)
    before = [one.clone() for one in sources]
    with torch.no_grad():
        outs = lora_linears(sources, layers, case.prologue(torch.float32))
    assert not any(out.requires_grad for out in outs)
    assert all(torch.equal(one, other) for one, other in zip(sources, before, strict=True))


def test_no_dtype_is_left_out() -> None:
    """A layer in bf16 with fp32 A and B gives their gradients in fp32."""
    layers, _ = layers_of([3], torch.bfloat16)
    found = results(lambda x: lora_linears((x,), layers), sources_of(CASES["none"], torch.bfloat16), layers)
    assert [one.dtype for one in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
