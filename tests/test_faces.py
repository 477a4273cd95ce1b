"""What belongs to the command line stays there: below ``cli/`` no text names a flag, and no module draws with rich."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import capotune

ROOT = Path(capotune.__file__).parent
BELOW = sorted(path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] != "cli")
FLAG = re.compile(r"(?<![\w-])--[a-z]")
OF_OTHERS = re.compile(
    r"(?:pip install|llama-gguf-split) --[\w-]+|var\(--[\w-]+|^git .*"
    r"|--(?:model-path|enable-lora|max-lora-rank|lora-modules|lora-paths|lora )"
)
"""A flag of pip's, git's, llama.cpp's, vLLM's or SGLang's, a variable of CSS's."""


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every string, whole or a part of an f-string, that is not a docstring; with its line."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, documented)]
    alone = {id(one.value) for body in bodies for one in body if isinstance(one, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.lineno, node.value


def names_a_flag(text: str) -> bool:
    return FLAG.search(OF_OTHERS.sub("", text)) is not None


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, one.name) for one in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def test_no_text_below_the_command_line_names_a_flag() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in BELOW
        for line, text in texts(parsed(path))
        if names_a_flag(text)
    ]
    assert found == []


def test_no_module_below_the_command_line_imports_rich() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in BELOW
        for line, name in imports(parsed(path))
        if name.partition(".")[0] in ("rich", "tyro")
    ]
    assert found == []


@pytest.mark.parametrize("code", ['"give --max-length"', 'f"give --max-length {x}"', 'f"{x}: --json"', "('--data', 1)"])
def test_a_flag_is_seen_in(code: str) -> None:
    assert any(names_a_flag(text) for _, text in texts(ast.parse(f"x = {code}")))


@pytest.mark.parametrize("code", ["x = 'a--b'", "x = '---'", "x = '-- '", 'def f():\n    """of `capo train --help`"""'])
def test_no_flag_is_seen_in(code: str) -> None:
    assert not [text for _, text in texts(ast.parse(code)) if names_a_flag(text)]


def test_the_modules_are_found() -> None:
    names = {str(path.relative_to(ROOT)) for path in BELOW}
    assert {"settings.py", "api/training.py", "tasks/generation/run.py", "data/columns.py"} <= names
    assert len(names) > 100
