"""The chunked cross-entropy against its definition, in losses and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from capotune.errors import DataError, SettingError
from capotune.kernels import cross_entropy, policy, reference
from capotune.kernels import native as native_module
from capotune.kernels.cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    softmax_cross_entropy,
)
from capotune.kernels.execution import execution, lending

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 5e-6}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


@pytest.fixture(params=["native", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on the C kernel and again without it."""
    if request.param == "reference":
        monkeypatch.setattr(native_module, "library", lambda _: None)
    elif native_module.library("elementwise_cpu") is None:
        pytest.skip("no C compiler here")
    return request.param


def torch_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, smoothing: float) -> list[torch.Tensor]:
    """PyTorch's own losses and their gradients, in float64."""
    leaf = logits.double().requires_grad_()
    losses = functional.cross_entropy(leaf, targets, reduction="none", label_smoothing=smoothing)
    return [losses.detach(), *torch.autograd.grad(losses.sum(), leaf)]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("tokens", "hidden", "vocabulary"), [(1, 8, 3), (7, 16, 50), (33, 12, 129), (64, 64, 1)])
def test_it_is_the_definition(
    tokens: int, hidden: int, vocabulary: int, with_bias: bool, smoothing: float, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(policy, "LOGITS_AT_ONCE", 5 * vocabulary)  # several chunks, the last one short
    generator = torch.Generator().manual_seed(tokens)
    states = torch.randn(tokens, hidden, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, hidden, generator=generator).to(dtype)
    bias = torch.randn(vocabulary, generator=generator).to(dtype) if with_bias else None
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    upstream = torch.randn(tokens, generator=generator)
    found = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        leaf = states.clone().requires_grad_()
        losses = function(leaf, weight, bias, targets, smoothing)
        losses.backward(upstream)
        found.append((losses.detach(), leaf.grad))
    torch.testing.assert_close(found[0][0], found[1][0], **TOLERANCE[dtype])
    torch.testing.assert_close(found[0][1], found[1][1], **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_are_larger_in_lent_memory(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is the same from call to call, and gone afterwards; only where it is of this dtype."""
    monkeypatch.setattr(policy, "LOGITS_AT_ONCE", 3 * 50)
    monkeypatch.setattr(policy, "LOGITS_AT_ONCE_IN_LENT_MEMORY", 20 * 50)
    chunks: list[tuple[int, int]] = []
    real = cross_entropy.softmax_cross_entropy

    def note(logits: torch.Tensor, *more: Any) -> torch.Tensor:
        chunks.append((len(logits), logits.untyped_storage().data_ptr()))
        return real(logits, *more)

    monkeypatch.setattr(cross_entropy, "softmax_cross_entropy", note)
    weight, states = torch.randn(50, 8).to(dtype), torch.randn(30, 8).to(dtype).requires_grad_()
    targets, found = torch.arange(30), []

    def read(count: int) -> None:
        losses = linear_cross_entropy(states[:count], weight, None, targets[:count])
        found.append((losses.detach(), *torch.autograd.grad(losses.sum(), states)))

    read(30)
    small = [3] * 10
    assert [rows for rows, _ in chunks] == small
    chunks.clear()
    with lending():
        read(30)
        read(7)
        read(30)
    large = [20, 10, 7, 20, 10] if dtype == torch.float32 else [*small, 3, 3, 1, *small]
    assert [rows for rows, _ in chunks] == large
    if dtype == torch.float32:
        assert len({place for _, place in chunks}) == 1
    for one in (found[1], found[3]):
        for lent, alone in zip(one, found[0], strict=True):
            torch.testing.assert_close(lent, alone, **TOLERANCE[dtype])
    assert execution().memory is None


def test_nothing_is_kept_when_no_gradient_is_asked_for() -> None:
    states, weight, targets = torch.randn(6, 4), torch.randn(9, 4), torch.arange(6)
    losses = linear_cross_entropy(states, weight, None, targets)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, linear_cross_entropy_reference(states, weight, None, targets))


def test_the_whole_of_the_logits_is_never_made() -> None:
    """A chunk holds 2²³ numbers; all logits of this call would be 16 times that."""
    weight, states = torch.randn(2**17, 4), torch.randn(2**10, 4, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for one in result if isinstance(result, tuple | list) else [result]:
                if isinstance(one, torch.Tensor):
                    largest = max(largest, one.numel())
            return result

    with Watch():
        linear_cross_entropy(states, weight, None, torch.arange(2**10)).sum().backward()
    assert largest <= 2**23


# ------------------------------------------------------------------------------------------- one chunk of the logits


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (4, 3), (3, 17), (2, 577), (5, 5000), (0, 7)])
def test_a_chunks_losses_and_gradients(rows: int, vocabulary: int, smoothing: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(rows, vocabulary, generator=generator) * scale
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    truth = torch_cross_entropy(logits, targets, smoothing)
    given = logits.clone()
    losses = softmax_cross_entropy(logits, targets, smoothing, False)
    assert torch.equal(logits, given)
    torch.testing.assert_close(losses.double(), truth[0], rtol=1e-6, atol=1e-6 * max(1, scale))
    assert torch.equal(softmax_cross_entropy(logits, targets, smoothing, True), losses)
    torch.testing.assert_close(logits.double(), truth[1], rtol=0, atol=2e-7 * max(scale, 5))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_c_kernel_is_more_exact_than_what_it_replaced(smoothing: float) -> None:
    """Exponents of differences from the largest logit: nothing is lost to its size."""
    if native_module.library("elementwise_cpu") is None:
        pytest.skip("no C compiler here")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 4000, generator=generator) + 3000
    targets = torch.randint(4000, (8,), generator=generator)
    truth = torch_cross_entropy(logits, targets, smoothing)
    errors = []
    for function in (softmax_cross_entropy, reference.softmax_cross_entropy):
        changed = logits.clone()
        losses = function(changed, targets, smoothing, True)
        errors.append([float((losses - truth[0]).abs().max()), float((changed - truth[1]).abs().max())])
    assert errors[0][0] < 1e-6 < errors[1][0]
    assert errors[0][1] < 1e-7
    assert errors[0][1] <= errors[1][1]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_tokens_that_cannot_be(smoothing: float) -> None:
    """-infinity in place of a logit: no share of the softmax, an infinite loss where it is the target or smoothed."""
    inf = float("inf")
    logits = torch.tensor([[1.0, -inf, 2.0, -inf, 0.5], [-inf, 3.0, -inf, -inf, -inf], [0.0, 1.0, -inf, 2.0, 3.0]])
    targets = torch.tensor([2, 1, 2])
    truth = functional.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    softmax = logits.softmax(1) - smoothing / 5 - (1 - smoothing) * functional.one_hot(targets, 5)
    torch.testing.assert_close(softmax_cross_entropy(logits, targets, smoothing, True), truth)
    torch.testing.assert_close(logits, softmax)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "all -inf"])
@pytest.mark.parametrize("size", [3, 100])
def test_a_broken_row_has_no_finite_loss_and_breaks_no_other(bad: float | str, size: int, path: str) -> None:
    logits, targets = torch.randn(3, size, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    good = softmax_cross_entropy(logits, targets, 0.0, False)
    if isinstance(bad, str):
        logits[1] = -float("inf")
    else:
        logits[1, size - 1] = bad
    losses = softmax_cross_entropy(logits.clone(), targets, 0.0, True)
    assert not losses[1].isfinite()
    assert path == "reference" or losses[1].isnan()
    assert torch.equal(losses[[0, 2]], good[[0, 2]])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("wrong", [-100, -1, 9, 2**40])
def test_a_target_beyond_the_vocabulary_is_refused(wrong: int) -> None:
    """C would read and write outside of the logits."""
    targets = torch.tensor([0, wrong, 8])
    with pytest.raises(DataError, match="tokens 0 to 8"):
        linear_cross_entropy(torch.randn(3, 4), torch.randn(9, 4), None, targets)


def test_threads_share_a_chunk_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = torch.randn(29, 50), torch.randint(50, (29,))
    threads, found = torch.get_num_threads(), []
    monkeypatch.setattr(policy, "ELEMENTS_PER_THREAD", 50)
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            changed = logits.clone()
            found.append((softmax_cross_entropy(changed, targets, 0.1, True), changed))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.usefixtures("path")
def test_targets_in_any_layout() -> None:
    logits, targets = torch.randn(4, 9), torch.arange(8)[::2]
    expected = functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(softmax_cross_entropy(logits, targets, 0.0, False), expected)
    columns = logits.t().contiguous().t()
    torch.testing.assert_close(softmax_cross_entropy(columns, targets, 0.0, False), expected)


@pytest.mark.usefixtures("path")
def test_targets_of_any_whole_number_and_one_for_each_row() -> None:
    logits, targets = torch.randn(5, 7), torch.tensor([0, 6, 3, 3, 1])
    expected = softmax_cross_entropy(logits, targets, 0.0, False)
    assert torch.equal(softmax_cross_entropy(logits, targets.int(), 0.0, False), expected)
    for wrong in (targets[:3], targets.repeat(2)):
        with pytest.raises(SettingError, match="targets has shape"):
            softmax_cross_entropy(logits, wrong, 0.0, False)
