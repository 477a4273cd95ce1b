"""``frozen_product`` of products_cpu.c, the product with a frozen weight in panels: against PyTorch in fp64."""

from __future__ import annotations

import ctypes
import itertools
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from capotune.kernels import linear
from capotune.kernels._native import address, library
from capotune.kernels.linear import sixteen_bits, vectors_allowed, weight_panels


def frozen_product(
    x: Tensor, panels: Tensor, bias: Tensor | None, y: Tensor, onto: bool, low: Tensor, matrix: Tensor, scale: float,
    shares: int = 1,
) -> None:  # fmt: skip
    """Calls C for ``shares`` ranges of the panels, one after the other."""
    lib = library("products_cpu")
    if lib is None:
        pytest.skip("no C compiler here")
    read = (x.data_ptr(), x.stride(0), panels.data_ptr(), address(bias))
    written = (y.data_ptr(), y.stride(0), int(onto))
    added = (low.shape[1], low.data_ptr(), low.stride(0), matrix.data_ptr())
    block = struct.pack("14qd", len(x), x.shape[1], y.shape[1], *read, *written, *added, scale)
    edges = [len(panels) * i // shares for i in range(shares + 1)]
    for first, last in itertools.pairwise(edges):
        lib.frozen_product(block, ctypes.c_int64(first), ctypes.c_int64(last))


@given(
    rows=st.integers(1, 40),
    terms=st.sampled_from([1, 7, 16, 100, 383, 384, 385, 768, 800]),
    columns=st.sampled_from([1, 5, 15, 16, 17, 31, 32, 33, 70]),
    ranks=st.integers(0, 48),
    biased=st.booleans(),
    onto=st.booleans(),
    input_gradient=st.booleans(),
    shares=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_it_is_the_product(
    rows: int, terms: int, columns: int, ranks: int, biased: bool, onto: bool, input_gradient: bool, shares: int,
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
    bias, matrix = (normal(columns) if biased and not onto else None), normal(ranks, columns)
    before = normal(rows, columns)
    around[:rows, :columns] = before if onto else torch.nan
    y = around[:rows, :columns]

    panels = weight_panels(weight, input_gradient=input_gradient)
    frozen_product(x[:, :terms], panels, bias, y, onto, low[:, :ranks], matrix, 0.5, shares)

    across = weight if input_gradient else weight.t()
    expected = x[:, :terms].double() @ across.double() + 0.5 * low[:, :ranks].double() @ matrix.double()
    expected += before.double() if onto else 0.0 if bias is None else bias.double()
    # a sum of n numbers of size 1 in fp32, in the worst order
    size = (
        x[:, :terms].abs().double() @ across.abs().double()
        + 0.5 * low[:, :ranks].abs().double() @ matrix.abs().double()
    )
    assert ((y.double() - expected).abs() <= 2.0**-24 * (terms + ranks + 2) * (size + 10)).all()
    assert (around[rows] == 7).all()
    assert (around[:, columns:] == 7).all()


@pytest.mark.parametrize("input_gradient", [True, False])
def test_panels_are_the_weight(input_gradient: bool) -> None:
    weight = torch.arange(1.0, 20 * 37 + 1).view(20, 37)
    panels = weight_panels(weight, input_gradient=input_gradient)
    columns, terms = (37, 20) if input_gradient else (20, 37)
    assert panels.shape == (-(-columns // 16), terms, 16)
    assert panels.is_contiguous()
    side_by_side = panels.transpose(0, 1).reshape(terms, -1)
    assert torch.equal(side_by_side[:, :columns], weight if input_gradient else weight.t())
    assert (side_by_side[:, columns:] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row(bad: float) -> None:
    x, weight = torch.ones(13, 20), torch.ones(17, 20)
    x[7, 3] = bad
    y, none = torch.empty(13, 17), torch.empty(13, 0)
    frozen_product(x, weight_panels(weight, input_gradient=False), None, y, False, none, torch.empty(0, 17), 1.0)
    assert not y[7].isfinite().any()
    y[7] = 20
    assert (y == 20).all()


def test_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_vectors_are_faster", lambda: True)
    x = torch.zeros(48, 8)
    assert not vectors_allowed(x)  # bits are to be PyTorch's
    with sixteen_bits():
        assert vectors_allowed(x)
        assert not vectors_allowed(x[:47])
        assert not vectors_allowed(x.double())
        assert not vectors_allowed(x.to("meta"))
        monkeypatch.setattr(linear, "_vectors_are_faster", lambda: False)
        assert not vectors_allowed(x)
