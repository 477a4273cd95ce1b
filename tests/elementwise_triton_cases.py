"""What tests/test_triton.py runs in a process of its own, without the C kernels: norm, gated unit, rotary embedding and
cross-entropy by their public names, which take Triton's kernels here, on a GPU or interpreted on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from capotune.kernels import reference, triton_ops
from capotune.kernels.cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    softmax_cross_entropy,
)
from capotune.kernels.rms_norm import RmsNormPrologue, rms_norm_reference
from capotune.kernels.rotary import rotary_backward, rotary_forward, rotary_reference
from capotune.kernels.swiglu import swiglu_backward, swiglu_forward, swiglu_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = triton_ops.DTYPES
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
MORE = DEVICE.type == "cuda"  # the interpreter takes milliseconds for a program
SIZES = [(1, 1), (2, 577), (1, 2500), *([(70, 64), (5, 3), (300, 4096)] if MORE else [])]
"""Rows, columns: one program and several, whole tiles and others."""
HEADS = [(1, 1, 2), (3, 5, 6), (2, 3, 34), *([(500, 9, 64)] if MORE else [])]
"""Tokens, heads, numbers in a head."""
VOCABULARIES = [(1, 1), (2, 3), (2, 4097), *([(7, 4096), (300, 49152)] if MORE else [])]
"""Rows, tokens that are known."""


@pytest.fixture(autouse=True)
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that were called; a test in which none was has tested something else."""
    names: list[str] = []
    real = triton_ops._kernel

    def note(name: str) -> Any:
        names.append(name)
        return real(name)

    monkeypatch.setattr(triton_ops, "_kernel", note)
    yield names
    assert names


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(DEVICE, dtype)


def true(function: Callable[..., Tensor], leaves: tuple[Tensor, ...], *rest: Any, grad: Tensor) -> list[Tensor]:
    """The result and the gradients of ``leaves`` in fp64, by autograd."""
    leaves = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    y = function(*leaves, *(one.double() if isinstance(one, Tensor) else one for one in rest))
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.double())]


def assert_near(found: Tensor, truth: Tensor, size: Tensor, roundings: float) -> None:
    """Within so many roundings of numbers of ``size``: of the terms that were added, where they cancel."""
    assert found.shape == truth.shape
    excess = (found.double() - truth).abs() - roundings * ROUNDING[found.dtype] * size.double() - 1e-7
    assert not (excess > 0).any(), excess.max()  # and no NaN, which differs from everything
    assert found.isfinite().all()


def slices(rows: int, columns: int, count: int, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    """Matrices that lie side by side in a larger one."""
    whole = random(rows, count * columns + 1, dtype=dtype, scale=scale)
    return list(whole[:, 1:].split(columns, 1))


def exact_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition without its fp32."""
    return weight * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_norm(rows: int, columns: int, dtype: torch.dtype, called: list[str]) -> None:
    x, weight = random(rows, columns, dtype=dtype, scale=3), random(columns, dtype=dtype, seed=1)
    grad, norm = random(rows, columns, dtype=dtype, seed=2), RmsNormPrologue(1e-5, trains=True)
    y, kept = norm.forward(x, weight)
    (grad_x, grad_weight), again = norm.backward(grad.clone(), (x, weight, *kept), recompute=True)
    truth = true(exact_norm, (x,), weight, 1e-5, grad=grad)
    assert_near(y, truth[0], truth[0].abs(), 8)
    assert again is not None
    assert torch.equal(again, y)
    root = (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    weighted = (grad * weight.double()).abs()
    along = x.double().abs() * root**2 * (weighted * x.double().abs()).mean(-1, keepdim=True)
    assert_near(grad_x, truth[1], root * (weighted + along), 8)
    products = grad.double() * x.double() * root
    assert grad_weight is not None
    assert_near(grad_weight, products.sum(0), products.abs().sum(0), 8)
    torch.testing.assert_close(y, rms_norm_reference(x, weight, 1e-5), rtol=8 * ROUNDING[dtype], atol=0)
    assert called == ["rms_norm_kernel", "rms_norm_backward_kernel", "rms_norm_kernel"] or called == [
        "rms_norm_kernel", "rms_norm_kernel", "rms_norm_backward_kernel",
    ]  # fmt: skip


def test_a_norm_of_more_than_two_dimensions_and_one_too_wide(called: list[str]) -> None:
    x, weight = random(2, 3, 8), random(8, seed=1)
    y, (roots,) = RmsNormPrologue(1e-5).forward(x, weight)
    torch.testing.assert_close(y, rms_norm_reference(x, weight, 1e-5))
    assert roots.shape == (6,)
    wide, weight = random(1, triton_ops.WIDEST + 1), random(triton_ops.WIDEST + 1, seed=1)
    torch.testing.assert_close(RmsNormPrologue(1e-5).forward(wide, weight)[0], rms_norm_reference(wide, weight, 1e-5))
    assert called == ["rms_norm_kernel"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("sliced", [False, True])
def test_gated_unit(rows: int, columns: int, sliced: bool, dtype: torch.dtype) -> None:
    """In new memory, and over what was given."""
    gate, up, grad = (
        slices(rows, columns, 3, dtype, scale=4)
        if sliced
        else [random(rows, columns, dtype=dtype, seed=seed, scale=4) for seed in range(3)]
    )
    truth = true(swiglu_reference, (gate, up), grad=grad)
    s, x = gate.double().sigmoid(), gate.double()
    sizes = [(grad * up.double()).abs() * s * (1 + x.abs() * (1 - s)), truth[2].abs()]
    y, new = swiglu_forward(gate, up), swiglu_backward(grad, gate, up)
    over = swiglu_backward(grad, gate, up, out=(gate, up), y=grad)
    for found in (y, grad):
        assert_near(found, truth[0], truth[0].abs(), 7)
    for found in (new, over):
        for one, exact, size in zip(found, truth[1:], sizes, strict=True):
            assert_near(one, exact, size, 7)
    assert over[0] is gate


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "size"), HEADS)
@pytest.mark.parametrize("sliced", [False, True])
def test_rotary(tokens: int, heads: int, size: int, sliced: bool, dtype: torch.dtype) -> None:
    """In new memory, and over what was given; the way back is the transposed turn."""
    flat = slices(tokens, heads * size, 2, dtype)[1] if sliced else random(tokens, heads * size, dtype=dtype)
    x, grad = flat.view(tokens, heads, size), random(tokens, heads, size, dtype=dtype, seed=1)
    cos, sin = (random(tokens, size, dtype=dtype, seed=seed) for seed in (2, 3))
    truth = true(rotary_reference, (x,), cos, sin, grad=grad)
    half = size // 2
    swapped = (torch.cat((one[..., half:], one[..., :half]), -1).double().abs() for one in (x, grad))
    by_cos, by_sin = (one[:, None].double().abs() for one in (cos, sin))
    turned_sin = torch.cat((by_sin[..., half:], by_sin[..., :half]), -1)
    there, back = rotary_forward(x, cos, sin), rotary_backward(grad, cos, sin)
    assert_near(there, truth[0], x.double().abs() * by_cos + next(swapped) * by_sin, 3)
    assert_near(back, truth[1], grad.double().abs() * by_cos + next(swapped) * turned_sin, 3)
    assert rotary_forward(x, cos, sin, out=x) is x
    assert torch.equal(x, there)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocabulary"), VOCABULARIES)
def test_cross_entropy(rows: int, vocabulary: int, dtype: torch.dtype, smoothing: float) -> None:
    """Whole tiles and others, of a matrix's own rows and of those of a wider one."""
    logits = random(rows, vocabulary + 5, dtype=dtype, scale=5)[:, 5:]
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    truth = logits.double()
    expected = reference.softmax_cross_entropy(truth, targets, smoothing, True)  # truth is the gradient now
    alone = softmax_cross_entropy(logits, targets, smoothing, False)
    losses = softmax_cross_entropy(logits, targets, smoothing, True)
    assert torch.equal(alone, losses)
    torch.testing.assert_close(losses.double(), expected.double(), rtol=1e-5, atol=1e-5)
    assert_near(logits, truth, truth.abs() + 2.0**-20, 2 if dtype != torch.float32 else 100)


@pytest.mark.parametrize("target", [-1, 12])
def test_a_target_beyond_the_vocabulary_is_no_number(target: int) -> None:
    logits, targets = random(2, 12), torch.tensor([3, target], device=DEVICE)
    losses = triton_ops.softmax_cross_entropy(logits, targets, 0.0, True)
    assert losses.isnan().tolist() == [False, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_of_an_output_layer(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of a few rows; logits of 16 bits are never widened."""
    monkeypatch.setattr("capotune.kernels.policy.LOGITS_AT_ONCE", 300)
    hidden, weight = random(11, 16, dtype=dtype), random(90, 16, dtype=dtype, seed=1)
    targets = torch.arange(0, 88, 8, device=DEVICE)
    hidden.requires_grad_()
    losses = linear_cross_entropy(hidden, weight, None, targets, 0.1)
    (found,) = torch.autograd.grad(losses.sum(), hidden)
    plain = hidden.detach().double().requires_grad_()
    expected = linear_cross_entropy_reference(plain, weight.double(), None, targets, 0.1)
    (truth,) = torch.autograd.grad(expected.sum(), plain)
    torch.testing.assert_close(losses.double(), expected.double(), rtol=8 * ROUNDING[dtype], atol=8 * ROUNDING[dtype])
    assert float((found.double() - truth).abs().max() / truth.abs().max()) <= 8 * ROUNDING[dtype]
