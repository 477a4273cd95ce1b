"""Compare what capotune may be installed with against security-floors.toml, and ask pip-audit where it is installed.

pip-audit's data comes from the package index; where that cannot be reached, the committed list alone is checked, and
that is said. Exit status 1: a release with a known hole is allowed, pinned or installed.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FLOORS, NEWEST, OLDEST = "security-floors.toml", "constraints.txt", "constraints-oldest.txt"
SECONDS = 60
"""That pip-audit may take."""


@dataclass(frozen=True)
class Hole:
    package: str
    fixed: Version
    advisory: str
    why: str
    not_reached: str | None = None
    """Why an older release may be used; None where it may not."""

    def found_in(self, version: str, where: str) -> list[str]:
        if Version(version) >= self.fixed:
            return []
        return [f"{where}: {self.package} {version} has {self.advisory} ({self.why}); {self.fixed} has not."]


def read_holes(path: Path) -> list[Hole]:
    entries: list[dict[str, str]] = tomllib.loads(path.read_text(encoding="utf-8"))["hole"]
    values = ({name.replace("-", "_"): value for name, value in entry.items()} for entry in entries)
    return [Hole(**{**one, "fixed": Version(one["fixed"])}) for one in values]


def lowest(line: str) -> tuple[str, str | None]:
    """A requirement's package and the lowest version that it allows; None where it names none."""
    requirement = Requirement(line)
    floor = re.search(r"[>=]=([\w.]+)", str(requirement.specifier))
    return canonicalize_name(requirement.name), floor[1] if floor else None


def declared(root: Path) -> list[tuple[str, str | None]]:
    """The lowest versions of pyproject.toml."""
    toml: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    project = toml["project"]
    lists = (toml["build-system"]["requires"], project["dependencies"], *project["optional-dependencies"].values())
    return [lowest(line) for lines in lists for line in lines]


def pinned(path: Path) -> list[tuple[str, str | None]]:
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [lowest(line) for line in lines if line]


def problems(root: Path = ROOT) -> list[str]:
    """One line for each known hole that a pin has, or that a range allows."""
    newest, oldest, floors = pinned(root / NEWEST), pinned(root / OLDEST), declared(root)
    found: list[str] = []
    for hole in read_holes(root / FLOORS):
        places = {NEWEST: newest}
        if hole.not_reached is None:
            places |= {OLDEST: oldest, "pyproject.toml": floors}
        for where, versions in places.items():
            for version in {version or "0" for package, version in versions if package == hole.package}:
                found += hole.found_in(version, where)
    return found


def installed(root: Path = ROOT) -> list[str]:
    """One line for each known hole that this environment has."""
    found: list[str] = []
    for hole in read_holes(root / FLOORS):
        with suppress(metadata.PackageNotFoundError):
            found += hole.found_in(metadata.version(hole.package), "installed") if hole.not_reached is None else []
    return found


def audit(command: str | None, root: Path = ROOT) -> tuple[list[str], str]:
    """What pip-audit finds in the pins, and one line that says whether it looked. ``command``: the program."""
    if command is None:
        return [], "pip-audit is not installed: the list alone was checked."
    options = ["--requirement", NEWEST, "--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
    try:
        done = subprocess.run([command, *options], cwd=root, capture_output=True, text=True, timeout=SECONDS)
        packages = [one for one in json.loads(done.stdout)["dependencies"] if "skip_reason" not in one]
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        packages = []
    if not packages:
        return [], "pip-audit cannot reach its data: the list alone was checked."
    found = [
        f"{NEWEST}: {one['name']} {one['version']} has {hole['id']}, fixed in {', '.join(hole['fix_versions']) or '?'}."
        for one in packages
        for hole in one.get("vulns", [])
    ]
    return found, f"pip-audit looked at {len(packages)} packages."


def main() -> int:
    found = [*problems(), *installed()]
    beside = shutil.which("pip-audit", path=str(Path(sys.executable).parent)) or shutil.which("pip-audit")
    audited, said = audit(beside)
    print("\n".join([*found, *audited, said]))
    return 1 if found or audited else 0


if __name__ == "__main__":
    sys.exit(main())
