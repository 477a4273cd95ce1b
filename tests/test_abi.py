"""What C and Python say to each other: names, kinds and places of every argument."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest
import torch

from capotune.kernels import abi
from capotune.kernels import native as native_module
from capotune.kernels.native import address, library, over_rows
from capotune.kernels.program import Program, symbol

KERNELS = Path(abi.__file__).parent
SOURCES = ("elementwise_cpu", "products_cpu")
"""Those that any processor can run."""
RMS_NORM = {"dtype": 0, "x": 1, "weight": 2, "columns": 3, "eps": 0.5, "y": 4, "roots": 5}


@pytest.mark.parametrize("name", SOURCES)
def test_compiled_structs_are_those_python_knows(name: str) -> None:
    lib = library(name)
    if lib is None:
        pytest.skip("no C compiler here")
    abi.check(lib)


def test_values_are_written_as_their_fields_are() -> None:
    packed = abi.kernel_layout("rms_norm").pack(dict(reversed(RMS_NORM.items())))
    assert struct.unpack("qqqqdqq", packed) == (0, 1, 2, 3, 0.5, 4, 5)


def test_whole_number_becomes_a_double() -> None:
    packed = abi.kernel_layout("rms_norm").pack({**RMS_NORM, "eps": 3})
    assert struct.unpack_from("d", packed, abi.layout("rms_norm").offsets["eps"]) == (3.0,)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"columns": 3.0}, "columns is 3.0 where C has int64_t"),
        ({"x": 1.5}, "x is 1.5 where C has pointer"),
        ({"eps": "much"}, "eps is 'much' where C has double"),
        ({"eps": None}, "eps is missing"),
        ({"epsilon": 0.5}, "there is no epsilon"),
        ({"eps": None, "epsilon": 0.5}, "eps is missing, there is no epsilon"),
    ],
)
def test_wrong_missing_and_extra_fields_are_named(changed: dict[str, object], said: str) -> None:
    given = {**RMS_NORM, **changed}
    given = {name: value for name, value in given.items() if value is not None}
    with pytest.raises(abi.AbiError, match=f"struct rms_norm: {said}"):
        abi.kernel_layout("rms_norm").pack(given)  # type: ignore[arg-type]


def test_call_with_a_wrong_field_is_refused() -> None:
    lib = library("elementwise_cpu")
    if lib is None:
        pytest.skip("no C compiler here")
    x = torch.ones(1, 4)
    with pytest.raises(abi.AbiError, match=r"struct elementwise: y is missing, there is no out"):
        over_rows(lib, "gelu", 1, 4, dtype=0, columns=4, x=address(x), out=address(x))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"columns": 3.0}, "columns is 3.0"),
        ({"target": None}, "target is missing"),
        ({"to": 7}, "there is no to"),
    ],
)
def test_program_refuses_a_wrong_field(changed: dict[str, object], said: str) -> None:
    lib = library("products_cpu")
    if lib is None:
        pytest.skip("no C compiler here")
    given = {"source": symbol("x"), "columns": 3, "target": symbol("y"), "row_stride": 1, "column_stride": 3, **changed}
    given = {name: value for name, value in given.items() if value is not None}
    with pytest.raises(abi.AbiError, match=said):
        Program().call(lib.copy_matrix, 3, 9, **given)


def test_program_refuses_a_symbol_for_a_double() -> None:
    lib = library("products_cpu")
    if lib is None:
        pytest.skip("no C compiler here")
    given: dict[str, int | float] = dict.fromkeys(abi.kernel_layout("low_rank_project").kinds, 0)
    with pytest.raises(abi.AbiError, match="scale is"):
        Program().call(lib.low_rank_project, 1, 1, **{**given, "scale": symbol("scale")})


def test_program_refuses_items_for_a_kernel_that_shares_itself_out() -> None:
    lib = library("products_cpu")
    if lib is None:
        pytest.skip("no C compiler here")
    given = dict.fromkeys(abi.kernel_layout("prepacked_product_fp32").kinds, 0)
    with pytest.raises(abi.AbiError, match="items are 1"):
        Program().call(lib.prepacked_product_fp32, 1, 1, **given)
    Program().call(lib.prepacked_product_fp32, None, 1, **given)


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("FIELD(double, eps)", "FIELD(int64_t, eps)", "rms_norm eps double 32"),
        ("FIELD(double, eps)", "FIELD(float, eps)", "rms_norm eps double 32"),
        ("FIELD(double, eps)", "FIELD(double, epsilon)", "rms_norm eps double 32"),
        ("FIELD(double, eps)\n", "", "rms_norm . struct 0 56"),
        ("FIELD(void *, y)\nFIELD(float *, roots)", "FIELD(float *, roots)\nFIELD(void *, y)", "rms_norm y pointer 40"),
    ],
)
def test_library_with_other_structs_is_refused(before: str, after: str, named: str, tmp_path: Path) -> None:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here")
    for path in KERNELS.glob("*.[ch]"):
        shutil.copy(path, tmp_path)
    header = tmp_path / "abi.h"
    listed = header.read_text(encoding="utf-8")
    start = listed.index("STRUCT(rms_norm)")
    header.write_text(listed[:start] + listed[start:].replace(before, after, 1), encoding="utf-8")
    # of each kernel the declarations are enough
    (tmp_path / "doctored.c").write_text('#include "common.h"\n', encoding="utf-8")
    made = tmp_path / "doctored.so"
    native_module._compile(compiler, native_module.FLAGS, tmp_path / "doctored.c", made)
    with pytest.raises(abi.AbiError, match=named.replace(".", r"\.")):
        native_module.open_library(made)


@pytest.mark.parametrize(
    "line", ["FIELD(int, dtype)", "FIELD(int64_t, columns)", "int64_t rows;", "KERNEL(a, b)", "END(c)"]
)
def test_header_with_anything_else_is_refused(line: str, tmp_path: Path) -> None:
    header = tmp_path / "abi.h"
    header.write_text(f"/* two\nlines */\nSTRUCT(a)\nFIELD(int64_t, columns)\n{line}\nEND(a)\n", encoding="utf-8")
    with pytest.raises(abi.AbiError, match=r"abi\.h:5: "):
        abi.read(header)


def test_every_struct_stands_once() -> None:
    structs = abi.read().structs
    for path in KERNELS.glob("*.[ch]"):
        text = path.read_text(encoding="utf-8")
        assert not [name for name in structs if f"struct {name} {{" in text], path.name
