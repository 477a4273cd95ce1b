"""What stands in the folder of a run or a comparison, by name, to be read without PyTorch.

run.json         a run's settings, and what it came to once it is complete
settings.json    a comparison's settings; its runs are in the folders below, by their methods' names
checkpoints/     of a run that is going on, or was stopped
.checkpoint-request    somebody asks for a checkpoint
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from capotune.errors import OutputError, SettingError
from capotune.files import check_free, remove_folder, remove_partial, write_atomic

__all__ = [
    "CHECKPOINTS",
    "COMPARISON",
    "RUN",
    "as_json",
    "check_nothing_there",
    "checkpoints",
    "has_checkpoint",
    "is_complete",
    "is_requested",
    "is_worth_keeping",
    "read_comparison",
    "read_run",
    "recorded_settings",
    "request_checkpoint",
    "step_and_epoch",
    "tidy",
    "withdraw_request",
]

RUN, COMPARISON, CHECKPOINTS = "run.json", "settings.json", "checkpoints"
_REQUEST = ".checkpoint-request"


def as_json(values: dict[str, Any]) -> str:
    """As records are written."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def read_run(out: Path) -> dict[str, Any]:
    """What ``run.json`` in ``out`` holds. Raises ``OutputError`` where there is none, or no record of a run in it."""
    try:
        record = _read(out / RUN)
    except FileNotFoundError:
        raise OutputError(
            f"no run in {out}: there is no {RUN}.", advice="Name the folder that training wrote."
        ) from None
    if not (isinstance(record, dict) and isinstance(record.get("settings"), dict) and "method" in record):
        raise OutputError("is no record of a run.", where=str(out / RUN))
    return record


def read_comparison(out: Path) -> dict[str, Any] | None:
    """What ``settings.json`` in ``out`` holds, None where there is none. Raises ``OutputError`` for something else."""
    try:
        record = _read(out / COMPARISON)
    except FileNotFoundError:
        return None
    if not (isinstance(record, dict) and _is_comparison(record)):
        raise OutputError("is no record of a comparison.", where=str(out / COMPARISON))
    return record


def _is_comparison(record: dict[str, Any]) -> bool:
    parts = {"settings": dict, "command": str, "files_sha256": dict, "data": dict}
    if not all(isinstance(record.get(name), kind) for name, kind in parts.items()):
        return False
    methods = record["settings"].get("methods")
    return isinstance(methods, list) and all(isinstance(method, str) for method in methods)


def _read(path: Path) -> Any:
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"cannot be read ({error}).", where=str(path)) from None


def recorded_settings(
    record: dict[str, Any], out: Path, rows: Mapping[str, Any], trust_remote_code: bool
) -> dict[str, Any]:
    """The settings in the record of ``out``; ``rows`` stand where a record only names rows that were in memory.

    Raises ``SettingError`` where these are missing, or a model's own code would run that the user does not ask for.
    """
    settings: dict[str, Any] = record["settings"]
    for name in ("data", "test"):
        if isinstance(settings.get(name), dict) and name not in rows:
            raise SettingError(
                f"the run in {out} read {settings[name].get('name', 'rows in memory')}.",
                setting=name,
                advice=f"Give the same rows again in Python: capotune.resume({str(out)!r}, {name}=…).",
            )
    if settings.get("trust_remote_code") and not trust_remote_code:
        raise SettingError(
            f"the run in {out} lets its model run its own Python code on this machine.",
            setting="trust_remote_code",
            advice="Give it again if you trust that model and whoever made this folder.",
        )
    return {**settings, **rows, "out": out}


def check_nothing_there(out: Path) -> None:
    """``OutputError`` if ``out`` exists, which says so where something was stopped there."""
    stopped = (out / RUN).exists() and "result" not in read_run(out)
    if stopped or ((out / COMPARISON).exists() and not (out / "compare.json").exists()):
        raise OutputError(
            f"the output folder {out} exists already.",
            advice="Go on with what was stopped there (`resume`), or choose another `out`, or remove it first.",
        )
    check_free(out)


def checkpoints(folder: Path) -> list[Path]:
    """Those in ``folder``, the oldest first."""
    return sorted(folder.glob("step-*"), key=step_and_epoch)


def step_and_epoch(checkpoint: Path) -> list[int]:
    """The steps and epochs before it, by its name."""
    return [int(number) for number in re.findall(r"\d+", checkpoint.name)]


def has_checkpoint(out: Path) -> bool:
    """Whether there is a state of the run in ``out`` to go on from."""
    return bool(checkpoints(out / CHECKPOINTS))


def is_complete(out: Path) -> bool:
    """Whether the run in ``out`` has its result. Raises ``OutputError`` for a record that cannot be read."""
    return (out / RUN).exists() and "result" in read_run(out)


def is_worth_keeping(out: Path) -> bool:
    """Whether the run in ``out`` is complete, or can be gone on with."""
    return has_checkpoint(out) or is_complete(out)


def tidy(out: Path) -> None:
    """Remove what only a run that goes on needs."""
    remove_folder(out / CHECKPOINTS)
    remove_partial(out)
    withdraw_request(out)


def request_checkpoint(out: Path) -> None:
    """Ask the process that trains in the run folder ``out`` for a checkpoint, from any process; it is taken after the
    step in hand. Raises ``OutputError`` where the folder cannot be written to."""
    write_atomic(out / _REQUEST, "")


def is_requested(out: Path) -> int | None:
    """When a checkpoint was asked for that is not written yet (ns); None: no one asks."""
    with suppress(OSError):
        return (out / _REQUEST).stat().st_mtime_ns
    return None


def withdraw_request(out: Path) -> None:
    """Nobody asks any more."""
    with suppress(OSError):
        (out / _REQUEST).unlink()
