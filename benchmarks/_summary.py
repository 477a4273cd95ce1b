"""Write ``benchmarks/README.md``, and the tables of the project's README, from ``results/*.json``. Run after a benchmark."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from capotune.files import human_bytes

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TITLES = {
    "demo": ("compare-tickets", "`examples/support_tickets.csv`, 20 intents, defaults alone"),
    "banking77": ("compare-banking77", "Banking77, 77 intents, all of train.csv and test.csv, defaults alone"),
}


def main() -> None:
    """Fill the marked places of both files."""
    readme = HERE.parent / "README.md"
    text = readme.read_text(encoding="utf-8")
    sections = ["# Benchmarks", "", "Made by `python benchmarks/_summary.py` from `results/*.json`; do not edit."]
    for marker, (name, title) in TITLES.items():
        path = RESULTS / f"{name}.json"
        if not path.is_file():
            continue
        block = comparison(json.loads(path.read_text(encoding="utf-8")), title)
        text = re.sub(f"(<!-- {marker} -->).*?(<!-- /{marker} -->)", rf"\1\n{block}\n\2", text, flags=re.DOTALL)
        sections += ["", f"## {title}", "", block, "", f"`python benchmarks/compare.py`, `results/{name}.json`."]
    for path in sorted(RESULTS.glob("*.json")):
        if not path.name.startswith("compare-"):
            sections += ["", f"## {path.stem}", "", *rows(json.loads(path.read_text(encoding="utf-8")))]
            sections += ["", f"`results/{path.name}`"]
    readme.write_text(text, encoding="utf-8")
    (HERE / "README.md").write_text("\n".join(sections) + "\n", encoding="utf-8")


def comparison(content: dict[str, Any], title: str) -> str:
    """A comparison as a Markdown table, with its machine and its recommendation."""
    lines = [
        f"{title}; {content['test_rows']:,} test rows. The base alone (nearest class mean): {content['base_score']:.2%}.",
        "",
        "| technique | accuracy | trained weights | adapter | seconds | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in content["rows"]:
        share = row["trainable_parameters"] / row["total_parameters"]
        lines.append(
            f"| {row['method']} | {row['score']:.2%} | {row['trainable_parameters']:,} ({share:.1%}) "
            f"| {human_bytes(row['adapter_bytes'])} | {row['train_seconds']:.0f} | {human_bytes(row['peak_memory_bytes'])} |"
        )
    machine = content["environment"]
    versions = f"torch {machine['torch']}, transformers {machine['transformers']}"
    lines += ["", f"Recommended: **{content['recommended']}**. {content['why']}", "", f"On {machine['cpu']}; {versions}."]
    return "\n".join(lines)


def rows(content: dict[str, Any]) -> list[str]:
    """The summary that a benchmark wrote for itself: a list of equal dictionaries under ``summary``."""
    table = content.get("summary")
    if not table:
        return ["See the file."]
    head = list(table[0])
    body = ["| " + " | ".join(str(row[name]) for name in head) + " |" for row in table]
    return ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *body]


if __name__ == "__main__":
    main()
