"""What tests/test_triton_ops.py runs in a process of its own: Triton kernels on a GPU, or interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from capotune.kernels import _triton, nf4
from capotune.kernels.nf4 import (
    Linear4bit,
    QuantizedTensor,
    dequantize_4bit,
    linear,
    quantize_4bit,
    reference,
    triton_ops,
)
from capotune.methods.lora.method import LoraLinear
from capotune.methods.lora.settings import LoraSettings

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PACKINGS = [(kind, nested) for kind in nf4.QUANT_TYPES for nested in (False, True)]
# Against the exact product of the same rounded weights: one rounding of the result, and the order of an fp32 sum.
NEAR = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def packed(shape: tuple[int, ...], kind: str = "nf4", block_size: int = 64, nested: bool = True) -> QuantizedTensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    weight.view(-1)[1:3] = torch.tensor([0.0, -1e-30])[: max(0, weight.numel() - 1)]
    return quantize_4bit(weight.to(DEVICE), quant_type=kind, block_size=block_size, double_quant=nested)


def by_pytorch(q: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(q.shape, dtype=dtype, device=DEVICE)
    reference.dequantize(q, out.view(-1))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "nested"), PACKINGS)
def test_unpacks_the_same_bits(kind: str, nested: bool, dtype: torch.dtype) -> None:
    """Whole and partial blocks and bytes, one program and several, one nested block and several."""
    for block_size in (32, 64, 4096):
        for shape in ((1,), (7,), (64, 33), (130, 127), (5000, 5)):
            q = packed(shape, kind, block_size, nested)
            got = dequantize_4bit(q, dtype)
            assert torch.equal(got.view(torch.uint8), by_pytorch(q, dtype).view(torch.uint8)), (block_size, shape)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # numpy's word, in the interpreter
def test_rounds_half_to_even_and_keeps_infinity() -> None:
    """Numbers halfway between two of bf16's, beyond its largest, and denormal ones."""
    absmax = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 1e-39, 2**-133 + 2**-134], dtype=torch.float32)
    codes = torch.full((5 * 16,), 0xF0, dtype=torch.uint8)  # 1 and −1 in turn
    q = QuantizedTensor(codes.to(DEVICE), absmax.to(DEVICE), "nf4", 32, (160,), torch.float32)
    for dtype in DTYPES:
        expected = torch.tensor([1.0, -1.0]).repeat(80).mul(absmax.repeat_interleave(32)).to(dtype)
        assert torch.equal(dequantize_4bit(q, dtype).cpu(), expected), dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "nested"), PACKINGS)
def test_few_rows_times_the_packed_weight(kind: str, nested: bool, dtype: torch.dtype) -> None:
    """Any number of rows up to 16; tiles that end in the middle; rows of W that are not whole blocks."""
    for outputs, columns, block_size in ((32, 128, 64), (33, 64, 32), (70, 130, 64), (3, 2, 4096)):
        q = packed((outputs, columns), kind, block_size, nested)
        for rows in (1, 5, triton_ops.MOST_ROWS):
            x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(DEVICE, dtype)
            assert triton_ops.fits(x, q)
            y = triton_ops.linear(x, q)
            exact = x.double() @ by_pytorch(q, dtype).double().t()
            bound = NEAR[dtype] * (x.double().abs() @ by_pytorch(q, dtype).double().abs().t())
            assert bool(((y.double() - exact).abs() <= bound).all()), (outputs, columns, rows)


def test_which_products_stay_packed() -> None:
    q = packed((4, 6))
    assert triton_ops.fits(torch.zeros(2, 8, 6, device=DEVICE), q)
    assert not triton_ops.fits(torch.zeros(17, 6, device=DEVICE), q)
    assert not triton_ops.fits(torch.zeros(0, 6, device=DEVICE), q)
    assert not triton_ops.fits(torch.zeros(2, 6, device=DEVICE, dtype=torch.float64), q)
    assert not triton_ops.fits(torch.zeros(2, 7, device=DEVICE), packed((4, 7)))  # a byte would span two rows


def test_the_layer_takes_the_packed_path_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward without a dense weight, backward with one; the same numbers as the dense layer."""
    layer = Linear4bit(packed((24, 96)), torch.randn(24, device=DEVICE))
    x = torch.randn(2, 3, 96, device=DEVICE, requires_grad=True)
    dense = layer.dense_weight(torch.float32)
    with monkeypatch.context() as without:
        without.setattr(linear, "borrow_dense", lambda *_: pytest.fail("the dense weight was asked for"))
        y = layer(x)
    y.square().sum().backward()
    expected = torch.nn.functional.linear(x.detach(), dense, layer.bias)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, 2 * expected @ dense, rtol=1e-4, atol=1e-3)
    many = torch.randn(17, 96, device=DEVICE)
    torch.testing.assert_close(layer(many), torch.nn.functional.linear(many, dense, layer.bias))


def test_lora_on_a_packed_weight_answers_without_unpacking(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LoraLinear(Linear4bit(packed((24, 96))), LoraSettings(rank=4), torch.Generator().manual_seed(0)).eval()
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 96, device=DEVICE)
    trained = layer(x)  # with gradients on: the path that training takes
    with torch.no_grad(), monkeypatch.context() as without:
        without.setattr(linear, "borrow_dense", lambda *_: pytest.fail("the dense weight was asked for"))
        torch.testing.assert_close(layer(x), trained)


def test_plain_pytorch_where_triton_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    q = packed((5, 64))
    monkeypatch.setattr(_triton, "_triton_is_there", lambda: False)
    monkeypatch.setattr(triton_ops, "_kernels", lambda: pytest.fail("Triton was imported"))
    assert torch.equal(dequantize_4bit(q, torch.float16), by_pytorch(q, torch.float16))
    assert not triton_ops.fits(torch.zeros(1, 64, device=DEVICE), q)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "nested"), PACKINGS)
def test_a_gpu_unpacks_what_the_cpu_does(kind: str, nested: bool, dtype: torch.dtype) -> None:
    """Large matrices, packed on the CPU and moved."""
    for shape in ((4096, 4096), (1024, 11008), (4095, 65)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02
        layer = Linear4bit(quantize_4bit(weight, quant_type=kind, double_quant=nested))
        here = layer.dense_weight(dtype)
        there = layer.to(DEVICE).dense_weight(dtype)
        assert torch.equal(here.view(torch.uint8), there.cpu().view(torch.uint8)), shape
