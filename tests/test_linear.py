"""The products of linear layers: against float64, with AMX and in PyTorch, and which does the work."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextvars import Context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import generation_helpers
import helpers
import pytest
import software_amx
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from capotune.errors import SettingError
from capotune.evaluation import forward
from capotune.kernels import linear, native_block, policy, prepacked
from capotune.kernels import native as native_module
from capotune.kernels.execution import reduced_precision
from capotune.kernels.linear import (
    LinearInput,
    amx_kernels,
    input_gradient,
    trained_linear,
    weight_gradient,
)
from capotune.kernels.prepacked import prepacked_amx_kernels
from capotune.methods.feature_extraction.settings import FeatureExtractionSettings
from capotune.methods.lora.settings import LoraSettings
from capotune.models import fusion
from capotune.settings import TrainingSettings

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDING = 2.0**-24
"""The largest relative error of one rounding to fp32."""
HALVES = 2.0**-17
"""The largest relative error of x = h + l. For x from 1 to 2, bf16 has steps of 2^-7: h is at most 2^-8 beside x, and
l at most 2^-17 beside what is left."""
SPLIT = 2 * HALVES * (1 + 2.0**-8) + 2.0**-16
"""That of a product: either factor's, times the other or its h, and l l', which is left out."""
ALL_WAYS = ["linear", "linear_input_gradient", "linear_weight_gradient"]
SIZES = [
    (1, 1, 1), (2, 3, 17), (15, 31, 16), (16, 32, 32), (17, 33, 33), (31, 63, 15), (32, 64, 64), (33, 65, 31),
    (34, 95, 127), (48, 255, 257), (49, 256, 256), (70, 257, 255), (64, 511, 513), (47, 512, 512), (65, 513, 511),
    (34, 577, 641), (513, 512, 512), (546, 530, 520), (1100, 500, 512), (8193, 33, 3),
    (20, 1024, 1025), (50, 1025, 1024), (20, 1365, 1366), (18, 1366, 1365), (20, 2048, 130), (33, 2049, 70),
    (18, 100, 2049), (20, 4096, 40), (17, 4097, 65), (33, 65, 4097), (5, 9000, 33), (9, 48, 9000),
]  # fmt: skip
"""Rows, into, out, with into and out each the length of a sum: below, at and beyond a tile of 16 x 32, a panel of 32
columns, four panels, the 256 terms multiplied at once, and the 4096 / 4, / 3, / 2 and / 1 terms for so many panels."""


class Problem(NamedTuple):
    """A layer, what goes in, and what comes back."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    grad: Tensor
    total: Tensor


@pytest.fixture(autouse=True)
def rounded() -> Iterator[None]:
    """Sixteen bits are enough in these tests; the one that they are not by themselves asks for a new context."""
    with reduced_precision():
        yield


@pytest.fixture(autouse=True)
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the C kernels that were called. Memory that they are to fill is NaN before."""
    names: list[str] = []
    real = linear._multiply

    def note(
        function: ctypes._NamedFuncPointer, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor,
        strips: Tensor | None,
        *, accumulate: bool, strips_ready: bool,
    ) -> None:  # fmt: skip
        assert y.dtype == torch.float32, "C writes fp32"
        assert y.stride(1) == 1 or y.shape[1] == 1, "C writes rows"
        if not accumulate:
            y.fill_(torch.nan)
        if not strips_ready and strips is not None:
            strips.fill_(torch.nan)
        names.append(function.__name__)
        real(function, x, weight, bias, y, strips, accumulate=accumulate, strips_ready=strips_ready)

    monkeypatch.setattr(linear, "_multiply", note)
    run = native_block.NativeBlock._run

    def note_block(*given: Any) -> None:
        names.append("a block")
        run(*given)

    monkeypatch.setattr(native_block.NativeBlock, "_run", note_block)
    return names


@pytest.fixture(scope="module")
def any_amx(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels for AMX; in software where there is none."""
    if found := amx_kernels():
        return found
    if reason := software_amx.why_not():
        pytest.skip(reason)
    return software_amx.compiled("products_amx", tmp_path_factory.mktemp("amx"))


@pytest.fixture(scope="module")
def any_prepacked_amx(any_amx: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels for frozen weights on the same."""
    if amx_kernels() and (found := prepacked_amx_kernels()):
        return found
    assert any_amx
    return software_amx.compiled("prepacked_amx", tmp_path_factory.mktemp("amx"))


@pytest.fixture
def unit(any_amx: ctypes.CDLL, any_prepacked_amx: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test where there is AMX."""
    real = prepacked.library
    monkeypatch.setattr(linear, "amx_kernels", lambda: any_amx)
    monkeypatch.setattr(prepacked, "library", lambda name: any_prepacked_amx if name == "prepacked_amx" else real(name))


@pytest.fixture
def native(unit: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001 - it is asked for, not used
    """Runs a test with AMX, also for few rows."""
    monkeypatch.setattr(policy, "REDUCED_PRECISION_ROWS", 1)


@pytest.fixture(params=["native", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with AMX and again without it."""
    if request.param == "native":
        request.getfixturevalue("native")
    else:
        monkeypatch.setattr(linear, "amx_kernels", lambda: None)
    return str(request.param)


@pytest.fixture
def forgetful() -> Iterator[None]:
    """What is known about this machine is found out anew, and again after the test."""
    caches = amx_kernels, prepacked._vectors_are_faster, native_module.library
    for one in caches:
        one.cache_clear()
    yield
    for one in caches:
        one.cache_clear()


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole(*shape: int, limit: int, seed: int = 0) -> Tensor:
    """Whole numbers from -limit to limit."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit + 1, shape, generator=generator).float()


def problem(rows: int, into: int, out: int, seed: int = 0) -> Problem:
    shapes = (rows, into), (out, into), (out,), (rows, out), (rows, into)
    return Problem(*(random(*shape, seed=seed + at) for at, shape in enumerate(shapes)))


def slice_of(x: Tensor, before: int = 3, after: int = 2) -> Tensor:
    """The same numbers as rows and columns of a larger matrix, whose others are NaN."""
    larger = torch.full((1 + x.shape[0] + 2, before + x.shape[1] + after), torch.nan)
    part = larger[1 : 1 + x.shape[0], before : before + x.shape[1]]
    part.copy_(x)
    return part


def assert_near(found: Tensor, truth: Tensor, size: Tensor, terms: int, path: str) -> None:
    """Within the roundings of a sum of so many terms, some taken together, and what splitting its numbers loses; their
    sizes add up to ``size``."""
    assert found.shape == truth.shape
    assert found.dtype == torch.float32
    # of 32 terms the unit adds up two halves of 16, and then both to the sum, for each of the three products
    loss = SPLIT + (24 + terms / 8) * ROUNDING if path == "native" else (12 + terms / 8) * ROUNDING
    excess = (found.double() - truth).abs() - loss * size
    assert not (excess > 0).any(), excess.max()
    assert found.isfinite().all()


def check(
    given_: Problem, path: str, *, with_bias: bool = True, accumulate: bool = True, entered: Tensor | None = None
) -> None:
    """All products against fp64; ``entered``: what stands for x where the weight's gradient is taken."""
    x, weight, bias, grad, total = given_
    x64, weight64, bias64, grad64, total64 = (one.double() for one in given_)
    truth, size = x64 @ weight64.t(), x64.abs() @ weight64.abs().t()
    if with_bias:
        truth, size = truth + bias64, size + bias64.abs()
    assert_near(LinearInput(x).linear(weight, bias if with_bias else None), truth, size, x.shape[1], path)
    truth, size = grad64 @ weight64, grad64.abs() @ weight64.abs()
    if accumulate:
        truth, size = truth + total64, size + total64.abs()
    found = input_gradient(grad, weight, total if accumulate else None)
    assert (found is total) == accumulate
    assert_near(found, truth, size, grad.shape[1], path)
    entered = x if entered is None else entered
    truth, size = grad64.t() @ entered.double(), grad64.t().abs() @ entered.double().abs()
    assert_near(weight_gradient(grad, entered), truth, size, len(x), path)


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("more", [True, False])
@pytest.mark.parametrize(("rows", "into", "out"), SIZES)
def test_products_match_float64(rows: int, into: int, out: int, more: bool, path: str, called: list[str]) -> None:
    """On the matrix unit where that is asked for; otherwise the tests of the C path would test PyTorch."""
    check(problem(rows, into, out), path, with_bias=more, accumulate=more)
    assert list(dict.fromkeys(called)) == (ALL_WAYS if path == "native" else [])


few = st.integers(0, 70)
terms = st.one_of(few, st.sampled_from([255, 256, 257, 300, 511, 512, 513, 545, 700]))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.one_of(few, st.sampled_from([300, 480, 511, 512, 513, 545, 640])), into=terms, out=terms,
    seed=st.integers(0, 10_000), with_bias=st.booleans(), accumulate=st.booleans(),
    strided=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
)  # fmt: skip
def test_products_of_any_size_match_float64(
    path: str, called: list[str], rows: int, into: int, out: int, seed: int, with_bias: bool, accumulate: bool,
    strided: tuple[bool, ...],
) -> None:  # fmt: skip
    """Each matrix may be a part of a larger one, as a layer's columns of what several layers share."""
    called.clear()
    x, weight, bias, grad, total = problem(rows, into, out, seed)
    matrices = zip((x, weight, grad, total), strided, strict=True)
    x, weight, grad, total = (slice_of(one) if inside else one for one, inside in matrices)
    check(Problem(x, weight, bias, grad, total), path, with_bias=with_bias, accumulate=accumulate)
    assert list(dict.fromkeys(called)) == (ALL_WAYS if path == "native" and rows and into and out else [])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("fine_x", "fine_weight"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize(("rows", "into", "out"), SIZES)
def test_values_of_16_bits_are_exact(rows: int, into: int, out: int, fine_x: bool, fine_weight: bool) -> None:
    """If those of the other factor have 8, and sums fit 24: so nothing but l l' is left out, at any place."""
    fine = min(2**16 - 1, 2**22 // max(rows, into, out))
    x, grad = (whole(rows, columns, limit=fine if fine_x else 2, seed=columns) for columns in (into, out))
    other = whole(rows, into, limit=fine if fine_weight else 2, seed=5)
    weight = whole(out, into, limit=fine if fine_weight else 2, seed=2)
    bias, total = whole(out, limit=2**20, seed=3), whole(rows, into, limit=2**20, seed=4)
    expected = x.double() @ weight.double().t(), grad.double() @ weight.double()
    assert torch.equal(LinearInput(x).linear(weight).double(), expected[0])
    assert torch.equal(LinearInput(x).linear(weight, bias).double(), expected[0] + bias)
    assert torch.equal(input_gradient(grad, weight).double(), expected[1])
    assert torch.equal(input_gradient(grad, weight, total.clone()).double(), expected[1] + total)
    assert torch.equal(weight_gradient(grad, other).double(), grad.double().t() @ other.double())


@pytest.mark.parametrize("trains", ["all", "weight", "bias", "x"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_trained_linear_matches_pytorch(trains: str, with_bias: bool, path: str, called: list[str]) -> None:
    """Its output and gradients against PyTorch's in fp64; what needs no gradient gets none, and costs nothing."""
    x, weight, bias, grad, _ = problem(66, 35, 50)
    tensors = {"x": x.view(2, 33, 35), "weight": weight, "bias": bias if with_bias else None}
    found, truth = ({}, {})
    for one, dtype in ((found, torch.float32), (truth, torch.float64)):
        layer = {
            name: None if tensor is None else tensor.detach().to(dtype).requires_grad_(trains in ("all", name))
            for name, tensor in tensors.items()
        }
        if all(tensor is None or not tensor.requires_grad for tensor in layer.values()):
            return
        one["y"] = (trained_linear if one is found else functional.linear)(layer["x"], layer["weight"], layer["bias"])
        one["y"].backward(grad.view(2, 33, 50).to(dtype))
        one |= {name: None if tensor is None else tensor.grad for name, tensor in layer.items()}
    sizes = {
        "y": (x.abs() @ weight.t().abs() + bias.abs(), 35), "x": (grad.abs() @ weight.abs(), 50),
        "weight": (grad.t().abs() @ x.abs(), 66), "bias": (grad.abs().sum(0), 66),
    }  # fmt: skip
    for name, (size, terms) in sizes.items():
        if truth[name] is None:
            assert found[name] is None
        else:
            assert_near(found[name], truth[name], size.view(truth[name].shape).double(), terms, path)
    asked = {
        "linear": True,
        "linear_input_gradient": trains in ("all", "x"),
        "linear_weight_gradient": trains in ("all", "weight"),
    }
    assert called == ([name for name, needed in asked.items() if needed] if path == "native" else [])


@pytest.mark.usefixtures("path")
def test_product_with_one_keeps_16_bits() -> None:
    """Either factor: numbers from one of bf16 to the next, in small steps, and some at random."""
    x = torch.cat([1 + torch.arange(2**15) * 2.0**-22, random(2**15)]).view(1024, 64)  # a step of bf16 is 2^-7
    one = torch.eye(64)
    found = (
        LinearInput(x).linear(one),
        LinearInput(one).linear(x).t(),
        input_gradient(x, one),
        input_gradient(one, x.t().contiguous()).t(),
    )
    for each in found:
        assert not ((each.double() - x).abs() > HALVES * x.double().abs()).any()


SCALES = [
    (1e-30, 1.0),
    (1e30, 1.0),
    (1e-30, 1e30),
    (1e30, 1e-30),
    (1.0, 1e-30),
    (1.0, 1e30),
    (1e-15, 1e-15),
    (1e18, 1e18),
]


@pytest.mark.parametrize(("scale", "weight_scale"), SCALES)
@pytest.mark.parametrize("size", [(50, 60, 70), (33, 520, 1)])
def test_small_and_large_values_match(size: tuple[int, int, int], scale: float, weight_scale: float, path: str) -> None:
    """As accurate as those about 1."""
    x, weight, bias, grad, total = problem(*size)
    product = scale * weight_scale
    scaled = Problem(x * scale, weight * weight_scale, bias * product, grad * scale, total * product)
    check(scaled, path, entered=x * weight_scale)


@pytest.mark.usefixtures("path")
def test_small_rows_beside_large_ones_match() -> None:
    """A row twice as large has a result twice as large, to the bit."""
    x, weight, _, grad, _ = problem(40, 70, 45)
    factors = torch.exp2(torch.linspace(-60, 90, 40).round())[:, None]
    assert torch.equal(LinearInput(x * factors).linear(weight), LinearInput(x).linear(weight) * factors)
    assert torch.equal(input_gradient(grad * factors, weight), input_gradient(grad, weight) * factors)


@pytest.mark.usefixtures("path")
def test_zeros_give_zeros() -> None:
    """Nothing comes of nothing, and what is added stays as it is."""
    x, weight, bias, grad, total = problem(40, 70, 45)
    x[7:30], grad[7:30] = 0, 0
    before = total.clone()
    assert torch.equal(LinearInput(x).linear(weight)[7:30], torch.zeros(23, 45))
    assert torch.equal(LinearInput(x).linear(weight, bias)[7:30], bias.expand(23, 45))
    assert torch.equal(input_gradient(grad, weight)[7:30], torch.zeros(23, 70))
    assert torch.equal(input_gradient(grad, weight, total)[7:30], before[7:30])
    assert torch.equal(LinearInput(x).linear(torch.zeros_like(weight), bias), bias.expand(40, 45))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("at", [(0, 0), (20, 33), (36, 44), (36, 3)])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, "all bits", "all bits but the sign"])
def test_what_is_not_finite_stays_in_its_row(value: float | str, at: tuple[int, int]) -> None:
    """A NaN of all bits would be rounded up to zero. In the weight it is in a row and a column."""
    given_ = problem(37, 45, 45)
    x, weight, bias, grad, total = given_
    expected = (
        LinearInput(x).linear(weight, bias),
        input_gradient(grad, weight),
        input_gradient(grad, weight, total.clone()),
    )
    spoilt = [one.clone() for one in (x, weight, grad)]
    for one in spoilt:
        if isinstance(value, str):
            one.view(torch.int32)[at] = -1 if value == "all bits" else 2**31 - 1
        else:
            one[at] = value
    x, other_weight, grad = spoilt
    found = (
        LinearInput(x).linear(weight, bias),
        input_gradient(grad, weight),
        input_gradient(grad, weight, total.clone()),
    )
    for one, other in zip(found, expected, strict=True):
        assert not one[at[0]].isfinite().any()
        assert torch.equal(one[: at[0]], other[: at[0]])
        assert torch.equal(one[at[0] + 1 :], other[at[0] + 1 :])
    products = LinearInput(given_.x).linear(other_weight, bias), input_gradient(given_.grad, other_weight)
    for one, other, column in zip(products, expected, at, strict=False):
        assert not one[:, column].isfinite().any()
        assert torch.equal(one[:, :column], other[:, :column])
        assert torch.equal(one[:, column + 1 :], other[:, column + 1 :])


# --------------------------------------------------------------------------------------------- what depends on what


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("size", [(70, 40, 65), (550, 540, 520)])
def test_a_row_depends_on_no_other(size: tuple[int, int, int]) -> None:
    """Nor a column, to the bit: neither on their numbers nor on how many they are."""
    x, weight, bias, grad, total = problem(*size)
    rows = LinearInput(x).linear(weight, bias)
    gradients = input_gradient(grad, weight, total.clone())
    for first, last in ((0, 1), (0, 16), (3, 36), (17, 65), (size[0] - 1, size[0]), (5, size[0])):
        part = slice(first, last)
        assert torch.equal(LinearInput(x[part]).linear(weight, bias), rows[part])
        assert torch.equal(input_gradient(grad[part], weight, total[part].clone()), gradients[part])
        part = slice(first, min(last, size[1], size[2]))
        assert torch.equal(LinearInput(x).linear(weight[part], bias[part]), rows[:, part])
        assert torch.equal(input_gradient(grad, weight[:, part], total[:, part].clone()), gradients[:, part])
    x[:20], grad[:20] = 7.0, -3.0
    assert torch.equal(LinearInput(x).linear(weight, bias)[20:], rows[20:])
    assert torch.equal(input_gradient(grad, weight, total)[20:], gradients[20:])


@pytest.mark.parametrize("size", [(70, 40, 65), (530, 540, 50)])
def test_input_of_several_layers_is_reused(size: tuple[int, int, int], path: str, called: list[str]) -> None:
    """Each with the bits that it has alone, also after one that AMX does not take."""
    x, weight, bias, _, _ = problem(*size)
    weights = [weight.t().contiguous().t(), weight, weight[:17] * 3, weight, random(100, size[1], seed=9)]
    biases = [None, bias, None, None, None]
    rows = LinearInput(x)
    found = [rows.linear(*one) for one in zip(weights, biases, strict=True)]
    assert called == (4 * ["linear"] if path == "native" else [])
    for one, *layer in zip(found, weights, biases, strict=True):
        assert torch.equal(one, LinearInput(x).linear(*layer))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [(70, 40, 65), (530, 540, 50)])
def test_strips_of_an_input_are_made_once(size: tuple[int, int, int], threads: int) -> None:
    """The first layer reads them, and no other."""
    torch.set_num_threads(threads)
    x, weight, bias, _, _ = problem(*size)
    expected = LinearInput(x).linear(weight, bias), LinearInput(x).linear(weight[:20])
    rows = LinearInput(x)
    assert torch.equal(rows.linear(weight, bias), expected[0])
    x.fill_(torch.nan)
    assert torch.equal(rows.linear(weight, bias), expected[0])
    assert torch.equal(rows.linear(weight[:20]), expected[1])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("size", [(45, 40, 65), (520, 530, 515)])
def test_what_is_read_stays_as_it_was(size: tuple[int, int, int]) -> None:
    given_ = problem(*size)
    before = [one.clone() for one in given_]
    LinearInput(given_.x).linear(given_.weight, given_.bias)
    input_gradient(given_.grad, given_.weight)
    assert all(torch.equal(one, other) for one, other in zip(given_, before, strict=True))
    input_gradient(given_.grad, given_.weight, given_.total)
    assert all(torch.equal(one, other) for one, other in zip(given_[:4], before, strict=False))


# -------------------------------------------------------------------------------------------------------------- layout


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("size", [(1, 1, 1), (47, 45, 65), (49, 96, 17), (515, 513, 530)])
def test_accumulating_into_a_slice_leaves_its_neighbours(size: tuple[int, int, int]) -> None:
    """They are NaN before and after."""
    _, weight, _, grad, total = problem(*size)
    part = slice_of(total)
    larger = part._base
    assert larger is not None
    assert input_gradient(grad, weight, part) is part
    assert torch.equal(part, input_gradient(grad, weight, total))
    assert int(larger.isnan().sum()) == larger.numel() - part.numel()


@pytest.mark.parametrize("size", [(0, 9, 5), (60, 0, 5), (1, 1, 1), (47, 45, 65), (49, 96, 17), (515, 513, 530)])
def test_output_goes_into_a_given_matrix(size: tuple[int, int, int], path: str, called: list[str]) -> None:
    """As for the rows of a last chunk in the room of a whole one. What was in it counts for nothing."""
    x, weight, bias, _, _ = problem(*size)
    truth, terms = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
    for more in (None, bias):
        room = torch.full((size[0] + 5, size[2]), torch.nan)
        out = room[2 : 2 + size[0]]
        assert LinearInput(x).linear(weight, more, out=out) is out
        added = torch.zeros(()) if more is None else more
        assert_near(out, truth + added.double(), terms + added.double().abs(), size[1], path)
        assert room[:2].isnan().all()
        assert room[2 + size[0] :].isnan().all()
    assert called == (["linear"] * 2 if path == "native" and x.numel() else [])


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("size", [(1, 1, 1), (47, 45, 65), (49, 96, 17), (515, 513, 530)])
def test_nothing_is_written_beyond_a_new_matrix(size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """C gets one with NaN around it, and with it the room for strips."""
    x, weight, bias, grad, _ = problem(*size)
    expected = LinearInput(x).linear(weight, bias), input_gradient(grad, weight), weight_gradient(grad, x)
    surrounded: list[tuple[Tensor, int, Tensor]] = []
    real = linear._multiply

    def move(function: object, x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, strips: Tensor, **how: bool) -> None:
        part, room = slice_of(y), torch.full((strips.numel() + 64,), torch.nan)
        real(function, x, weight, bias, part, room[32:-32].view(strips.shape), **how)  # type: ignore[arg-type]
        assert room[:32].isnan().all()
        assert room[-32:].isnan().all()
        assert part._base is not None
        surrounded.append((part._base, y.numel(), part))

    monkeypatch.setattr(linear, "_multiply", move)
    LinearInput(x).linear(weight, bias)
    input_gradient(grad, weight)
    weight_gradient(grad, x)
    for (larger, numbers, part), other in zip(surrounded, expected, strict=True):
        assert torch.equal(part, other)
        assert int(larger.isnan().sum()) == larger.numel() - numbers


def before_a_wall(x: Tensor) -> Tensor:
    """The same numbers, the last of them at the end of a page, the next of which nobody may read."""
    size = x.numel() * x.element_size()
    end = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, end + mmap.PAGESIZE)
    wall = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(pages)) + end)
    assert ctypes.CDLL(None).mprotect(wall, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return torch.frombuffer(pages, dtype=x.dtype, count=x.numel(), offset=end - size).view(x.shape).copy_(x)


def exit_status(work: Callable[[], object]) -> int:
    """Of a process of its own, which may crash."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python from 3.12, about threads: this test needs none
        import resource  # not on every system that has no AMX

    child = os.fork()
    if child == 0:
        status = 1
        try:
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("size", [(1, 1, 1), (5, 3, 17), (48, 64, 32), (47, 45, 65), (49, 97, 18), (51, 300, 127)])
def test_nothing_is_read_beyond_the_end(size: tuple[int, int, int]) -> None:
    """Of any matrix: not even what would count for nothing."""
    x, weight, bias, grad, total = (before_a_wall(one) for one in problem(*size))
    out = before_a_wall(grad)

    def work() -> None:
        LinearInput(x).linear(weight, bias, out=out)
        input_gradient(grad, weight, total)
        weight_gradient(grad, x)

    assert exit_status(work) == 0
    assert exit_status(lambda: ctypes.string_at(out.data_ptr(), out.numel() * 4 + 1)) == -signal.SIGSEGV  # of the wall


def test_broadcast_row_is_multiplied(path: str, called: list[str]) -> None:
    """Expanded, it lies in memory once."""
    x, weight, bias, grad, _ = problem(50, 40, 65)
    x, grad, weights = x[:1].expand(50, 40), grad[:1].expand(50, 65), weight[:1].expand(65, 40)
    for one in (weight, weights):
        assert torch.equal(LinearInput(x).linear(one, bias), LinearInput(x.contiguous()).linear(one.contiguous(), bias))
        assert torch.equal(input_gradient(grad, one), input_gradient(grad.contiguous(), one.contiguous()))
    assert called == (([ALL_WAYS[0]] * 2 + [ALL_WAYS[1]] * 2) * 2 if path == "native" else [])


def transposed(x: Tensor) -> Tensor:
    """The same numbers, those of a column side by side."""
    return x.t().contiguous().t()


@pytest.mark.usefixtures("native")
def test_other_layouts_are_left_to_pytorch(called: list[str]) -> None:
    x, weight, bias, grad, total = problem(50, 40, 65)
    check(Problem(transposed(x), weight, bias, transposed(grad), total), "reference")
    check(Problem(x, transposed(weight), bias, grad, total), "reference", entered=transposed(x))
    check(Problem(x[:, ::2], weight[:, ::2], bias, grad[:, :1].expand(50, 65), total[:, ::2]), "reference")
    spread = torch.stack([bias, bias], 1)[:, 0]
    assert torch.equal(LinearInput(x).linear(weight, spread), torch.nn.functional.linear(x, weight, bias))
    turned = transposed(total)
    expected = total.addmm(grad, weight)
    assert input_gradient(grad, weight, turned) is turned
    torch.testing.assert_close(turned, expected, rtol=0, atol=65 * 2**-21)
    assert called == []


# ------------------------------------------------------------------------------------------------- who does the work


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("more", [-10, -1, 0, 1])
def test_few_rows_are_left_to_pytorch(more: int, called: list[str]) -> None:
    """Below the fewest that are worth it."""
    check(problem(policy.REDUCED_PRECISION_ROWS + more, 64, 64), "native" if more >= 0 else "reference")
    assert called == (ALL_WAYS if more >= 0 else [])


@pytest.mark.parametrize("size", [(0, 9, 5), (60, 0, 5), (60, 9, 0), (0, 0, 0)])
def test_empty_matrices_are_left_to_pytorch(size: tuple[int, int, int], path: str, called: list[str]) -> None:
    """Sums of nothing are zero, and what is added is there."""
    rows, into, out = size
    x, weight, bias, grad, total = problem(*size)
    before = total.clone()
    assert torch.equal(LinearInput(x).linear(weight), torch.zeros(rows, out))
    assert torch.equal(input_gradient(grad, weight), torch.zeros(rows, into))
    check(Problem(x, weight, bias, grad, total), path)
    assert torch.equal(total, before)
    assert called == []


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_left_to_pytorch(dtype: torch.dtype, called: list[str]) -> None:
    x, weight, bias, grad, total = (one.to(dtype) for one in problem(50, 64, 65))
    expected = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(LinearInput(x).linear(weight, bias), expected)
    found = LinearInput(x).linear(weight, bias, out=torch.full((50, 65), torch.nan, dtype=dtype))
    tolerance = {torch.bfloat16: 2**-6, torch.float64: 1e-14}[dtype]  # it is rounded before the bias, and after
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    assert torch.equal(input_gradient(grad, weight), grad @ weight)
    expected = total.addmm(grad, weight)
    assert torch.equal(input_gradient(grad, weight, total), expected)
    assert torch.equal(total, expected)
    assert called == []


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_mixed_dtypes_are_refused(dtype: torch.dtype, called: list[str]) -> None:
    """By PyTorch; C would read or write beyond their ends."""
    x, weight, bias, grad, total = problem(50, 64, 65)
    for one in (
        lambda: LinearInput(x).linear(weight.to(dtype), bias),
        lambda: LinearInput(x.to(dtype)).linear(weight, bias),
        lambda: LinearInput(x).linear(weight, bias.to(dtype)),
        lambda: input_gradient(grad, weight.to(dtype)),
        lambda: input_gradient(grad.to(dtype), weight),
        lambda: input_gradient(grad, weight, total.to(dtype)),
    ):
        with pytest.raises(RuntimeError, match=r"dtype|same type"):
            one()
    assert called == []


@pytest.mark.usefixtures("native")
def test_other_devices_are_left_to_pytorch(called: list[str]) -> None:
    x, weight, bias, grad, total = (one.to("meta") for one in problem(50, 64, 65))
    assert LinearInput(x).linear(weight, bias).is_meta
    assert input_gradient(grad, weight).is_meta
    assert input_gradient(grad, weight, total) is total
    assert called == []


@pytest.mark.usefixtures("forgetful")
def test_without_c_pytorch_multiplies(monkeypatch: pytest.MonkeyPatch, called: list[str]) -> None:
    monkeypatch.setenv("CAPOTUNE_NATIVE", "0")
    assert amx_kernels() is None
    check(problem(60, 40, 65), "reference")
    assert called == []


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("level", ["plain", "avx2", "avx512"])
def test_below_level_amx_pytorch_multiplies(level: str, monkeypatch: pytest.MonkeyPatch, called: list[str]) -> None:
    """Nothing is compiled that would not run."""
    asked: list[str] = []
    monkeypatch.setattr(linear, "cpu_level", lambda: level)
    monkeypatch.setattr(linear, "library", asked.append)
    assert amx_kernels() is None
    assert asked == []
    check(problem(60, 40, 65), "reference")
    assert called == []


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("lib", [None, SimpleNamespace(ask_for_amx=lambda: 0)])
def test_where_amx_cannot_be_used_pytorch_multiplies(
    lib: object, monkeypatch: pytest.MonkeyPatch, called: list[str]
) -> None:
    """No compiler that knows it, or a system that does not let the process use it."""
    monkeypatch.setattr(linear, "cpu_level", lambda: "amx")
    monkeypatch.setattr(linear, "library", lambda _: lib)
    assert amx_kernels() is None
    check(problem(60, 40, 65), "reference")
    assert called == []


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(default: torch.dtype) -> None:
    """What C writes to is of the dtype that C writes."""
    x, weight, bias, grad, _ = problem(50, 40, 65)
    expected = LinearInput(x).linear(weight, bias), input_gradient(grad, weight)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = LinearInput(x).linear(weight, bias), input_gradient(grad, weight)
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# ------------------------------------------------------------------------------------------------------------ threads


def results(given_: Problem) -> list[Tensor]:
    """All products, and one added."""
    x, weight, bias, grad, total = given_
    output, gradient = LinearInput(x).linear(weight, bias), input_gradient(grad, weight)
    return [output, gradient, input_gradient(grad, weight, total.clone()), weight_gradient(grad, x)]


FOR_THREADS = [(1, 9, 3), (16, 32, 32), (70, 300, 129), (250, 600, 545), (640, 257, 40), (911, 530, 65)]
"""Too small for two, for whom there are more columns than rows, and the other way round."""


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("size", FOR_THREADS)
def test_threads_share_the_work_out(size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: each number is one thread's. Also where PyTorch's threads are none that C can use."""
    given_ = problem(*size)
    expected = results(given_)
    for threads in (2, 3, 4, 7):
        torch.set_num_threads(threads)
        assert all(torch.equal(one, other) for one, other in zip(results(given_), expected, strict=True))
    monkeypatch.setattr(linear, "_pool", lambda: (ctypes.c_void_p(), ctypes.c_void_p()))
    assert all(torch.equal(one, other) for one, other in zip(results(given_), expected, strict=True))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("size", FOR_THREADS[2:])
def test_shares_can_be_done_in_any_order(size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each alone, also from rows that are ready. One thread shares nothing, and more get no more work than there is."""
    given_ = problem(*size)
    expected = results(given_)
    stage = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    shared: list[tuple[int, int]] = []

    def backwards(_: int, kernel: int, arguments: int, items: int, threads: int) -> None:
        shared.append((items, threads))
        for item in reversed(range(items)):
            stage(kernel)(arguments, item, item + 1)

    sharer = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 2)(backwards)
    monkeypatch.setattr(linear, "_pool", lambda: (ctypes.cast(sharer, ctypes.c_void_p), ctypes.c_void_p()))
    assert all(torch.equal(one, other) for one, other in zip(results(given_), expected, strict=True))
    assert shared == []
    for threads in (2, 4, 7):
        torch.set_num_threads(threads)
        assert all(torch.equal(one, other) for one, other in zip(results(given_), expected, strict=True))
        rows = LinearInput(given_.x)
        for _ in range(2):
            assert torch.equal(rows.linear(given_.weight, given_.bias), expected[0])
        assert len(shared) >= 5
        assert all(items > 1 and 1 < by <= threads for items, by in shared)
        shared.clear()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(("rows", "into", "out"), [(9, 48, 9000), (33, 65, 4097), (70, 40, 1537), (300, 33, 6145)])
def test_threads_share_a_vocabulary_out(rows: int, into: int, out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each adds up outputs of its own: the numbers are small and whole, so that their sums are exact in any order.
    Also where the last thread's share is shorter, and where ``total`` has gaps between its rows."""
    weight, grad = whole(out, into, limit=15, seed=1), whole(rows, out, limit=15, seed=2)
    wide = whole(rows, into + 3, limit=2**16, seed=3)
    expected = grad.double() @ weight.double()
    shared: list[tuple[int, int]] = []
    stage = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)

    def backwards(_: int, kernel: int, arguments: int, items: int, threads: int) -> None:
        shared.append((items, threads))
        for item in reversed(range(items)):
            stage(kernel)(arguments, item, item + 1)

    sharer = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 2)(backwards)
    pools = [linear._pool(), (ctypes.cast(sharer, ctypes.c_void_p), ctypes.c_void_p())]
    for pool in pools:
        monkeypatch.setattr(linear, "_pool", lambda pool=pool: pool)
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(input_gradient(grad, weight).double(), expected)
            total = wide.clone()
            input_gradient(grad, weight, total[:, :into])
            assert torch.equal(total[:, :into].double(), expected + wide[:, :into])
            assert torch.equal(total[:, into:], wide[:, into:])
    parts = -(-out // 1536)
    for threads in (2, 3, 7):
        assert ((threads, threads) in shared) == (parts >= threads)  # more threads share each part of the outputs out
    torch.set_num_threads(64)  # of that many outputs the last one has none
    given_ = whole(3, 64 * 1537, limit=15, seed=4), whole(64 * 1537, 8, limit=15, seed=5)
    assert torch.equal(input_gradient(*given_).double(), given_[0].double() @ given_[1].double())
    assert (64, 64) in shared


@pytest.mark.usefixtures("native")
def test_the_work_is_shared_where_it_can_be() -> None:
    """PyTorch's pool is there wherever PyTorch came with GNU OpenMP."""
    known = native_module.library("elementwise_cpu") is not None and native_module.fork_join() is not None
    assert [bool(one.value) for one in linear._pool()] == [known, known]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("threads", [1, 3])
def test_small_stack_is_enough(threads: int) -> None:
    """Threads that a program starts itself may have 512 kB and less. Linux gives the unit to all that ever start."""
    given_ = problem(530, 600, 70)
    expected, found = results(given_), []

    def work() -> None:
        torch.set_num_threads(threads)
        with reduced_precision():
            found.extend(results(given_))

    before = threading.stack_size(256 * 1024)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.usefixtures("native")
def test_all_bits_count_outside_of_reduced_precision(called: list[str]) -> None:
    """Nor in a thread that was started by one who did, nor after an error."""
    found: list[list[Tensor]] = []

    def fails() -> None:
        with reduced_precision():
            raise KeyError

    def work() -> None:
        with pytest.raises(KeyError):
            fails()
        found.append(results(given_))

    given_ = problem(70, 60, 50)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert called == []
    assert len(found) == 1
    results(given_)
    assert called == [ALL_WAYS[0], ALL_WAYS[1], *ALL_WAYS[1:]]


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.usefixtures("path")
def test_shapes_that_do_not_fit_are_refused(called: list[str]) -> None:
    """C would read beyond their ends."""
    x, weight, bias, grad, total = problem(50, 10, 4)
    with pytest.raises(SettingError, match=r"weight has shape \(4, 9\).*must be \(4, 10\)"):
        LinearInput(x).linear(weight[:, :9], bias)
    with pytest.raises(SettingError, match=r"weight has shape \(4, 10\).*must be \(4, 9\)"):
        LinearInput(x[:, :9]).linear(weight, bias)
    with pytest.raises(SettingError, match=r"out has shape \(49, 4\).*must be \(50, 4\)"):
        LinearInput(x).linear(weight, bias, out=torch.empty(49, 4))
    with pytest.raises(SettingError, match=r"out has shape \(50, 5\).*must be \(50, 4\)"):
        LinearInput(x).linear(weight, bias, out=torch.empty(50, 5))
    with pytest.raises(SettingError, match=r"weight has shape \(3, 10\).*must be \(4, 10\)"):
        input_gradient(grad, weight[:3])
    with pytest.raises(SettingError, match=r"weight has shape \(4, 10\).*must be \(3, 10\)"):
        input_gradient(grad[:, :3], weight, total)
    with pytest.raises(SettingError, match=r"accumulate_into has shape \(49, 10\).*must be \(50, 10\)"):
        input_gradient(grad, weight, total[:49])
    with pytest.raises(SettingError, match=r"grad has shape \(49, 4\).*must be \(50, 4\)"):
        weight_gradient(grad[:49], x)
    with pytest.raises(SettingError, match=r"accumulate_into has shape \(50, 9\).*must be \(50, 10\)"):
        input_gradient(grad, weight, total[:, :9])
    assert called == []


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("shape", [(3,), (5,), (1,), (1, 4), (50, 4)])
def test_bias_that_does_not_fit_is_refused(shape: tuple[int, ...], called: list[str]) -> None:
    """Nor is one number added to all columns, which PyTorch would do."""
    x, weight, _, _, _ = problem(50, 10, 4)
    with pytest.raises(SettingError, match=r"bias has shape .*must be \(4,\)"):
        LinearInput(x).linear(weight, random(*shape))
    assert called == []


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.usefixtures("native")
def test_blocks_of_large_models_are_composed(bert: Path, called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With AMX too, and nearly the same losses."""
    runs = []
    for small in (True, False):
        monkeypatch.setattr(fusion, "may_prepack", lambda _weights, small=small: small)
        called.clear()
        method = LoraSettings(rank=4, target_modules=("all-linear",), epochs=1, batch_size=16)
        assembled = helpers.on_base(bert, method)
        examples = {"train_examples": helpers.examples(assembled, 48), "held_examples": helpers.examples(assembled, 8)}
        _, losses = Context().run(helpers.fit, assembled, **examples)
        assert ("a block" in called) == small
        assert ("linear_input_gradient" in called) == (not small)
        runs.append(losses)
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    "method",
    [
        LoraSettings(rank=4, target_modules=("all-linear",), learning_rate=1e-3, epochs=2, batch_size=16),
        FeatureExtractionSettings(trainable_layers=1, learning_rate=1e-3, epochs=2, batch_size=16),
    ],
    ids=lambda method: method.method,
)
@pytest.mark.parametrize("base", ["bert", "llama"])
def test_training_in_reduced_precision_matches_fp32(
    base: str,
    method: TrainingSettings,
    bert: Path,
    llama_writer: Path,
    called: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nearly the same losses step by step; what is scored before, between and after has all bits."""
    scored: list[int] = []
    outputs = forward.outputs

    def note(*given: Any) -> Tensor:
        before = len(called)
        found = outputs(*given)
        scored.append(len(called) - before)
        return found

    monkeypatch.setattr(forward, "outputs", note)
    runs = []
    for unit in (True, False):
        with monkeypatch.context() as patch:
            if not unit:
                patch.setattr(linear, "amx_kernels", lambda: None)
            called.clear()
            made = helpers if base == "bert" else generation_helpers
            assembled = made.on_base(bert if base == "bert" else llama_writer, method)
            data = {
                "train_examples": made.examples(assembled, 48),
                "held_examples": made.examples(assembled, 16, seed=1),
            }
            state, losses = Context().run(helpers.fit, assembled, **data)
            runs.append((losses, state.best_score))
            assert bool(called) == unit
            assert ("linear_weight_gradient" in called) == (unit and method.method == "feature-extraction")
    assert scored == [0] * 6  # at the start and after each epoch, twice
    (near, near_score), (exact, exact_score) = runs
    assert near == pytest.approx(exact, rel=1e-4)
    assert near_score == pytest.approx(exact_score, rel=1e-4)
