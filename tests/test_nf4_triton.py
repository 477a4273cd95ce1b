"""Triton kernels for 4-bit weights. Their cases run in a process of their own: Triton decides when it is first imported
whether it compiles for a GPU or interprets on the CPU, and the other tests here are about the CPU's own paths."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from capotune.kernels import nf4_triton

CASES = Path(__file__).with_name("nf4_triton_cases.py")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the extra 'test' brings Triton on Linux only")
def test_the_kernels_compute_what_pytorch_does() -> None:
    """On a GPU where there is one, else in Triton's interpreter."""
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    ran = subprocess.run(command, env={**os.environ, **interpreted}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout


def test_the_cpu_has_its_own_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not nf4_triton.available(torch.device("cpu"))


def test_importing_the_kernels_does_not_import_triton() -> None:
    code = "import sys, capotune.kernels.nf4; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
