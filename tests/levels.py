"""The tests of the kernels, and the contracts, at each level that this machine can (``make test-levels``).

A level is what the C kernels are compiled for (``device.cpu_level``), or ``none``: no C at all, as without a compiler.
AMX is emulated where the processor has AVX-512 with bf16 and no AMX (software_amx.py). The machine's own level is left
to ``make test``.

    python tests/levels.py [level ...]

Prints a line a level, and the tests that were skipped at every one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

import software_amx

from capotune.device import CPU_LEVELS, machine_cpu_level

TESTS = Path(__file__).parent
KERNELS = (
    "abi", "backends", "blocks", "cpu_level", "cross_entropy", "elementwise", "linear", "lora_linear", "low_rank",
    "native_block", "nf4", "prepacked", "prologue", "saved_activations", "short_attention",
)  # fmt: skip
CONTRACTS = {
    "contract": ("same_seed_same_bits", "merged_is_unmerged"),
    "golden_curves": ("losses_of_this_level",),
    "generation_contract": ("same_seed_same_bits", "merged_is_unmerged"),
}
"""Of the contracts those that hang on what computes: the others are about files, counts, messages
and what a checkpoint holds. That losses fall is in the golden curves."""
CASES = "not (contract and (gpt2 or qwen2)) and not (importing or cut_short or flipped_bit or found_again)"
"""Which cases, in pytest's words. Of the families one a kind of block that the kernels compute whole: the others'
blocks are composed of the same kernels. None about the compiled files themselves: they are files at every level."""


ONE_CODE = ("abi", "cpu_level", "elementwise", "nf4", "prologue", "short_attention")
"""Kernels that are compiled alike for avx512 and amx (``native.SIMD_FLAGS``): the machine's own level tests them."""


class Level(NamedTuple):
    """How to run at it."""

    name: str
    environment: dict[str, str]
    kernels: tuple[str, ...] = KERNELS


def levels() -> dict[str, Level]:
    """Those that this machine can, but its own."""
    own = machine_cpu_level()
    found = [Level("none", {"CAPOTUNE_NATIVE": "0"})]
    found += [Level(name, {"CAPOTUNE_CPU_LEVEL": name}) for name in CPU_LEVELS[: CPU_LEVELS.index(own)]]
    if own != "amx" and software_amx.why_not() is None:
        products = tuple(name for name in KERNELS if name not in ONE_CODE)
        found.append(Level("amx", {"SOFTWARE_AMX": "1"}, products))
    return {level.name: level for level in found}


class Outcome(NamedTuple):
    """Of one run of the tests."""

    passed: bool
    seconds: float
    ran: frozenset[str]
    skipped: frozenset[str]


def run(level: Level) -> Outcome:
    """The tests there, in as many processes as there are cores."""
    started, paths = time.monotonic(), [str(TESTS / f"test_{name}.py") for name in level.kernels]
    paths += [str(TESTS / f"test_{name}.py::test_{what}") for name, whats in CONTRACTS.items() for what in whats]
    plain = {name: value for name, value in os.environ.items() if name not in ("CAPOTUNE_NATIVE", "CAPOTUNE_CPU_LEVEL")}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        shared = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadscope"]
        command = [sys.executable, "-m", "pytest", "-q", "-k", CASES, *shared, f"--junitxml={report}", *paths]
        code = subprocess.run(command, env=plain | level.environment, check=False).returncode
        cases = list(ElementTree.parse(report).iter("testcase"))
    names = {f"{case.get('classname')}::{case.get('name')}": case.find("skipped") is not None for case in cases}
    skipped = frozenset(name for name, was_skipped in names.items() if was_skipped)
    return Outcome(code == 0, time.monotonic() - started, frozenset(names) - skipped, skipped)


def main(wanted: list[str]) -> int:
    """Those levels, or all; 1 where a test failed."""
    known = levels()
    if unknown := set(wanted) - set(known):
        print(f"this machine cannot test {', '.join(sorted(unknown))}; it can: {', '.join(known)}", file=sys.stderr)
        return 2
    outcomes: dict[str, Outcome] = {}
    for name in wanted or known:
        print(f"\n================ level {name}", flush=True)
        outcomes[name] = run(known[name])
    print()
    for name, one in outcomes.items():
        counts = f"{len(one.ran)} tests ran, {len(one.skipped)} were skipped, {one.seconds:.0f} s"
        print(f"level {name}: {'passed' if one.passed else 'FAILED'}, {counts}")
    everywhere = frozenset.intersection(*(one.skipped for one in outcomes.values()))
    print(f"skipped at every one of them: {', '.join(sorted(everywhere)) or 'none'}")
    return 0 if all(one.passed for one in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
