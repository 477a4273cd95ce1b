"""What ``gpu_check.sh`` runs: the tests and benchmarks that only a GPU can answer, most telling first, in a given time.

    python scripts/gpu_check.py OUT SECONDS

Each part is a process that writes ``OUT/NAME.json``; one that is there already is not run again, and one that is cut
off by the time leaves what it has written so far as ``NAME.part.json``. ``OUT/log.txt`` takes what they print. At most
eight files of 16 MB. Without a GPU, small parts with tiny shapes show that the check itself works.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
LOG_BYTES = 4 * 2**20
"""Of each part's output, at most so much of its end."""
FEWEST_SECONDS = 20
"""With less time left, no further part is begun."""

TESTS = (
    "triton", "attention", "linear_head", "contract", "generation_contract", "peft_parity", "generation_parity",
    "sequence_packing", "quantize", "nf4", "lora_linear", "cross_entropy",
)  # fmt: skip
"""Test files whose code takes other ways on a GPU, most telling first."""
TABLES = ("8b-lora", "8b-qlora", "135m-lora", "8b-lora-lengths", "8b-qlora-memory", "1b-lora")
PROFILES = ("135m-lora", "8b-lora", "8b-qlora")
CUT_OFF = "cut off by the time"


@dataclass(frozen=True)
class Part:
    """One process and the most seconds that it is worth."""

    name: str
    command: list[str]
    seconds: int


def parts(on_gpu: bool, work: Path) -> list[Part]:
    """In order of worth. The tests leave a report in ``work``, every other part its results."""
    bench, quick, alone = ROOT / "benchmarks", [] if on_gpu else ["--quick"], [] if on_gpu else ["--alone"]
    processes, files = ("8", TESTS) if on_gpu else ("0", ("backends",))
    tests = ["-m", "pytest", "-q", "-n", processes, "-p", "no:cacheprovider", f"--junitxml={work}/tests.xml"]
    tables = TABLES if on_gpu else TABLES[2:3]
    profiles = PROFILES if on_gpu else PROFILES[:1]
    return [
        Part("tests", [*tests, *(f"tests/test_{name}.py" for name in files)], 240),
        Part("tables", [f"{bench}/engine.py", *tables, "--out", f"{work}/tables.json", *quick, *alone], 420),
        Part("loss", [f"{bench}/_gpu_loss.py", "--out", f"{work}/loss.json", *quick], 60),
        Part("profile", [f"{bench}/_gpu_profile.py", *profiles, "--out", f"{work}/profile.json", *quick], 150),
    ]


def run(part: Part, seconds: float, work: Path, out: Path) -> str:
    """Run a part, with ``work`` for its temporary files too, and bring what it wrote to ``out``; how it ended."""
    with (work / "log").open("w+b") as log:
        command, environment = [sys.executable, *part.command], {**os.environ, "TMPDIR": str(work)}
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        ) as process:
            try:
                ended = f"exit code {process.wait(seconds)}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # what it started holds the GPU
                ended = CUT_OFF
        log.seek(max(0, log.tell() - LOG_BYTES))
        with (out / "log.txt").open("ab") as whole:
            whole.write(f"\n===== {part.name}: {ended}\n".encode() + log.read())
    if part.name == "tests" and (work / "tests.xml").is_file():
        (work / "tests.json").write_text(json.dumps(outcomes(work / "tests.xml"), indent=1) + "\n", encoding="utf-8")
    written = work / f"{part.name}.json"
    if written.is_file():
        target = out / f"{part.name}{'.part' if ended == CUT_OFF else ''}.json"
        target.write_bytes(written.read_bytes())
    return ended


def outcomes(report: Path) -> dict[str, Any]:
    """Of the tests: how many of each, and what failed with its last lines."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = {}
    for case in cases:
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                failed[f"{case.get('classname')}::{case.get('name')}"] = (found.text or "")[-1500:]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"ran": len(cases) - skipped, "skipped": skipped, "failed": failed}


def main() -> None:
    """All parts that are missing, while there is time."""
    out, end = Path(sys.argv[1]), time.monotonic() + float(sys.argv[2])
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else "no GPU: tiny shapes"
    state: dict[str, Any] = {"device": device, "torch": torch.__version__, "parts": {}}
    for number in range(len(parts(on_gpu, Path()))):
        with TemporaryDirectory() as folder:
            part, left, began = parts(on_gpu, Path(folder))[number], end - time.monotonic(), time.monotonic()
            if (out / f"{part.name}.json").exists():
                ended = "was there"
            elif left < FEWEST_SECONDS:
                ended = "no time left"
            else:
                ended = run(part, min(left, part.seconds), Path(folder), out)
        state["parts"][part.name] = {"ended": ended, "seconds": round(time.monotonic() - began, 1)}
        print(f"{part.name}: {ended}", flush=True)
        (out / "check.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
