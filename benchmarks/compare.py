"""The main job on real data: all four techniques with defaults alone, on the tickets and on Banking77.

Writes ``results/compare-tickets.json`` and, where ``../shared/data`` is there, ``results/compare-banking77.json``: the
content of ``compare.json`` with the machine. Run with nothing else on the machine: the seconds are wall time.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import capotune

HERE = Path(__file__).parent
BANKING77 = HERE.parents[1] / "shared" / "data" / "banking77"


def compare(name: str, data: Path, test: Path | None) -> None:
    """Run ``capotune.compare`` and keep its numbers."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        capotune.compare(data=str(data), test=str(test) if test else None, out=out, cache=False)
        content = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    details = content.pop("details")
    content["environment"] = details["environment"]
    path = HERE / "results" / f"compare-{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(path)


def main() -> None:
    """Both data sets, or those named on the command line."""
    wanted = sys.argv[1:] or ["tickets", "banking77"]
    if "tickets" in wanted:
        compare("tickets", HERE.parent / "examples" / "support_tickets.csv", None)
    if "banking77" in wanted and BANKING77.is_dir():
        compare("banking77", BANKING77 / "train.csv", BANKING77 / "test.csv")
    elif "banking77" in wanted:
        print(f"{BANKING77} is not there: Banking77 is left out", file=sys.stderr)


if __name__ == "__main__":
    main()
