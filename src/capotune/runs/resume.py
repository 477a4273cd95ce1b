"""Go on with a run that was stopped: everything it needs stands in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capotune import methods
from capotune.engine.checkpoint import load_checkpoint
from capotune.engine.saving import CHECKPOINTS
from capotune.errors import DataError, ModelError, OutputError, SettingError
from capotune.events import Finished, Reporter, Stage, ignore
from capotune.files import full_disk_is_said, remove_partial
from capotune.folder_lock import locked
from capotune.memory_table import MemoryTable
from capotune.runs.run import RUN, SCORES_BASE, complete, prepare, record_of, tidy
from capotune.settings import TrainingSettings, TrainSettings, build

__all__ = ["resume"]


def resume(
    out: Path,
    report: Reporter = ignore,
    *,
    rows: Mapping[str, MemoryTable] | None = None,
    trust_remote_code: bool = False,
    patience: float = 0.0,
) -> dict[str, Any]:
    """Go on with the run in ``out`` to the same bits as if it had never stopped; returns what ``run.json`` holds. Of a
    run that is complete nothing is done again.

    Args:
        out: the run's folder.
        report: called with the events.
        rows: what the settings ``data`` and ``test`` held, where that was rows in memory.
        trust_remote_code: whether the run may have it, if it had.
        patience: seconds to wait for another process that works there.

    Raises ``OutputError`` where no run is or another process works on it, ``DataError`` and ``ModelError`` when data or
    base are not what they were, and whatever ``run`` raises.
    """
    before = read_record(out)
    with locked(out, patience), full_disk_is_said(out):
        if "result" in before:
            tidy(out)
            report(Finished(result=before["result"]))
            return before
        settings, method = _recorded(before, out, rows or {}, trust_remote_code)
        state = load_checkpoint(out / CHECKPOINTS, report)
        report(Stage(text="reading data"))
        prepared = prepare(settings, method, report)
        record = record_of(prepared, before.get(SCORES_BASE, False), report)
        _check_same(before, record, out)
        remove_partial(out)
        return complete(prepared, record, state, report)


def read_record(out: Path) -> dict[str, Any]:
    """What stands in the ``run.json`` of ``out``. Raises ``OutputError`` where none is or it is none."""
    path = out / RUN
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OutputError(
            f"no run in {out}: there is no {RUN}.", advice="Name the folder that training wrote."
        ) from None
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot be read ({error}).", where=str(path)) from None
    if not (isinstance(record, dict) and isinstance(record.get("settings"), dict) and "method" in record):
        raise OutputError("is no record of a run.", where=str(path))
    return record


def _recorded(
    record: dict[str, Any], out: Path, rows: Mapping[str, MemoryTable], trust_remote_code: bool
) -> tuple[TrainSettings, TrainingSettings]:
    """The settings that the run was started with."""
    values = with_rows(record["settings"], rows, out) | {"out": out}
    check_trust(values, trust_remote_code, out)
    where = str(out / RUN)
    own = build(methods.get(record["method"]).Settings, record[record["method"]], where)
    return build(TrainSettings, values, where), own


def with_rows(settings: dict[str, Any], rows: Mapping[str, MemoryTable], out: Path) -> dict[str, Any]:
    """Recorded ``settings``, with rows in memory, which a record only names, in their place."""
    for name in ("data", "test"):
        if isinstance(settings.get(name), dict) and name not in rows:
            raise SettingError(
                f"the run in {out} read {settings[name].get('name', 'rows in memory')}.",
                setting=name,
                advice=f"Give the same rows again in Python: capotune.resume({str(out)!r}, {name}=…).",
            )
    return {**settings, **rows}


def check_trust(settings: dict[str, Any], trust_remote_code: bool, out: Path) -> None:
    """``SettingError`` where a record asks for a model's own code and the user does not."""
    if settings.get("trust_remote_code") and not trust_remote_code:
        raise SettingError(
            f"the run in {out} lets its model run its own Python code on this machine.",
            setting="trust_remote_code",
            advice="Give it again if you trust that model and whoever made this folder.",
        )


def _check_same(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """Data, further files and base must be what they were when the run was started."""
    advice = "Bring back what it was, or begin anew in another `out`: a run goes on exactly or not at all."
    if before["data_sha256"] != now["data_sha256"]:
        raise DataError(
            f"the data is another than when the run in {out} was started.",
            where=_name(now["settings"]["data"]),
            advice=advice,
        )
    for name, value in now["files_sha256"].items():
        if before.get("files_sha256", {}).get(name, value) != value:
            raise DataError(
                f"its content is another than when the run in {out} was started.", setting=name, advice=advice
            )
    for name, value in now["base"].items():
        if before["base"].get(name) != value:
            raise ModelError(
                f"the base is another than when the run in {out} was started: its {name} is {value} now and was "
                f"{before['base'].get(name)}.",
                where=now["base"]["name"],
                advice=advice,
            )


def _name(data: Any) -> str:
    return str(data["name"] if isinstance(data, dict) else data)
