"""The main job on real data: all four techniques with defaults alone, on the tickets and on Banking77.

Writes ``results/compare-tickets.json`` and, where ``../shared/data`` is there, ``results/compare-banking77.json``: the
content of ``compare.json`` with the machine. Run with nothing else on the machine: the seconds are wall time.

    python benchmarks/compare.py                           both data sets, all techniques
    python benchmarks/compare.py banking77 prompt-tuning   one technique again; the other rows stay as they are
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import capotune
from capotune.methods import names
from capotune.report import Comparison, recommend

HERE = Path(__file__).parent
BANKING77 = HERE.parents[1] / "shared" / "data" / "banking77"


def compare(name: str, methods: list[str], data: Path, test: Path | None) -> None:
    """Run ``capotune.compare`` and keep its numbers."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        capotune.compare(data=str(data), test=str(test) if test else None, out=out, methods=methods, cache=False)
        content = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    details = content.pop("details")
    content["environment"] = details["environment"]
    path = HERE / "results" / f"compare-{name}.json"
    if len(methods) < len(names()):
        content = _with_other_rows(content, json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(path)


def _with_other_rows(content: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    new = {row["method"]: row for row in content["rows"]}
    content["rows"] = [new.get(row["method"], row) for row in before["rows"]]
    content["base_score"] = before["base_score"]
    return recommend(Comparison.from_dict(content)).to_dict() | {"environment": content["environment"]}


def main() -> None:
    """Both data sets and all techniques, or those named on the command line."""
    wanted = [name for name in sys.argv[1:] if name not in names()] or ["tickets", "banking77"]
    methods = [name for name in sys.argv[1:] if name in names()] or list(names())
    if "tickets" in wanted:
        compare("tickets", methods, HERE.parent / "examples" / "support_tickets.csv", None)
    if "banking77" in wanted and BANKING77.is_dir():
        compare("banking77", methods, BANKING77 / "train.csv", BANKING77 / "test.csv")
    elif "banking77" in wanted:
        print(f"{BANKING77} is not there: Banking77 is left out", file=sys.stderr)


if __name__ == "__main__":
    main()
