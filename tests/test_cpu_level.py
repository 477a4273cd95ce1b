"""The level of instructions that the C kernels are compiled for: found, lowered, refused, recorded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from capotune import device, kernels
from capotune.device import CPU_LEVELS, cpu_level, machine_cpu_level
from capotune.errors import SettingError
from capotune.kernels import linear, native_ops, prepacked
from capotune.kernels import native as native_module

FOUND = getattr(machine_cpu_level, "__wrapped__", None)
"""Finds the level anew each time; None where the tests set it (software_amx.py)."""


@pytest.fixture
def on_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has every level."""
    monkeypatch.setattr(device, "machine_cpu_level", lambda: "amx")
    monkeypatch.delenv("CAPOTUNE_CPU_LEVEL", raising=False)


@pytest.fixture
def forgetful() -> Iterator[None]:
    """What was compiled and found out is asked for anew, and again after the test."""
    cached = native_module.library, linear.amx_kernels, prepacked._vectors_are_faster
    for one in cached:
        one.cache_clear()
    yield
    for one in cached:
        one.cache_clear()


@pytest.mark.skipif(FOUND is None, reason="these tests run on AMX in software")
@pytest.mark.parametrize(
    ("capability", "has_amx", "level"),
    [
        ("DEFAULT", False, "plain"), ("NO AVX", False, "plain"), ("SVE256", False, "plain"), ("AVX2", False, "avx2"),
        ("AVX2", True, "avx2"), ("AVX512", False, "avx512"), ("AVX512", True, "amx"),
    ],
)  # fmt: skip
def test_machine_level_is_the_processors(
    capability: str, has_amx: bool, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no more than PyTorch uses, which its users can lower (AVX2 where there is AMX)."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(device, "_linux_lists", lambda _: has_amx)
    assert FOUND is not None
    assert FOUND() == level


def test_flags_of_the_processor_are_linuxs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor\t: 0\nflags\t\t: fpu avx2 amx_tile amx_int8 amx_bf16 avx512_bf16\nbugs\t\t: none\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    assert device._linux_lists({"amx_tile", "avx2"})
    assert not device._linux_lists({"amx_tile", "bugs"})
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    assert not device._linux_lists({"amx_tile"})


@pytest.mark.usefixtures("on_amx")
@pytest.mark.parametrize("level", CPU_LEVELS)
def test_variable_lowers_the_level(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_level() == "amx"
    monkeypatch.setenv("CAPOTUNE_CPU_LEVEL", "")
    assert cpu_level() == "amx"
    monkeypatch.setenv("CAPOTUNE_CPU_LEVEL", level)
    assert cpu_level() == level


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("avx512", "CAPOTUNE_CPU_LEVEL=avx512: this machine does not have that level. Allowed: plain, avx2."),
        ("AVX2", "CAPOTUNE_CPU_LEVEL=AVX2: there is no such level. Allowed: plain, avx2."),
    ],
)
def test_level_that_is_not_there_is_refused(wanted: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "machine_cpu_level", lambda: "avx2")
    monkeypatch.setenv("CAPOTUNE_CPU_LEVEL", wanted)
    with pytest.raises(SettingError) as raised:
        cpu_level()
    assert str(raised.value) == message


@pytest.mark.usefixtures("on_amx")
@pytest.mark.parametrize(
    ("level", "flags"),
    [
        ("plain", set()), ("avx2", {"-mavx2", "-mf16c", "-mfma"}),
        ("avx512", {"-mavx2", "-mf16c", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"}),
    ],
)  # fmt: skip
def test_compiler_is_told_the_level(
    level: str, flags: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And no instruction beyond; libraries with other flags have another name in the cache."""
    told: list[tuple[str, ...]] = []

    def compile_nothing(_compiler: str, flags: tuple[str, ...], _source: Path, target: Path) -> None:
        told.append(flags)
        target.touch()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", sys.executable)  # is found, and never called
    monkeypatch.setattr(native_module, "_compile", compile_nothing)
    names = set()
    for chosen in ("amx", level):
        monkeypatch.setenv("CAPOTUNE_CPU_LEVEL", chosen)
        names.add(native_module._compiled(Path(native_module.__file__).with_name("products_cpu.c")).name)
    assert {flag for flag in told[-1] if flag.startswith("-m")} == flags
    assert len(names) == (1 if level == "avx512" else 2)  # amx has flags of its own for its own sources only


@pytest.mark.usefixtures("forgetful")
def test_record_names_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the kernels that are compiled, not of the processor."""
    cpu = torch.device("cpu")
    if kernels.described(cpu) == "PyTorch":
        pytest.skip("no C compiler here")
    monkeypatch.setenv("CAPOTUNE_CPU_LEVEL", "plain")
    for one in (native_module.library, linear.amx_kernels):
        one.cache_clear()
    assert kernels.described(cpu) == "compiled for plain"
    monkeypatch.setenv("CAPOTUNE_NATIVE", "0")
    native_module.library.cache_clear()
    assert kernels.described(cpu) == "PyTorch"


def test_record_tells_where_amx_may_not_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system may keep its registers from a process."""
    monkeypatch.setattr(kernels, "library", lambda _: object())
    monkeypatch.setattr(kernels, "bound", lambda *_: native_ops)
    monkeypatch.setattr(kernels, "cpu_level", lambda: "amx")
    monkeypatch.setattr(kernels, "amx_kernels", lambda: None)
    assert kernels.described(torch.device("cpu")) == "compiled for avx512"
    monkeypatch.setattr(kernels, "amx_kernels", object)
    assert "amx" in kernels.described(torch.device("cpu"))
