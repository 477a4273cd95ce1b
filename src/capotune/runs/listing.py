"""The runs below a folder: what each is, how far it came, and what differs between two of them.

How far a run came is found by opening what it left: its adapter, or its newest checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic

from capotune.adapters.files import WEIGHTS
from capotune.adapters.store import read_adapter
from capotune.engine.checkpoint import load_checkpoint
from capotune.engine.metrics_log import read_metrics
from capotune.errors import CapotuneError, OutputError
from capotune.folder_lock import holder
from capotune.models.content import sha256_of
from capotune.run_folder import CHECKPOINTS, COMPARISON, RUN, read_comparison, read_run
from capotune.runs.circumstances import resumed_elsewhere

__all__ = ["ListedRun", "checked_record", "compare_runs", "differences", "list_runs", "loss_curve"]

_DEEPEST = 3
"""Folders below the one that is searched."""

Status = Literal["complete", "running", "stopped", "broken"]


class _Result(pydantic.BaseModel):
    metric: str | None = None
    score: pydantic.FiniteFloat | None = None
    scores: dict[str, float | None] = {}
    train_seconds: pydantic.FiniteFloat


class _Place(pydantic.BaseModel):
    step: int
    environment: dict[str, Any]


class _Record(pydantic.BaseModel):
    """What is read of a run's or a comparison's record; more may stand there."""

    method: str = ""
    settings: dict[str, Any]
    base: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    repository: dict[str, Any] = {}
    resumed_in: list[_Place] = []
    started: str | None = None
    result: _Result | None = None


class _Row(pydantic.BaseModel):
    method: str
    score: pydantic.FiniteFloat | None


class _Table(pydantic.BaseModel):
    """What is read of ``compare.json``."""

    rows: list[_Row]
    metric: str
    recommended: str


@dataclass(frozen=True)
class ListedRun:
    """One run's folder."""

    folder: Path
    status: Status
    details: str
    """How far it came, or what is wrong with it, in words; empty where it is complete."""
    record: Mapping[str, Any]
    """Its ``run.json``; empty where that cannot be read."""

    def as_json(self) -> dict[str, Any]:
        """As plain values, with what most people look for."""
        result, settings = self.record.get("result", {}), self.record.get("settings", {})
        return {
            "folder": str(self.folder),
            "status": self.status,
            "details": self.details,
            "method": self.record.get("method"),
            "task": settings.get("task"),
            "model": settings.get("model"),
            **{name: result.get(name) for name in ("metric", "score", "train_seconds")},
            "started": self.record.get("started"),
        }


def list_runs(folder: Path) -> list[ListedRun]:
    """The runs and comparisons in ``folder`` and up to three folders below it, by their names.

    Raises ``OutputError`` where there is no such folder.
    """
    if not folder.is_dir():
        raise OutputError("no such folder.", where=str(folder))
    return [look_at(found) for found in sorted(_run_folders(folder))]


def look_at(folder: Path) -> ListedRun:
    """The run in ``folder``, which holds a ``run.json``, or the comparison."""
    try:
        comparison = read_comparison(folder)
        if comparison is not None:
            return _comparison(folder, comparison)
        record = checked_record(folder)
    except OutputError as error:
        return ListedRun(folder, "broken", str(error), {})
    try:
        return ListedRun(folder, *_how_far(folder, record), record)
    except CapotuneError as error:
        return ListedRun(folder, "broken", str(error), record)


def compare_runs(one: Path, other: Path) -> dict[str, Any]:
    """What differs between two runs: of each part of their records (``settings``, ``environment`` …) the values that
    are not equal, the first run's and the other's, and from which step on their losses differ.

    Raises ``OutputError`` for a folder without a run.
    """
    records = checked_record(one), checked_record(other)
    return {
        "runs": [str(one), str(other)],
        "differing": differences(*records),
        "adapters": _same_adapters(one, other),
        "losses": loss_curve(one, other),
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, dict[str, list[Any]]]:
    """Of each part of two records the values that are not equal, by their names; no part without any."""
    found = {}
    first, second = _parts(one), _parts(other)
    for part, values in first.items():
        there = second[part]
        names = [name for name in {**values, **there} if values.get(name) != there.get(name)]
        if part == "environment":  # earlier versions recorded less of it
            names = [name for name in names if name in values and name in there]
        if names:
            found[part] = {name: [values.get(name), there.get(name)] for name in names}
    return found


def loss_curve(one: Path, other: Path) -> dict[str, Any] | None:
    """How two runs' losses go together: ``steps`` that both took, ``equal``, the first step that ``differs_from``, and
    the ``largest`` difference; None where one of them took no steps."""
    curves = [{line["step"]: line["loss"] for line in read_metrics(run) if "step" in line} for run in (one, other)]
    both = sorted(curves[0].keys() & curves[1].keys())
    if not both:
        return None
    differing = [step for step in both if curves[0][step] != curves[1][step]]
    pairs = [(curves[0][step], curves[1][step]) for step in differing]
    apart = [abs(loss - other) for loss, other in pairs if loss is not None and other is not None]
    return {
        "steps": len(both),
        "equal": not differing and curves[0].keys() == curves[1].keys(),
        "differs_from": differing[0] if differing else None,
        "largest": max(apart, default=0.0),
    }


def checked_record(folder: Path) -> dict[str, Any]:
    """As ``read_run``; also raises ``OutputError`` for one whose parts are not of the kinds that runs write."""
    record = read_run(folder)
    try:
        _Record.model_validate(record, strict=True)
    except pydantic.ValidationError as error:
        raise _odd(folder / RUN, error) from None
    return record


def _odd(path: Path, error: pydantic.ValidationError) -> OutputError:
    first = error.errors()[0]
    return OutputError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}.", where=str(path))


def _run_folders(folder: Path) -> Iterator[Path]:
    for parent, names, files in os.walk(folder):
        here = Path(parent)
        found = (RUN in files or COMPARISON in files) and _is_ours(here)
        if found:
            yield here
        deep = len(here.relative_to(folder).parts) >= _DEEPEST
        whole = found and RUN in files
        names[:] = [] if whole or deep else [name for name in names if not name.startswith(".")]


def _is_ours(folder: Path) -> bool:
    """Whether a run or a comparison wrote the record in ``folder``, or what stands beside it: other programs have files
    of these names too."""
    if any((folder / name).exists() for name in (CHECKPOINTS, "adapter", "compare.json")):
        return True
    try:
        return read_comparison(folder) is not None or bool(read_run(folder))
    except OutputError:
        return False


def _how_far(folder: Path, record: Mapping[str, Any]) -> tuple[Status, str]:
    """Raises ``CapotuneError`` for what is damaged."""
    steps = [line for line in read_metrics(folder) if "step" in line]
    total = f" of {steps[-1]['steps']:,}" if steps and "steps" in steps[-1] else ""
    process = holder(folder)
    if process is not None:
        at = f", at step {steps[-1]['step']:,}{total}" if steps else ""
        return "running", f"{process}{at}"
    if "result" in record:
        read_adapter(folder / "adapter")
        return "complete", ""
    state = load_checkpoint(folder / CHECKPOINTS)
    if state is None:
        return "stopped", "before its first checkpoint"
    return "stopped", f"at step {state.step:,}{total}"


def _comparison(folder: Path, record: Mapping[str, Any]) -> ListedRun:
    """A comparison, by what its techniques have come to."""
    techniques = [folder / str(method) for method in record["settings"].get("methods", ())]
    runs = [look_at(one) for one in techniques if (one / RUN).exists()]
    complete = sum(run.status == "complete" for run in runs)
    seconds = sum(run.record.get("result", {}).get("train_seconds", 0.0) for run in runs)
    shown = {**record, "method": "comparison", "result": {"train_seconds": seconds}}
    shown["started"] = min((run.record["started"] for run in runs if "started" in run.record), default=None)
    process, done = holder(folder), f"{complete} of {len(techniques)} techniques are complete"
    if process is not None:
        return ListedRun(folder, "running", f"{process}, {done}", shown)
    try:
        table = _Table.model_validate_json((folder / "compare.json").read_bytes(), strict=True)
    except FileNotFoundError:
        return ListedRun(folder, "stopped", done, shown)
    except pydantic.ValidationError as error:
        return ListedRun(folder, "broken", str(_odd(folder / "compare.json", error)), shown)
    except OSError as error:
        return ListedRun(folder, "broken", f"compare.json cannot be read ({error})", shown)
    best = next((row for row in table.rows if row.method == table.recommended), None)
    if best is None:
        return ListedRun(folder, "complete", "none is recommended", shown)
    shown["result"] |= {"metric": table.metric, "score": best.score}
    return ListedRun(folder, "complete", f"{best.method} is recommended", shown)


def _parts(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A record's parts, each a name and a value for what is in it."""
    own = record.get(str(record.get("method")), {})
    own = own if isinstance(own, dict) else {}
    said_elsewhere = ("adapter", "scores", "intervals")
    result = {name: value for name, value in record.get("result", {}).items() if name not in said_elsewhere}
    return {
        "settings": {"method": record.get("method"), **record.get("settings", {}), **own},
        "base": record.get("base", {}),
        "data": {"data_sha256": record.get("data_sha256")},
        "environment": record.get("environment", {}),
        "resumed": {"resumed_in": resumed_elsewhere(record)},
        "repository": record.get("repository", {}),
        "result": {**result, **record.get("result", {}).get("scores", {})},
    }


def _same_adapters(one: Path, other: Path) -> bool | None:
    """Whether the trained weights are equal to the bit; None where one has none."""
    paths = [run / "adapter" / WEIGHTS for run in (one, other)]
    return sha256_of(paths[0]) == sha256_of(paths[1]) if all(path.is_file() for path in paths) else None
