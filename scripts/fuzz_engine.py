"""What the fuzzers have in common: inputs from atheris (libFuzzer with coverage of the Python code), counts, findings.

What is raised beside ``CapotuneError`` is a finding, and so is an input that takes longer than ``SLOW`` seconds of a
processor; each is printed once with the place, and its bytes are written to ``out``. Memory beyond ``MEMORY_MB`` ends
the run.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import atheris

SLOW, MEMORY_MB, LONGEST_INPUT = 10, 3000, 1 << 16


@dataclass
class Counts:
    """What came of the inputs."""

    runs: int = 0
    accepted: int = 0
    slowest: float = 0.0
    findings: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """What is given an input."""

    read: Callable[[bytes], object]
    """Returns where the input was good."""
    refused: tuple[type[BaseException], ...]
    """What it raises where the input is not."""
    seeds: Sequence[bytes]
    mutate: Callable[[bytes, int], bytes] | None
    """A change of an input's values, by a seed; None: bytes alone."""
    whole: bool = False
    """Whether bytes are left as they are: inputs that nobody but us writes, with values that anybody may."""


class TooSlowError(Exception):
    """An input took longer than ``SLOW`` seconds: raised where it was then."""


def folder_for(name: str) -> Path:
    """An empty folder, which ``fuzz`` removes."""
    return Path(tempfile.mkdtemp(prefix=f"capotune-fuzz-{name}-"))


def fuzz(name: str, target: Target, runs: int, out: Path, folder: Path) -> None:
    """Give the target ``runs`` inputs in this process, which ends with it; prints a line of docs/fuzzing.md's table."""
    counts = Counts()
    signal.signal(signal.SIGPROF, _too_slow)

    def one(data: bytes) -> None:
        counts.runs += 1
        began = time.process_time()
        try:
            signal.setitimer(signal.ITIMER_PROF, SLOW)
            target.read(data)
            counts.accepted += 1
        except target.refused:
            pass
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            found(name, error, data, counts, out)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        counts.slowest = max(counts.slowest, time.process_time() - began)
        if counts.runs >= runs:
            finish(name, counts, folder)

    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = [
        sys.argv[0], str(corpus), f"-max_len={LONGEST_INPUT}", f"-rss_limit_mb={MEMORY_MB}", "-verbosity=0",
        "-timeout=60",
    ]  # fmt: skip
    mutator = {} if target.mutate is None else {"custom_mutator": mutator_of(target.mutate, target)}
    atheris.Setup(options, one, **mutator)
    atheris.Fuzz()


def _too_slow(_number: int, _frame: object) -> None:
    raise TooSlowError(f"more than {SLOW} s")


def mutator_of(change: Callable[[bytes, int], bytes], target: Target) -> Callable[[bytes, int, int], bytes]:
    """Three in four inputs have a value changed, one of them in a whole file; the others have bytes changed."""

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        kind = seed % 4
        whole = target.seeds[seed // 4 % len(target.seeds)]
        by_bytes = kind == 3 and not target.whole
        mutated = atheris.Mutate(data, len(data)) if by_bytes else change(whole if kind == 0 else data, seed)
        return bytes(mutated[:longest])

    return mutate


def found(name: str, error: Exception, data: bytes, counts: Counts, out: Path) -> None:
    """Count a finding; a new one is shown with its place and its input written."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "capotune" in frame.filename] or list(frames)
    place = f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else str(error)
    counts.findings[place] = counts.findings.get(place, 0) + 1
    if counts.findings[place] == 1:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}-{len(counts.findings)}").write_bytes(data)
        print(f"FOUND {name}: {place}: {str(error)[:300]}", "".join(traceback.format_list(frames[-4:])), sep="\n")
        sys.stdout.flush()


def finish(name: str, counts: Counts, folder: Path) -> None:
    """Print the table's line and end the process, which libFuzzer would not."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(
        f"| {name} | {counts.runs:,} | {counts.accepted:,} | {len(counts.findings)} | {counts.slowest:.2f} s "
        f"| {peak:,} MB |"
    )
    for place, times in counts.findings.items():
        print(f"  {place}: {times} inputs")
    shutil.rmtree(folder)
    sys.stdout.flush()
    os._exit(1 if counts.findings else 0)


def command_line(script: str, names: Iterable[str], start: Callable[[str, int, Path], Any], words: str | None) -> int:
    """Run the target that is asked for, or all; returns the exit code."""
    names = list(names)
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", choices=[*names, "all"], default="all")
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument(
        "--out", type=Path, default=Path("fuzz-findings"), help="folder for inputs that found something"
    )
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    if given.list:
        print(*names, sep="\n")
        return 0
    if given.target == "all":  # each in a process of its own: libFuzzer ends it
        more = ["--runs", str(given.runs), "--out", str(given.out)]
        return max(subprocess.run([sys.executable, script, name, *more], check=False).returncode for name in names)
    logging.disable(logging.WARNING)
    start(given.target, given.runs, given.out)
    return 0
