"""Go on with a run that was stopped: everything it needs stands in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from capotune import methods
from capotune.device import pick_device
from capotune.engine.checkpoint import load_checkpoint
from capotune.engine.state import draws_on
from capotune.errors import DataError, ModelError, OutputError
from capotune.events import Finished, Reporter, Stage, alive, ignore
from capotune.files import check_own, full_disk_is_said, remove_partial
from capotune.folder_lock import locked
from capotune.memory_table import MemoryTable
from capotune.models.base import find
from capotune.run_folder import CHECKPOINTS, RUN, read_run, recorded_settings, tidy
from capotune.runs.circumstances import CIRCUMSTANCES
from capotune.runs.listing import checked_record
from capotune.runs.run import SCORES_BASE, base_record, complete, prepare, record_of
from capotune.settings import TrainingSettings, TrainSettings, build

__all__ = ["check_base", "check_inputs", "check_same", "resume", "run_settings"]

AS_IT_WAS = "Bring back what it was, or begin anew in another `out`: a run goes on exactly or not at all."


def resume(
    out: Path,
    report: Reporter = ignore,
    *,
    rows: Mapping[str, MemoryTable] | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Go on with the run in ``out`` to the same bits as if it had never stopped; returns what ``run.json`` holds. Of a
    run that is complete nothing is done again.

    Args:
        out: the run's folder.
        report: called with the events.
        rows: what the settings ``data`` and ``test`` held, where that was rows in memory.
        trust_remote_code: whether the run may have it, if it had.

    Raises ``OutputError`` where no run is, another process works on it, or it began on another kind of device,
    ``DataError`` and ``ModelError`` when data or base are not what they were, and whatever ``run`` raises.
    """
    read_run(out)
    check_own(out)
    with locked(out), full_disk_is_said(out):
        before = checked_record(out)
        if "result" in before:
            tidy(out)
            report(Finished(result=before["result"]))
            return before
        settings, method = run_settings(before, out, rows or {}, trust_remote_code)
        state = load_checkpoint(out / CHECKPOINTS, report)
        if state is not None and not draws_on(state, pick_device()):
            raise OutputError(
                f"the run in {out} was started on another kind of device than {pick_device()}, the one that is here.",
                advice="Go on where it was started, or begin anew in another `out`.",
            )
        report(Stage(text="reading data"))
        stored_states = state.stored_states if state else None
        prepared = replace(prepare(settings, method, report), stored_states=stored_states)
        record = record_of(prepared, before.get(SCORES_BASE, False), report)
        check_same(before, record, out)
        since = ("started", "settings_from", *(CIRCUMSTANCES if state else ()))
        record |= {name: before[name] for name in since if name in before}
        remove_partial(out)
        return complete(prepared, record, state, report)


def run_settings(
    record: dict[str, Any], out: Path, rows: Mapping[str, MemoryTable], trust_remote_code: bool
) -> tuple[TrainSettings, TrainingSettings]:
    """The settings that the run was started with."""
    values = recorded_settings(record, out, rows, trust_remote_code)
    where = str(out / RUN)
    own = build(methods.get(record["method"]).Settings, record[record["method"]], where)
    return build(TrainSettings, values, where), own


def check_base(out: Path, report: Reporter = ignore) -> None:
    """``ModelError`` when the base of the run in ``out`` is not what it was when the run was started."""
    before = read_run(out)
    name, trusted = before["settings"]["model"], before["settings"].get("trust_remote_code", False)
    _check_same_base(before, base_record(find(name, trust_remote_code=trusted, report=report), report), out)


def check_inputs(
    out: Path, rows: Mapping[str, MemoryTable], trust_remote_code: bool, report: Reporter = ignore
) -> None:
    """``DataError`` or ``ModelError`` when data, further files or base of the run in ``out`` are not what they were;
    the data is read for it. The arguments are those of ``resume``."""
    before = checked_record(out)
    prepared = prepare(*run_settings(before, out, rows, trust_remote_code), alive(report))
    check_same(before, record_of(prepared, False, report), out)


def check_same(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """Data, further files and base must be what they were when the run was started."""
    since = f"is another than when the run in {out} was started"
    was, is_now = before["data_sha256"], now["data_sha256"]
    if was != is_now:
        hashes = f"its hash is {_short(is_now)} and was {_short(was)}"
        raise DataError(f"the data {since}: {hashes}.", where=_name(now["settings"]["data"]), advice=AS_IT_WAS)
    for name, value in now["files_sha256"].items():
        if before.get("files_sha256", {}).get(name, value) != value:
            raise DataError(f"its content {since}.", setting=name, advice=AS_IT_WAS)
    _check_same_base(before, now["base"], out)


def _check_same_base(before: dict[str, Any], base: dict[str, Any], out: Path) -> None:
    for name, value in base.items():
        if before["base"].get(name) != value:
            raise ModelError(
                f"the base is another than when the run in {out} was started: its {name} is {value} now and was "
                f"{before['base'].get(name)}.",
                where=base["name"],
                advice=AS_IT_WAS,
            )


def _short(value: str) -> str:
    """Both ends: one half may be of the training rows, the other of the test rows."""
    return f"{value[:8]}…{value[-8:]}"


def _name(data: Any) -> str:
    return str(data["name"] if isinstance(data, dict) else data)
