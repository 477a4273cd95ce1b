"""Attention of short sequences on a CPU, in C: the definition's results, what it keeps, and where it is left alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_attention import assert_alike, drawn, out_and_gradients
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from capotune.kernels import attention as attention_module
from capotune.kernels import native as native_module
from capotune.kernels import policy
from capotune.kernels.attention import Sequences, packed_attention, packed_attention_reference

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 2e-6
"""Of the largest number, and of 1 at least: 70 terms of about 1, each rounded by 2^-24."""


@pytest.fixture(autouse=True)
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the C kernels that were called."""
    if native_module.library("products_cpu") is None:
        pytest.skip("no C compiler here")
    names: list[str] = []
    real = attention_module.over_rows

    def note(lib: object, kernel: str, *sizes: object, **arguments: object) -> None:
        names.append(kernel)
        real(lib, kernel, *sizes, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(attention_module, "over_rows", note)
    return names


BOTH_WAYS = ["short_attention", "short_attention_backward"]


def exact(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lengths: tuple[int, ...], **how: Any) -> list[Tensor]:
    """The definition in fp64: output and gradients."""

    def definition(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, *, causal: bool, scale: float) -> Tensor:
        outs, shared = [], q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        for one in zip(*(torch.split(x, list(sequences.lengths)) for x in (q, k, v)), strict=True):
            query, key, value = (x.transpose(0, 1) for x in one)
            scores = scale * query @ key.transpose(1, 2)
            if causal:
                scores = scores + torch.full(scores.shape[1:], -torch.inf).double().triu(1)
            outs.append((scores.softmax(-1) @ value).transpose(0, 1))
        return torch.cat(outs)

    return out_and_gradients(definition, q.double(), k.double(), v.double(), grad.double(), lengths, **how)


def slices(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same numbers as columns of one matrix, NaN between them."""
    width = [x.shape[1] * x.shape[2] for x in (q, k, v)]
    wide = torch.full((len(q), sum(width) + 12), torch.nan)
    found, at = [], 3
    for x, columns in zip((q, k, v), width, strict=True):
        part = wide[:, at : at + columns].view(x.shape)
        part.copy_(x)
        found.append(part)
        at += columns + 3
    return found[0], found[1], found[2]


# ------------------------------------------------------------------------------------------------------------- values


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.one_of(st.sampled_from([0, 1, 3, 4, 5, 7, 8, 9]), st.integers(0, 70)), min_size=1, max_size=6),
    size=st.sampled_from([8, 16, 24, 40, 64, 128]), key_heads=st.integers(1, 3), shared=st.integers(1, 4),
    causal=st.booleans(), scale=st.sampled_from([0.05, 0.3, 1.0]), strided=st.booleans(), seed=st.integers(0, 10_000),
)  # fmt: skip
def test_short_attention_matches_float64(
    called: list[str], lengths: list[int], size: int, key_heads: int, shared: int, causal: bool, scale: float,
    strided: bool, seed: int,
) -> None:  # fmt: skip
    called.clear()
    q, k, v, grad = drawn(tuple(lengths), (size, key_heads * shared, key_heads), seed=seed)
    how: dict[str, Any] = {"causal": causal, "scale": scale}
    given_ = slices(q, k, v) if strided else (q, k, v)
    found = out_and_gradients(packed_attention, *given_, grad, tuple(lengths), **how)
    assert called == BOTH_WAYS
    if sum(lengths):
        # the error of a softmax grows with its scores, which are up to some √size·scale·4
        assert_alike(found, exact(q, k, v, grad, tuple(lengths), **how), TOLERANCE * max(1, scale * size**0.5))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 2, 4, 7, 8, 9, 15, 16, 17])
def test_lengths_around_whole_vectors_match(length: int, causal: bool, called: list[str]) -> None:
    """Between others, whose numbers would show if they were read."""
    lengths = (3, length, 5)
    given_ = drawn(lengths, (16, 4, 2))
    how: dict[str, Any] = {"causal": causal, "scale": 0.25}
    assert_alike(
        out_and_gradients(packed_attention, *given_, lengths, **how), exact(*given_, lengths, **how), TOLERANCE
    )
    assert called == BOTH_WAYS


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("lengths", "kernels"), [((511,), BOTH_WAYS), ((3, 512), BOTH_WAYS), ((513, 2), [])])
def test_longest_sequences_match(lengths: tuple[int, ...], causal: bool, kernels: list[str], called: list[str]) -> None:
    """With the largest head, as much as there is room for; beyond, and only then, PyTorch's kernels."""
    given_ = drawn(lengths, (128, 2, 1))
    how: dict[str, Any] = {"causal": causal, "scale": 128**-0.5}
    found = out_and_gradients(packed_attention, *given_, lengths, **how)
    assert_alike(found, exact(*given_, lengths, **how), 2 * TOLERANCE)
    assert called == kernels


@pytest.mark.parametrize("shape", [(12, 4, 2), (7, 2, 2), (136, 2, 1)])
def test_other_head_sizes_are_left_to_pytorch(shape: tuple[int, int, int], called: list[str]) -> None:
    lengths = (5, 1, 12)
    given_ = drawn(lengths, shape)
    how: dict[str, Any] = {"causal": True, "scale": shape[0] ** -0.5}
    assert_alike(
        out_and_gradients(packed_attention, *given_, lengths, **how), exact(*given_, lengths, **how), TOLERANCE
    )
    assert called == []


def test_pytorchs_attention_gives_the_same(monkeypatch: pytest.MonkeyPatch, called: list[str]) -> None:
    """As on a machine without a compiler."""
    lengths = (9, 1, 30)
    given_ = drawn(lengths, (16, 4, 2))
    how: dict[str, Any] = {"causal": True, "scale": 0.25}
    found = out_and_gradients(packed_attention, *given_, lengths, **how)
    assert called == BOTH_WAYS
    monkeypatch.setattr(attention_module, "products", lambda *_: None)
    assert_alike(found, out_and_gradients(packed_attention, *given_, lengths, **how), TOLERANCE)
    assert called == BOTH_WAYS


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("window", "kernels"), [(1, []), (5, []), (11, []), (12, BOTH_WAYS), (100, BOTH_WAYS)])
def test_windows_are_left_to_pytorch_where_they_bind(
    window: int, causal: bool, kernels: list[str], called: list[str]
) -> None:
    """One that hides something is not for these kernels; one that hides nothing is."""
    lengths = (12, 3, 12)
    given_ = drawn(lengths, (16, 4, 2))
    how: dict[str, Any] = {"causal": causal, "scale": 0.25, "window": window}
    found = out_and_gradients(packed_attention, *given_, lengths, **how)
    assert_alike(found, out_and_gradients(packed_attention_reference, *given_, lengths, **how), TOLERANCE)
    assert called == kernels


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [1e4, 1e18])
def test_huge_scores_do_not_overflow(causal: bool, scale: float) -> None:
    """A softmax of numbers far beyond e^88 takes the largest alone."""
    lengths = (10, 13)
    q, k, v, grad = drawn(lengths, (8, 2, 1))
    found = out_and_gradients(packed_attention, q, k, v, grad, lengths, causal=causal, scale=scale)
    assert all(one.isfinite().all() for one in found)
    for start, length in ((0, 10), (10, 13)):
        scores = torch.einsum("ihc,jc->hij", q.double()[start:][:length], k.double()[start:][:length, 0])
        if causal:
            scores = scores + torch.full((length, length), -torch.inf).double().triu(1)
        best = v[start + scores.argmax(2), 0].transpose(0, 1)
        torch.testing.assert_close(found[0][start : start + length], best, rtol=0, atol=1e-6)


def test_vanishing_weights_are_zero() -> None:
    """Some 87 below the largest score a weight becomes 0, and from there on it stays so."""
    q, k, v, grad = drawn((30,), (8, 1, 1))
    q[:], k[:] = 1.0, -torch.linspace(0, 25, 30)[:, None, None]  # scores from 0 to -200
    how: dict[str, Any] = {"causal": False, "scale": 1.0}
    found = out_and_gradients(packed_attention, q, k, v, grad, (30,), **how)
    assert_alike(found, exact(q, k, v, grad, (30,), **how), TOLERANCE)
    q[:], k[:] = 1e10, -1e10 * torch.linspace(0, 25, 30)[:, None, None]
    found = out_and_gradients(packed_attention, q, k, v, grad, (30,), **how)
    assert torch.equal(found[0], v[:1].expand(30, 1, 8))
    assert not any(one.any() for one in found[1:3])


def test_equal_scores_take_the_mean() -> None:
    """Nothing is added to and nothing lost from weights that are all the same."""
    lengths = (7, 12)
    q, k, v, _ = drawn(lengths, (8, 2, 2))
    found = packed_attention(torch.zeros_like(q), k, v, Sequences(lengths), causal=False, scale=1.0)
    expected = torch.cat([part.mean(0, keepdim=True).expand(len(part), -1, -1) for part in v.split(list(lengths))])
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-7)


def test_a_sequence_sees_nothing_of_another() -> None:
    """To the bit, however the others change; also its gradients."""
    lengths = (6, 9, 6)
    q, k, v, grad = drawn(lengths, (16, 4, 2))
    how: dict[str, Any] = {"causal": False, "scale": 0.25}
    found = out_and_gradients(packed_attention, q, k, v, grad, lengths, **how)
    for one in (q, k, v, grad):
        one[:6] = 1e3
        one[15:] = -7.0
    others = out_and_gradients(packed_attention, q, k, v, grad, lengths, **how)
    assert all(torch.equal(one[6:15], other[6:15]) for one, other in zip(found, others, strict=True))
    assert not torch.equal(found[0], others[0])


def test_a_token_sees_nothing_after_it() -> None:
    """With causal attention, to the bit."""
    q, k, v, _ = drawn((23,), (16, 4, 2))
    before = packed_attention(q, k, v, Sequences((23,)), causal=True, scale=0.25)
    for one in (q, k, v):
        one[11:] += 5.0
    after = packed_attention(q, k, v, Sequences((23,)), causal=True, scale=0.25)
    assert torch.equal(before[:11], after[:11])
    assert not torch.equal(before[11:], after[11:])


# ------------------------------------------------------------------------------------------------- layout and threads


@pytest.mark.parametrize("causal", [True, False])
def test_other_layouts_match(causal: bool) -> None:
    """Slices of one matrix, heads first, and an expanded gradient: the bits of contiguous tensors."""
    lengths = (5, 1, 11)
    q, k, v, _ = drawn(lengths, (16, 4, 2))
    grad = torch.linspace(-1, 1, 16).expand(17, 4, 16)
    how: dict[str, Any] = {"causal": causal, "scale": 0.25}
    expected = out_and_gradients(packed_attention, q, k, v, grad.contiguous(), lengths, **how)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    numbers_first = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in (q, k, v)]
    for given_ in (slices(q, k, v), heads_first, numbers_first):
        assert not given_[0].is_contiguous()
        found = out_and_gradients(packed_attention, *given_, grad, lengths, **how)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(40,), (0, 3, 17, 1, 9), (1, 1)])
def test_threads_give_the_same_bits(lengths: tuple[int, ...], causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "ELEMENTS_PER_THREAD", 5)
    given_ = drawn(lengths, (16, 6, 3))
    found = []
    for threads in (1, 3, 4):
        torch.set_num_threads(threads)
        found.append(out_and_gradients(packed_attention, *given_, lengths, causal=causal, scale=0.25))
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


# ----------------------------------------------------------------------------------------------------------- autograd


def test_only_queries_keys_and_values_are_saved() -> None:
    """Where they lie: neither a copy nor the weights, which are as many as pairs of tokens."""
    q, k, v, grad = drawn((20, 9), (16, 4, 2))
    leaves = [x.requires_grad_() for x in slices(q, k, v)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        out = packed_attention(*leaves, Sequences((20, 9)), causal=True, scale=0.25)
    assert [one.data_ptr() for one in kept] == [x.data_ptr() for x in leaves]
    assert [one.shape for one in kept] == [x.shape for x in leaves]
    out.backward(grad)
    assert all(x.grad is not None for x in leaves)


@pytest.mark.parametrize("trained", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradient_of_one_input_alone_matches(trained: tuple[bool, ...]) -> None:
    lengths = (5, 9)
    q, k, v, grad = drawn(lengths, (16, 4, 2))
    at = trained.index(True)
    expected = out_and_gradients(packed_attention, q, k, v, grad, lengths, causal=True, scale=0.25)[1 + at]
    leaves = [x.requires_grad_(wanted) for x, wanted in zip((q, k, v), trained, strict=True)]
    packed_attention(*leaves, Sequences(lengths), causal=True, scale=0.25).backward(grad)
    assert torch.equal(leaves[at].grad, expected)  # type: ignore[arg-type]
    assert [x.grad is not None for x in leaves] == list(trained)


def test_checkpointed_gradients_match() -> None:
    """Computed again on the way back: the same bits, and twice the forward pass."""
    lengths = (5, 9)
    q, k, v, grad = drawn(lengths, (16, 4, 2))
    how: dict[str, Any] = {"causal": True, "scale": 0.25}
    expected = out_and_gradients(packed_attention, q, k, v, grad, lengths, **how)

    def again(*given_: Tensor, **how: Any) -> Tensor:
        return checkpoint(packed_attention, *given_[:3], given_[3], use_reentrant=False, **how)  # type: ignore[no-any-return]

    found = out_and_gradients(again, q, k, v, grad, lengths, **how)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_nothing_is_recorded_without_gradients() -> None:
    q, k, v, _ = drawn((6,), (8, 2, 2))
    with torch.no_grad():
        out = packed_attention(q.requires_grad_(), k, v, Sequences((6,)), causal=True, scale=0.3)
    assert not out.requires_grad


def test_inputs_are_not_changed() -> None:
    given_ = drawn((6, 11), (8, 4, 2))
    before = [one.clone() for one in given_]
    out_and_gradients(packed_attention, *given_, (6, 11), causal=True, scale=0.3)
    assert all(torch.equal(one, other) for one, other in zip(given_, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_left_to_pytorch(dtype: torch.dtype, called: list[str]) -> None:
    lengths = (6, 11)
    given_ = drawn(lengths, (8, 4, 2), dtype)
    found = out_and_gradients(packed_attention, *given_, lengths, causal=True, scale=0.3)
    assert_alike(found, exact(*given_, lengths, causal=True, scale=0.3), 2**-6 if dtype == torch.bfloat16 else 1e-12)
    assert called == []


def test_no_sequences_give_empty_output() -> None:
    q = torch.randn(0, 2, 8)
    assert packed_attention(q, q, q, Sequences(()), causal=True, scale=1.0).shape == (0, 2, 8)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_another_default_dtype_changes_nothing(default: torch.dtype) -> None:
    """What C writes to is of the dtype that C writes."""
    q = torch.randn(33, 2, 8, requires_grad=True)
    expected = packed_attention(q, q, q, Sequences((33,)), causal=True, scale=1.0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = packed_attention(q, q, q, Sequences((33,)), causal=True, scale=1.0)
        found.sum().backward()
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found, expected)
    assert q.grad is not None
    assert q.grad.isfinite().all()


def test_small_stack_is_enough() -> None:
    """Threads that a program starts itself may have 512 kB and less."""
    q = torch.randn(300, 2, 64, requires_grad=True)

    def there_and_back() -> None:
        packed_attention(q, q, q, Sequences((300,)), causal=True, scale=1.0).sum().backward()

    before = threading.stack_size(256 * 1024)
    try:
        thread = threading.Thread(target=there_and_back)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    assert q.grad is not None
