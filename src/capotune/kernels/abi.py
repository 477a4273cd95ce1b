"""The arguments of the C kernels, as abi.h lists them: names, C types, places.

A call names its arguments, and a field's C type decides how its value is written: an int for a double becomes one, a
float for an int64_t is an error, and so is a name too many or too few. ``check`` holds what is read here against what
the C compiler made of the same list.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from operator import itemgetter
from pathlib import Path

__all__ = [
    "Abi",
    "AbiError",
    "StructLayout",
    "Value",
    "check",
    "declare",
    "kernel_layout",
    "layout",
    "read",
    "shares_itself",
]

Value = int | float

_HEADER = Path(__file__).with_name("abi.h")
_FORMATS = {"int64_t": "q", "double": "d", "pointer": "P"}
_BYTES = 8  # of every field
_SPACE = 2**16  # for the text of a table
_LINE = re.compile(r"(STRUCT|FIELD|END|KERNEL|SHARING_KERNEL)\(([^,()]+)(?:, (\w+))?\)")
_KERNEL_ARGUMENTS = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
_SHARING_KERNEL_ARGUMENTS = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class AbiError(TypeError):
    """C and Python disagree about a kernel's arguments: a mistake in this package, never its user's."""


class StructLayout:
    """One struct."""

    def __init__(self, name: str, kinds: Mapping[str, str]) -> None:
        """``kinds``: "int64_t", "double" or "pointer" by the fields' names, in order."""
        self.name, self.kinds = name, dict(kinds)
        self.size = _BYTES * len(kinds)
        """Bytes."""
        self.offsets = {field: _BYTES * number for number, field in enumerate(kinds)}
        """Bytes from the struct's beginning to each field."""
        self._pack = struct.Struct("".join(_FORMATS[kind] for kind in kinds.values())).pack
        self._in_order = itemgetter(*kinds)

    def pack(self, values: Mapping[str, Value]) -> bytes:
        """The struct. Raises ``AbiError`` for a missing or an unknown name, or a value of another type."""
        if len(values) == len(self.kinds):
            try:
                return self._pack(*self._in_order(values))
            except (KeyError, struct.error):
                pass  # raised below, by name
        raise self._misfit(values)

    def kinds_of(self, values: Mapping[str, object]) -> Mapping[str, str]:
        """The kinds of the fields, in order. Raises ``AbiError`` unless the ``values`` are named as they are."""
        if values.keys() != self.kinds.keys():
            raise self._misfit(values)
        return self.kinds

    def _misfit(self, values: Mapping[str, object]) -> AbiError:
        wrong = [f"{field} is missing" for field in self.kinds if field not in values]
        wrong += [f"there is no {field}" for field in values if field not in self.kinds]
        wrong += [
            f"{field} is {values[field]!r} where C has {kind}"
            for field, kind in self.kinds.items()
            if field in values and not isinstance(values[field], float if kind == "double" else int)
        ]
        return AbiError(f"struct {self.name}: {', '.join(wrong)}")


@dataclass(frozen=True)
class Abi:
    """What a header lists."""

    structs: Mapping[str, StructLayout]
    kernels: Mapping[str, str]
    """Name of the struct that each kernel takes."""
    sharing: frozenset[str]
    """The kernels that share themselves out over threads."""


def read(header: Path = _HEADER) -> Abi:
    """Raises ``AbiError``, which names the line, for anything but such a list."""
    text = re.sub(
        r"/\*.*?\*/", lambda comment: "\n" * comment.group().count("\n"), header.read_text("utf-8"), flags=re.S
    )
    structs: dict[str, StructLayout] = {}
    kernels: dict[str, str] = {}
    sharing: set[str] = set()
    name, kinds = "", dict[str, str]()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        found = _LINE.fullmatch(line.strip())
        what, first, second = found.groups() if found else ("", "", None)
        if what == "STRUCT" and not name and second is None and first not in structs:
            name, kinds = first, {}
        elif what == "FIELD" and name and second is not None and second not in kinds and (kind := _kind(first)):
            kinds[second] = kind
        elif what == "END" and first == name and kinds and second is None:
            structs[name], name = StructLayout(name, kinds), ""
        elif what.endswith("KERNEL") and not name and second in structs and first not in kernels:
            kernels[first] = str(second)
            sharing |= {first} if what == "SHARING_KERNEL" else set()
        else:
            raise AbiError(f"{header.name}:{number}: {line.strip()!r} does not belong there")
    return Abi(structs, kernels, frozenset(sharing))


def _empty_lines(comment: re.Match[str]) -> str:
    """As many as the comment has, so that the lines after it keep their numbers."""
    return "\n" * comment.group().count("\n")


def _kind(c_type: str) -> str | None:
    """None for a type that has no kind."""
    return "pointer" if c_type.endswith(" *") else c_type if c_type in _FORMATS and c_type != "pointer" else None


@cache
def _abi() -> Abi:
    return read()


@cache
def layout(name: str) -> StructLayout:
    """The struct of that name."""
    return _abi().structs[name]


@cache
def kernel_layout(kernel: str) -> StructLayout:
    """The struct that the C function ``kernel`` takes."""
    return layout(_abi().kernels[kernel])


@cache
def shares_itself(kernel: str) -> bool:
    """Whether it is a SHARING_KERNEL."""
    return kernel in _abi().sharing


def check(lib: ctypes.CDLL, abi: Abi | None = None) -> None:
    """Compare with the table that ``lib`` was compiled with. Raises ``AbiError``, which names the first field that
    differs in name, kind, place or size."""
    text = ctypes.create_string_buffer(_SPACE)
    length = lib.abi_table(text, ctypes.c_int64(_SPACE))
    assert length < _SPACE
    expected = []
    for one in (abi or _abi()).structs.values():
        expected.append(f"{one.name} . struct 0 {one.size}")
        expected += [f"{one.name} {field} {kind} {one.offsets[field]} {_BYTES}" for field, kind in one.kinds.items()]
    compiled = text.value.decode().splitlines()
    for ours, theirs in zip_longest(expected, compiled, fillvalue="nothing"):
        if ours != theirs:
            raise AbiError(f"{lib._name}: C has {theirs!r} (struct, field, kind, offset, size), Python {ours!r}")


def declare(lib: ctypes.CDLL) -> None:
    """Say what the kernels of ``lib`` take, so that ctypes converts and counts it."""
    abi = _abi()
    for name in abi.kernels:
        function = getattr(lib, name, None)
        if function is not None:
            function.argtypes = _SHARING_KERNEL_ARGUMENTS if name in abi.sharing else _KERNEL_ARGUMENTS
            function.restype = None
