"""Make the records of a comparison's runs name one score to compare by, where it takes all of them to decide on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capotune import tasks
from capotune.adapters.checksums import signed_again
from capotune.adapters.files import RECORD
from capotune.evaluation.pairs import RowCounts
from capotune.files import write_atomic

__all__ = ["agree"]


def agree(records: Mapping[str, dict[str, Any]], folder: Path) -> None:
    """Decide on one score for all techniques, and write it into their records, ``folder/METHOD`` each, and into
    ``records``, each one's ``run.json``."""
    task = tasks.get(next(iter(records.values()))["settings"]["task"])
    metric, why = task.decide({method: record["result"] for method, record in records.items()})
    for method, record in records.items():
        if record["result"]["score"] is not None:
            _compare_by(metric, why, record, folder / method)


def _compare_by(metric: str, why: str, record: dict[str, Any], out: Path) -> None:
    result = record["result"]
    if (result["metric"], result.get("metric_why", "")) == (metric, why):
        return
    changed: dict[str, Any] = {"metric_why": why}
    if result["metric"] != metric:
        rows = _first(metric, json.loads((out / "test_rows.json").read_text("utf-8")))
        write_atomic(out / "test_rows.json", json.dumps(rows) + "\n")
        changed |= {
            "metric": metric,
            "score": result["scores"][metric],
            "interval": result["intervals"].get(metric),
            "test_rows": len(RowCounts.from_dict(rows).counts),
        }
    adapter = json.loads((out / "adapter" / RECORD).read_text("utf-8"))
    adapter["trained"] |= changed
    result |= changed
    if "base_score" in record:
        record["base_score"] = record["base_scores"].get(metric)
    _write(out / "adapter" / RECORD, signed_again(adapter))
    result["adapter_bytes"] = sum(path.stat().st_size for path in (out / "adapter").iterdir())
    _write(out / "run.json", record)


def _first(metric: str, rows: dict[str, Any]) -> dict[str, Any]:
    """The content of ``test_rows.json`` with the counts of ``metric`` before those of others."""
    base = {"base": _first(metric, rows.pop("base"))} if "base" in rows else {}
    every = [rows, *rows.pop("others", [])]
    chosen: dict[str, Any] = next((one for one in every if one["metric"] == metric), every[0])
    return chosen | {"others": [one for one in every if one is not chosen]} | base


def _write(path: Path, content: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
