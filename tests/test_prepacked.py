"""Products with frozen weights in the kernels' own form: against PyTorch in fp64, and against what is said of them."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_linear import any_amx, any_prepacked_amx, native, unit
from torch import Tensor

from capotune.kernels import abi, linear, prepacked
from capotune.kernels.execution import reduced_precision
from capotune.kernels.native import address, library
from capotune.kernels.prepacked import fits_prepacked, int16_product_reference, may_prepack, prepack, strip_bytes
from capotune.kernels.program import kernel_address

__all__ = ["any_amx", "any_prepacked_amx", "native", "unit"]


def weight_panels(weight: Tensor, *, input_gradient: bool) -> Tensor:
    """The form for processors without AMX."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "amx_kernels", lambda: None)
        return prepack(weight, input_gradient=input_gradient)


# ------------------------------------------------------------------------------------------------- panels, by vectors


def frozen_product(
    x: Tensor, panels: Tensor, bias: Tensor | None, y: Tensor, accumulate: bool, low: Tensor, matrix: Tensor,
    scale: float, shares: int = 1,
) -> None:  # fmt: skip
    """Calls C with a sharer that gives it ``shares`` ranges of the panels, one after the other."""
    lib = library("products_cpu")
    if lib is None:
        pytest.skip("no C compiler here")
    arguments = {
        "rows": len(x), "terms": x.shape[1], "columns": y.shape[1], "x": address(x), "x_stride": x.stride(0),
        "panels": address(panels), "bias": address(bias), "y": address(y), "y_stride": y.stride(0),
        "accumulate": accumulate, "ranks": low.shape[1], "xa": address(low), "xa_stride": low.stride(0),
        "matrix": address(matrix), "scale": scale,
    }  # fmt: skip
    asked: list[int] = []

    @ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 2)
    def one_after_the_other(_: int, work: int, block: int, items: int, threads: int) -> None:
        kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(work)
        asked.extend([items, threads])
        for first, last in itertools.pairwise([items * i // threads for i in range(threads + 1)]):
            kernel(block, first, last)

    block = abi.kernel_layout("prepacked_product_fp32").pack(arguments)
    lib.prepacked_product_fp32(block, one_after_the_other, None, shares)
    used = min(shares, len(panels))
    assert asked == ([len(panels), used] if used > 1 else [])


@given(
    rows=st.integers(1, 40),
    terms=st.sampled_from([1, 7, 16, 100, 383, 384, 385, 768, 800]),
    columns=st.sampled_from([1, 5, 15, 16, 17, 31, 32, 33, 70]),
    ranks=st.integers(0, 48),
    biased=st.booleans(),
    accumulate=st.booleans(),
    input_gradient=st.booleans(),
    shares=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_fp32_product_matches_float64(
    rows: int, terms: int, columns: int, ranks: int, biased: bool, accumulate: bool, input_gradient: bool, shares: int,
    seed: int,
) -> None:  # fmt: skip
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    # each is a part of a larger matrix, whose other numbers are NaN to read, and are to stay as they are
    x, low = torch.full((rows, terms + 3), torch.nan), torch.full((rows, ranks + 2), torch.nan)
    x[:, :terms], low[:, :ranks] = normal(rows, terms), normal(rows, ranks)
    around = torch.full((rows + 1, columns + 5), 7.0)
    weight = normal(terms, columns) if input_gradient else normal(columns, terms)
    bias, matrix = (normal(columns) if biased and not accumulate else None), normal(ranks, columns)
    before = normal(rows, columns)
    around[:rows, :columns] = before if accumulate else torch.nan
    y = around[:rows, :columns]

    panels = weight_panels(weight, input_gradient=input_gradient)
    frozen_product(x[:, :terms], panels, bias, y, accumulate, low[:, :ranks], matrix, 0.5, shares)

    across = weight if input_gradient else weight.t()
    expected = x[:, :terms].double() @ across.double() + 0.5 * low[:, :ranks].double() @ matrix.double()
    expected += before.double() if accumulate else 0.0 if bias is None else bias.double()
    # a sum of n numbers of size 1 in fp32, in the worst order
    size = (
        x[:, :terms].abs().double() @ across.abs().double()
        + 0.5 * low[:, :ranks].abs().double() @ matrix.abs().double()
    )
    assert ((y.double() - expected).abs() <= 2.0**-24 * (terms + ranks + 2) * (size + 10)).all()
    assert (around[rows] == 7).all()
    assert (around[:, columns:] == 7).all()


@pytest.mark.parametrize("input_gradient", [True, False])
def test_panels_hold_the_weight(input_gradient: bool) -> None:
    weight = torch.arange(1.0, 20 * 37 + 1).view(20, 37)
    panels = weight_panels(weight, input_gradient=input_gradient)
    columns, terms = (37, 20) if input_gradient else (20, 37)
    assert panels.shape == (-(-columns // 16), terms, 16)
    assert panels.is_contiguous()
    side_by_side = panels.transpose(0, 1).reshape(terms, -1)
    assert torch.equal(side_by_side[:, :columns], weight if input_gradient else weight.t())
    assert (side_by_side[:, columns:] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_value_stays_in_its_row(bad: float) -> None:
    x, weight = torch.ones(13, 20), torch.ones(17, 20)
    x[7, 3] = bad
    y, none = torch.empty(13, 17), torch.empty(13, 0)
    frozen_product(x, weight_panels(weight, input_gradient=False), None, y, False, none, torch.empty(0, 17), 1.0)
    assert not y[7].isfinite().any()
    y[7] = 20
    assert (y == 20).all()


# ------------------------------------------------------------------------------------------- strips, by AMX


class Product:
    """``prepacked_product_int16`` on these matrices; what it writes is NaN before."""

    def __init__(self, x: Tensor, weight: Tensor, *, input_gradient: bool = False) -> None:
        self.x, self.columns = x, weight.t() if input_gradient else weight
        self.form = prepack(weight, input_gradient=input_gradient)
        rows, columns = len(x), len(self.columns)
        self.strips = torch.full((strip_bytes(x.shape[1]) * -(-rows // 16) + 64,), 77, dtype=torch.int8)
        self.around = torch.full((rows + 1, columns + 5), 7.0)
        self.y = self.around[:rows, :columns]
        self.y.fill_(torch.nan)
        self.bias: Tensor | None = None
        self.low, self.matrix, self.scale = torch.empty(rows, 0), torch.empty(0, columns), 0.0
        self.directions, self.made_scale = torch.empty(0, x.shape[1]), 0.0
        self.accumulate = False

    def run(self, threads: int = 1, *, ready: bool = False, before: object = None, pool: object = None) -> Tensor:
        lib, made = prepacked.prepacked_amx_kernels(), len(self.directions)
        assert lib is not None
        if made:
            self.low[:, :made] = torch.nan
        arguments = {
            "rows": len(self.x), "terms": self.x.shape[1], "columns": len(self.columns),
            "x": address(self.x), "x_stride": self.x.stride(0), "activation": kernel_address(before),
            "strips": address(self.strips), "strips_ready": ready, "weight": address(self.form),
            "bias": address(self.bias), "y": address(self.y), "y_stride": self.y.stride(0),
            "accumulate": self.accumulate, "delta_ranks": len(self.matrix), "delta_xa": address(self.low),
            "delta_matrix": address(self.matrix),
            "delta_scale": self.scale, "projected_ranks": made, "projected_xa": address(self.low),
            "projected_matrix": address(self.directions), "projected_scale": self.made_scale,
            "xa_stride": self.low.stride(0),
        }  # fmt: skip
        block = abi.kernel_layout("prepacked_product_int16").pack(arguments)
        lib.prepacked_product_int16(block, *(linear._pool() if pool is None else pool), threads)
        assert (self.around[len(self.x)] == 7).all()
        assert (self.around[:, len(self.columns) :] == 7).all()
        assert (self.strips[-64:] == 77).all()
        return self.y

    def size(self) -> Tensor:
        """Of the numbers that are added up, to whose last bits the sum is exact."""
        return self.x.abs().double() @ self.columns.abs().double().t() + self.largest()

    def largest(self) -> Tensor:
        return len(self.x.t()) * self.x.abs().amax(1).double()[:, None] * self.columns.abs().amax(1).double()


def parts_of(x: Tensor) -> Tensor:
    """The same numbers with NaN between the rows."""
    larger = torch.full((x.shape[0], x.shape[1] + 3), torch.nan)
    larger[:, : x.shape[1]] = x
    return larger[:, : x.shape[1]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SIZES = [
    (1, 1, 1), (2, 3, 17), (15, 63, 16), (16, 64, 32), (17, 65, 33), (31, 127, 15), (32, 128, 64), (33, 129, 31),
    (48, 255, 257), (49, 256, 70), (255, 40, 65), (256, 65, 40), (257, 100, 33), (300, 1537, 20), (130, 9000, 17),
    (700, 2000, 33),
]  # fmt: skip
"""Rows, terms, columns: below, at and beyond a tile, a panel, the rows that are shared out, and those of one part."""


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("input_gradient", [False, True])
@pytest.mark.parametrize(("rows", "terms", "columns"), SIZES)
def test_int16_product_matches_reference(rows: int, terms: int, columns: int, input_gradient: bool) -> None:
    """To the last bits of fp32, whatever the number of threads."""
    weight = normal(terms, columns) if input_gradient else normal(columns, terms)
    made = Product(parts_of(normal(rows, terms, seed=1)), weight, input_gradient=input_gradient)
    expected = int16_product_reference(made.x, made.columns)
    for threads in (1, 2, 3):
        made.y.fill_(torch.nan)
        assert ((made.run(threads).double() - expected).abs() <= 2.0**-22 * made.size()).all(), threads
    truth = made.x.double() @ made.columns.double().t()
    if rows * columns > 500:
        # less than with TF32, which rounds each number by up to 2^-12 of its own
        assert float((made.y - truth).norm()) < 2.0**-12 * float(truth.norm())
    # what each factor's rounding can do, and all that is left out
    scale, weight_scale = (one.abs().amax(1).double() / 32639 for one in (made.x, made.columns))
    rounding = 0.51 * (
        scale[:, None] * made.columns.abs().double().sum(1) + weight_scale * made.x.abs().double().sum(1)[:, None]
    )
    left_out = 2.0**14 * terms * scale[:, None] * weight_scale
    assert ((made.y - truth).abs() <= rounding + left_out + 2.0**-22 * made.size()).all()


@pytest.mark.usefixtures("native")
@given(
    rows=st.integers(1, 300), terms=st.integers(1, 200), columns=st.integers(1, 100), ranks=st.integers(0, 9),
    made_ranks=st.integers(0, 9), biased=st.booleans(), accumulate=st.booleans(), ready=st.booleans(),
    threads=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_bias_delta_and_projection_match(
    rows: int, terms: int, columns: int, ranks: int, made_ranks: int, biased: bool, accumulate: bool, ready: bool,
    threads: int, seed: int,
) -> None:  # fmt: skip
    """A bias, what is there, a low-rank change, whose one half may be made of x before."""
    made = Product(parts_of(normal(rows, terms, seed=seed)), normal(columns, terms, seed=seed + 1))
    made.low = parts_of(normal(rows, max(ranks, made_ranks), seed=seed + 2))
    made.matrix, made.scale = normal(ranks, columns, seed=seed + 3), 0.5
    made.directions, made.made_scale = normal(made_ranks, terms, seed=seed + 4), 2.0
    made.bias, made.accumulate = (normal(columns, seed=seed + 5) if biased else None), accumulate
    before = normal(rows, columns, seed=seed + 6)
    if accumulate:
        made.y.copy_(before)
    if ready:  # the rows are in the strips, and what is x is not read
        once = Product(made.x, normal(columns, terms, seed=seed + 1))
        once.run()
        made.strips, made.directions = once.strips, torch.empty(0, terms)
    low = made.low.double().clone()
    if len(made.directions):
        low[:, :made_ranks] = 2 * made.x.double() @ made.directions.double().t()
    expected = int16_product_reference(made.x, made.columns) + 0.5 * low[:, :ranks] @ made.matrix.double()
    expected += before.double() if accumulate else 0 if made.bias is None else made.bias.double()
    if ready:
        made.x = torch.full_like(made.x, torch.nan)
    found, kept = made.run(threads, ready=ready), made.low.double()
    slack = 2.0**-22 * (100 * terms + low.abs() @ torch.ones_like(low).t()[:, :1] * 50)
    assert ((found.double() - expected).abs() <= slack).all()
    assert ((kept - low).abs() <= 2.0**-20 * 100 * terms).all()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("rows", [50, 300])
def test_activation_is_applied_to_rows(rows: int) -> None:
    made = Product(normal(rows, 90), normal(40, 90, seed=1))
    elementwise = library("elementwise_cpu")
    assert elementwise is not None
    found = made.run(2, before=elementwise.gelu)
    activated = Product(torch.nn.functional.gelu(made.x), normal(40, 90, seed=1)).run()
    assert float((found - activated).norm()) < 1e-4 * float(activated.norm())


@pytest.mark.usefixtures("native")
def test_values_of_8_bits_are_exact() -> None:
    """As whole numbers of steps of 256 are, beside any others."""
    random = torch.Generator().manual_seed(0)
    x = torch.randint(-32639, 32640, (40, 100), generator=random).float()
    weight = 256 * torch.randint(-9, 10, (50, 100), generator=random).float()
    x[:, 0], weight[:, 0], x[:, 1], weight[:, 1] = 0, 32639, 32639, 0
    assert torch.equal(Product(x, weight).run().double(), x.double() @ weight.double().t())
    assert torch.equal(Product(x / 2**9, weight * 2**9).run().double(), x.double() @ weight.double().t())


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("scale", [1e-29, 1e-12, 1e12, 1e30])
def test_small_and_large_rows_match(scale: float) -> None:
    """As accurate as others beside them."""
    x, weight = normal(40, 100), normal(50, 100, seed=1)
    expected = Product(x, weight).run().clone()
    factor = 2.0 ** round(torch.tensor(scale).log2().item())
    x[7:20] *= factor
    found = Product(x, weight).run()
    assert torch.equal(found[:7], expected[:7])
    assert torch.equal(found[20:], expected[20:])
    torch.testing.assert_close(found[7:20] / factor, expected[7:20], rtol=1e-5, atol=1e-5)
    weight *= factor
    torch.testing.assert_close(Product(normal(40, 100), weight).run() / factor, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("at", [(0, 0), (20, 33), (36, 44)])
def test_non_finite_values_stay_in_row_and_column(bad: float, at: tuple[int, int]) -> None:
    x, weight = normal(37, 45), normal(40, 45, seed=1)
    expected = Product(x, weight).run().clone()
    x[at] = bad
    found = Product(x, weight).run()
    others = torch.arange(37) != at[0]
    assert found[at[0]].isnan().all()
    assert torch.equal(found[others], expected[others])
    weight[at] = bad
    found = Product(normal(37, 45), weight).run()
    others = torch.arange(40) != at[0]
    assert found[:, at[0]].isnan().all()
    assert torch.equal(found[:, others], expected[:, others])


@pytest.mark.usefixtures("native")
def test_rows_and_columns_of_zeros_give_zeros() -> None:
    x, weight = normal(40, 70), normal(45, 70, seed=1)
    x[7:30], weight[3:5] = 0, 1e-40  # as good as zero
    made = Product(x, weight)
    made.bias = normal(45)
    found = made.run()
    assert torch.equal(found[7:30], made.bias.expand(23, 45))
    assert torch.equal(found[:, 3:5], made.bias[3:5].expand(40, 2))
    assert not torch.equal(found[:7, :3], made.bias[:3].expand(7, 3))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("rows", [70, 300])
def test_parts_in_any_order_give_the_same_bits(rows: int) -> None:
    """Each alone, with the bits of one thread's, and as many as there are."""
    made = Product(normal(rows, 100), normal(150, 100, seed=1))
    made.low, made.matrix, made.scale = normal(rows, 3), normal(3, 150), 1.0
    expected = made.run().clone()
    stage = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    shared: list[int] = []

    def backwards(_: int, kernel: int, arguments: int, items: int, threads: int) -> None:
        shared.append(items)
        assert 1 < threads <= items
        for item in reversed(range(items)):
            stage(kernel)(arguments, item, item + 1)

    sharer = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 2)(backwards)
    made.y.fill_(torch.nan)
    found = made.run(2, pool=(ctypes.cast(sharer, ctypes.c_void_p), ctypes.c_void_p()))
    assert torch.equal(found, expected)
    assert shared == ([5, 5] if rows == 70 else [2])  # strips and then panels; parts


@pytest.mark.usefixtures("native")
def test_prepacked_weight_takes_two_bytes_an_element() -> None:
    form = prepack(normal(384, 1536), input_gradient=False)
    assert form.nbytes == 384 * 1536 * 2 + 384 * 4
    assert prepack(normal(384, 1536), input_gradient=True).nbytes == 384 * 1536 * 2 + 1536 * 4


# ------------------------------------------------------------------------------------------------------- which is asked


def test_prepacked_products_need_reduced_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "amx_kernels", lambda: None)
    monkeypatch.setattr(prepacked, "_vectors_are_faster", lambda: True)
    x = torch.zeros(48, 8)
    assert not fits_prepacked(x)  # bits are to be PyTorch's
    with reduced_precision():
        assert fits_prepacked(x)
        assert not fits_prepacked(x[:47])
        assert not fits_prepacked(x.double())
        assert not fits_prepacked(x.to("meta"))
        monkeypatch.setattr(prepacked, "_vectors_are_faster", lambda: False)
        assert not fits_prepacked(x)


@pytest.mark.parametrize(("name", "most"), [("native", 2**28), ("all_bits", 2**25)])
def test_small_models_are_prepacked(name: str, most: int, request: pytest.FixtureRequest) -> None:
    """BERT-base's 85 million weights where there is AMX."""
    request.getfixturevalue(name)
    assert may_prepack(most)
    assert not may_prepack(most + 1)
