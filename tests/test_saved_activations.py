"""What is kept for the way back in 16 bits: against its definition, and what gradients and memory are with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import generation_helpers
import helpers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from capotune.kernels import policy, saved_activations
from capotune.kernels.native import library
from capotune.kernels.saved_activations import (
    dequantize_rows,
    quantize_rows,
    quantize_rows_reference,
    quantized_saved_activations,
)
from capotune.methods.lora.settings import LoraSettings

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(library("elementwise_cpu") is None, reason="no C compiler here"),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def put_away(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what was kept in 16 bits, also of small tensors."""
    shapes: list[tuple[int, ...]] = []
    real = saved_activations.quantize_rows

    def note(x: Tensor) -> saved_activations.QuantizedRows:
        shapes.append(tuple(x.shape))
        return real(x)

    monkeypatch.setattr(saved_activations, "quantize_rows", note)
    monkeypatch.setattr(policy, "QUANTIZE_SAVED_FROM_ELEMENTS", 1)
    return shapes


@given(
    shape=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    scale=st.sampled_from([1e-25, 1e-3, 1.0, 1e4, 1e30]),
    turned=st.booleans(),
    threads=st.integers(1, 2),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_quantized_rows_match_reference(shape: list[int], scale: float, turned: bool, threads: int, seed: int) -> None:
    """To the bit, and off by at most half a step of the row's largest number."""
    torch.set_num_threads(threads)
    x = normal(*shape, seed=seed) * scale
    x = x.transpose(0, -1) if turned else x
    found = dequantize_rows(quantize_rows(x))
    assert torch.equal(found, quantize_rows_reference(x))
    assert found.is_contiguous()
    assert ((found - x).abs() <= 2.0**-16 * (1 + 2.0**-6) * x.abs().amax(-1, keepdim=True)).all()


def test_quantized_rows_take_half_the_memory() -> None:
    x = normal(512, 1536)
    quantized = quantize_rows(x)
    assert quantized.values.nbytes + quantized.scales.nbytes < 0.501 * x.nbytes


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_rows_become_nan(bad: float) -> None:
    x = normal(5, 40)
    x[1, 7], x[3] = bad, 1e-35
    found = dequantize_rows(quantize_rows(x))
    assert found[1].isnan().all()
    assert (found[3] == 0).all()
    torch.testing.assert_close(found[[0, 2, 4]], x[[0, 2, 4]], rtol=0, atol=1e-4)
    assert torch.equal(found.nan_to_num(9), quantize_rows_reference(x).nan_to_num(9))


def test_outputs_are_equal_and_gradients_near(put_away: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)  # for the layer's first weights
    layer, x = nn.Linear(64, 96), normal(50, 64).requires_grad_()

    def read() -> list[Tensor]:
        y = torch.nn.functional.silu(layer(x * 2)).transpose(0, 1).softmax(-1)
        return [y, *torch.autograd.grad(y, [x, *layer.parameters()], normal(96, 50, seed=1))]

    expected = read()
    with quantized_saved_activations():
        found = read()
    assert torch.equal(found[0], expected[0])
    for one, other in zip(found[1:], expected[1:], strict=True):
        # a softmax's gradient is a difference of larger numbers, so that more than 2⁻¹⁶ is lost
        assert 0 < float((one - other).norm()) < 3e-4 * float(other.norm())
    assert (50, 64) in put_away
    assert not {(96, 64), (64, 96)} & set(put_away)  # PyTorch keeps the weight turned


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_saved_as_they_are(dtype: torch.dtype, put_away: list[tuple[int, ...]]) -> None:
    x = normal(50, 64).to(dtype).requires_grad_()
    with quantized_saved_activations():
        y = (x * x).sin()
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], 2 * x * (x * x).cos())
    assert put_away == []


def test_without_c_activations_are_saved_as_they_are(
    put_away: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_activations, "elementwise", lambda *_: None)
    x = normal(50, 64).requires_grad_()
    with quantized_saved_activations():
        y = x.square()
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], 2 * x)
    assert put_away == []


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("base", ["bert", "llama"])
def test_training_with_quantized_activations_matches(
    base: str, checkpointed: bool, bert: Path, llama_writer: Path, put_away: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch, all_bits: None,  # noqa: ARG001 - it is asked for, not used
) -> None:  # fmt: skip
    """The first loss is the same, those after it nearly so, and the weights that are trained on rounded activations
    differ a little."""
    made: Any = helpers if base == "bert" else generation_helpers
    runs, ends = [], []
    for many in (1, 10**9):
        monkeypatch.setattr(policy, "QUANTIZE_SAVED_FROM_TOKENS", many)
        put_away.clear()
        method = LoraSettings(
            rank=4, target_modules=("all-linear",), learning_rate=1e-3, epochs=2, batch_size=16,
            gradient_checkpointing=checkpointed,
        )  # fmt: skip
        assembled = made.on_base(bert if base == "bert" else llama_writer, method)
        examples = {"train_examples": made.examples(assembled, 48), "held_examples": made.examples(assembled, 8)}
        _, losses = helpers.fit(assembled, **examples, on_epoch=lambda state, *_: ends.append(state.weights))
        assert bool(put_away) == (many == 1)
        runs.append((losses, torch.cat([weight.flatten() for weight in ends[-1].values()])))
    (losses, weights), (exact_losses, exact_weights) = runs
    assert losses[0] == exact_losses[0]
    assert losses == pytest.approx(exact_losses, rel=1e-4)
    # so little that the losses of six steps may well be equal to the last bit
    assert 0 < float((weights - exact_weights).norm()) < 1e-2 * float(exact_weights.norm())
