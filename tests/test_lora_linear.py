"""The fast LoRA linear against its definition in plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from capotune.kernels.lora_linear import LinearLayer, few_rows, lora_linear, lora_linear_of_few, lora_reference
from capotune.kernels.nf4 import Linear4bit, quantize_4bit

SHAPES = [((7, 5), 9, 3), ((1, 8), 8, 1), ((2, 3, 17), 5, 4), ((1, 1, 1), 1, 1), ((33,), 31, 8), ((2, 1, 3, 6), 10, 6)]
"""Shape of x, outputs, rank."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12}


def problem(
    shape: tuple[int, ...], out: int, rank: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Values of order one; A and B in the dtype that trains (fp32, or fp64 with fp64)."""
    generator = torch.Generator().manual_seed(seed)
    trained = torch.promote_types(dtype, torch.float32)
    into = shape[-1]
    made = {
        "x": torch.randn(shape, generator=generator).to(dtype),
        "weight": (torch.randn(out, into, generator=generator) / into**0.5).to(dtype),
        "bias": torch.randn(out, generator=generator).to(dtype),
        "a": (torch.randn(rank, into, generator=generator) / into**0.5).to(trained),
        "b": torch.randn(out, rank, generator=generator).to(trained),
        "grad": torch.randn(*shape[:-1], out, generator=generator).to(dtype),
    }
    for name in ("x", "a", "b"):
        made[name].requires_grad_(True)
    return made


def results(function: object, p: dict[str, torch.Tensor], *, bias: bool = True) -> dict[str, torch.Tensor]:
    """Output and gradients."""
    wanted = {name: p[name] for name in ("x", "a", "b") if p[name].requires_grad}
    y = function(p["x"], p["weight"].to, p["bias"] if bias else None, p["a"], p["b"], 1.7)  # type: ignore[operator]
    grads = torch.autograd.grad(y, list(wanted.values()), p["grad"])
    return {"y": y.detach()} | dict(zip(wanted, grads, strict=True))


def assert_close(fast: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], tolerance: float) -> None:
    """Relative to the largest value, which rounding goes by."""
    assert fast.keys() == plain.keys()
    for name in plain:
        assert fast[name].dtype == plain[name].dtype, name
        assert fast[name].shape == plain[name].shape, name
        largest = plain[name].abs().max().item()
        torch.testing.assert_close(fast[name], plain[name], rtol=0, atol=tolerance * max(largest, 1e-3), msg=name)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("shape", "out", "rank"), SHAPES)
def test_lora_linear_matches_reference(
    shape: tuple[int, ...], out: int, rank: int, dtype: torch.dtype, bias: bool
) -> None:
    p = problem(shape, out, rank, dtype)
    assert_close(results(lora_linear, p, bias=bias), results(lora_reference, p, bias=bias), TOLERANCE[dtype])


@pytest.mark.parametrize("seed", range(12))
def test_lora_linear_of_any_size_matches_reference(seed: int) -> None:
    sizes = torch.randint(1, 70, (4,), generator=torch.Generator().manual_seed(seed)).tolist()
    p = problem((sizes[0], sizes[1]), sizes[2], min(sizes[1:]), seed=seed)
    assert_close(results(lora_linear, p), results(lora_reference, p), 1e-5)


def test_gradients_match_finite_differences() -> None:
    p = problem((3, 2, 5), 4, 2, torch.float64)
    inputs = (p["x"], p["a"], p["b"])
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, p["weight"].to, p["bias"], a, b, 0.6), inputs)


def test_frozen_input_asks_for_no_gradient_and_no_weight() -> None:
    """Below the lowest adapted layer nothing is computed: W is asked for once, in the forward pass."""
    p = problem((6, 9), 7, 3)
    p["x"].requires_grad_(False)
    asked: list[torch.dtype] = []

    def weight(dtype: torch.dtype) -> torch.Tensor:
        asked.append(dtype)
        return p["weight"].to(dtype)

    y = lora_linear(p["x"], weight, None, p["a"], p["b"], 1.7)
    y.backward(p["grad"])
    assert asked == [torch.float32]
    assert p["x"].grad is None
    plain = results(lora_reference, p, bias=False)
    assert_close({"y": y.detach(), "a": p["a"].grad, "b": p["b"].grad}, plain, 1e-5)


def test_nothing_is_recorded_without_gradients() -> None:
    p = problem((6, 9), 7, 3)
    with torch.no_grad():
        y = lora_linear(p["x"], p["weight"].to, p["bias"], p["a"], p["b"], 1.7)
    assert not y.requires_grad
    torch.testing.assert_close(y, lora_reference(p["x"], p["weight"].to, p["bias"], p["a"], p["b"], 1.7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "out", "rank"), SHAPES)
def test_few_rows_without_gradients_match_reference(
    shape: tuple[int, ...], out: int, rank: int, dtype: torch.dtype
) -> None:
    p = problem(shape, out, rank, dtype)
    assert not few_rows(p["x"])
    with torch.no_grad():
        assert few_rows(p["x"])
        assert not few_rows(p["x"].expand(65, *shape))
        for bias in (p["bias"], None):
            found = lora_linear_of_few(p["x"], LinearLayer(p["weight"].to, bias, p["a"], p["b"], 1.7))
            expected = lora_reference(p["x"], p["weight"].to, bias, p["a"], p["b"], 1.7)
            assert_close({"y": found}, {"y": expected}, TOLERANCE[dtype])


def test_strided_tensors_match() -> None:
    """x and the gradient as views, as attention heads and Conv1D's transposed weight give them."""
    p = problem((4, 6, 10), 8, 3)
    p["x"] = p["x"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(True)
    p["weight"] = p["weight"].t().contiguous().t()
    p["grad"] = p["grad"].new_ones(1).expand(4, 6, 8)
    assert not p["x"].is_contiguous()
    assert_close(results(lora_linear, p), results(lora_reference, p), 1e-5)


def test_no_rows_give_empty_outputs() -> None:
    p = problem((0, 5), 4, 2)
    found = results(lora_linear, p)
    assert found["y"].shape == (0, 4)
    assert not found["a"].any()
    assert not found["b"].any()


def test_inputs_are_not_changed() -> None:
    p = problem((5, 6), 4, 2)
    before = {name: tensor.detach().clone() for name, tensor in p.items()}
    results(lora_linear, p)
    assert all(torch.equal(before[name], p[name]) for name in p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantized_weight_matches_its_dense_one(quant_type: str, dtype: torch.dtype) -> None:
    """The dense weight lives during a product only, and is unpacked again for the backward pass."""
    p = problem((3, 5, 128), 64, 4, dtype)
    packed = quantize_4bit(p["weight"].float(), quant_type=quant_type)
    layer = Linear4bit.from_quantized(packed)
    asked: list[torch.dtype] = []

    def weight(asked_dtype: torch.dtype) -> torch.Tensor:
        asked.append(asked_dtype)
        return layer.dense_weight(asked_dtype)

    y = lora_linear(p["x"], weight, None, p["a"], p["b"], 1.7)
    kept = {tuple(tensor.shape) for tensor in y.grad_fn.saved_tensors}  # type: ignore[union-attr]
    assert (64, 128) not in kept
    grads = torch.autograd.grad(y, [p["x"], p["a"], p["b"]], p["grad"])
    assert asked == [dtype, dtype]
    p["weight"] = layer.dense_weight(dtype)
    fast = {"y": y.detach(), **dict(zip(("x", "a", "b"), grads, strict=True))}
    assert_close(fast, results(lora_reference, p, bias=False), TOLERANCE[dtype])
