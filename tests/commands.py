"""Run ``capo`` inside the test's process, or as the process that a user starts, and look at what it left behind."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from warm import CAPO

from capotune.cli import main

PATIENCE = 600.0
"""Seconds after which a test no longer waits for another process. It waits for what the process does, not for a time:
this only ends a test whose process hangs."""


@dataclass(frozen=True)
class Result:
    """What a command gave back."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """Everything printed, as one line: a table or a box may break a sentence anywhere."""
        return " ".join((self.out + " " + self.err).split())


def capo(*arguments: object) -> Result:
    """Run one command in this process. An exception that the command line lets through fails the test."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Result(code, out.getvalue(), err.getvalue())


def tree(folder: Path) -> dict[str, str]:
    """Every file and folder below, hidden ones too, with the hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def start(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
    """``capo`` as a process of its own, that says so when it leaves behind what nobody ends for it.

    A file is closed as soon as nobody holds it, which Python warns of too: a signal between ``open`` and ``with`` does
    that, in any program.
    """
    command = [
        sys.executable,
        "-W",
        "error:subprocess:ResourceWarning",  # ... is still running
        "-W",
        "error:Implicitly cleaning up:ResourceWarning",  # a temporary folder
        "-c",
        CAPO,
    ]
    return subprocess.Popen(
        [*command, *map(str, arguments)], cwd=cwd, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Return once ``happened``; fail when the process ends before, or nothing comes."""
    end = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None, f"it ended before: {process.communicate()}"
        assert time.monotonic() < end, "it did not come so far"
        time.sleep(0.01)
