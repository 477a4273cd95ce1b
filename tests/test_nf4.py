"""Four-bit weights: the same bits as bitsandbytes, the same bits on both paths, and no damaged file gets through."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from capotune.errors import ModelError, SettingError
from capotune.kernels import native as native_module
from capotune.kernels import policy
from capotune.kernels.nf4 import (
    Linear4bit,
    QuantizedTensor,
    dequantize_4bit,
    from_checkpoint,
    native_ops,
    quantize_4bit,
    reference,
    tables,
    to_checkpoint,
)

pytestmark = pytest.mark.usefixtures("one_thread")

bnb = pytest.importorskip("bitsandbytes.functional")

CPU = torch.device("cpu")
QUANT_TYPES = ("nf4", "fp4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# Whole blocks; more than one nested block; a short last block; odd counts; vectors; more than two dimensions.
SHAPES = ((64, 128), (250, 128), (17, 33), (1,), (3, 5, 7), (3600, 9))


@pytest.fixture(params=["native", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on the C kernels and again without them."""
    if request.param == "reference":
        monkeypatch.setattr(native_module, "library", lambda _: None)
    elif native_module.library("nf4_cpu") is None:
        pytest.skip("no C compiler here")
    return request.param


def make(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Weights of one kind; ``dtype`` may round or flush them, as a real checkpoint's does."""
    generator = torch.Generator().manual_seed(len(shape) * 1000 + shape[-1])
    x = torch.randn(shape, generator=generator)
    match kind:
        case "normal":
            x = x * 0.02
        case "constant":
            x = torch.full(shape, -0.3)
        case "zero":
            x = torch.zeros(shape)
        case "zero blocks":
            x = x * (torch.arange(x.numel()) // 512 % 2).view(shape)
        case "tiny":
            x = x * 1e-7
        case "denormal":
            x = x * (1e-40 if dtype != torch.float16 else 1e-6)
        case "huge":
            x = x.sign() * torch.finfo(dtype).max * 1e-4 * x.abs().clamp(max=1)
        case "outlier":
            x.view(-1)[x.numel() // 2] = 5e4
        case "midpoints":  # with absmax 1 in every block, each number lies on a limit between two codes
            limits = torch.cat([*(tables.code_midpoints(kind, CPU)[0] for kind in QUANT_TYPES), torch.ones(2)])
            x = limits.repeat(x.numel() // 32 + 1)[: x.numel()].view(shape)
    return x.to(dtype)


KINDS = ("normal", "constant", "zero", "zero blocks", "tiny", "denormal", "huge", "outlier", "midpoints")


@dataclass
class Expected:
    """What bitsandbytes makes of one tensor, by its PyTorch kernels: what every device without its own kernels runs."""

    codes: Tensor
    absmax: Tensor
    offset: Tensor
    absmax8: Tensor
    nested_absmax: Tensor
    numbers: dict[tuple[bool, torch.dtype], Tensor]


@cache
def bitsandbytes(kind: str, shape: tuple[int, ...], dtype: torch.dtype, quant_type: str, block_size: int) -> Expected:
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    x = make(kind, shape, dtype)
    codes, state = bnb.quantize_4bit(x, quant_type=quant_type, blocksize=block_size)
    kernel = torch.library.get_kernel(torch.ops.bitsandbytes.quantize_blockwise.default, "XLA")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    offset, table = state.absmax.mean(), bnb.create_dynamic_map()
    absmax8, nested_absmax = kernel.call_boxed(keys, state.absmax - offset, table, 256)
    state2 = bnb.QuantState(nested_absmax, code=table, blocksize=256, dtype=torch.float32)
    stored = {False: state.absmax, True: bnb.dequantize_blockwise(absmax8, state2) + offset}
    eager = inspect.unwrap(_dequantize_4bit_compute)  # not compiled; where torch.compile can't be had it is so already
    numbers = {
        (nested, out): eager(codes.view(-1), absmax, state.code, block_size, shape, out).view(shape)
        for nested, absmax in stored.items()
        for out in DTYPES
    }
    return Expected(codes.view(-1), state.absmax, offset, absmax8, nested_absmax, numbers)


# ------------------------------------------------------------------------------------------ parity with bitsandbytes


def test_tables_are_bitsandbytes() -> None:
    for quant_type in QUANT_TYPES:
        ours, theirs = tables.code_values(quant_type, CPU), bnb.get_4bit_type(quant_type, device="cpu")
        assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))  # a zero's sign counts
    assert torch.equal(tables.absmax_map(CPU), bnb.create_dynamic_map())


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("path")
def test_same_bits_as_bitsandbytes(quant_type: str, kind: str) -> None:
    """Codes, absmax, nested statistics, and the numbers in three dtypes, for each shape, dtype and block size."""
    for shape, dtype, block_size in itertools.product(SHAPES, DTYPES, (32, 64, 256, 1024, 4096)):
        where = f"{shape} {dtype} block {block_size}"
        theirs = bitsandbytes(kind, shape, dtype, quant_type, block_size)
        x = make(kind, shape, dtype)
        for nested in (False, True):
            q = quantize_4bit(x, quant_type=quant_type, block_size=block_size, double_quant=nested)
            assert torch.equal(q.codes, theirs.codes), where
            assert torch.equal(q.absmax, theirs.absmax8 if nested else theirs.absmax), where
            if nested:
                assert torch.equal(q.offset, theirs.offset), where
                assert torch.equal(q.nested_absmax, theirs.nested_absmax), where
            for out in DTYPES:
                numbers = dequantize_4bit(q, out)
                assert numbers.dtype == out
                expected = theirs.numbers[nested, out]
                assert torch.equal(numbers.view(torch.uint8), expected.view(torch.uint8)), f"{where} to {out}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("path")
def test_the_largest_numbers(dtype: torch.dtype) -> None:
    """Stored as bitsandbytes does; where the mean of absmax overflows, double quantisation would lose them all."""
    x = torch.full((64, 64), torch.finfo(dtype).max, dtype=dtype)
    codes, state = bnb.quantize_4bit(x, quant_type="nf4")
    q = quantize_4bit(x, double_quant=False)
    assert torch.equal(q.codes, codes.view(-1))
    assert torch.equal(q.absmax, state.absmax)
    assert torch.equal(dequantize_4bit(q), x)
    if dtype != torch.float16:
        with pytest.raises(ModelError, match="double_quant=False"):
            quantize_4bit(x)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("path")
def test_same_numbers_as_the_public_dequantiser(quant_type: str, dtype: torch.dtype) -> None:
    """What users call on this machine (the C++ kernel), wherever a row is a whole number of blocks."""
    for block_size in (32, 64, 128, 1024):
        x = make("normal", (64, 1024), dtype)
        codes, state = bnb.quantize_4bit(x, quant_type=quant_type, blocksize=block_size, compress_statistics=True)
        theirs = from_checkpoint(bnb_checkpoint(codes, state))
        assert torch.equal(dequantize_4bit(theirs), bnb.dequantize_4bit(codes, state))


def test_nearest_is_exact_where_the_c_library_rounds_to_a_grid() -> None:
    """bitsandbytes' C++ 8-bit quantiser looks (v + 1)/2·65535, rounded, up in a table; ours and its PyTorch one do not.

    It should differ in few places, by few codes (those near 0 lie close together), and never be the nearer one.
    """
    torch.manual_seed(0)
    values, table = torch.randn(4000, 256), bnb.create_dynamic_map()
    theirs, scale = torch.ops.bitsandbytes.quantize_blockwise(values.view(-1), table, 256)
    ours, ours_scale = reference.quantize_absmax(values.view(-1), torch.zeros(()))
    assert torch.equal(scale, ours_scale)
    scaled = (values.double() / scale.double()[:, None]).view(-1)
    differs = theirs != ours
    share = differs.double().mean().item()
    if share == 0:
        pytest.skip("this bitsandbytes was built without the grid")
    assert share < 0.003
    assert (theirs.int() - ours.int()).abs().max() <= 4
    far, near = ((table.double()[codes.int()] - scaled).abs() for codes in (theirs, ours))
    # In exact arithmetic a value may sit within fp32 rounding of the limit; there neither is wrong.
    assert bool((near[differs] <= far[differs] + 1e-7).all())
    assert (near[differs] < far[differs]).double().mean() > 0.95


# --------------------------------------------------------------------------------------------------- the two paths


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 20_000),
    block_size=st.sampled_from(BLOCK_SIZES),
    quant_type=st.sampled_from(QUANT_TYPES),
    dtype=st.sampled_from(DTYPES),
    double_quant=st.booleans(),
    scale=st.sampled_from([1e-42, 1e-30, 1e-5, 1.0, 1e4, 1e30]),
)
def test_c_and_pytorch_give_the_same_bits(
    seed: int, n: int, block_size: int, quant_type: str, dtype: torch.dtype, double_quant: bool, scale: float
) -> None:
    lib = native_module.library("nf4_cpu")
    if lib is None:
        pytest.skip("no C compiler here")
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * scale
    x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    codes, absmax = reference.quantize(x, quant_type, block_size)
    fast_codes, fast_absmax = native_ops.quantize(x, quant_type, block_size)
    assert torch.equal(codes, fast_codes)
    assert torch.equal(absmax, fast_absmax)
    offset = x.float().mean()
    absmax8, nested_absmax = reference.quantize_absmax(x.float(), offset)
    fast_absmax8, fast_nested_absmax = native_ops.quantize_absmax(x.float(), offset)
    assert torch.equal(absmax8, fast_absmax8)
    assert torch.equal(nested_absmax, fast_nested_absmax)
    q = quantize_4bit(x, quant_type=quant_type, block_size=block_size, double_quant=double_quant)
    for out_dtype in DTYPES:
        slow, fast = torch.empty(n, dtype=out_dtype), torch.empty(n, dtype=out_dtype)
        reference.dequantize(q, slow)
        native_ops.dequantize(q, fast)
        assert torch.equal(slow, fast)


def test_every_half_precision_number_reads_the_same_in_c() -> None:
    """All finite bf16 and fp16 numbers, one block of 32 each with itself as absmax: absmax is the number."""
    lib = native_module.library("nf4_cpu")
    if lib is None:
        pytest.skip("no C compiler here")
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        numbers = bits.view(dtype)
        numbers = numbers[numbers.isfinite()]
        _, absmax = native_ops.quantize(numbers.repeat_interleave(32), "nf4", 32)
        assert torch.equal(absmax, numbers.float().abs())


def test_threads_and_chunks_share_the_work_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make("normal", (1001, 77), torch.float32)
    expected = quantize_4bit(x)
    for share in ("QUANTIZE_PER_THREAD", "ABSMAX_PER_THREAD", "DEQUANTIZE_PER_THREAD"):
        monkeypatch.setattr(policy, share, 4096)
    monkeypatch.setattr(policy, "QUANTIZE_AT_ONCE", 4096)
    torch.set_num_threads(7)
    assert_equal_quantized(quantize_4bit(x), expected)
    whole = dequantize_4bit(expected)
    torch.set_num_threads(1)
    monkeypatch.setattr(native_module, "library", lambda _: None)
    assert_equal_quantized(quantize_4bit(x), expected)
    assert torch.equal(dequantize_4bit(expected), whole)


def assert_equal_quantized(a: QuantizedTensor, b: QuantizedTensor) -> None:
    for name in ("codes", "absmax", "nested_absmax", "offset"):
        mine, other = getattr(a, name), getattr(b, name)
        assert (mine is None) == (other is None)
        assert mine is None or torch.equal(mine, other), name
    assert (a.shape, a.dtype, a.quant_type, a.block_size) == (b.shape, b.dtype, b.quant_type, b.block_size)


@pytest.fixture
def fresh_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """``library`` looks again, with an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CAPOTUNE_NATIVE", raising=False)
    native_module.library.cache_clear()
    yield tmp_path / "capotune"
    native_module.library.cache_clear()


def test_the_compiled_kernel_is_kept_and_found_again(fresh_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if native_module.library("nf4_cpu") is None:
        pytest.skip("no C compiler here")
    (built,) = fresh_library.iterdir()
    assert built.suffix == ".so"
    native_module.library.cache_clear()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled twice"))
    assert native_module.library("nf4_cpu") is not None


def test_a_compiled_kernel_with_one_flipped_bit_is_not_run(fresh_library: Path) -> None:
    if native_module.library("nf4_cpu") is None:
        pytest.skip("no C compiler here")
    (built,) = fresh_library.iterdir()
    before = built.read_bytes()
    built.unlink()  # not changed in place: this process runs it
    built.write_bytes(before[:2000] + bytes([before[2000] ^ 1]) + before[2001:])
    native_module.library.cache_clear()
    assert native_module.library("nf4_cpu") is not None
    assert before in [path.read_bytes() for path in fresh_library.iterdir()]


@pytest.mark.parametrize("trouble", ["missing", "failing", "read-only"])
def test_without_a_compiler_pytorch_takes_over(
    trouble: str, fresh_library: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = {block: reference.quantize(torch.linspace(-1, 1, 999), "nf4", block)[0] for block in (32, 64)}
    if trouble == "missing":
        monkeypatch.setattr(native_module.shutil, "which", lambda _: None)
    elif trouble == "failing":
        monkeypatch.setenv("CC", "false")
    else:
        fresh_library.write_text("a file where the folder should go")
    with caplog.at_level(logging.INFO, logger=native_module.__name__):
        for block, codes in expected.items():
            assert torch.equal(quantize_4bit(torch.linspace(-1, 1, 999), block_size=block).codes, codes)
    assert native_module.library("nf4_cpu") is None
    assert len(caplog.records) == 1
    assert "plain PyTorch" in caplog.text
    assert "\n" not in caplog.records[0].getMessage()


@pytest.mark.usefixtures("fresh_library")
def test_environment_variable_turns_the_c_path_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPOTUNE_NATIVE", "0")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled although turned off"))
    assert native_module.library("nf4_cpu") is None


def test_importing_compiles_nothing(tmp_path: Path) -> None:
    code = "import capotune.kernels.nf4"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.usefixtures("path")
def test_no_other_code_is_nearer(quant_type: str) -> None:
    """The definition, argmin over all sixteen values in double precision."""
    x = make("normal", (50, 64), torch.float32)
    q = quantize_4bit(x, quant_type=quant_type, double_quant=False)
    scaled = x.double() / q.absmax.double()[:, None]
    table = tables.code_values(quant_type, CPU).double()
    best = (scaled[..., None] - table).abs().amin(-1)
    chosen = (scaled - table[torch.stack([q.codes >> 4, q.codes & 15], 1).view(50, 64).int()]).abs()
    assert (chosen - best).max() < 1e-7


@pytest.mark.usefixtures("path")
def test_storage_is_4_127_bits_a_parameter() -> None:
    q = quantize_4bit(torch.randn(1024, 1024))
    assert q.nbytes == 1024 * 1024 // 2 + 16384 + 64 * 4 + 4
    assert 8 * q.nbytes / q.numel == pytest.approx(4.127, abs=5e-4)
    assert quantize_4bit(torch.randn(1024, 1024), double_quant=False).nbytes == 1024 * 1024 // 2 + 16384 * 4


@pytest.mark.usefixtures("path")
def test_input_is_read_in_logical_order_whatever_its_strides() -> None:
    base = torch.randn(64, 200)
    for view in (base.t(), base[:, ::2], base.view(-1)[::3], base[1:, 3:77]):
        assert_equal_quantized(quantize_4bit(view), quantize_4bit(view.clone(memory_format=torch.contiguous_format)))


@pytest.mark.usefixtures("path")
def test_quantising_leaves_the_weight_and_autograd_alone() -> None:
    weight = nn.Parameter(torch.randn(8, 64))
    before = weight.detach().clone()
    q = quantize_4bit(weight)
    assert torch.equal(weight, before)
    assert not dequantize_4bit(q).requires_grad


@pytest.mark.usefixtures("path")
def test_out_receives_the_numbers() -> None:
    q = quantize_4bit(torch.randn(16, 64))
    out = torch.full((16, 64), 7.0, dtype=torch.bfloat16)
    assert dequantize_4bit(q, out=out) is out
    assert torch.equal(out, dequantize_4bit(q, torch.bfloat16))
    for bad in (torch.empty(64, 16), torch.empty(64, 16).t(), torch.empty(16, 64, dtype=torch.float64)):
        with pytest.raises(SettingError):
            dequantize_4bit(q, out=bad)
    with pytest.raises(SettingError, match="out must be"):
        dequantize_4bit(q, torch.float16, out=out)
    with pytest.raises(SettingError, match="float64"):
        dequantize_4bit(q, torch.float64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 70, 199])
@pytest.mark.usefixtures("path")
def test_a_weight_that_is_not_finite_is_refused(bad: float, dtype: torch.dtype, position: int) -> None:
    weight = torch.randn(2, 100)
    weight.view(-1)[position] = bad
    with pytest.raises(ModelError, match=r"\(2, 100\) holds 1 values"):
        quantize_4bit(weight.to(dtype))


def test_bad_settings_and_weights_are_refused() -> None:
    weight = torch.randn(4, 64)
    with pytest.raises(SettingError, match=r"'int4'.*nf4, fp4"):
        quantize_4bit(weight, quant_type="int4")
    for block_size in (0, 16, 48, 8192, -64, 64.0):
        with pytest.raises(SettingError, match=r"block_size.*4096"):
            quantize_4bit(weight, block_size=block_size)  # type: ignore[arg-type]
    for bad in (torch.empty(0, 4), weight.double(), weight.int()):
        with pytest.raises(ModelError):
            quantize_4bit(bad)


# ------------------------------------------------------------------------------------------------- the linear layer


def make_linear(bias: bool = True, **options: object) -> tuple[nn.Linear, Linear4bit]:
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias)
    return linear, Linear4bit.from_linear(linear, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("path")
def test_linear_is_the_product_with_the_dense_weight(double_quant: bool, bias: bool) -> None:
    linear, packed = make_linear(bias, double_quant=double_quant)
    dense = copy.deepcopy(linear)
    dense.weight.data = packed.dense_weight(torch.float32)
    assert dense.weight.shape == (packed.out_features, packed.in_features) == (40, 96)
    x = torch.randn(2, 5, 96)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = packed(mine), dense(other)
    assert torch.equal(y, expected)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    assert torch.equal(mine.grad, other.grad)


def test_gradients_reach_the_input_and_a_bias_that_trains() -> None:
    """The same as autograd finds through the dense weight, for a loss that is not linear in y."""
    _, packed = make_linear()
    packed.bias.requires_grad_()
    x = torch.randn(3, 96, requires_grad=True)
    (packed(x).square().sum()).backward()
    bias = packed.bias.detach().clone().requires_grad_()
    again = x.detach().clone().requires_grad_()
    (again @ packed.dense_weight().t() + bias).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad)
    torch.testing.assert_close(packed.bias.grad, bias.grad)


def test_linear_keeps_no_dense_weight_for_backward() -> None:
    """Neither as a saved tensor nor anywhere reachable from the graph's node."""
    saved: list[Tensor] = []
    _, packed = make_linear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = packed(torch.randn(3, 96, requires_grad=True))
    assert saved == []
    node = y.grad_fn
    held = [value for value in vars(node).values() if isinstance(value, Tensor)]
    assert held == []
    assert node.q.nbytes < 40 * 96


@pytest.mark.usefixtures("path")
def test_layers_of_all_sizes_share_scratch_memory_without_mixing() -> None:
    """A narrow layer after a wide one, other dtypes between, backward in reverse: as with weights of their own."""
    torch.manual_seed(0)
    sizes = [(64, 512), (512, 96), (96, 160), (160, 32)]
    dtypes = (None, torch.bfloat16, torch.float16, torch.float32)
    layers = [Linear4bit.from_linear(nn.Linear(*s), compute_dtype=d) for s, d in zip(sizes, dtypes, strict=True)]
    x = torch.randn(7, 64)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = mine, other
    for layer in layers:
        y = layer(y).tanh()
        dtype = layer.compute_dtype or torch.float32
        product = nn.functional.linear(expected.to(dtype), layer.dense_weight(dtype), layer.bias.to(dtype))
        expected = product.float().tanh()
    assert torch.equal(y, expected)
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(mine.grad, other.grad)
    borrowed = layers[1].borrowed_weight(torch.float32)
    assert torch.equal(borrowed, layers[1].dense_weight(torch.float32))


def test_linear_is_frozen_and_small() -> None:
    _, packed = make_linear()
    assert all(not parameter.requires_grad for parameter in packed.parameters())
    stored = sum(t.nbytes for t in packed.buffers()) + packed.bias.nbytes
    assert packed.weight_nbytes == packed.quantized.nbytes
    assert stored == packed.weight_nbytes + 40 * 4
    assert "quant_type=nf4" in repr(packed)


@pytest.mark.parametrize("compute", DTYPES)
@pytest.mark.parametrize("given_dtype", [torch.float32, torch.bfloat16])
def test_compute_dtype_is_inside_and_the_input_dtype_outside(compute: torch.dtype, given_dtype: torch.dtype) -> None:
    _, packed = make_linear(compute_dtype=compute)
    x = torch.randn(4, 96).to(given_dtype).requires_grad_()
    y = packed(x)
    assert y.dtype == given_dtype
    inside = nn.functional.linear(x.to(compute), packed.dense_weight(compute), packed.bias.to(compute))
    assert torch.equal(y, inside.to(given_dtype))
    y.sum().backward()
    assert x.grad.dtype == given_dtype


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("double_quant", [False, True])
def test_casting_the_module_keeps_the_weight(cast: torch.dtype, double_quant: bool) -> None:
    _, packed = make_linear(double_quant=double_quant)
    before = packed.dense_weight()
    moved = nn.Sequential(packed).to(cast)[0]
    assert moved.bias.dtype == cast
    assert torch.equal(moved.dense_weight(), before)
    assert moved.to("cpu").codes.dtype == torch.uint8


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_copy_and_state_dict_round_trip(quant_type: str, double_quant: bool) -> None:
    model = nn.Sequential(make_linear(quant_type=quant_type, double_quant=double_quant)[1])
    twin = copy.deepcopy(model)
    twin[0].codes.zero_()
    assert not torch.equal(twin[0].codes, model[0].codes)
    state = model.state_dict()
    assert set(state) == {"0.bias", *to_checkpoint(model[0].quantized, "0.")}
    other = nn.Sequential(Linear4bit(quantize_4bit(torch.zeros(40, 96)), torch.zeros(40)))  # another kind altogether
    other.load_state_dict(state)
    assert_equal_quantized(other[0].quantized, model[0].quantized)
    assert torch.equal(other[0].bias, model[0].bias)


def test_loading_the_wrong_state_is_refused() -> None:
    model = nn.Sequential(make_linear()[1])
    state = model.state_dict()
    without = {key: value for key, value in state.items() if not key.startswith("0.weight")}
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight"):
        model.load_state_dict(without)
    with pytest.raises(ModelError, match=r"0\.weight"):
        model.load_state_dict({**state, **to_checkpoint(quantize_4bit(torch.randn(96, 40)), "0.")})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**state, "0.other": torch.zeros(1)})


def test_linear_refuses_what_is_no_matrix() -> None:
    with pytest.raises(ModelError, match="two dimensions"):
        Linear4bit.from_quantized(quantize_4bit(torch.randn(64)))
    with pytest.raises(ModelError, match="bias"):
        Linear4bit.from_quantized(quantize_4bit(torch.randn(8, 64)), bias=torch.zeros(9))


# ------------------------------------------------------------------------------------------------- the published file


def bnb_checkpoint(codes: Tensor, state: object) -> dict[str, Tensor]:
    return {"weight": codes} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_checkpoints_travel_both_ways(quant_type: str, nested: bool, dtype: torch.dtype) -> None:
    x = make("normal", (300, 128), dtype)
    codes, state = bnb.quantize_4bit(x, quant_type=quant_type, blocksize=64, compress_statistics=nested)
    theirs = bnb_checkpoint(codes, state)
    q = from_checkpoint(theirs)
    ours = to_checkpoint(q)
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype, key
        assert torch.equal(ours[key], value), key

    facts = {key.removeprefix("weight."): value for key, value in ours.items() if key != "weight"}
    read = bnb.QuantState.from_dict(facts, device=CPU)
    assert torch.equal(bnb.dequantize_4bit(ours["weight"], read), dequantize_4bit(q))


def test_checkpoint_survives_safetensors_and_a_prefix(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    q = quantize_4bit(torch.randn(40, 96))
    stored = to_checkpoint(q, "model.layers.3.up_proj.") | to_checkpoint(q, "other.")
    save_file({key: value.clone() for key, value in stored.items()}, tmp_path / "x.safetensors")
    assert_equal_quantized(from_checkpoint(load_file(tmp_path / "x.safetensors"), "model.layers.3.up_proj."), q)


def test_codes_stored_in_the_dtype_of_the_model_are_read() -> None:
    q = quantize_4bit(torch.randn(40, 96))
    stored = to_checkpoint(q)
    stored["weight"] = stored["weight"].view(-1).view(torch.bfloat16).view(-1, 1)
    assert_equal_quantized(from_checkpoint(stored), q)


def test_a_foreign_map_is_honoured() -> None:
    """Old CPU builds of bitsandbytes wrote −1 over the first entry; the numbers must follow the file's own map."""
    codes, state = bnb.quantize_4bit(torch.randn(300, 128), quant_type="nf4", compress_statistics=True)
    state.state2.code[0] = -1.0
    state.absmax[::2] = 0
    q = from_checkpoint(bnb_checkpoint(codes, state))
    assert torch.equal(dequantize_4bit(q), bnb.dequantize_4bit(codes, state))


def with_facts(stored: dict[str, Tensor], **changes: object) -> dict[str, Tensor]:
    (key,) = (key for key in stored if "quant_state" in key)
    facts = json.loads(bytes(stored[key].tolist())) | changes
    facts = {name: value for name, value in facts.items() if value != "removed"}
    return {**stored, key: torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)}


DAMAGES = {
    "a larger shape": lambda s: with_facts(s, shape=[64, 96]),
    "a smaller shape": lambda s: with_facts(s, shape=[2, 96]),
    "a negative shape": lambda s: with_facts(s, shape=[-40, -96]),
    "a huge shape": lambda s: with_facts(s, shape=[2**40, 2**40]),
    "no shape": lambda s: with_facts(s, shape=None),
    "fractional shape": lambda s: with_facts(s, shape=[40.0, 96.0]),
    "another block size": lambda s: with_facts(s, blocksize=128),
    "an impossible block size": lambda s: with_facts(s, blocksize=0),
    "a fractional block size": lambda s: with_facts(s, blocksize=64.0),
    "no block size": lambda s: with_facts(s, blocksize="removed"),
    "another nested block size": lambda s: with_facts(s, nested_blocksize=128),
    "no offset": lambda s: with_facts(s, nested_offset="removed"),
    "an offset in words": lambda s: with_facts(s, nested_offset="much"),
    "an offset that is not finite": lambda s: with_facts(s, nested_offset=float("nan")),
    "an offset beyond fp32": lambda s: with_facts(s, nested_offset=1e300),
    "unknown original dtype": lambda s: with_facts(s, dtype="float8"),
    "type at odds with its key": lambda s: with_facts(s, quant_type="fp4"),
    "truncated codes": lambda s: s | {"weight": s["weight"][:-1]},
    "codes of another dtype": lambda s: s | {"weight": s["weight"].float()},
    "truncated absmax": lambda s: s | {"weight.absmax": s["weight.absmax"][:-1]},
    "absmax not nested": lambda s: s | {"weight.absmax": s["weight.absmax"].float()},
    "truncated nested absmax": lambda s: s | {"weight.nested_absmax": s["weight.nested_absmax"][:0]},
    "nested absmax not finite": lambda s: s | {"weight.nested_absmax": s["weight.nested_absmax"] / 0},
    "another table": lambda s: s | {"weight.quant_map": s["weight.quant_map"] * 2},
    "a short 8-bit map": lambda s: s | {"weight.nested_quant_map": s["weight.nested_quant_map"][:255]},
    "an 8-bit map that is not finite": lambda s: s | {"weight.nested_quant_map": s["weight.nested_quant_map"] / 0},
    "no codes": lambda s: {key: value for key, value in s.items() if key != "weight"},
    "no absmax": lambda s: {key: value for key, value in s.items() if key != "weight.absmax"},
    "no table": lambda s: {key: value for key, value in s.items() if key != "weight.quant_map"},
    "no 8-bit map": lambda s: {key: value for key, value in s.items() if key != "weight.nested_quant_map"},
    "no facts": lambda s: {key: value for key, value in s.items() if "quant_state" not in key},
    "facts that are no JSON": lambda s: s | {"weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)},
    "facts that are a list": lambda s: s | {"weight.quant_state.bitsandbytes__nf4": torch.tensor([91, 93])},
    "facts in floats": lambda s: s | {"weight.quant_state.bitsandbytes__nf4": torch.rand(9)},
    "two sets of facts": lambda s: s | {"weight.quant_state.bitsandbytes__fp4": torch.zeros(9, dtype=torch.uint8)},
    "an unknown type": lambda s: {
        key.replace("nf4", "int4"): value for key, value in with_facts(s, quant_type="int4").items()
    },
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name(damage: str) -> None:
    good = to_checkpoint(quantize_4bit(torch.randn(40, 96)))
    from_checkpoint(good)
    bad = {f"layer.7.{key}": value for key, value in DAMAGES[damage](good).items()}
    with pytest.raises(ModelError, match=r"^layer\.7\.weight"):
        from_checkpoint(bad, "layer.7.")


def test_parts_that_do_not_fit_cannot_be_put_together() -> None:
    """The C kernels trust a QuantizedTensor's sizes, so its constructor must not let wrong ones through."""
    q = quantize_4bit(torch.randn(40, 96))
    for changes in (
        {"shape": (41, 96)},
        {"codes": q.codes[::2]},
        {"codes": torch.empty(2 * q.codes.numel(), dtype=torch.uint8)[::2]},
        {"offset": None},
        {"nested_absmax": None, "offset": None},
        {"block_size": 32},
        {"codes": q.codes.to("meta")},
        {"dtype": torch.int8},
    ):
        with pytest.raises(ModelError):
            QuantizedTensor(**{**vars(q), **changes})  # type: ignore[arg-type]
