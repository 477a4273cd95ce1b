"""What the README tells a reader to type is typed here, in its order, in a fresh folder with fewer rows of data."""

from __future__ import annotations

import io
import re
import shlex
import sys
from pathlib import Path

import pytest
from commands import capo

ROOT = Path(__file__).parents[1]
DOCS = ("defaults", "design", "glossary", "log")
BLOCKS = re.findall(
    r"```(bash|python|yaml)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples in it, every tenth row of them: the same commands take a tenth of the time. Shared by
    all blocks: later ones use what earlier ones made."""
    path = tmp_path_factory.mktemp("reader")
    (path / "examples").mkdir()
    for data in (ROOT / "examples").glob("*.[cj]s*"):
        lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
        header, rows = (lines[:1], lines[1:]) if data.suffix == ".csv" else ([], lines)
        (path / "examples" / data.name).write_text("".join([*header, *rows[::10]]), encoding="utf-8")
    return path


def run_commands(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line of a shell block, in this process: ``capo …``, or ``echo … | capo …``."""
    for line in text.splitlines():
        piped, _, command = line.rpartition(" | ")
        said, words = shlex.split(piped)[1:], shlex.split(command, comments=True)
        assert words[0] == "capo", line
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{word}\n" for word in said)))
        ran = capo(*words[1:])
        assert ran.code == 0, ran
        assert "Traceback" not in ran.err


@pytest.mark.parametrize("number", [n for n, (kind, _) in enumerate(BLOCKS) if kind != "yaml"])
def test_a_block_runs(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, text = BLOCKS[number]
    monkeypatch.chdir(folder)
    if text.startswith("make "):
        targets = (ROOT / "Makefile").read_text(encoding="utf-8")
        for line in text.splitlines():
            assert re.search(rf"^{line.split()[1]}:", targets, flags=re.MULTILINE), line
    elif kind == "bash":
        run_commands(text, monkeypatch)
    else:
        exec(compile(text, f"README.md, block {number}", "exec"), {"__name__": "readme"})


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
