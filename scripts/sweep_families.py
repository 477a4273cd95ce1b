"""Try every causal and every encoder family of the installed Transformers, and write what works into docs/families.md.

    python scripts/sweep_families.py                              # all of them, on every core
    python scripts/sweep_families.py gptj falcon --jobs 1         # some, shown and not written
    python scripts/sweep_families.py --list

Of each family a tiny model with random weights is made (``tiny_families``) and everything that Capotune does with a
base is done with it (``family_checks``), in a process of its own with a limit of time, so that a crash is a cell of the
table too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from pathlib import Path

import sklearn.linear_model  # noqa: F401 - loaded once here, not in every family's process
import torch
import transformers
from family_checks import Cell, Checks, run
from tiny_families import families, make

import capotune.runs.convert
import capotune.runs.run  # noqa: F401

TABLE = Path(__file__).parents[1] / "docs" / "families.md"
SECONDS = 240
"""Limit for one family."""
Result = dict[str, Cell]


def main() -> None:
    """Run the families that are named, or all, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="all when left out")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="families at a time")
    parser.add_argument("--only", nargs="*", default=[], help="columns, such as evaluate 'labels: lora'")
    parser.add_argument("--keep", type=Path, help="folder for the models and adapters; else they are removed")
    parser.add_argument("--out", type=Path, help="where the table is written; docs/families.md for a whole run")
    parser.add_argument("--list", action="store_true", help="the families, and nothing else")
    options = parser.parse_args()
    if options.list:
        print(*(f"{name:30} {kind}" for name, kind in families().items()), sep="\n")
        return
    names = options.families or list(families())
    with tempfile.TemporaryDirectory(prefix="capotune-families-") as temporary:
        results = dict[str, Result]()
        try:
            sweep(names, options.keep or Path(temporary), options.jobs, options.only, results)
        except KeyboardInterrupt:
            print("stopped: the table holds the families that were done")
    out = options.out or (None if options.families or options.only else TABLE)
    if out is not None:
        out.write_text(table(results), encoding="utf-8")
    print(summary(results))


def sweep(names: list[str], folder: Path, jobs: int, only: list[str], found: dict[str, Result]) -> None:
    """Put each family's cells into ``found`` as it is done; ``jobs`` families at a time."""
    waiting, running = list(names), dict[str, tuple[BaseProcess, float]]()
    context = multiprocessing.get_context("fork")
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            process = context.Process(target=_family, args=(name, folder / name, only), daemon=True)
            process.start()
            running[name] = process, time.monotonic()
        for name, (process, started) in list(running.items()):
            late = time.monotonic() - started > SECONDS
            if late:
                process.kill()
            if late or not process.is_alive():
                process.join()
                found[name] = _read(folder / name, process.exitcode, late)
                print(shown(name, found[name], time.monotonic() - started), flush=True)
                del running[name]
        time.sleep(0.05)


def _family(name: str, folder: Path, only: list[str]) -> None:
    """In a process of its own: make the model, run the checks, write each cell as it is known."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    folder.mkdir(parents=True)
    (folder / "stderr").touch()
    os.dup2(os.open(folder / "stderr", os.O_WRONLY), 2)
    cells: Result = {}

    def record(column: str, cell: Cell) -> None:
        cells[column] = cell
        (folder / "cells.json").write_text(json.dumps({key: asdict(one) for key, one in cells.items()}))

    made = run(lambda: (make(name, folder / "model"), 0.0)[1], folder)
    if made.outcome != "works":
        record("made", made)
        return
    checks = Checks(folder / "model", folder)
    writes = checks.base.writes_text
    for column, check in checks.all().items():
        of_text = column.partition(":")[0] in ("evaluate", "generate", "text", "merge")
        if (not only or column in only) and (writes or not of_text):
            record(column, run(check, folder / "model"))


def _read(folder: Path, exit_code: int | None, late: bool) -> Result:
    path = folder / "cells.json"
    cells = {column: Cell(**one) for column, one in json.loads(path.read_text()).items()} if path.is_file() else {}
    if late:
        cells["ended"] = Cell("fault", f"not done after {SECONDS} seconds")
    elif exit_code:
        cells["ended"] = Cell("fault", f"the process ended with {exit_code}")
    return cells


def shown(name: str, cells: Result, seconds: float) -> str:
    """One family's cells for the terminal."""
    marks = {"works": "✓", "refused": "r", "differs": "≠", "fault": "✗"}
    lines = [f"{name:24} {''.join(marks[cell.outcome] for cell in cells.values())}  {seconds:.0f} s"]
    lines += [f"    {column}: {cell.outcome}: {cell.words}" for column, cell in cells.items() if cell.words]
    return "\n".join(lines)


def summary(results: dict[str, Result]) -> str:
    """How many cells came to what."""
    count = Counter(cell.outcome for cells in results.values() for cell in cells.values())
    return f"{len(results)} families: " + ", ".join(f"{number} {outcome}" for outcome, number in count.most_common())


def table(results: dict[str, Result]) -> str:
    """The page: families by rows, checks by columns, words below."""
    columns = list(dict.fromkeys(column for cells in results.values() for column in cells))
    notes: dict[str, int] = {}
    lines = []
    for name, cells in sorted(results.items()):
        row = [_mark(cells.get(column), notes) for column in columns]
        lines.append(f"| {name} | {' | '.join(row)} |")
    head = f"| family | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}"
    words = "\n".join(f"{number}. {text}" for text, number in notes.items())
    return f"{_INTRODUCTION}\n{summary(results)}.\n\n{head}\n" + "\n".join(lines) + f"\n\n## Words\n\n{words}\n"


def _mark(cell: Cell | None, notes: dict[str, int]) -> str:
    if cell is None:
        return ""
    if cell.outcome == "works":
        return "✓"
    number = notes.setdefault(f"{cell.outcome}: {cell.words}", len(notes) + 1)
    return f"{cell.outcome} [{number}](#words)"


_INTRODUCTION = f"""# Families of models

What Capotune does with each family of Transformers {transformers.__version__}, tried on tiny models with random weights
by `python scripts/sweep_families.py`.
"""


if __name__ == "__main__":
    main()
