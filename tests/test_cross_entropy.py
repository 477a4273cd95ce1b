"""The chunked cross-entropy against its definition, in losses and gradients."""

from __future__ import annotations

import pytest
import torch

from capotune.kernels import cross_entropy
from capotune.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 5e-6}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("tokens", "hidden", "vocabulary"), [(1, 8, 3), (7, 16, 50), (33, 12, 129), (64, 64, 1)])
def test_it_is_the_definition(
    tokens: int, hidden: int, vocabulary: int, with_bias: bool, smoothing: float, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(cross_entropy, "_LOGITS_AT_ONCE", 5 * vocabulary)  # several chunks, the last one short
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
