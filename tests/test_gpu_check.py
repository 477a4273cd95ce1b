"""The check for a machine with a GPU, tried out on tiny shapes: every part runs, and what is there is not run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PARTS = ("tests", "tables", "loss", "profile")


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes with a GPU: bash scripts/gpu_check.sh")
def test_every_part_runs_once(tmp_path: Path) -> None:
    def check() -> str:
        script = ROOT / "scripts" / "gpu_check.sh"
        command = ["bash", str(script), str(tmp_path / "no-wheels"), str(tmp_path / "out"), "3000"]
        done = subprocess.run(
            command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=False
        )
        log = tmp_path / "out" / "log.txt"
        assert done.returncode == 0, done.stderr + (log.read_text("utf-8") if log.is_file() else "")
        return done.stdout

    assert check() == "".join(f"{part}: exit code 0\n" for part in PARTS), (tmp_path / "out/log.txt").read_text("utf-8")
    found = {part: json.loads((tmp_path / "out" / f"{part}.json").read_text("utf-8")) for part in PARTS}
    assert found["tests"]["ran"] > 0
    assert found["tests"]["failed"] == {}
    (row,) = found["tables"]["135m-lora"]["comparisons"][0]["rows"]
    assert row["tokens_per_second"] > 0
    assert found["loss"]["runs"]["PyTorch"]["gradient_norm_difference"] < 1e-2
    assert found["profile"]["135m-lora"]["kernels"] > 100
    assert check() == "".join(f"{part}: was there\n" for part in PARTS)
