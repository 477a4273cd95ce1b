"""What the README tells a reader to type is typed here, in its order, in a fresh folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ("defaults", "design", "glossary", "log")
BLOCKS = re.findall(
    r"```(bash|python|yaml)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples in it, shared by all blocks: later ones use what earlier ones made."""
    path = tmp_path_factory.mktemp("reader")
    (path / "examples").symlink_to(ROOT / "examples")
    return path


@pytest.mark.parametrize("number", [n for n, (kind, _) in enumerate(BLOCKS) if kind != "yaml"])
def test_a_block_runs(number: int, folder: Path) -> None:
    kind, text = BLOCKS[number]
    if text.startswith("make "):
        targets = (ROOT / "Makefile").read_text(encoding="utf-8")
        for line in text.splitlines():
            assert re.search(rf"^{line.split()[1]}:", targets, flags=re.MULTILINE), line
        return
    command = [sys.executable, "-c", text] if kind == "python" else ["bash", "-ec", text]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr


def test_the_yaml_is_a_valid_configuration() -> None:
    import yaml

    from capotune.api import compare_settings
    from capotune.settings import build

    (text,) = [text for kind, text in BLOCKS if kind == "yaml"]
    assert build(compare_settings(), yaml.safe_load(text)).for_method("lora").model_dump()["rank"] == 8


def test_there_is_something_to_run() -> None:
    assert sum(kind == "bash" for kind, _ in BLOCKS) >= 2
    assert sum(kind == "python" for kind, _ in BLOCKS) >= 3


def test_links_lead_somewhere() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "examples/README.md", *(f"docs/{one}.md" for one in DOCS)):
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (ROOT / name).parent.joinpath(target).exists(), f"{name}: {target}"
