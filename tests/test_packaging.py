"""The wheel and the source distribution hold everything, and the wheel works where there is no source tree."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "src")
NOT_SHIPPED = ("__pycache__", "*.egg-info")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """A command's output; no source tree is on its path."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, made from a copy of the tree, and the wheel, made from the sdist."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns(*NOT_SHIPPED))
        else:
            shutil.copy(ROOT / name, tree / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree, cwd=tree)
    return out


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (path,) = distributions.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment with the wheel in it. Its dependencies are this environment's."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    programs = folder / ("Scripts" if sys.platform == "win32" else "bin")
    python = programs / "python"
    (site,) = json.loads(run(python, "-c", "import json, site; print(json.dumps(site.getsitepackages()))", cwd=folder))
    # a path file in it is not read in turn, so the source tree that is installed here stays out
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    offline = ("--no-index", "--no-deps", "--disable-pip-version-check")
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        *offline,
        "--ignore-installed",
        wheel,
        cwd=folder,
    )
    return programs


def package_files() -> set[str]:
    """What lies in the source tree's package, but what Python makes there."""
    package = ROOT / "src" / "capotune"
    return {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("capotune-")}
    assert names == package_files()


def test_sdist_holds_the_package_and_what_builds_it(distributions: Path) -> None:
    (path,) = distributions.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/{name}" for name in package_files()} | {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert not {name for name in names if name.startswith(("tests", "benchmarks"))}


def test_installed_wheel_is_what_runs(environment: Path, tmp_path: Path) -> None:
    said = run(environment / "python", "-c", "import capotune; print(capotune.__file__)", cwd=tmp_path)
    assert Path(said.strip()).is_relative_to(environment.parent)


def test_comparison_runs_from_the_installed_wheel(environment: Path, tmp_path: Path) -> None:
    """The embedded model, the data, the kernels' sources and the page's template all come with the wheel. One
    technique and 200 of the demo's rows are enough for that."""
    said = run(environment / "python", "-c", "from capotune.cli.demo import EXPRESSIONS as e; print(e)", cwd=tmp_path)
    lines = Path(said.strip()).read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:180] + lines[-20:]), encoding="utf-8")
    methods = ["qlora"]
    epochs = [part for method in methods for part in (f"--{method}.epochs", "1")]
    run(
        environment / "capo", "compare", "--data", "few.jsonl", "--model", "capo-tiny", "--methods", *methods, *epochs,
        "--out", "made", cwd=tmp_path, CAPOTUNE_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    rows = json.loads((tmp_path / "made" / "compare.json").read_text(encoding="utf-8"))["rows"]
    assert [row["method"] for row in rows] == methods
    assert (tmp_path / "made" / "compare.html").stat().st_size > 10_000
    assert {path.name for path in tmp_path.iterdir()} == {"few.jsonl", "made", "cache"}
