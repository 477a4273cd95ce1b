"""A recorded run made again, and compared with what it left."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capotune.errors import OutputError
from capotune.events import Reporter, Stage
from capotune.files import check_free, growing_folder
from capotune.memory_table import MemoryTable
from capotune.run_folder import RUN, as_json, read_run
from capotune.runs.circumstances import now
from capotune.runs.listing import compare_runs
from capotune.runs.resume import check_same, run_settings
from capotune.runs.run import complete, prepare, record_of

__all__ = ["reproduce"]


def reproduce(
    run: Path, out: Path | None, report: Reporter, *, rows: Mapping[str, MemoryTable], trust_remote_code: bool
) -> dict[str, Any]:
    """Train as ``run`` records it, into ``out`` or a temporary folder, and compare.

    Returns what ``compare_runs`` does, the recorded run first, and ``same``: whether weights, scores and losses are
    equal to the bit. Raises ``OutputError`` where no complete run is, ``DataError`` and ``ModelError`` when data or
    base are not what they were, and as ``run`` does.
    """
    record = read_run(run)
    if "result" not in record:
        raise OutputError(
            f"the run in {run} is not complete.", advice="Go on with it first (`capo resume`), or name another."
        )
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
    prepared = prepare(settings, method, report)
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
