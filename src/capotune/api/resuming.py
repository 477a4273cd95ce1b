"""Go on with what was stopped; ask a run for a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from capotune.device import collector_at_rest
from capotune.errors import OutputError
from capotune.events import CancelToken, Reporter, ignore

__all__ = ["checkpoint", "methods_of", "request_checkpoint", "resume"]

_POLL_SECONDS = 0.05


def resume(
    out: str | Path,
    *,
    data: Any = None,
    test: Any = None,
    trust_remote_code: bool = False,
    report: Reporter = ignore,
    cancel: CancelToken | None = None,
) -> dict[str, Any]:
    """Go on with a run that was stopped, to the same bits as if it never had been; returns what ``train`` does.

    Args:
        out: the run's folder. All settings stand in it.
        data: the rows, where they were given in memory; ``test`` the same. Other rows are refused.
        trust_remote_code: to be given again where the run had it.
        report: called with progress events (``capotune.events``).
        cancel: stops it from another thread.

    Of a run that is complete nothing is done again. Raises ``OutputError`` where no run is or another process works on
    it, ``DataError`` and ``ModelError`` when data or base are not what they were, and as ``train``.
    """
    with collector_at_rest():
        from capotune.runs import resume as runs

    return runs.resume(
        Path(out),
        (cancel or CancelToken()).watching(report),
        rows=_rows(data, test),
        trust_remote_code=trust_remote_code,
    )


def methods_of(out: str | Path) -> tuple[str, ...]:
    """The methods that ``resume`` goes on with. Raises ``OutputError`` where no run is."""
    from capotune.runs import resume as runs

    return (runs.read_record(Path(out))["method"],)


def request_checkpoint(out: str | Path) -> None:
    """Ask the process that trains in the folder ``out`` for a checkpoint; returns at once."""
    from capotune.engine import saving

    saving.request_checkpoint(Path(out))


def checkpoint(out: str | Path) -> Path:
    """Ask the process that trains in the folder ``out`` for a checkpoint, wait for it, and return its folder.

    It is taken after the step in hand. Raises ``OutputError`` where no process trains.
    """
    from capotune.engine.checkpoint import checkpoints
    from capotune.engine.saving import CHECKPOINTS, is_requested
    from capotune.folder_lock import holder

    out = Path(out)
    asked = False
    while holder(out) is not None:
        if not asked:
            request_checkpoint(out)
            asked = True
        elif not is_requested(out):
            return checkpoints(out / CHECKPOINTS)[-1]
        time.sleep(_POLL_SECONDS)
    raise OutputError(
        f"the run in {out} ended before its next step." if asked else f"no process trains in {out}.",
        advice="Its last checkpoint stands in `checkpoints` there, unless the run is complete.",
    )


def _rows(data: Any, test: Any) -> dict[str, Any]:
    from capotune.data.readers import as_source

    given = {"data": data, "test": test}
    return {name: as_source(value, name) for name, value in given.items() if value is not None}
