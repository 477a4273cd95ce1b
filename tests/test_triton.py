"""Triton kernels. Their cases run in processes of their own: Triton decides when it is first imported whether it
compiles for a GPU or interprets on the CPU, and the other tests here are about the CPU's own paths."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from capotune.kernels import backends, triton_ops
from capotune.kernels._triton import available


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the extra 'test' brings Triton on Linux only")
@pytest.mark.parametrize("of", ["nf4", "elementwise"])
def test_the_kernels_compute_what_pytorch_does(of: str) -> None:
    """On a GPU where there is one, else in Triton's interpreter, where the C kernels would take their place."""
    elsewhere = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1", "CAPOTUNE_NATIVE": "0"}
    cases = Path(__file__).with_name(f"{of}_triton_cases.py")
    allowed = "ignore:Conversion of an array with ndim > 0:DeprecationWarning"  # the interpreter of Triton 3.5 does it
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", allowed, str(cases)]
    ran = subprocess.run(command, env={**os.environ, **elsewhere}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout


def test_the_cpu_has_its_own_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not available(torch.device("cpu"))
    assert backends.backend_for(torch.ones(2, 3)) is not triton_ops


def test_importing_the_kernels_does_not_import_triton() -> None:
    modules = ", ".join(f"capotune.kernels.{name}" for name in ("nf4", "rms_norm", "cross_entropy"))
    code = f"import sys, {modules}; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
