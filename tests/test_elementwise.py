"""The fused norm, gated unit and rotary embedding: against their definitions, on both paths, in any layout."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from capotune.errors import SettingError
from capotune.kernels import native as native_module
from capotune.kernels import policy
from capotune.kernels.gelu import GeluPrologue, gelu_forward, gelu_reference
from capotune.kernels.layer_norm import add_layer_norm, add_layer_norm_reference
from capotune.kernels.lora_linear import Prologue
from capotune.kernels.rms_norm import RmsNormPrologue, rms_norm_reference
from capotune.kernels.rotary import rotary, rotary_backward, rotary_forward, rotary_reference
from capotune.kernels.swiglu import SwiGLUPrologue, swiglu_backward, swiglu_forward, swiglu_reference

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = 1e-5
DTYPES = (torch.float32, torch.bfloat16)
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""The largest relative error of one rounding."""
TINY = 1e-30
"""C takes e^x for 0 below the smallest normal fp32 number, which times a large gate and a large up is still less."""
SIZES = [(1, 1), (5, 3), (2, 17), (3, 577), (0, 6), (70, 64), (2, 5000)]
"""Rows, columns."""
HEADS = [(1, 1, 2), (3, 2, 6), (5, 9, 64), (0, 2, 4), (17, 3, 34)]
"""Tokens, heads, numbers in a head."""


@pytest.fixture(params=["native", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on the C kernels and again without them."""
    if request.param == "reference":
        monkeypatch.setattr(native_module, "library", lambda _: None)
    elif native_module.library("elementwise_cpu") is None:
        pytest.skip("no C compiler here")
    return request.param


@pytest.fixture
def native() -> None:
    if native_module.library("elementwise_cpu") is None:
        pytest.skip("no C compiler here")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


class Alone(torch.autograd.Function):
    """A prologue without linear layers behind it, so that autograd can ask for its gradients: on copies, since the way
    back writes over what it was given. The input that it computes once more must be the one of the way there."""

    @staticmethod
    def forward(ctx: Any, prologue: Prologue, *sources: Tensor) -> Tensor:
        y, kept = prologue.forward(*sources)
        ctx.save_for_backward(*sources, *kept, y)
        ctx.prologue = prologue
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *kept, y = (one.clone(memory_format=torch.contiguous_format) for one in ctx.saved_tensors)
        grads, again = ctx.prologue.backward(
            grad.clone(memory_format=torch.contiguous_format), tuple(kept), recompute=True
        )
        torch.testing.assert_close(again, y.to(again.dtype), equal_nan=True)
        return None, *grads


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return Alone.apply(RmsNormPrologue(eps, trains=weight.requires_grad), x, weight)  # type: ignore[no-any-return, no-untyped-call]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return Alone.apply(SwiGLUPrologue(), gate, up)  # type: ignore[no-any-return, no-untyped-call]


def gelu(x: Tensor) -> Tensor:
    return Alone.apply(GeluPrologue(), x)  # type: ignore[no-any-return, no-untyped-call]


def differentiate(
    function: Callable[..., Tensor], leaves: tuple[Tensor, ...], *rest: Any, grad: Tensor
) -> list[Tensor]:
    """The result and the gradients of ``leaves``."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    y = function(*leaves, *rest)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def exact(function: Callable[..., Tensor], leaves: tuple[Tensor, ...], *rest: Any, grad: Tensor) -> list[Tensor]:
    """The same in float64."""
    wide = [one.double() if isinstance(one, Tensor) else one for one in rest]
    return differentiate(function, tuple(leaf.double() for leaf in leaves), *wide, grad=grad.double())


def exact_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition without its fp32."""
    return weight * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


def assert_near(found: Tensor, truth: Tensor, size: Tensor | float, roundings: float) -> None:
    """Within so many roundings of numbers of ``size``: of the terms that were added, where they cancel."""
    assert found.shape == truth.shape
    size = torch.as_tensor(size, dtype=torch.float64).expand(truth.shape)
    excess = (found.double() - truth).abs() - roundings * ROUNDING[found.dtype] * size - 1e-36
    assert not (excess > 0).any(), excess.max()  # and no NaN, which differs from everything
    assert found.isfinite().all()


def steps_apart(a: Tensor, b: Tensor) -> int:
    """How many bf16 numbers lie between the two at most."""
    assert a.dtype == b.dtype == torch.bfloat16
    bits = [one.contiguous().view(torch.int16).int() for one in (a, b)]
    ordered = [torch.where(one < 0, -(one & 0x7FFF), one) for one in bits]
    return int((ordered[0] - ordered[1]).abs().max()) if a.numel() else 0


# --------------------------------------------------------------------------------------------------- the definitions


def test_the_references_are_transformers_own() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    for dtype in DTYPES:
        norm = llama.LlamaRMSNorm(24, EPS).to(dtype)
        norm.weight.data = random(24, dtype=dtype, seed=1)
        x = random(2, 5, 24, dtype=dtype)
        assert torch.equal(rms_norm_reference(x, norm.weight, EPS), norm(x))
        x, cos, sin = random(7, 3, 8, dtype=dtype), random(7, 8, dtype=dtype, seed=1), random(7, 8, dtype=dtype, seed=2)
        expected, _ = llama.apply_rotary_pos_emb(x, x, cos, sin)
        assert torch.equal(rotary_reference(x, cos, sin), expected)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_norm(rows: int, columns: int, dtype: torch.dtype) -> None:
    x, weight = random(rows, columns, dtype=dtype, scale=3), random(columns, dtype=dtype, seed=1)
    grad = random(rows, columns, dtype=dtype, seed=2)
    found = differentiate(rms_norm, (x,), weight, EPS, grad=grad)
    truth = exact(exact_norm, (x,), weight, EPS, grad=grad)
    assert_near(found[0], truth[0], truth[0].abs(), 8)
    root = (x.double().pow(2).mean(-1, keepdim=True) + EPS).rsqrt()
    weighted = (grad * weight.double()).abs()
    along = x.double().abs() * root**2 * (weighted * x.double().abs()).mean(-1, keepdim=True)
    assert_near(found[1], truth[1], root * (weighted + along), 8)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_gated_unit(rows: int, columns: int, dtype: torch.dtype) -> None:
    gate, up, grad = (random(rows, columns, dtype=dtype, seed=seed, scale=4) for seed in range(3))
    found = differentiate(swiglu, (gate, up), grad=grad)
    truth = exact(swiglu_reference, (gate, up), grad=grad)
    assert_near(found[0], truth[0], truth[0].abs(), 7)
    s, x = gate.double().sigmoid(), gate.double()
    assert_near(found[1], truth[1], (grad * up.double()).abs() * s * (1 + x.abs() * (1 - s)), 7)
    assert_near(found[2], truth[2], truth[2].abs(), 7)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_gelu(rows: int, columns: int, dtype: torch.dtype) -> None:
    x, grad = (random(rows, columns, dtype=dtype, seed=seed, scale=3) for seed in range(2))
    found = differentiate(gelu, (x,), grad=grad)
    truth = exact(gelu_reference, (x,), grad=grad)
    # both paths add 1 and erf, or take it from 1: what is left is off by roundings of 1
    assert_near(found[0], truth[0], x.double().abs() + 1e-3, 6)
    assert_near(found[1], truth[1], grad.double().abs() * (1 + x.double().abs()), 6)


@pytest.mark.usefixtures("native")
def test_gelu_of_every_size() -> None:
    """Far to the left x·Φ(x) is small, and right to six digits all the same, where PyTorch's has lost them."""
    x = torch.cat([torch.linspace(-12.5, 12, 200_001), torch.tensor([0.0, -0.0, 1e30, -1e30, 40.0, -40.0])])[None]
    wide = x.double()
    truth = wide * 0.5 * torch.erfc(-wide / 2**0.5)
    assert_near(gelu_forward(x), truth, truth.abs() * (1 + 0.3 * wide.square().clamp(max=200)) + 1e-36, 12)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [size for size in SIZES if size[0] and size[1] > 1])
def test_layer_norm_of_a_sum(rows: int, columns: int, dtype: torch.dtype) -> None:
    x, residual, grad = (random(rows, columns, dtype=dtype, seed=seed, scale=3) for seed in range(3))
    weight, bias = random(columns, dtype=dtype, seed=3), random(columns, dtype=dtype, seed=4)
    found = differentiate(add_layer_norm, (x, residual), weight, bias, EPS, grad=grad)
    total = (x + residual).double()  # rounded as the definition rounds it
    truth = exact(add_layer_norm, (total, torch.zeros_like(total)), weight, bias, EPS, grad=grad)
    spread = total.std(1, correction=0, keepdim=True)
    normal = (total - total.mean(1, keepdim=True)).abs() / (spread**2 + EPS).sqrt()
    assert_near(found[0], truth[0], weight.double().abs() * (normal + 1) + bias.double().abs(), 8)
    weighted = (grad * weight.double()).abs()
    size = weighted + weighted.mean(1, keepdim=True) + normal * (weighted * normal).mean(1, keepdim=True)
    assert_near(found[1], truth[1], size * (spread**2 + EPS).rsqrt(), 12)
    assert torch.equal(found[1], found[2])


@pytest.mark.usefixtures("path")
def test_layer_norm_is_the_definition() -> None:
    x, residual, grad = (random(6, 24, seed=seed) for seed in range(3))
    weight, bias = random(24, seed=3), random(24, seed=4)
    found, expected = (
        differentiate(function, (x, residual), weight, bias, EPS, grad=grad)
        for function in (add_layer_norm, add_layer_norm_reference)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "size"), HEADS)
def test_rotary(tokens: int, heads: int, size: int, dtype: torch.dtype) -> None:
    """The halves of cos and sin are drawn apart: no kernel may rely on their being equal."""
    x, grad = (random(tokens, heads, size, dtype=dtype, seed=seed) for seed in range(2))
    cos, sin = (random(tokens, size, dtype=dtype, seed=seed) for seed in range(2, 4))
    found = differentiate(rotary, (x,), cos, sin, grad=grad)
    truth = exact(rotary_reference, (x,), cos, sin, grad=grad)
    for y, expected, given_ in zip(found, truth, (x, grad), strict=True):
        assert_near(y, expected, given_.double().abs().amax((1, 2), keepdim=True) * 6, 2)
    assert found[0].is_contiguous()


@pytest.mark.usefixtures("native")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 9), columns=st.integers(1, 300), seed=st.integers(0, 10_000), dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 30.0, 1e4]),
)  # fmt: skip
def test_c_and_pytorch_agree(rows: int, columns: int, seed: int, dtype: torch.dtype, scale: float) -> None:
    """Results in bf16 to two steps where they do not cancel, since a factor that lies between two numbers of bf16 may
    be rounded to either; rotary's to the bit, both ways."""
    a, b = (random(rows, columns, dtype=dtype, seed=seed + i, scale=scale) for i in range(2))
    weight, grad = random(columns, dtype=dtype, seed=seed), random(rows, columns, dtype=dtype, seed=seed + 2)
    pairs = [
        (swiglu_forward(a, b), swiglu_reference(a, b)),
        (rms_norm(a, weight, EPS), rms_norm_reference(a, weight, EPS)),
    ]
    for fast, plain in pairs:
        torch.testing.assert_close(fast, plain, rtol=1e-6 if dtype == torch.float32 else 0.01, atol=TINY)
        if dtype == torch.bfloat16:
            assert steps_apart(*(torch.where(one.abs() > TINY, one, 0) for one in (fast, plain))) <= 2
    x, g = (one.repeat(1, 4).view(rows, 2, 2 * columns) for one in (a, grad))
    cos, sin = a.repeat(1, 2).contiguous(), random(rows, 2 * columns, dtype=dtype, seed=seed + 3)
    fast, plain = (differentiate(function, (x,), cos, sin, grad=g) for function in (rotary, rotary_reference))
    for one, other in zip(fast, plain, strict=True):
        largest = float(max(x.abs().max(), g.abs().max()) * max(cos.abs().max(), sin.abs().max())) if rows else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=0 if dtype == torch.bfloat16 else 3e-7 * largest)


@pytest.mark.usefixtures("native")
def test_bf16_is_rounded_where_the_definition_rounds() -> None:
    """The same bits but where an fp32 rounding decides the bf16 one; with one rounding less a quarter would differ."""
    a, b = (random(50, 2000, dtype=torch.bfloat16, seed=seed) for seed in range(2))
    for fast, plain in (
        (swiglu_forward(a, b), swiglu_reference(a, b)),
        (rms_norm(a, b[0], EPS), rms_norm_reference(a, b[0], EPS)),
    ):
        assert (fast != plain).float().mean() < 1e-3


@pytest.mark.parametrize("shape", [(6,), (2, 3, 4, 5), (1, 1)])
@pytest.mark.usefixtures("path")
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    a, b, weight = random(*shape), random(*shape, seed=1), random(shape[-1], seed=2)
    torch.testing.assert_close(swiglu(a, b), swiglu_reference(a, b))
    torch.testing.assert_close(rms_norm(a, weight, EPS), rms_norm_reference(a, weight, EPS))


def test_gradients_by_finite_differences() -> None:
    """In fp64, which only the PyTorch path computes in."""
    gate, up = (random(3, 4, seed=seed).double().requires_grad_() for seed in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))
    x = random(3, 2, 6).double().requires_grad_()
    cos, sin = (random(3, 6, seed=seed).double() for seed in range(2))
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin), (x,))


@pytest.mark.usefixtures("path")
def test_half_precision_and_mixed_dtypes_take_the_definition() -> None:
    """fp16, and a norm in bf16 whose weight is fp32: results have the dtypes of the definition."""
    a, b = random(3, 8, dtype=torch.float16), random(3, 8, dtype=torch.float16, seed=1)
    assert torch.equal(swiglu(a, b), swiglu_reference(a, b))
    assert torch.equal(rms_norm(a, b[0], EPS), rms_norm_reference(a, b[0], EPS))
    x, weight = random(3, 8, dtype=torch.bfloat16), random(8, seed=1)
    found = differentiate(rms_norm, (x,), weight, EPS, grad=random(3, 8, seed=2))
    expected = differentiate(rms_norm_reference, (x,), weight, EPS, grad=random(3, 8, seed=2))
    assert torch.equal(found[0], expected[0])
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[1], expected[1], rtol=0.01, atol=0.01)
    found = differentiate(swiglu, (x, weight.repeat(3, 1)), grad=random(3, 8, seed=2))
    assert [one.dtype for one in found] == [torch.float32, torch.bfloat16, torch.float32]


@pytest.mark.usefixtures("native")
def test_the_environment_variable_turns_the_c_path_off(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up, grad = (random(5, 33, seed=seed) for seed in range(3))
    before = differentiate(swiglu, (gate, up), grad=grad)
    monkeypatch.setenv("CAPOTUNE_NATIVE", "0")
    monkeypatch.setattr("capotune.kernels.native_ops.over_rows", lambda *_, **__: pytest.fail("C although turned off"))
    native_module.library.cache_clear()
    try:
        assert native_module.library("elementwise_cpu") is None
        after = differentiate(swiglu, (gate, up), grad=grad)
    finally:
        native_module.library.cache_clear()
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- extreme values


@pytest.mark.usefixtures("path")
def test_the_exponential_over_its_whole_range() -> None:
    """silu(x)/x is the logistic function; every fp32 result near it means that e^x is right as well."""
    x = torch.cat([torch.linspace(-87.3, 20, 300_001), torch.logspace(-37, -1, 1000), -torch.logspace(-37, -1, 1000)])
    y = swiglu_forward(x, torch.ones_like(x))
    truth = torch.nn.functional.silu(x.double())
    assert_near(y, truth, truth.abs(), 5)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_gates(dtype: torch.dtype) -> None:
    gate = torch.tensor([0.0, -0.0, 1e4, -1e4, 88.8, -88.8, -104.0, 1e30, -1e30, 3e-39], dtype=dtype)
    y, grad_gate, grad_up = differentiate(swiglu, (gate, torch.ones_like(gate)), grad=torch.ones_like(gate))
    wide = gate.double()
    assert_near(y, wide.clamp(min=0), wide.clamp(min=0) + 1e-28, 2)
    assert_near(grad_gate, (wide > 1).double() + 0.5 * (wide.abs() < 1), 1 + 1e-28, 2)
    assert_near(grad_up, wide.clamp(min=0), wide.clamp(min=0) + 1e-28, 2)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_go_through_as_in_the_definition(dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    gate = torch.tensor([nan, inf, -inf, 1.0, 1.0, 2.0], dtype=dtype)
    up = torch.tensor([1.0, 1.0, 1.0, nan, -inf, 3.0], dtype=dtype)
    torch.testing.assert_close(swiglu(gate, up), swiglu_reference(gate, up), equal_nan=True)
    x = torch.stack([gate, up, torch.ones_like(up)])
    norms = rms_norm(x, torch.ones_like(up), EPS), rms_norm_reference(x, torch.ones_like(up), EPS)
    torch.testing.assert_close(*norms, equal_nan=True)
    x = gate.view(1, 1, 6)
    turned = (function(x, up[None], up[None]) for function in (rotary, rotary_reference))
    torch.testing.assert_close(*turned, equal_nan=True)


@pytest.mark.usefixtures("native")
def test_a_nan_of_any_bits_stays_one_in_bf16() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16)
    y = rotary_forward(x.view(1, 1, -1), torch.ones(1, 2**16, dtype=x.dtype), torch.zeros(1, 2**16, dtype=x.dtype))
    expected = rotary_reference(x.view(1, 1, -1), torch.ones(1, 2**16).to(x), torch.zeros(1, 2**16).to(x))
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("path")
def test_rows_of_zeros_and_huge_numbers() -> None:
    x = torch.zeros(4, 40)
    x[1], x[2], x[3, 7] = 1e15, 1e-15, 1e18
    grad, weight = random(4, 40, seed=2), random(40, seed=1)
    found = differentiate(rms_norm, (x,), weight, EPS, grad=grad)
    truth = exact(exact_norm, (x,), weight, EPS, grad=grad)
    assert_near(found[0], truth[0], truth[0].abs(), 5)
    torch.testing.assert_close(found[1].double(), truth[1], rtol=1e-4, atol=1e-4 * float(truth[1][1].abs().max()))


@pytest.mark.usefixtures("path")
def test_a_long_row_is_summed_exactly_enough() -> None:
    """2¹⁷ numbers of one size: an fp32 sum in one place would be off by thousands of roundings."""
    x = random(2, 2**17).abs() + 1
    y = rms_norm(x, torch.ones(2**17), EPS)
    truth = exact_norm(x.double(), torch.ones(2**17).double(), EPS)
    assert_near(y, truth, truth, 8)


# ----------------------------------------------------------------------------------------------------------- layouts


class Copies(TorchDispatchMode):
    """Collects the operations that write a tensor's numbers somewhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(function) for word in ("copy", "clone", "contiguous", "cat")):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_of_columns_are_read_and_written_in_place(dtype: torch.dtype, path: str) -> None:
    """gate | up side by side, their gradients too: nothing is copied and nothing beside them is touched."""
    n = 19
    both, grad = random(7, 2 * n + 5, dtype=dtype, seed=1), random(7, n, dtype=dtype, seed=2)
    gate, up = both[:, 2 : n + 2], both[:, n + 3 : 2 * n + 3]
    wide, pair = torch.full((7, 40), 9.0, dtype=dtype), torch.full((7, 50), 9.0, dtype=dtype)
    with Copies() as copies:
        assert swiglu_forward(gate, up, out=wide[:, 5 : n + 5]).data_ptr() == wide[:, 5:].data_ptr()
        swiglu_backward(grad, gate, up, out=(pair[:, 1 : n + 1], pair[:, n + 2 : 2 * n + 2]))
    assert copies.found == [] or path == "reference"
    gate, up = gate.contiguous(), up.contiguous()
    torch.testing.assert_close(wide[:, 5 : n + 5], swiglu_forward(gate, up))
    grad_gate, grad_up = swiglu_backward(grad, gate, up)
    torch.testing.assert_close(pair[:, 1 : n + 1], grad_gate)
    torch.testing.assert_close(pair[:, n + 2 : 2 * n + 2], grad_up)
    wide[:, 5 : n + 5], pair[:, 1 : n + 1], pair[:, n + 2 : 2 * n + 2] = 9, 9, 9
    assert (wide == 9).all()
    assert (pair == 9).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_of_a_slice_of_columns(dtype: torch.dtype, transposed: bool, path: str) -> None:
    """Queries as they lie in the matrix of queries, keys and values, there and back again."""
    turn = rotary_backward if transposed else rotary_forward
    matrix, wide = random(6, 60, dtype=dtype), torch.full((6, 30), 9.0, dtype=dtype)
    cos, sin = random(6, 8, dtype=dtype, seed=1), random(6, 8, dtype=dtype, seed=2)
    x, out = matrix[:, 10:34].unflatten(1, (3, 8)), wide[:, 4:28].unflatten(1, (3, 8))
    with Copies() as copies:
        turn(x, cos, sin, out=out)
    assert copies.found == [] or path == "reference"
    assert torch.equal(out, turn(x.contiguous(), cos, sin))
    assert (wide[:, :4] == 9).all()
    assert (wide[:, 28:] == 9).all()


@pytest.mark.usefixtures("path")
def test_results_may_replace_what_they_were_computed_from() -> None:
    gate, up, grad = (random(5, 100, seed=seed) for seed in range(3))
    expected = swiglu_forward(gate, up), *swiglu_backward(grad, gate, up)
    assert torch.equal(swiglu_forward(gate.clone(), target := up.clone(), out=target), expected[0])
    pair = gate.clone(), up.clone()
    assert all(map(torch.equal, swiglu_backward(grad, *pair, out=pair), expected[1:]))
    x, cos, sin = random(5, 2, 50), random(5, 50, seed=1), random(5, 50, seed=2)
    expected = rotary_forward(x, cos, sin)
    assert torch.equal(rotary_forward(x, cos, sin, out=x), expected)


@pytest.mark.usefixtures("path")
def test_other_layouts_are_copied_first() -> None:
    """Transposed, with every second column, and gradients of a sum, which are one number in all places."""
    a, b = random(6, 9).t(), random(9, 12)[:, ::2]
    weight = random(12, seed=3)[::2]
    torch.testing.assert_close(swiglu(a, b), swiglu_reference(a, b))
    torch.testing.assert_close(rms_norm(a, weight, EPS), rms_norm_reference(a, weight, EPS))
    one = torch.ones(()).expand(9, 6)
    norms = (
        lambda x, y: rms_norm(x * y, weight, EPS),
        lambda x, y: rms_norm_reference(x * y, weight, EPS),
    )
    for fast, plain in ((swiglu, swiglu_reference), norms):
        found, expected = (differentiate(function, (a, b), grad=one) for function in (fast, plain))
        for first, second in zip(found, expected, strict=True):
            torch.testing.assert_close(first, second)
    x = random(2, 5, 8).transpose(0, 1)  # as heads come out of attention
    cos, sin = random(8).expand(5, 8), random(5, 16, seed=1)[:, ::2]
    found, expected = (
        differentiate(function, (x,), cos, sin, grad=torch.ones(()).expand(5, 2, 8))
        for function in (rotary, rotary_reference)
    )
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.usefixtures("path")
def test_shapes_that_do_not_fit_are_refused() -> None:
    """C would read beyond the end."""
    a, narrow = random(4, 6), random(4, 5)
    for call in (
        lambda: swiglu(a, narrow), lambda: swiglu_forward(a, a, out=narrow), lambda: swiglu_backward(narrow, a, a),
        lambda: swiglu_backward(a, a, a, out=(a, narrow)), lambda: rms_norm(a, random(5), EPS),
        lambda: rms_norm(a, random(1), EPS), lambda: rotary(a.view(4, 1, 6), narrow, a),
        lambda: rotary(a.view(4, 1, 6), a, a[:3]), lambda: rotary(narrow.view(4, 1, 5), narrow, narrow),
        lambda: rotary_backward(a.view(4, 1, 6), a, a, out=a),
    ):  # fmt: skip
        with pytest.raises(SettingError, match="has shape"):
            call()
    for out in (random(6, 4).t(), random(4, 12)[:, ::2]):
        with pytest.raises(SettingError, match="slice of the columns"):
            swiglu_forward(a, a, out=out)


# ------------------------------------------------------------------------------------------------- autograd, threads


@pytest.mark.usefixtures("path")
def test_nothing_is_recorded_without_gradients() -> None:
    x = random(3, 2, 4).requires_grad_()
    cos = random(3, 4)
    with torch.no_grad():
        assert not rotary(x, cos, cos).requires_grad
    plain = swiglu_forward(x, x), *swiglu_backward(x, x, x), rotary_forward(x, cos, cos), rotary_backward(x, cos, cos)
    assert not any(y.requires_grad for y in plain)


@ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
def one_of_the_threads(work: int, data: int, _threads: int, _flags: int) -> None:
    """A pool that gives fewer threads than it is asked for."""
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work)(data)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("pool", ["PyTorch's", "one of the threads", "none"])
def test_threads_share_the_rows_without_a_seam(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up, grad = (random(53, 31, seed=seed) for seed in range(3))
    alone = differentiate(swiglu, (gate, up), grad=grad)
    monkeypatch.setattr(policy, "ELEMENTS_PER_THREAD", 31)
    asked = []
    fork_join = {"PyTorch's": native_module.fork_join(), "one of the threads": one_of_the_threads, "none": None}[pool]
    monkeypatch.setattr(native_module, "fork_join", lambda: asked.append(1) or fork_join)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, differentiate(swiglu, (gate, up), grad=grad), alone))
    assert len(asked) == 6


@pytest.mark.usefixtures("native")
def test_a_library_cut_short_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "capotune"
    source = Path(native_module.__file__).with_name("elementwise_cpu.c")
    built = native_module._compiled(source)
    assert built.parent == folder
    built.write_bytes(b"")
    assert native_module._loaded(source).swiglu
    assert built.stat().st_size
