"""The small products of a low-rank change: against float64 on both paths, in any layout, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from capotune.errors import SettingError
from capotune.kernels import native as native_module
from capotune.kernels import native_ops, policy
from capotune.kernels.low_rank import gather, project, update

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDING = 2.0**-24
"""The largest relative error of one rounding to fp32."""
SIZES = [(1, 1, 1), (5, 7, 3), (3, 8, 8), (33, 16, 13), (32, 17, 48), (31, 100, 49), (70, 65, 5), (2, 300, 20)]
"""Rows, columns, ranks: below, at and beyond a vector of 8, a tile of 32 rows, and the limit of 48 ranks."""


@pytest.fixture(params=["native", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on the C kernels and again without them."""
    if request.param == "reference":
        monkeypatch.setattr(native_module, "library", lambda _: None)
    elif native_module.library("products_cpu") is None:
        pytest.skip("no C compiler here")
    return request.param


@pytest.fixture
def native() -> None:
    if native_module.library("products_cpu") is None:
        pytest.skip("no C compiler here")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the C kernels that were called."""
    names: list[str] = []
    real = native_ops.over_rows

    def note(lib: object, kernel: str, *sizes: object, **arguments: object) -> None:
        names.append(kernel)
        real(lib, kernel, *sizes, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(native_ops, "over_rows", note)
    return names


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def problem(rows: int, columns: int, ranks: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, low and matrix, each its own."""
    return random(rows, columns, seed=seed), random(rows, ranks, seed=seed + 1), random(ranks, columns, seed=seed + 2)


def slice_of(x: Tensor, before: int = 3, after: int = 2) -> Tensor:
    """The same numbers as columns of a wider matrix, whose others are NaN."""
    wide = torch.full((x.shape[0], before + x.shape[1] + after), torch.nan)
    part = wide[:, before : before + x.shape[1]]
    part.copy_(x)
    return part


def assert_near(found: Tensor, truth: Tensor, size: Tensor, terms: int) -> None:
    """Within the roundings of a sum of so many terms, taken in eight parts; their sizes add up to ``size``."""
    assert found.shape == truth.shape
    assert found.dtype == torch.float32
    excess = (found.double() - truth).abs() - (12 + terms / 8) * ROUNDING * size
    assert not (excess > 0).any(), excess.max()
    assert found.isfinite().all()


def check(x: Tensor, low: Tensor, matrix: Tensor, scale: float) -> None:
    """All three against fp64."""
    x64, low64, matrix64 = x.double(), low.double(), matrix.double()
    (rows, columns), ranks = x.shape, len(matrix)
    size = abs(scale) * x64.abs() @ matrix64.abs().t()
    assert_near(project(x, matrix, scale), scale * x64 @ matrix64.t(), size, columns)
    size = abs(scale) * low64.abs().t() @ x64.abs()
    assert_near(gather(low, x, scale), scale * low64.t() @ x64, size, rows)
    truth, size = x64 + scale * low64 @ matrix64, x64.abs() + abs(scale) * low64.abs() @ matrix64.abs()
    assert update(x, low, matrix, scale) is x
    assert_near(x, truth, size, 8 * ranks)


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("rows", "columns", "ranks"), SIZES)
def test_products_match_float64(rows: int, columns: int, ranks: int) -> None:
    check(*problem(rows, columns, ranks), scale=1.7)


@pytest.mark.usefixtures("path")
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 70), columns=st.integers(1, 90), ranks=st.integers(1, 50), seed=st.integers(0, 10_000),
    scale=st.sampled_from([1.0, -0.3, 16.0, 1e-6, 0.0]), strided_x=st.booleans(), strided_low=st.booleans(),
)  # fmt: skip
def test_products_of_any_size_match_float64(
    rows: int, columns: int, ranks: int, seed: int, scale: float, strided_x: bool, strided_low: bool
) -> None:
    """x and low may each be columns of a wider matrix: a layer's part of what several layers share."""
    x, low, matrix = problem(rows, columns, ranks, seed)
    check(slice_of(x) if strided_x else x, slice_of(low) if strided_low else low, matrix, scale)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(("rows", "columns", "ranks"), [size for size in SIZES if size[2] <= 48])
def test_small_ranks_run_in_c(rows: int, columns: int, ranks: int, called: list[str]) -> None:
    """Also for slices of columns; otherwise the tests of the C path would test PyTorch."""
    x, low, matrix = problem(rows, columns, ranks)
    check(slice_of(x), slice_of(low), matrix, 1.0)
    assert called == ["low_rank_project", "low_rank_gather", "low_rank_update"]


@pytest.mark.usefixtures("path")
def test_scale_defaults_to_one() -> None:
    x, low, matrix = problem(6, 20, 5)
    assert torch.equal(project(x, matrix), project(x, matrix, 1.0))
    assert torch.equal(gather(low, x), gather(low, x, 1.0))
    assert torch.equal(update(x.clone(), low, matrix), update(x.clone(), low, matrix, 1.0))


@pytest.mark.usefixtures("path")
def test_project_writes_into_a_slice() -> None:
    """As several layers write their parts side by side: what stands beside is left alone."""
    x, _, matrix = problem(35, 21, 6)
    expected = project(x, matrix, 0.7)
    wide = random(35, 15)
    before = wide.clone()
    out = wide[:, 4:10]
    assert project(x, matrix, 0.7, out=out) is out
    assert torch.equal(wide[:, 4:10], expected)
    assert torch.equal(wide[:, :4], before[:, :4])
    assert torch.equal(wide[:, 10:], before[:, 10:])


@pytest.mark.usefixtures("path")
def test_update_of_a_slice_leaves_its_neighbours() -> None:
    x, low, matrix = problem(9, 13, 5)
    wide = random(9, 20, seed=5)
    before, part = wide.clone(), wide[:, 4:17]
    part.copy_(x)
    update(part, low, matrix, 0.3)
    assert torch.equal(part, update(x, low, matrix, 0.3))
    assert torch.equal(wide[:, :4], before[:, :4])
    assert torch.equal(wide[:, 17:], before[:, 17:])


@pytest.mark.usefixtures("path")
def test_what_is_read_stays_as_it_was() -> None:
    x, low, matrix = problem(11, 12, 4)
    before = [one.clone() for one in (x, low, matrix)]
    project(x, matrix, 2.0)
    gather(low, x, 2.0)
    assert all(torch.equal(one, other) for one, other in zip((x, low, matrix), before, strict=True))
    update(x, low, matrix, 2.0)
    assert torch.equal(low, before[1])
    assert torch.equal(matrix, before[2])


@pytest.mark.usefixtures("path")
def test_no_rows_give_empty_or_zeros() -> None:
    x, low, matrix = problem(0, 9, 3)
    assert project(x, matrix).shape == (0, 3)
    assert update(x, low, matrix).shape == (0, 9)
    assert torch.equal(gather(low, x), torch.zeros(3, 9))


@pytest.mark.usefixtures("path")
def test_other_layouts_match() -> None:
    """Columns that do not lie side by side, and a matrix that is transposed."""
    x, low, matrix = problem(10, 17, 6)
    expected = project(x, matrix), gather(low, x), update(x.clone(), low, matrix)
    x, low, matrix = (one.t().contiguous().t() for one in (x, low, matrix))
    found = project(x, matrix), gather(low, x), update(x, low, matrix)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=17 * 2**-21)


# ------------------------------------------------------------------------------------------------------- other dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_left_to_pytorch(dtype: torch.dtype, called: list[str]) -> None:
    """The trained matrix stays fp32 while what it changes is bf16; results have the dtype of what is changed."""
    x, low, matrix = problem(7, 24, 4)
    x, low = x.to(dtype), low.to(dtype)
    tolerance = {torch.bfloat16: 2**-6, torch.float64: 1e-12}[dtype]
    exact = [one.to(dtype).double().clone() for one in (x, low, matrix)]  # update writes over x
    results = (
        (project(x, matrix, 0.7), 0.7 * exact[0] @ exact[2].t()),
        (gather(low, x, 0.7), 0.7 * exact[1].t() @ exact[0]),
        (update(x, low, matrix, 0.7), exact[0] + 0.7 * exact[1] @ exact[2]),
    )
    for found, truth in results:
        assert found.dtype == dtype
        assert float((found.double() - truth).abs().max()) <= tolerance * float(truth.abs().max())
    assert called == []


# ------------------------------------------------------------------------------------------------------------ threads


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("size", [(1, 9, 3), (7, 64, 8), (45, 67, 13), (100, 8, 48), (40, 7, 2)])
def test_threads_share_the_work_out(size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: each number is one thread's."""
    monkeypatch.setattr(policy, "ELEMENTS_PER_THREAD", 5)
    x, low, matrix = problem(*size)
    found: list[list[Tensor]] = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        changed = update(slice_of(x), slice_of(low), matrix, 0.7)
        found.append([project(x, matrix, 0.7), gather(low, x, 0.7), changed])
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.usefixtures("path")
def test_shapes_that_do_not_fit_are_refused() -> None:
    """C would read beyond their ends."""
    x, low, matrix = problem(6, 10, 4)
    with pytest.raises(SettingError, match=r"matrix has shape \(4, 9\).*must be \(4, 10\)"):
        project(x, matrix[:, :9])
    with pytest.raises(SettingError, match=r"out has shape \(6, 5\).*must be \(6, 4\)"):
        project(x, matrix, out=torch.empty(6, 5))
    with pytest.raises(SettingError, match=r"out has shape \(7, 4\).*must be \(6, 4\)"):
        project(x, matrix, out=torch.empty(7, 4))
    with pytest.raises(SettingError, match=r"xa has shape \(5, 4\).*must be \(6, 4\)"):
        update(x, low[:5], matrix)
    with pytest.raises(SettingError, match=r"xa has shape \(6, 3\).*must be \(6, 4\)"):
        update(x, low[:, :3], matrix)
    with pytest.raises(SettingError, match=r"matrix has shape \(4, 9\).*must be \(4, 10\)"):
        update(x, low, matrix[:, :9])
    with pytest.raises(SettingError, match=r"xa has shape \(5, 4\).*must be \(6, 4\)"):
        gather(low[:5], x)
