"""Exchange adapters with PEFT on ten architectures, both ways, and write the differences into docs/adapters.md.

    python scripts/adapter_matrix.py            # all cells, some minutes on one core
    python scripts/adapter_matrix.py Llama BERT # some, shown and not written

The cells are those of ``tests/peft_cases.py``: small random models, every kind of adapter that is read or trained here.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import peft  # noqa: E402
import peft_cases  # noqa: E402
import transformers  # noqa: E402
from peft_cases import Cell  # noqa: E402

PAGE = ROOT / "docs" / "adapters.md"
BEGIN, END = "<!-- written by scripts/adapter_matrix.py -->", "<!-- end -->"
TASKS = {"CAUSAL_LM": "text", "SEQ_CLS": "labels"}


def main() -> None:
    """Measure every cell, or those of the named families; write the page where it was all."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    found: dict[Cell, float] = {}
    with tempfile.TemporaryDirectory(prefix="capotune-adapters-") as temporary:
        for number, cell in enumerate(peft_cases.cells()):
            if cell.reason is None and (not sys.argv[1:] or cell.family in sys.argv[1:]):
                base = peft_cases.make_base(cell.family, Path(temporary) / cell.family)
                found[cell] = cell.measure(base, Path(temporary) / str(number))
                print(f"{found[cell]:.0e}  {cell.direction}: {cell.feature}, {cell.family}, {TASKS[cell.task_type]}")
    print(f"{len(found)} cells, the largest difference {max(found.values()):.1e}")
    if not sys.argv[1:]:
        text = PAGE.read_text(encoding="utf-8")
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        versions = f"With PEFT {peft.__version__} and Transformers {transformers.__version__}."
        PAGE.write_text(f"{before}{BEGIN}\n{versions}\n\n{tables(found)}\n{END}{after}", encoding="utf-8")


def tables(found: dict[Cell, float]) -> str:
    """One for each direction and task, and the reasons of cells that cannot be."""
    reasons = sorted({cell.reason for cell in peft_cases.cells() if cell.reason is not None})
    lines = []
    for (direction, task), of_table in groupby(peft_cases.cells(), lambda cell: (cell.direction, cell.task_type)):
        shown = list(of_table)
        families = [family for family in peft_cases.FAMILIES if any(cell.family == family for cell in shown)]
        header = ["", *families]
        lines += [f"**{TASKS[task].capitalize()}, {direction}**", "", row(header), row(["---" for _ in header])]
        for feature, of_row in groupby(shown, lambda cell: cell.feature):
            lines.append(row([feature, *(_shown(cell, found, reasons) for cell in of_row)]))
        lines.append("")
    return "\n".join([*lines, *(f"{at}. {reason}" for at, reason in enumerate(reasons, 1))])


def written(page: str) -> str:
    """The part of a page that is written here, without the line of versions."""
    return page.partition(BEGIN)[2].partition(END)[0].strip().partition("\n\n")[2]


def row(texts: list[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(texts)} |"


def _shown(cell: Cell, found: dict[Cell, float], reasons: list[str]) -> str:
    return f"{found[cell]:.0e}" if cell.reason is None else f"({reasons.index(cell.reason) + 1})"


if __name__ == "__main__":
    main()
