"""A whole block by two programs of kernel calls: against the reference (in a model: test_linear.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_linear import any_amx, any_prepacked_amx, native, rounded, unit
from torch import Tensor

from capotune.errors import SettingError
from capotune.kernels import execution, linear, policy, prepacked
from capotune.kernels.attention import Sequences
from capotune.kernels.blocks import BERT, LLAMA, Block, Call, Norm, reference
from capotune.kernels.execution import Execution, reduced_precision
from capotune.kernels.lora_linear import LinearLayer
from capotune.kernels.memory import Memory
from capotune.kernels.native import library
from capotune.kernels.native_block import NativeBlock
from capotune.kernels.program import Program, symbol

__all__ = ["any_amx", "any_prepacked_amx", "native", "rounded", "unit"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True, params=["AMX", "vectors"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with AMX, and again without it by the kernel in fp32."""
    if request.param == "AMX":
        request.getfixturevalue("native")
    elif library("products_cpu") is None:
        pytest.skip("no C compiler here")
    else:
        monkeypatch.setattr(linear, "amx_kernels", lambda: None)
        monkeypatch.setattr(prepacked, "_vectors_are_faster", lambda: True)
        monkeypatch.setattr(policy, "REDUCED_PRECISION_ROWS", 1)
    return str(request.param)


class Made:
    """A block of random layers, what goes in, and the gradient that comes back."""

    def __init__(
        self, lengths: Sequence[int], heads: int, size: int, inner: int, ranks: Sequence[int], *, causal: bool = False,
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.random = torch.Generator().manual_seed(seed)
        hidden, self.sequences = heads * size, Sequences(tuple(lengths))
        shapes = [(hidden, hidden)] * 4 + [(inner, hidden), (hidden, inner)]
        layers = [self.layer(*shape, rank) for shape, rank in zip(shapes, ranks, strict=True)]
        norms = [Norm(1 + 0.1 * self.normal(hidden), 0.1 * self.normal(hidden), 1e-5) for _ in range(2)]
        self.block = Block(
            BERT, dict(zip(["q", "k", "v", "o", "up", "down"], layers, strict=True)),
            dict(zip(["norm1", "norm2"], norms, strict=True)), head_size=size, scale=size**-0.5, causal=causal,
        )  # fmt: skip
        self.native = NativeBlock(self.block, Memory())
        self.x, self.grad = self.normal(sum(lengths), hidden), self.normal(sum(lengths), hidden)
        self.trained = [one for layer in layers if layer.lora_a is not None for one in (layer.lora_a, layer.lora_b)]

    def call(self, *rates: float, rows: Tensor | None = None) -> Call:
        return Call(self.sequences, dropout=rates, rows=rows)

    def takes(self) -> bool:
        return self.native.takes(self.x, self.call())

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def layer(self, out: int, into: int, rank: int) -> LinearLayer:
        weight, bias = self.normal(out, into) / into**0.5, self.normal(out)
        if not rank:
            return LinearLayer(weight.to, bias)
        a, b = self.normal(rank, into) / into**0.5, self.normal(out, rank) / rank**0.5
        return LinearLayer(weight.to, bias, unaligned(a).requires_grad_(), unaligned(b).requires_grad_(), 0.5)

    def reference(self, x: Tensor) -> Tensor:
        return reference(self.block, x, self.call())

    def all_of(self, read: Callable[[Tensor], Tensor], *, needs_input: bool = True) -> list[Tensor]:
        """The output, and the gradients of x and of what is trained."""
        x = self.x.clone().requires_grad_(needs_input)
        y = read(x)
        leaves = [x, *self.trained] if needs_input else self.trained
        return [y.detach(), *torch.autograd.grad(y, leaves, self.grad[: len(y)])]


class MadeLlama(Made):
    """The same in Llama's form; each key head has ``shared`` query heads."""

    def __init__(
        self, lengths: Sequence[int], key_heads: int, shared: int, size: int, inner: int, ranks: Sequence[int]
    ) -> None:
        self.random, self.sequences = torch.Generator().manual_seed(0), Sequences(tuple(lengths))
        hidden, keys, tokens = key_heads * shared * size, key_heads * size, sum(lengths)
        shapes = {
            "q": (hidden, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, hidden),
            "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner),
        }  # fmt: skip
        layers = {name: self.layer(*shapes[name], rank) for name, rank in zip(shapes, ranks, strict=True)}
        norms = {name: Norm(1 + 0.1 * self.normal(hidden), None, 1e-5) for name in ("norm1", "norm2")}
        self.block = Block(LLAMA, layers, norms, head_size=size, scale=size**-0.5, causal=True)
        self.native = NativeBlock(self.block, Memory())
        self.x, self.grad, angles = self.normal(tokens, hidden), self.normal(tokens, hidden), self.normal(tokens, size)
        self.rotation = angles.cos(), angles.sin()
        self.trained = [
            one for layer in layers.values() for one in (layer.lora_a, layer.lora_b) if one is not None
        ]  # fmt: skip

    def call(self, *rates: float, rows: Tensor | None = None) -> Call:
        return replace(super().call(*rates, rows=rows), rotation=self.rotation)


def unaligned(x: Tensor) -> Tensor:
    """The same where the optimizer's one tensor for all weights may have it: at any number."""
    return torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape)


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """In the mean square: a product at 16 bits is off by some 1e-5, and a block is six of them."""
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        off = float((one - other).norm() / other.norm().clamp_min(1e-6))
        assert off <= tolerance, f"tensor {number} is off by {off:.1g}"


@given(
    lengths=st.lists(st.integers(5, 40), min_size=1, max_size=5),
    heads=st.integers(1, 3),
    size=st.sampled_from([8, 16, 24, 64]),
    inner=st.integers(17, 130),
    ranks=st.lists(st.integers(0, 9), min_size=6, max_size=6),
    causal=st.booleans(),
    needs_input=st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_native_block_matches_reference(
    lengths: list[int], heads: int, size: int, inner: int, ranks: list[int], causal: bool, needs_input: bool,
    kernels: str,
) -> None:  # fmt: skip
    made = Made(lengths, heads, size, inner, ranks, causal=causal)
    if not needs_input and not made.trained:
        return
    assert made.takes()
    expected = made.all_of(made.reference, needs_input=needs_input)
    found = made.all_of(lambda x: made.native(x, made.call()), needs_input=needs_input)
    # sums of few numbers may cancel; a wrong term is off by all of it
    assert_near(found, expected, 1e-2 if kernels == "AMX" else 1e-4)


@given(
    lengths=st.lists(st.integers(5, 40), min_size=1, max_size=4),
    ranks=st.sampled_from([[2, 0, 3, 4, 5, 6], [0] * 6, [0, 0, 0, 3, 0, 2]]),
    rates=st.sampled_from([(0.0, 0.0), (0.25, 0.5)]),
    needs_input=st.booleans(),
    draw=st.data(),
)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_subset_of_rows_matches_reference(
    lengths: list[int], ranks: list[int], rates: tuple[float, float], needs_input: bool, draw: st.DataObject,
    kernels: str,
) -> None:  # fmt: skip
    """In any order: the rows of the whole output, and gradients as if nobody looked at the others."""
    made = Made(lengths, 2, 16, 70, ranks)
    if not needs_input and not made.trained:
        return
    tokens = sum(lengths)
    count = draw.draw(st.integers(1, tokens))
    rows = torch.randperm(tokens, generator=made.random)[:count]

    call = made.call(*rates, rows=rows)
    torch.manual_seed(1)
    expected = made.all_of(lambda x: reference(made.block, x, call), needs_input=needs_input)
    torch.manual_seed(1)
    found = made.all_of(lambda x: made.native(x, call), needs_input=needs_input)
    assert_near(found, expected, 1e-2 if kernels == "AMX" else 1e-4)
    with torch.no_grad():
        torch.manual_seed(1)
        assert torch.equal(made.native(made.x, call), found[0])


@given(
    lengths=st.lists(st.integers(5, 40), min_size=1, max_size=4),
    key_heads=st.integers(1, 2),
    shared=st.integers(1, 3),
    size=st.sampled_from([8, 16, 24]),
    inner=st.integers(17, 130),
    ranks=st.lists(st.integers(0, 9), min_size=7, max_size=7),
    needs_input=st.booleans(),
    subset=st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_native_llama_block_matches_reference(
    lengths: list[int], key_heads: int, shared: int, size: int, inner: int, ranks: list[int], needs_input: bool,
    subset: bool, kernels: str,
) -> None:  # fmt: skip
    made = MadeLlama(lengths, key_heads, shared, size, inner, ranks)
    if not needs_input and not made.trained:
        return
    rows = torch.randperm(len(made.x), generator=made.random)[: len(made.x) // 2 + 1] if subset else None
    assert made.native.takes(made.x, made.call(rows=rows))
    grad = made.grad.clone()
    expected = made.all_of(lambda x: reference(made.block, x, made.call(rows=rows)), needs_input=needs_input)
    found = made.all_of(lambda x: made.native(x, made.call(rows=rows)), needs_input=needs_input)
    assert_near(found, expected, 1e-2 if kernels == "AMX" else 1e-4)
    assert torch.equal(made.grad, grad)  # it is the caller's


def test_many_tokens_of_llama_are_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose saved activations are quantised."""
    made = MadeLlama([17, 33], 2, 2, 16, 70, [2] * 7)
    for tokens, takes in ((51, True), (50, False)):
        monkeypatch.setattr(policy, "QUANTIZE_SAVED_FROM_TOKENS", tokens)
        assert made.native.takes(made.x, made.call()) == takes
        assert Made([17, 33], 2, 16, 70, [2] * 6).takes()


def test_rotation_that_does_not_fit_is_refused() -> None:
    made = MadeLlama([17, 33], 2, 2, 16, 70, [2] * 7)
    cos, sin = made.rotation
    with pytest.raises(SettingError, match="cos and sin has shape"):
        made.native(made.x, replace(made.call(), rotation=(cos[:49], sin)))
    assert not made.native.takes(made.x, replace(made.call(), rotation=(cos.double(), sin)))
    assert not made.native.takes(made.x, replace(made.call(), rotation=None))


def test_rows_out_of_range_are_refused() -> None:
    made = Made([17, 33], 2, 16, 70, [2, 2, 2, 2, 2, 2])
    refused = [([50], "from 0 to 49, not 50 to 50"), ([3, -1], "not -1 to 3"), ([0.0], "float32"), ([[1]], "1, 1")]
    for rows, words in refused:
        with pytest.raises(SettingError, match=words):
            made.native(made.x, made.call(rows=torch.tensor(rows)))
    assert not made.native.takes(made.x, made.call(rows=torch.tensor([], dtype=torch.int64)))
    assert made.native.takes(made.x, made.call(rows=torch.tensor([0])))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_give_the_same_bits(threads: int) -> None:
    made = Made([170, 33, 205], 4, 24, 300, [2, 2, 3, 4, 5, 6])

    def read() -> list[Tensor]:
        return made.all_of(lambda x: made.native(x, made.call()))

    alone = read()
    torch.set_num_threads(threads)
    for one, other in zip(read(), alone, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_in_parts_give_the_same_bits(threads: int) -> None:
    """So many numbers between the layers that a thread's rows of them do not fit into its cache together: each row has
    the bits that it has without the others."""
    torch.set_num_threads(threads)
    made = Made([170, 133, 205], 2, 16, 8200, [2, 0, 3, 4, 5, 6])
    with torch.no_grad():
        together, alone = made.native(made.x, made.call()), made.native(made.x[:170], Call(Sequences((170,))))
    assert torch.equal(together[:170], alone)


@pytest.mark.parametrize("rates", [(0.25, 0.5), (0.25, 0.0), (0.0, 0.5)])
def test_dropout_draws_and_scales_as_pytorch(rates: tuple[float, float]) -> None:
    made = Made([17, 33], 2, 16, 70, [2, 2, 2, 2, 2, 2])
    torch.manual_seed(1)
    expected = made.all_of(lambda x: reference(made.block, x, made.call(*rates)))
    torch.manual_seed(1)
    assert_near(made.all_of(lambda x: made.native(x, made.call(*rates))), expected, 3e-4)


def test_second_backward_is_refused() -> None:
    made = Made([17, 33], 2, 16, 70, [2, 2, 2, 2, 2, 2])
    y = made.native(made.x, made.call())
    torch.autograd.grad(y, made.trained, made.grad, retain_graph=True)
    with pytest.raises(RuntimeError, match="run the forward pass again"):
        torch.autograd.grad(y, made.trained, made.grad)


def test_native_block_takes_only_what_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made([17, 33], 2, 16, 70, [2, 2, 2, 2, 2, 2])
    assert made.takes()
    assert not made.native.takes(made.x.double(), made.call())
    assert not made.native.takes(torch.zeros(600, 32), Call(Sequences((600,))))  # too long for its attention
    assert not Made([50], 1, 20, 70, [0] * 6).takes()  # heads that are no whole vectors
    assert not Made([50], 2, 16, 70, [20, 20, 20, 0, 0, 0]).takes()  # not a low rank
    plain = Made([17, 33], 2, 16, 70, [0] * 6).block
    layer, norm = plain.layers["o"], plain.norms["norm1"]
    for changed, takes in (
        ({}, True),
        ({"layers": {**plain.layers, "o": replace(layer, bias=torch.zeros(32, dtype=torch.bfloat16))}}, False),
        ({"layers": {**plain.layers, "o": replace(layer, trained_weight=torch.zeros(32, 32))}}, False),
        ({"layers": {**plain.layers, "o": replace(layer, bias=torch.zeros(32).requires_grad_())}}, False),
        ({"norms": {**plain.norms, "norm1": norm._replace(weight=torch.ones(32).requires_grad_())}}, False),
        ({"window": 8}, False),
    ):
        native = NativeBlock(replace(plain, **changed), Memory())
        assert native.takes(made.x, made.call()) == takes
    monkeypatch.setattr(policy, "REDUCED_PRECISION_ROWS", 51)
    assert not made.takes()
    monkeypatch.setattr(policy, "REDUCED_PRECISION_ROWS", 1)
    monkeypatch.setattr(linear, "amx_kernels", lambda: None)
    monkeypatch.setattr(prepacked, "_vectors_are_faster", lambda: False)
    assert not made.takes()


def test_ranks_of_layers_that_share_an_input_are_counted_together() -> None:
    for ranks, few in (([24, 8, 24, 24, 24, 24], False), ([24, 0, 24, 24, 24, 24], True)):
        made = Made([17, 33], 2, 16, 70, ranks)
        assert made.takes() == few


def test_shapes_that_do_not_fit_are_refused() -> None:
    made = Made([17, 33], 2, 16, 70, [2, 2, 2, 2, 2, 2])
    for x, sequences in ((made.x, Sequences((17, 330))), (made.x[:, :16].contiguous(), made.sequences)):
        with pytest.raises(SettingError, match="x has shape"):
            made.native(x, Call(sequences))


def test_dropout_of_everything_is_zero() -> None:
    made = Made([17, 33], 2, 16, 70, [2, 2, 2, 2, 2, 2])
    assert made.native(made.x, made.call(1.0, 1.0)).isfinite().all()


def test_program_follows_its_symbols() -> None:
    products = library("products_cpu")
    assert products is not None
    program, source, to = Program(), torch.arange(12.0), torch.zeros(12)
    rows = symbol("rows")
    program.call(
        products.copy_matrix, rows, 3 * rows,
        source=symbol("from"), columns=3, target=symbol("to"), row_stride=1, column_stride=rows,
    )  # fmt: skip
    for count in (4, 2):
        program.run({"from": source.data_ptr(), "to": to.data_ptr(), "rows": count})
        assert torch.equal(to[: 3 * count].view(3, count), source[: 3 * count].view(count, 3).t())
    with pytest.raises(KeyError):
        program.run({"from": 0, "to": 0})


def test_native_block_needs_reduced_precision() -> None:
    made = Made([17, 33], 2, 16, 70, [2, 2, 2, 2, 2, 2])
    execution._execution.set(Execution())
    assert not made.takes()
    with reduced_precision():
        assert made.takes()
