"""Which backend computes what, and that each has the whole table with the same arguments."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from capotune.kernels import backends, native_ops, reference, triton_ops
from capotune.kernels import native as native_module
from capotune.kernels.backends import Backend, backend_for, bound

TABLE = [name for name, member in vars(Backend).items() if inspect.isfunction(member) and not name.startswith("_")]
CPU = torch.device("cpu")


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a compiler, and without Triton's interpreter."""
    monkeypatch.setattr(native_module, "library", lambda _: object())
    monkeypatch.setattr(backends, "available", lambda device: device.type == "cuda")


@pytest.mark.parametrize("backend", [reference, native_ops, triton_ops], ids=lambda module: module.NAME)
@pytest.mark.parametrize("name", TABLE)
def test_every_backend_has_the_table_with_equal_signatures(backend: ModuleType, name: str) -> None:
    wanted = list(inspect.signature(getattr(Backend, name)).parameters.values())[1:]
    found = list(inspect.signature(getattr(backend, name)).parameters.values())
    assert [(one.name, one.kind, one.default) for one in found] == [(one.name, one.kind, one.default) for one in wanted]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cpu", torch.float32, native_ops), ("cpu", torch.bfloat16, native_ops), ("cpu", torch.float16, reference),
        ("cpu", torch.float64, reference), ("cuda", torch.float32, triton_ops), ("cuda", torch.float16, triton_ops),
        ("cuda", torch.float64, reference), ("meta", torch.float32, reference), ("mps", torch.float32, reference),
    ],
)  # fmt: skip
def test_fastest_backend_of_a_device_and_dtype_is_bound(device: str, dtype: torch.dtype, expected: ModuleType) -> None:
    assert bound(torch.device(device), dtype) is expected


def test_without_c_plain_pytorch_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_module, "library", lambda _: None)
    monkeypatch.setattr(backends, "available", lambda _: False)
    assert bound(CPU, torch.float32) is reference
    monkeypatch.setattr(backends, "available", lambda _: True)  # Triton's interpreter
    assert bound(CPU, torch.float32) is triton_ops


@pytest.mark.usefixtures("native")
def test_tensors_of_several_dtypes_or_devices_are_plain_pytorchs() -> None:
    """C would read two elements of bf16 as one."""
    x, halved, elsewhere = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, 3, device="meta")
    assert backend_for(x, x) is native_ops
    assert backend_for(halved, halved) is native_ops
    for pair in ((x, halved), (halved, x), (x, elsewhere), (elsewhere, x), (elsewhere, elsewhere)):
        assert backend_for(*pair) is reference


# --------------------------------------------------------------------------------------------- C beside its reference

ROWS, COLUMNS = [0, 1, 3, 37], [1, 7, 16, 65]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def calls(backend: Backend, rows: int, columns: int, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Arguments of every function of the table that has no keywords; what is written is of random content before.
    A backward function gets the statistics that the same backend's forward function gave."""

    def matrix(seed: int) -> Tensor:
        return drawn(rows, columns, dtype=dtype, seed=seed)

    vector = drawn(columns, dtype=dtype, seed=9), drawn(columns, dtype=dtype, seed=10)
    roots = backend.rms_norm(matrix(1), vector[0], 1e-5)[1]
    sums = backend.add_layer_norm(matrix(1), matrix(2), *vector, 1e-5)[1]
    targets, ranks = torch.arange(rows) % columns, 5
    xa, lora = drawn(rows, ranks, dtype=dtype, seed=12), drawn(ranks, columns, dtype=dtype, seed=13)
    return {
        "rms_norm": (matrix(0), vector[0], 1e-5),
        "rms_norm_backward": (matrix(0), matrix(1), vector[0], roots),
        "add_layer_norm": (matrix(0), matrix(1), *vector, 1e-5),
        "add_layer_norm_backward": (matrix(0), *sums, vector[0]),
        "gelu": (matrix(0),),
        "gelu_backward": (matrix(0), matrix(1)),
        "swiglu": tuple(matrix(seed) for seed in range(3)),
        "swiglu_backward": tuple(matrix(seed) for seed in range(6)),
        "softmax_cross_entropy": (matrix(0).float(), targets, 0.1, True),
        "project": (matrix(0), lora, 0.5, None),
        "update": (matrix(0), xa, lora, 0.5),
        "gather": (xa, matrix(0), 0.5),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in TABLE if name != "rotary"])
def test_c_computes_and_writes_what_the_reference_does(name: str, dtype: torch.dtype) -> None:
    """``rotary`` has its own in test_elementwise.py, beside those of every function's exactness."""
    if bound(CPU, dtype) is not native_ops:
        pytest.skip("no C compiler here")
    for rows in ROWS:
        for columns in COLUMNS:
            outcomes = []
            for backend in (native_ops, reference):
                given = calls(backend, rows, columns, dtype)[name]
                outcomes.append([*flat(getattr(backend, name)(*given)), *flat(given)])
            for found, expected in zip(*outcomes, strict=True):
                assert found.dtype == expected.dtype or expected.dim() == 1  # PyTorch rounds a norm's statistics
                scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
                torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=scale * TOLERANCE[dtype])


def flat(values: Any) -> list[Tensor]:
    """The tensors among them."""
    if isinstance(values, Tensor):
        return [values]
    return [one for value in values for one in flat(value)] if isinstance(values, tuple) else []
