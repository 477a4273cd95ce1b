"""Many kernel calls as one call of C.

In a step of a small model a kernel works for some 10 µs, and Python takes as long to call it. A program is a list of
calls, written once. What differs from run to run are a few values: how many rows there are, where tensors begin. Every
argument is a sum of multiples of these symbols, so that a run is one small product of whole numbers and one C call.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from capotune.kernels import abi, policy
from capotune.kernels.native import fork_join, library

__all__ = ["Affine", "Program", "kernel_address", "symbol"]


@dataclass(frozen=True)
class Affine:
    """A sum of multiples of symbols; "" is 1."""

    terms: tuple[tuple[str, int], ...]

    def __add__(self, other: Affine | int) -> Affine:
        more = dict(_affine(other).terms)
        total = {name: more.pop(name, 0) + factor for name, factor in self.terms}
        return Affine((*total.items(), *more.items()))

    def __mul__(self, factor: int) -> Affine:
        return Affine(tuple((name, factor * of_name) for name, of_name in self.terms))

    __rmul__ = __mul__


def symbol(name: str) -> Affine:
    """The symbol itself."""
    return Affine(((name, 1),))


def kernel_address(kernel: Any) -> int:
    """Where a function of a C library begins; 0 for None."""
    return ctypes.cast(kernel, ctypes.c_void_p).value or 0


def _affine(value: Affine | int) -> Affine:
    return value if isinstance(value, Affine) else Affine((("", value),))


class Program:
    """Calls of C kernels that are run in order."""

    def __init__(self) -> None:
        self._calls: list[tuple[dict[str, Affine], list[Affine]]] = []
        """The fields of each ``struct call`` but where its arguments are, and these."""
        self._symbols: tuple[str, ...] = ()
        self._matrix = np.empty((0, 0), np.int64)
        """(fields, symbols)."""

    def call(
        self, kernel: Any, items: Affine | int | None, work: Affine | int, /, **arguments: Affine | int | float
    ) -> None:
        """Add a call of ``kernel``, a function of a C library: the items to share out over threads (None: it shares
        itself out), the operations of all of them, and the fields of its struct in abi.h.

        Raises ``AbiError`` where the arguments are not those of the kernel.
        """
        if (items is None) != abi.shares_itself(kernel.__name__):
            raise abi.AbiError(f"{kernel.__name__}: items are {items}, and abi.h says otherwise")
        shared = -1 if items is None else items
        call = {"kernel": kernel_address(kernel), "items": shared, "work": work}
        kinds = abi.kernel_layout(kernel.__name__).kinds_of(arguments)
        fields = [_field(kernel.__name__, name, kind, arguments[name]) for name, kind in kinds.items()]
        self._calls.append(({name: _affine(one) for name, one in call.items()}, fields))
        self._symbols = ()

    def run(self, values: Mapping[str, int]) -> None:
        """Run all calls, with these values for the symbols. The caller keeps alive what addresses point to."""
        if not self._symbols:
            self._translate()
        given = np.array([1, *(values[name] for name in self._symbols[1:])], np.int64)
        fields = self._matrix @ given
        sharer = library("elementwise_cpu")
        assert sharer is not None
        counts = (ctypes.c_int64(torch.get_num_threads()), ctypes.c_int64(policy.ELEMENTS_PER_THREAD))
        where = ctypes.c_void_p(fields.ctypes.data)
        sharer.run_program(where, ctypes.c_int64(len(self._calls)), fork_join(), *counts)

    def _translate(self) -> None:
        """From sums to one matrix: first the calls, then the arguments of each."""
        of_call, calls, arguments = abi.layout("call"), list[Affine](), list[Affine]()
        at = of_call.size * len(self._calls)
        for call, fields in self._calls:
            placed = {**call, "arguments": _affine(at)}
            calls += [placed[name] for name in of_call.kinds_of(placed)]
            arguments += fields
            at += 8 * len(fields)
        rows = [dict(one.terms) for one in (*calls, *arguments)]
        self._symbols = ("", *sorted({name for row in rows for name in row} - {""}))
        self._matrix = np.array([[row.get(name, 0) for name in self._symbols] for row in rows], np.int64)


def _field(kernel: str, name: str, kind: str, value: Affine | int | float) -> Affine:
    """As a whole number of the same eight bytes."""
    if kind == "double" and not isinstance(value, Affine):
        return _affine(int(struct.unpack("q", struct.pack("d", value))[0]))
    if kind == "double" or isinstance(value, float):
        raise abi.AbiError(f"{kernel}: {name} is {value!r} where C has {kind}")
    return _affine(value)
