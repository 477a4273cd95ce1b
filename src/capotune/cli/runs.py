"""``capo runs`` and ``capo reproduce``: what runs there are, what differs between two, and one of them made again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from capotune.cli.console import terminal
from capotune.cli.display import score_text, watch
from capotune.cli.flags import Json, parse
from capotune.cli.grid import two_columns
from capotune.errors import cut
from capotune.settings import Settings

_SHOWN = 60
_TITLES = {
    "settings": "settings", "base": "base", "data": "data", "environment": "machine and versions",
    "resumed": "gone on with elsewhere", "repository": "your repository", "result": "result",
}  # fmt: skip


class Runs(Settings):
    """List the runs below a folder, or say what differs between two."""

    folder: tyro.conf.Positional[Path] = Path()
    """Folder to search, up to three folders deep. Left out: the current one."""
    compare: tuple[Path, Path] | None = None
    """Two run folders: what differs between them."""
    as_json: Json = False
    """Print one JSON object a run, or one for `compare`."""


def runs(rest: list[str]) -> int:
    """Run the command; returns the exit code."""
    given = parse(Runs, rest, "capo runs")
    from capotune import api

    if given.compare is not None:
        found = api.compare_runs(*given.compare)
        print(json.dumps(found, ensure_ascii=False)) if given.as_json else show_differences(found)
        return 0
    listed = [run.as_json() for run in api.list_runs(given.folder)]
    if given.as_json:
        for run in listed:
            print(json.dumps(run, ensure_ascii=False))
    elif listed:
        _show(listed, given.folder)
    else:
        print(f"no run in {given.folder}.")
    return 0


def _show(listed: Sequence[Mapping[str, Any]], folder: Path) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("run", "method", "status", "score", "train (s)", "started"):
        table.add_column(heading, overflow="fold", no_wrap=heading != "status", min_width=9)
    for run in listed:
        shown = Path(run["folder"])
        name = shown.relative_to(folder) if shown != folder else shown
        known = run["metric"] is not None and run["score"] is not None
        table.add_row(
            str(name),
            run["method"] or "",
            " ".join(part for part in (run["status"], run["details"]) if part),
            score_text(run["metric"], run["score"]) if known else "",
            f"{run['train_seconds']:,.1f}" if run["train_seconds"] is not None else "",
            (run["started"] or "")[5:16].replace("T", " "),
        )
    terminal().print(table, highlight=False)


def show_differences(found: Mapping[str, Any]) -> None:
    """A line for each value that differs, under its part."""
    grid = two_columns()
    for part, values in found["differing"].items():
        grid.add_row(_TITLES[part], "")
        for name, (one, other) in values.items():
            grid.add_row(f"  {name}", f"{_short(one)} against {_short(other)}")
    if not found["differing"]:
        grid.add_row("records", "equal")
    if found["adapters"] is not None:
        grid.add_row("adapter", "equal to the bit" if found["adapters"] else "other weights")
    if found["losses"] is not None:
        grid.add_row("losses", loss_words(found["losses"]))
    terminal().print(grid, highlight=False)


def loss_words(losses: Mapping[str, Any]) -> str:
    """How two loss curves go together, in words."""
    if losses["equal"]:
        return f"equal to the bit in all {losses['steps']:,} steps"
    if losses["differs_from"] is None:
        return f"equal to the bit in the {losses['steps']:,} steps that both took"
    first = losses["differs_from"]
    where = "from the first step on" if first == 1 else f"equal up to step {first - 1:,}, then"
    return f"{where} up to {losses['largest']:.2g} apart ({losses['steps']:,} steps)"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "-"
    return "-" if value is None else cut(str(value), _SHOWN)


class Reproduce(Settings):
    """Make a recorded run, or those of a comparison, again, and say whether weights, scores and losses are the same to
    the bit."""

    run: tyro.conf.Positional[Path]
    """Folder of a run or a comparison that is complete."""
    out: Path | None = None
    """Folder for what is made again. Must not exist. Left out: a temporary one, which is removed."""
    trust_remote_code: bool = False
    """Allow the model to run its own Python code on this machine, where the run had it."""
    as_json: Json = False
    """Print one JSON object."""


def reproduce(rest: list[str]) -> int:
    """Run the command; returns the exit code: 1 where something differs."""
    given = parse(Reproduce, rest, "capo reproduce")
    from capotune import api

    with watch(api.methods_of(given.run)) as report:
        found = api.reproduce(given.run, out=given.out, trust_remote_code=given.trust_remote_code, report=report)
    if given.as_json:
        print(json.dumps(found, ensure_ascii=False))
    elif "techniques" in found:
        for name, one in found["techniques"].items():
            print(f"\n{name}")
            _show_reproduced(one)
    else:
        _show_reproduced(found)
    return 0 if found["same"] else 1


def _show_reproduced(found: Mapping[str, Any]) -> None:
    """What is equal and, where something is not, what differs about the machine."""
    grid = two_columns()
    grid.add_row("weights", "equal to the bit" if found["adapters"] else "other bits")
    one, again = found["scores"]
    grid.add_row("scores", "equal" if one == again else "; ".join(_scores(one, again)))
    grid.add_row("losses", loss_words(found["losses"]) if found["losses"] else "none: it is not trained in steps")
    console = terminal()
    console.print(grid, highlight=False)
    if found["same"]:
        console.print("\nThe run is reproduced to the bit.")
        return
    elsewhere, _ = found["differing"].get("resumed", {}).get("resumed_in", ([], []))
    if elsewhere:
        console.print("\nThe recorded run was gone on with elsewhere, so that other bits are to be expected:")
        console.print(*(f"  {words}" for words in elsewhere), sep="\n", highlight=False)
    differing = found["differing"].get("environment", {})
    if not differing and not elsewhere:
        console.print("\nNothing that the record holds of the machine differs. Is the cache, or a library, another?")
        return
    if differing:
        _show_machines(differing, console)


def _show_machines(differing: Mapping[str, Sequence[str]], console: Console) -> None:
    console.print("\nOther bits are to be expected where these differ (docs/determinism.md):")
    machine = two_columns()
    for name, (there, here) in differing.items():
        machine.add_row(f"  {name}", f"{_short(there)} there, {_short(here)} here")
    console.print(machine, highlight=False)


def _scores(one: Mapping[str, float], again: Mapping[str, float]) -> Sequence[str]:
    return [f"{score_text(name, value)} against {score_text(name, again[name])}" for name, value in one.items()]
