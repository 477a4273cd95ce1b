"""Under which circumstances a run was made, for its record: machine and versions, where each setting came from, and the
state of the user's own repository."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from capotune.device import environment
from capotune.engine.recorded import MAY_DIFFER
from capotune.errors import SHOWN, cut
from capotune.events import Reporter, Warned
from capotune.kernels import described
from capotune.settings import Settings

__all__ = ["CIRCUMSTANCES", "circumstances", "gone_on", "now", "repository", "resumed_elsewhere", "settings_from"]

CIRCUMSTANCES = ("environment", "repository", "resumed_in")
"""Parts of a record."""
_GIT_SECONDS = 10
_SAME_BITS = {"memory", "system"}
"""Of a machine: what does not decide about the bits of a result."""
_RUNS_NOTHING = "git --no-optional-locks -c core.fsmonitor=false -c core.hooksPath=/dev/null"


def circumstances(device: torch.device) -> dict[str, Any]:
    """Here, on ``device``: ``environment``, and ``repository`` where the current folder is in one."""
    here = repository(Path.cwd())
    return {
        "environment": environment() | {"kernels": described(device)},
        **({"repository": here} if here else {}),
    }


def gone_on(record: Mapping[str, Any], here: Mapping[str, Any], step: int, report: Reporter) -> dict[str, Any]:
    """What the record of a run says that goes on ``here`` after ``step``: the circumstances it began under stay, and
    these come to ``resumed_in`` where they differ from the ones before in what decides about bits; ``Warned`` names it.
    """
    earlier = record.get("resumed_in", [])
    differing = _differing((earlier or [record])[-1], here)
    if differing:
        report(Warned(text=f"the run goes on elsewhere ({differing}): {MAY_DIFFER}"))
        earlier = [*earlier, {"step": step, **here}]
    began = {name: record[name] for name in CIRCUMSTANCES if name in record}
    return {**here, **began, **({"resumed_in": earlier} if earlier else {})}


def resumed_elsewhere(record: Mapping[str, Any]) -> list[str]:
    """Of each time that a run was gone on with elsewhere, after which step, and what differed; in words."""
    places = [record, *record.get("resumed_in", [])]
    return [f"after step {here.get('step')}: {_differing(there, here)}" for there, here in pairwise(places)]


def _differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What differs between two environments and decides about bits; earlier versions recorded less of it."""
    before, now = there.get("environment", {}), here.get("environment", {})
    names = [name for name in now if before.get(name, now[name]) != now[name] and name not in _SAME_BITS]
    return "; ".join(f"{name}: {_shown(before[name])} before, {_shown(now[name])} now" for name in names)


def _shown(value: object) -> str:
    return cut(str(value), SHOWN)


def now() -> str:
    """The time, in UTC, as records hold it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def settings_from(settings: Settings, method: Settings, given: Mapping[str, str]) -> dict[str, str]:
    """Of each setting where it came from: ``default``, or what ``given`` says of it by its name."""
    names = [*type(settings).model_fields, *type(method).model_fields]
    names.remove("out")  # a record does not know where it is
    return {name: given.get(name, "default") for name in names}


def repository(folder: Path) -> dict[str, Any] | None:
    """The commit of the git repository around ``folder``, and whether tracked files differ from it (``dirty``; None
    where that is not known); None where there is no commit or no git.

    Nothing that a stranger's repository names is run: no hook, no monitor, and where its own configuration names
    filters for files, these are not compared.
    """
    commit = _git(folder, "git rev-parse --verify --quiet HEAD^{commit}")
    if not commit:
        return None
    own = _git(folder, "git config --local --includes --name-only --list")
    dirty = None
    if own is not None and not any(name.startswith("filter.") for name in own.lower().splitlines()):
        changes = _git(folder, "git status --porcelain --untracked-files=no --ignore-submodules=all")
        dirty = None if changes is None else bool(changes)
    return {"commit": commit, "dirty": dirty}


def _git(folder: Path, command: str) -> str | None:
    """What a command of git says; None where it is missing, refuses, or takes too long."""
    try:
        done = subprocess.run(
            [*_RUNS_NOTHING.split(), *command.split()[1:]], cwd=folder, capture_output=True, text=True,
            encoding="utf-8", errors="replace", timeout=_GIT_SECONDS, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
