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
import resource
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from pathlib import Path

import sklearn.linear_model  # noqa: F401 - loaded once here, not in every family's process
import torch
import transformers
from family_checks import TOLERANCE, Cell, Checks, run
from tiny_families import families, make

import capotune.runs.convert
import capotune.runs.run  # noqa: F401

TABLE = Path(__file__).parents[1] / "docs" / "families.md"
SECONDS = 120
"""Of a processor's time, for one family."""
LONGEST = 1800
"""Seconds by the clock, on a busy machine."""
Result = dict[str, Cell]
_SPARSE = (
    "its attention takes the best keys by score, and equal scores, which random weights have, fall otherwise in a "
    "batch; with all keys taken there is no difference"
)
_FUSED = (
    "linear weights that are stored fused, such as query, key and value in one tensor, are quantized apart as they are "
    "loaded, and the written model leaves them whole"
)
REASONS = {
    **dict.fromkeys(("axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4"), _SPARSE),
    **dict.fromkeys(("gte", "jina_embeddings_v3", "nomic_bert"), _FUSED),
    "inkling2_text": "a few weights are stored under names that 4 bits have no place beside, so the written model "
    "leaves them whole",
}
"""Of differences."""


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
            late = time.monotonic() - started > LONGEST
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
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
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
        cells["ended"] = Cell("fault", f"not done after {LONGEST} seconds")
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
    tried = {name: cells for name, cells in sorted(results.items()) if "made" not in cells}
    columns = list(dict.fromkeys(column for cells in tried.values() for column in cells))
    notes: dict[str, int] = {}
    rows = [[name, *(_mark(name, cells.get(column), notes) for column in columns)] for name, cells in tried.items()]
    lines = [["family", *columns], ["---"] * (len(columns) + 1), *rows]
    words = [f"{number}. {text}" for text, number in notes.items()]
    left_out = [f"- {name}: {cells['made'].words}" for name, cells in sorted(results.items()) if "made" in cells]
    return "\n".join(
        [
            _INTRODUCTION,
            f"{summary(tried)}.\n",
            *(f"| {' | '.join(line)} |" for line in lines),
            "\n## Words\n",
            *words,
            "\n## Not tried\n\nNo tiny model of these could be made; what Transformers or the script said:\n",
            *left_out,
            "",
        ]
    )


def _mark(name: str, cell: Cell | None, notes: dict[str, int]) -> str:
    if cell is None:
        return ""
    if cell.outcome == "works":
        return "✓"
    reason = f": {REASONS[name]}" if cell.outcome == "differs" and name in REASONS else ""
    number = notes.setdefault(f"{cell.outcome}: {cell.words}{reason}", len(notes) + 1)
    return f"{cell.outcome} [{number}](#words)"


_INTRODUCTION = f"""# Families of models

What Capotune does with each family of Transformers {transformers.__version__}, on tiny models with random weights, as
`python scripts/sweep_families.py` finds it.

✓: it works, and each answer is within {TOLERANCE:g} of what Transformers computes of one row at a time.

- *evaluate*: the base's loss. *generate*: prompts of three lengths in a batch, one by one, and by Transformers.
- *text: …*, *labels: …*: trained a few steps and read back; the run's score is the stored adapter's, row by row. A soft
  prompt for text is also put before Transformers' own model as `inputs_embeds`, a deep one's keys and values into its
  cache, and a head's features are those of Transformers' hidden states.
- *merge*: the merged model in Transformers scores as the adapter did. *quantize*: the written 4 bits are read as the
  base that is quantized on load.
- *refused*: one message says why and what to do. *differs*: by how much, and why. An empty cell was not tried.
"""


if __name__ == "__main__":
    main()
