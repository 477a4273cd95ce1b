"""What runs there are, what differs between two, and one of them made again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from capotune.device import collector_at_rest
from capotune.events import CancelToken, Reporter, ignore

if TYPE_CHECKING:
    from capotune.runs.listing import ListedRun

__all__ = ["compare_runs", "list_runs", "reproduce"]


def list_runs(folder: str | Path = ".") -> list[ListedRun]:
    """The runs in ``folder`` and up to three folders below it, those of comparisons among them.

    How far each came is found by opening its adapter or its newest checkpoint, so that a damaged one is told. Raises
    ``OutputError`` where there is no such folder.
    """
    with collector_at_rest():
        from capotune.runs import listing

    return listing.list_runs(Path(folder))


def compare_runs(one: str | Path, other: str | Path) -> dict[str, Any]:
    """What differs between two runs: ``differing`` holds, for each part of their records, the values that are not
    equal; ``adapters`` whether their weights are equal to the bit; ``losses`` how their loss curves go together.

    Raises ``OutputError`` for a folder without a run.
    """
    with collector_at_rest():
        from capotune.runs import listing

    return listing.compare_runs(Path(one), Path(other))


def reproduce(
    run: str | Path,
    *,
    out: str | Path | None = None,
    data: Any = None,
    test: Any = None,
    trust_remote_code: bool = False,
    report: Reporter = ignore,
    cancel: CancelToken | None = None,
) -> dict[str, Any]:
    """Make a recorded run again and compare: ``same`` says whether weights, scores and losses are equal to the bit, and
    the rest is as ``compare_runs`` has it, the recorded run first. Of a comparison ``techniques`` holds that of each.

    Args:
        run: the folder of a run or a comparison, complete.
        out: folder for what is made again; must not exist. Left out: a temporary one, which is removed.
        data: the rows, where they were given in memory; ``test`` the same.
        trust_remote_code: to be given again where the run had it.
        report: called with progress events (``capotune.events``).
        cancel: stops it from another thread.

    Raises ``DataError`` and ``ModelError`` when data or base are not what they were, and as ``train``.
    """
    with collector_at_rest():
        from capotune.api.resuming import rows_in_memory
        from capotune.runs import reproduce as runs

    return runs.reproduce(
        Path(run),
        None if out is None else Path(out),
        (cancel or CancelToken()).watching(report),
        rows=rows_in_memory(data, test),
        trust_remote_code=trust_remote_code,
    )
