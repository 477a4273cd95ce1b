"""Go on with what was stopped; ask a run for a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capotune import run_folder
from capotune.api.comparison import resume_comparison
from capotune.api.trackers import names_in, recorded_config, tracked
from capotune.device import collector_at_rest
from capotune.errors import OutputError
from capotune.events import CancelToken, Reporter, ignore
from capotune.folder_lock import holder
from capotune.run_folder import CHECKPOINTS, checkpoints, is_requested, read_comparison, read_run

if TYPE_CHECKING:
    from capotune.report import Comparison

__all__ = ["checkpoint", "methods_of", "request_checkpoint", "resume", "rows_in_memory"]

_POLL_SECONDS = 0.05


def resume(
    out: str | Path,
    *,
    data: Any = None,
    test: Any = None,
    trust_remote_code: bool = False,
    report: Reporter = ignore,
    cancel: CancelToken | None = None,
) -> dict[str, Any] | Comparison:
    """Go on with a run or a comparison that was stopped, to the same bits as if it never had been; returns what
    ``train`` or ``compare`` does.

    Args:
        out: its folder. All settings stand in it.
        data: the rows, where they were given in memory; ``test`` the same. Other rows are refused.
        trust_remote_code: to be given again where the run had it.
        report: called with progress events (``capotune.events``).
        cancel: stops it from another thread.

    What is complete is not done again; a technique that failed is tried once more. Raises ``OutputError`` where there
    is nothing to go on with or another process works on it, ``DataError`` and ``ModelError`` when data or base are not
    what they were, and as ``train``.
    """
    out, rows, cancel = Path(out), rows_in_memory(data, test), cancel or CancelToken()
    comparison = read_comparison(out)
    if comparison is not None:
        return resume_comparison(out, comparison, rows, trust_remote_code, report, cancel)
    with collector_at_rest():
        from capotune.runs import resume as runs

    before = read_run(out)
    with tracked(names_in(before), out, {None: recorded_config(before)}, cancel.watching(report)) as told:
        return runs.resume(out, told, rows=rows, trust_remote_code=trust_remote_code)


def methods_of(out: str | Path) -> tuple[str, ...]:
    """The methods that ``resume`` goes on with. Raises ``OutputError`` where nothing is that can be gone on with."""
    comparison = read_comparison(Path(out))
    return (read_run(Path(out))["method"],) if comparison is None else tuple(comparison["settings"]["methods"])


def request_checkpoint(out: str | Path) -> None:
    """Ask the process that trains in ``out``, the folder of a run or a comparison, for a checkpoint; returns at once.
    Where none trains nothing is done."""
    trains = _trains_in(Path(out))
    if trains is not None:
        run_folder.request_checkpoint(trains)


def checkpoint(out: str | Path) -> Path:
    """Ask the process that trains in ``out``, the folder of a run or a comparison, for a checkpoint, wait for it, and
    return its folder.

    It is taken after the step in hand. Raises ``OutputError`` where no process trains.
    """
    trains = _trains_in(Path(out))
    if trains is None:
        raise OutputError(f"no process trains in {out}.", advice="Name the folder of a run that is going on.")
    run_folder.request_checkpoint(trains)
    while is_requested(trains) is not None and holder(trains) is not None:
        time.sleep(_POLL_SECONDS)
    written = checkpoints(trains / CHECKPOINTS)
    if is_requested(trains) is not None or not written:  # a run that ends withdraws it, and removes its checkpoints
        raise OutputError(f"the run in {trains} ended before its next step.")
    return written[-1]


def _trains_in(out: Path) -> Path | None:
    """The folder of the run that a process works on: ``out``, or of a comparison the technique in hand."""
    folders = [out] if read_comparison(out) is None else [out / method for method in methods_of(out)]
    return next((folder for folder in folders if holder(folder) is not None), None)


def rows_in_memory(data: Any, test: Any) -> dict[str, Any]:
    """The rows that were given, as settings hold them."""
    from capotune.data.readers import as_source

    given = {"data": data, "test": test}
    return {name: as_source(value, name) for name, value in given.items() if value is not None}
