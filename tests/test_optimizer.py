"""The optimiser to which all weights of a rate are one tensor: PyTorch's AdamW and clipping, and whose memory it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from capotune.engine.optimizer import FlatAdamW, set_learning_rate

SHAPES = {"a": (8, 5), "b": (1,), "c": (3, 4, 2), "d": (7, 8)}
RATES = {"a": 1e-2, "b": 5e-2, "c": 1e-2, "d": 5e-2}
DECAY, MOST_NORM = 0.1, 0.5
FINITE = torch.tensor(1.0)


def weights() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {key: nn.Parameter(torch.randn(shape, generator=generator)) for key, shape in SHAPES.items()}


def give_gradients(to: dict[str, nn.Parameter], step: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step + 1)
    for weight in to.values():
        weight.grad = torch.randn(weight.shape, generator=generator) * size


def pytorchs(of: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    """The same, each weight for itself."""
    return torch.optim.AdamW([{"params": [of[key]], "lr": RATES[key]} for key in of], weight_decay=DECAY, fused=True)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_it_is_adamw_with_clipping(size: float) -> None:
    """Gradients below the norm, around it and far above; a learning rate that falls."""
    found, expected = weights(), weights()
    plain = pytorchs(expected)
    with FlatAdamW(found, RATES, DECAY) as optimizer:
        for step in range(6):
            factor = 1 - step / 6
            set_learning_rate(optimizer, factor)
            for group, rate in zip(plain.param_groups, RATES.values(), strict=True):
                group["lr"] = rate * factor
            give_gradients(found, step, size)
            give_gradients(expected, step, size)
            optimizer.step(MOST_NORM, FINITE)
            nn.utils.clip_grad_norm_(expected.values(), MOST_NORM)
            plain.step()
            assert all(weight.grad is None for weight in found.values())
    for key in SHAPES:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)


def test_no_gradient_counts_as_one_of_zero() -> None:
    found, expected = weights(), weights()
    plain = pytorchs(expected)
    with FlatAdamW(found, RATES, DECAY) as optimizer:
        for step in range(3):
            give_gradients(found, step)
            give_gradients(expected, step)
            found["c"].grad, expected["c"].grad = None, torch.zeros(SHAPES["c"])
            optimizer.step(1e9, FINITE)
            plain.step()
    for key in SHAPES:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)


def test_moments_go_on_to_the_same_bits() -> None:
    """Stopped after any step, its state taken out and put into another one."""

    def trained(stops: set[int]) -> dict[str, torch.Tensor]:
        own, moments = weights(), {}
        first = 0
        for last in sorted({*stops, 5}):
            with FlatAdamW(own, RATES, DECAY) as optimizer:
                optimizer.set_moments(moments)
                for step in range(first, last):
                    give_gradients(own, step)
                    optimizer.step(MOST_NORM, FINITE)
                moments = optimizer.moments()
            first = last
        assert {key: one["exp_avg"].shape for key, one in moments.items()} == {key: w.shape for key, w in own.items()}
        assert {float(one["step"]) for one in moments.values()} == {5.0}
        return {key: weight.detach() for key, weight in own.items()}

    whole = trained(set())
    for stops in ({1}, {0, 3}, {1, 2, 3, 4}):
        assert all(torch.equal(whole[key], weight) for key, weight in trained(stops).items())


def test_moments_before_the_first_step_are_none_and_later_ones_are_copies() -> None:
    own = weights()
    with FlatAdamW(own, RATES, DECAY) as optimizer:
        assert optimizer.moments() == {key: {} for key in SHAPES}
        optimizer.set_moments(optimizer.moments())
        give_gradients(own, 0)
        optimizer.step(MOST_NORM, FINITE)
        kept = optimizer.moments()
        before = kept["a"]["exp_avg"].clone()
        give_gradients(own, 1)
        optimizer.step(MOST_NORM, FINITE)
        assert torch.equal(kept["a"]["exp_avg"], before)
        assert float(kept["a"]["step"]) == 1


def test_weights_have_memory_of_their_own_afterwards(tmp_path: Path) -> None:
    """Also when it ends by an error; what shares memory could not be saved."""
    own = weights()
    before = {key: weight.detach().clone() for key, weight in own.items()}
    optimizer = FlatAdamW(own, RATES, DECAY)
    with torch.no_grad():
        own["a"].add_(1)  # what they are when it begins counts, and not when it was made
    with optimizer:
        assert own["a"].untyped_storage().data_ptr() == own["c"].untyped_storage().data_ptr()
        assert torch.equal(own["a"], before["a"] + 1)
    assert len({weight.untyped_storage().data_ptr() for weight in own.values()}) == len(SHAPES)
    with pytest.raises(KeyboardInterrupt), optimizer:
        raise KeyboardInterrupt
    assert len({weight.untyped_storage().data_ptr() for weight in own.values()}) == len(SHAPES)
    save_file({key: weight.detach() for key, weight in own.items()}, tmp_path / "weights.safetensors")
    assert torch.equal(load_file(tmp_path / "weights.safetensors")["c"], before["c"])
