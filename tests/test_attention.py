"""Attention of sequences that stand one after the other: what it gives, its gradients, and what it must not see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from capotune.kernels.attention import Sequences, packed_attention, packed_attention_reference

SHAPES = [(8, 4, 4), (16, 4, 2), (33, 6, 2), (64, 8, 2), (33, 3, 1)]
"""(head_dim, heads, key-value heads): one to four heads share a key-value head."""
WINDOWS = [None, 1, 9, 100]
"""None, the token alone, within the longer sequences, beyond all."""
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
"""Of the largest number (of 1 at least: inputs are about 1). fp32: 70 terms summed in another order, each rounded by
2^-24. bf16: a rounding is up to 2^-9; probabilities, their gradients, each of up to four heads that share a key-value
head, and the sum are rounded once."""


def random_lengths(seed: int) -> tuple[int, ...]:
    """1 to 70, in no order, most of them distinct, some of them equal neighbours."""
    lengths = torch.randint(1, 71, (9,), generator=torch.Generator().manual_seed(seed)).tolist()
    return (*lengths, 5, 5, 5, 1, 1, lengths[-1], lengths[-1])


LENGTHS = {
    "one": (23,),
    "one token": (1,),
    "single tokens": (1, 1, 1, 1),
    "equal": (6,) * 5,
    "equal, not neighbours": (6, 3, 6, 3, 6),
    "rising": tuple(range(1, 13)),
    "random": random_lengths(1),
    "random and sorted": tuple(sorted(random_lengths(2))),
}


def drawn(
    lengths: tuple[int, ...],
    shape: tuple[int, int, int] = (8, 4, 2),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v, and the gradient of the output."""
    head_dim, heads, shared = shape
    generator = torch.Generator().manual_seed(seed)
    each = [torch.randn(sum(lengths), count, head_dim, generator=generator) for count in (heads, shared, shared, heads)]
    q, k, v, grad = (x.to(device, dtype) for x in each)
    return q, k, v, grad


Attention = Callable[..., torch.Tensor]


def out_and_gradients(
    attention: Attention, q: Any, k: Any, v: Any, grad: torch.Tensor, lengths: tuple[int, ...], **how: Any
) -> list[torch.Tensor]:
    """The output and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, Sequences(lengths), **how)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_alike(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for name, one, other in zip(["out", "q", "k", "v"], found, expected, strict=True):
        off = float((one.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(1))
        assert off <= tolerance, (name, off)


def by_hand(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple[int, ...],
    *,
    causal: bool,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Token by token and head by head, in fp64."""
    out, start, share = torch.zeros(q.shape, dtype=torch.float64), 0, q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    for length in lengths:
        for i in range(start, start + length):
            first, last = start, start + length
            if window is not None:
                first, last = max(first, i - window + 1), min(last, i + window)
            if causal:
                last = i + 1
            for head in range(q.shape[1]):
                weights = (scale * k[first:last, head // share] @ q[i, head]).softmax(0)
                out[i, head] = weights @ v[first:last, head // share]
        start += length
    return out


# ----------------------------------------------------------------------------------------------------- the definition


@pytest.mark.parametrize("attention", [packed_attention, packed_attention_reference])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 6, 7])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
def test_small_example_by_hand(attention: Attention, causal: bool, window: int | None, heads: tuple[int, int]) -> None:
    lengths = (5, 5, 1, 6, 7, 2)
    q, k, v, _ = drawn(lengths, (8, *heads))
    how: dict[str, Any] = {"causal": causal, "scale": 0.7, "window": window}
    found = attention(q, k, v, Sequences(lengths), **how)
    torch.testing.assert_close(found.double(), by_hand(q, k, v, lengths, **how), rtol=0, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_matches_reference(
    shape: tuple[int, int, int], causal: bool, window: int | None, dtype: torch.dtype, device: str
) -> None:
    lengths = random_lengths(sum(shape))
    given = drawn(lengths, shape, dtype, device)
    how: dict[str, Any] = {"causal": causal, "scale": shape[0] ** -0.5, "window": window}
    found, expected = (
        out_and_gradients(one, *given, lengths, **how) for one in (packed_attention, packed_attention_reference)
    )
    assert_alike(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_any_lengths_match_reference(lengths: tuple[int, ...], window: int | None, device: str) -> None:
    given = drawn(lengths, device=device)
    how: dict[str, Any] = {"causal": True, "scale": 0.4, "window": window}
    found, expected = (
        out_and_gradients(one, *given, lengths, **how) for one in (packed_attention, packed_attention_reference)
    )
    assert_alike(found, expected, 1e-5)


class Elsewhere(torch.Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_path_of_other_devices_matches(shape: tuple[int, int, int], causal: bool) -> None:
    lengths = random_lengths(7)
    q, k, v, grad = drawn(lengths, shape)
    how: dict[str, Any] = {"causal": causal, "scale": 0.3}
    there = [x.as_subclass(Elsewhere) for x in (q, k, v)]
    found = out_and_gradients(packed_attention, *there, grad, lengths, **how)
    assert_alike(found, out_and_gradients(packed_attention_reference, q, k, v, grad, lengths, **how), 1e-5)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_scale_is_applied(causal: bool, window: int | None) -> None:
    """Next to none takes the mean of what is seen."""
    lengths = (7, 3, 7)
    q, k, v, grad = drawn(lengths)
    how: dict[str, Any] = {"causal": causal, "window": window}
    for scale in (1e-6, 0.1, 1.0, 3.0):
        found, expected = (
            out_and_gradients(one, q, k, v, grad, lengths, scale=scale, **how)
            for one in (packed_attention, packed_attention_reference)
        )
        assert_alike(found, expected, 1e-5)
    mean = packed_attention(q, k, v, Sequences(lengths), scale=1e-6, **how)[6, 0]
    seen = slice(3, 7) if window else slice(0, 7)
    torch.testing.assert_close(mean, v[seen, 0].mean(0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_match_finite_differences(causal: bool, window: int | None) -> None:
    """Without a definition in between: fp64, against finite differences."""
    lengths = (3, 3, 1, 4)
    leaves = [x.double().requires_grad_() for x in drawn(lengths, (4, 2, 1))[:3]]

    def attention(*given: torch.Tensor) -> torch.Tensor:
        return packed_attention(*given, Sequences(lengths), causal=causal, scale=0.6, window=window)

    assert torch.autograd.gradcheck(attention, leaves)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("trained", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradient_of_one_input_alone_matches(trained: tuple[bool, ...], window: int | None) -> None:
    """LoRA on the values alone, say."""
    lengths = (5, 5, 9)
    q, k, v, grad = drawn(lengths)
    how: dict[str, Any] = {"causal": True, "scale": 0.5, "window": window}
    expected = out_and_gradients(packed_attention_reference, q, k, v, grad, lengths, **how)[1:]
    leaves = [x.clone().requires_grad_(on) for x, on in zip((q, k, v), trained, strict=True)]
    packed_attention(*leaves, Sequences(lengths), **how).backward(grad)
    for leaf, right in zip(leaves, expected, strict=True):
        assert (leaf.grad is None) == (not leaf.requires_grad)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, right, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------- each sequence to itself


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("changed", range(5))
def test_sequences_do_not_see_each_other(changed: int, causal: bool, window: int | None, device: str) -> None:
    """Whatever stands in one sequence, NaN too: the others' outputs and gradients keep their bits."""
    lengths = (6, 6, 6, 2, 11)
    given = drawn(lengths, device=device)
    how: dict[str, Any] = {"causal": causal, "scale": 0.5, "window": window}
    before = out_and_gradients(packed_attention, *given, lengths, **how)
    start = sum(lengths[:changed])
    own = slice(start, start + lengths[changed])
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[own] = False
    for filler in (100.0, torch.nan):
        spoilt = [x.clone() for x in given]
        for x in spoilt:
            x[own] = x[own] + filler
        after = out_and_gradients(packed_attention, *spoilt, lengths, **how)
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one[others], other[others])
        assert not torch.equal(before[0][own], after[0][own])


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_one_token_changes_its_own_sequence(causal: bool, window: int | None) -> None:
    """The tokens that see it, and no other: found from the outputs, not from a mask."""
    lengths = (9, 9, 9)
    q, k, v, _ = drawn(lengths)
    how: dict[str, Any] = {"causal": causal, "scale": 0.5, "window": window}
    before = packed_attention(q, k, v, Sequences(lengths), **how)
    token = 9 + 4
    k[token] += 1
    v[token] += 1
    moved = (packed_attention(q, k, v, Sequences(lengths), **how) != before).flatten(1).any(1).nonzero()[:, 0].tolist()
    reach = 9 if window is None else window
    first = token if causal else max(9, token - reach + 1)
    assert moved == list(range(first, min(18, token + reach)))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_no_gradient_where_nothing_depends(causal: bool, window: int | None) -> None:
    lengths = (6, 6, 2, 11)
    q, k, v, grad = drawn(lengths)
    grad[:6], grad[12:] = 0, 0
    found = out_and_gradients(packed_attention, q, k, v, grad, lengths, causal=causal, scale=0.5, window=window)
    for gradient in found[1:]:
        assert not gradient[:6].any()
        assert not gradient[12:].any()
        assert gradient[6:12].any()


@pytest.mark.parametrize("window", [None, 4])
def test_the_order_of_sequences_does_not_matter(window: int | None) -> None:
    lengths = (4, 9, 4, 4, 1)
    order = [3, 1, 4, 0, 2]
    given = drawn(lengths)
    moved = [torch.cat([torch.split(x, list(lengths))[at] for at in order]) for x in given]
    how: dict[str, Any] = {"causal": True, "scale": 0.5, "window": window}
    before = out_and_gradients(packed_attention, *given, lengths, **how)
    after = out_and_gradients(packed_attention, *moved, tuple(lengths[at] for at in order), **how)
    for one, other in zip(before, after, strict=True):
        parts = torch.split(one, list(lengths))
        torch.testing.assert_close(other, torch.cat([parts[at] for at in order]), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------- however it is stored


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_slices_of_one_matrix_match(dtype: torch.dtype, window: int | None, device: str) -> None:
    """q, k and v as one product gives them, side by side: nothing is copied, and the gradients meet in one matrix."""
    lengths, (head_dim, heads, shared) = random_lengths(3), (16, 4, 2)
    q, k, v, grad = drawn(lengths, (head_dim, heads, shared), dtype, device)
    whole = torch.cat([x.flatten(1) for x in (q, k, v)], 1).requires_grad_()
    parts = torch.split(whole, [heads * head_dim, shared * head_dim, shared * head_dim], 1)
    views = [part.unflatten(1, (-1, head_dim)) for part in parts]
    assert not any(view.is_contiguous() for view in views)
    how: dict[str, Any] = {"causal": True, "scale": 0.3, "window": window}
    out = packed_attention(*views, Sequences(lengths), **how)
    out.backward(grad)
    expected = out_and_gradients(packed_attention_reference, q, k, v, grad, lengths, **how)
    assert whole.grad is not None
    gradients = torch.split(whole.grad, [part.shape[1] for part in parts], 1)
    found = [out.detach(), *(gradient.unflatten(1, (-1, head_dim)) for gradient in gradients)]
    assert_alike(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(
    "order",
    [
        (1, 0, 2),  # heads first, as Transformers hands them over
        (0, 1, 2),
        (2, 0, 1),  # numbers of one head apart from each other
        (0, 2, 1),
    ],
)
def test_any_strides_match(order: tuple[int, int, int], window: int | None, device: str) -> None:
    lengths = random_lengths(4)
    given = drawn(lengths, device=device)
    back = tuple(order.index(at) for at in range(3))
    stored = [x.permute(order).contiguous().permute(back) for x in given]
    how: dict[str, Any] = {"causal": False, "scale": 0.3, "window": window}
    found = out_and_gradients(packed_attention, *stored, lengths, **how)
    assert_alike(found, out_and_gradients(packed_attention_reference, *given, lengths, **how), 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, 4])
def test_gradients_given_as_views_match(window: int | None, device: str) -> None:
    """As a sum, a mean over tokens, or a transposition hands them back."""
    lengths = (5, 5, 9)
    q, k, v, grad = drawn(lengths, device=device)
    how: dict[str, Any] = {"causal": True, "scale": 0.5, "window": window}
    for view in (
        torch.ones((), device=device).expand(grad.shape),
        grad[:1].expand(grad.shape),
        grad[:, :, :1].expand(grad.shape),
        grad.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    ):
        found = out_and_gradients(packed_attention, q, k, v, view, lengths, **how)
        expected = out_and_gradients(packed_attention_reference, q, k, v, view.contiguous(), lengths, **how)
        assert_alike(found, expected, 1e-5)


def test_inputs_are_not_changed() -> None:
    lengths = (5, 5, 9)
    given = drawn(lengths)
    before = [x.clone() for x in given]
    out_and_gradients(packed_attention, *given, lengths, causal=True, scale=0.5)
    assert all(torch.equal(one, other) for one, other in zip(given, before, strict=True))


# ------------------------------------------------------------------------------------------------------------ sequences


def test_sequences() -> None:
    sequences = Sequences((4, 4, 1, 4, 2, 2, 2))
    assert sequences.groups == ((2, 4), (1, 1), (1, 4), (3, 2))
    assert sequences.starts.tolist() == [0, 4, 8, 9, 13, 15, 17, 19]
    assert sequences.positions(0).tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 0, 1, 2, 3, 0, 1, 0, 1, 0, 1]
    assert sequences.positions(2).tolist() == [at + 2 for at in sequences.positions(0).tolist()]
    assert sequences.positions(0).dtype == sequences.starts.dtype == torch.int64


@pytest.mark.parametrize("lengths", [(0, 3), (3, 0), (0,), (2, 0, 0, 2)])
@pytest.mark.parametrize("window", [None, 2])
def test_a_sequence_without_tokens(lengths: tuple[int, ...], window: int | None) -> None:
    given = drawn(lengths)
    how: dict[str, Any] = {"causal": True, "scale": 0.5, "window": window}
    full = tuple(length for length in lengths if length)
    found = out_and_gradients(packed_attention, *given, lengths, **how)
    if full:
        assert_alike(found, out_and_gradients(packed_attention_reference, *given, full, **how), 1e-5)
