"""A recorded run made again, and compared with what it left."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from capotune.engine.recorded import STORED_STATES
from capotune.errors import OutputError
from capotune.events import Event, Reporter, Stage, Warned
from capotune.files import check_free, growing_folder
from capotune.memory_table import MemoryTable
from capotune.run_folder import RUN, as_json, is_complete, read_comparison, read_run
from capotune.runs.circumstances import now
from capotune.runs.listing import checked_record, compare_runs
from capotune.runs.resume import check_same, run_settings
from capotune.runs.run import complete, prepare, record_of

__all__ = ["reproduce"]

_GO_ON = "Go on with it first (`capo resume`), or name another."


def reproduce(
    run: Path, out: Path | None, report: Reporter, *, rows: Mapping[str, MemoryTable], trust_remote_code: bool
) -> dict[str, Any]:
    """Train as ``run`` records it, into ``out`` or a temporary folder, and compare; of a comparison each technique.

    Returns what ``compare_runs`` does, the recorded run first, and ``same``: whether weights, scores and losses are
    equal to the bit; of a comparison ``same``, whether all are, and ``techniques``, that by their names. One that did
    not finish is left out, which ``Warned`` says. Raises ``OutputError`` where nothing complete is, ``DataError`` and
    ``ModelError`` when data or base are not what they were, and as ``run`` does.
    """
    comparison = read_comparison(run)
    if comparison is None:
        return _run(run, out, report, rows, trust_remote_code)
    techniques = {name: run / name for name in comparison["settings"]["methods"]}
    complete = {name: folder for name, folder in techniques.items() if is_complete(folder)}
    if not complete:
        raise OutputError(f"no technique of the comparison in {run} is complete.", advice=_GO_ON)
    if out is not None:
        check_free(out)
    for name in [name for name in techniques if name not in complete]:
        report(Warned(text=f"{name} did not finish in {run} and is left out."))
    found = {
        name: _run(folder, out and out / name, partial(_told, report, name), rows, trust_remote_code)
        for name, folder in complete.items()
    }
    return {"same": all(one["same"] for one in found.values()), "techniques": found}


def _told(report: Reporter, method: str, event: Event) -> None:
    """Report an event of one technique."""
    report(replace(event, method=method))


def _run(
    run: Path, out: Path | None, report: Reporter, rows: Mapping[str, MemoryTable], trust_remote_code: bool
) -> dict[str, Any]:
    record = checked_record(run)
    if "result" not in record:
        raise OutputError(f"the run in {run} is not complete.", advice=_GO_ON)
    if out is not None:
        check_free(out)
        return _again(run, record, out, report, rows, trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="capo-reproduce-") as folder:
        return _again(run, record, Path(folder) / "run", report, rows, trust_remote_code)


def _again(
    run: Path,
    before: dict[str, Any],
    out: Path,
    report: Reporter,
    rows: Mapping[str, MemoryTable],
    trust_remote_code: bool,
) -> dict[str, Any]:
    settings, method = run_settings(before, run, rows, trust_remote_code)
    settings = settings.model_copy(update={"out": out, "report_to": (), "cache": False})
    report(Stage(text="reading data"))
    stored_states = before["result"].get(STORED_STATES)
    prepared = replace(prepare(settings, method, report), stored_states=stored_states)
    record = record_of(prepared, False, report)
    check_same(before, record, run)
    record |= {"started": now(), "settings_from": before.get("settings_from", {})}
    with growing_folder(out, {RUN: as_json(record)}, keep=lambda: False):
        complete(prepared, record, None, report)
    return _compared(run, out)


def _compared(run: Path, again: Path) -> dict[str, Any]:
    found = compare_runs(run, again)
    found["differing"].pop("settings", None)  # but for where it is, and that nothing comes from the cache
    scores = [read_run(one)["result"]["scores"] for one in (run, again)]
    losses = found["losses"]
    same = bool(found["adapters"]) and scores[0] == scores[1] and (losses is None or losses["equal"])
    return {"same": same, "scores": scores, **found}
