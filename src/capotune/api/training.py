"""Train one technique, or several side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capotune.device import collector_at_rest
from capotune.errors import SettingError
from capotune.memory_table import MemoryTable
from capotune.settings import CompareSettings, MethodSettings, RunSettings, TrainSettings, build, method_class, nearest

if TYPE_CHECKING:
    from capotune.report import Comparison

Reporter = Callable[[dict[str, Any]], None]
CompareReporter = Callable[[str, dict[str, Any]], None]


def train(
    method: str, *, data: object, out: str | Path = "capo-train", resume: bool = False, report: Reporter | None = None,
    **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train one technique on labelled text and write its run folder; returns what ``run.json`` holds.

    ``data``, and ``test`` in ``settings``: a path, a dataset id on the hub, or rows in memory: a list of dicts
    (``[{"text": "…", "label": "…"}]``), a pandas DataFrame, a ``datasets.Dataset`` or ``DatasetDict``.

    ``method`` is ``feature-extraction``, ``lora``, ``qlora`` or ``prompt-tuning``; ``settings`` are those of
    ``capo train METHOD --help`` by name (``rank=8``, ``test="test.csv"``). ``report`` is called with progress events.

    Raises ``CapotuneError`` subclasses, all ``ValueError``s, for unusable settings, data, models and folders.
    """
    shared, own = _separate(method, settings)
    return train_run(build(TrainSettings, {"out": out, **_sources(data, shared)}), own, resume=resume, report=report)


def train_run(
    settings: TrainSettings, method: MethodSettings, *, resume: bool = False, report: Reporter | None = None
) -> dict[str, Any]:
    """``train`` with settings already validated."""
    with collector_at_rest():
        from capotune.runs.run import run

    return run(settings, method, report or (lambda _: None), resume=resume)


def compare(
    *, data: object, out: str | Path = "capo-compare", report: CompareReporter | None = None, **settings: Any
) -> Comparison:
    """Run the techniques side by side; writes ``compare.json``, ``.png``, ``.html`` and an adapter each into ``out``.

    ``data`` and ``test`` as in ``train``; ``settings`` are those of ``capo compare --help`` by name: ``model``,
    ``methods``, ``seed``, and one dictionary per method (``lora={"rank": 8}``). Raises as ``train``.
    """
    return compare_run(build(CompareSettings, {"out": out, **_sources(data, settings)}), report=report)


def compare_run(
    settings: CompareSettings, *, report: CompareReporter | None = None, command: str | None = None
) -> Comparison:
    """``compare`` with settings already validated; ``command`` is shown on the page as the way to repeat it."""
    from capotune.files import output_folder
    from capotune.report import write
    from capotune.runs.compare import run_techniques

    if settings.test_fraction == 0 and settings.test is None:
        raise SettingError("--test-fraction 0 leaves no rows to compare on; allowed are values between 0 and 1.")
    inspected: dict[str, Any] = {}

    def listen(method: str, event: dict[str, Any]) -> None:
        if event["kind"] == "data" and not inspected:  # once: a soft prompt only shortens the room for text
            inspected.update(event["report"])
        if report:
            report(method, event)

    with output_folder(settings.out) as new:
        results = run_techniques(settings, new, listen)
        results = {method: _name_final_folder(new, settings.out, method) for method in results}
        comparison = _comparison(results, new, settings.tolerance)
        details = _details(settings, comparison, results, new, inspected, command or _command(settings))
        write(comparison, details, new)
    return comparison


def inspect(*, data: object, **settings: Any) -> dict[str, Any]:
    """What data holds and how it would be read: ``task``, ``model`` whose tokens were counted, and ``report``.

    ``data`` and ``test`` as in ``train``; ``settings`` are those of ``capo data --help`` by name. Nothing is trained or
    written. Raises as ``train``.
    """
    with collector_at_rest():
        from capotune.runs.run import prepare

    shared, method = _separate("lora", settings)
    found: dict[str, Any] = {}

    def listen(event: dict[str, Any]) -> None:
        if event["kind"] == "data":
            found.update(task=event["task"], report=event["report"])

    chosen, _, _ = prepare(build(TrainSettings, _sources(data, shared)), method, listen)
    return {"task": found["task"], "model": chosen.model, "report": found["report"]}


def _sources(data: object, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with ``data`` and ``test`` as settings hold them."""
    from capotune.data.readers import as_source

    test = settings.get("test")
    return {**settings, "data": as_source(data), **({} if test is None else {"test": as_source(test, "test")})}


def _command(settings: CompareSettings) -> str:
    """How to make the comparison again."""
    if isinstance(settings.data, MemoryTable) or isinstance(settings.test, MemoryTable):
        return "capotune.compare(data=…)"
    return f"capo compare --data {settings.data}"


def _separate(method: str, settings: dict[str, Any]) -> tuple[dict[str, Any], MethodSettings]:
    """Split flat keyword settings into the run's own and the method's."""
    cls = method_class(method)
    known = [*RunSettings.model_fields, *cls.model_fields]
    for name in settings:
        if name not in known:
            raise SettingError(f"unknown setting '{name}' for {method}.{nearest(name, known)}")
    own = build(cls, {name: value for name, value in settings.items() if name in cls.model_fields})
    return {name: value for name, value in settings.items() if name in RunSettings.model_fields}, own


def _comparison(results: dict[str, dict[str, Any]], folder: Path, tolerance: float) -> Comparison:
    from capotune.api import page_content
    from capotune.evaluation.metrics import metric
    from capotune.evaluation.pairs import RowCounts
    from capotune.report import Comparison, ComparisonRow, recommend

    taken_over = {field.name for field in fields(ComparisonRow)} & next(iter(results.values()))["result"].keys()
    rows = tuple(
        ComparisonRow(
            method=method,
            adapter=f"{method}/adapter",
            **{name: record["result"][name] for name in taken_over - {"adapter"}},
        )
        for method, record in results.items()
    )
    first = next(iter(results.values()))
    result, base, task = first["result"], _base(results), first["settings"]["task"]
    comparison = Comparison(
        model=first["settings"]["model"],
        task=task,
        metric=result["metric"],
        higher_is_better=metric(result["metric"]).higher_is_better,
        train_rows=result["train_rows"],
        test_rows=result["test_rows"],
        base_score=base.get("base_score", float("nan")),
        base_scores=base.get("base_scores", {}),
        rows=rows,
        tolerance=tolerance,
        base_label=page_content.base_label(task),
        columns=page_content.columns(task, result["metric"], result["scores"]),
    )
    written = {method: json.loads((folder / method / "test_rows.json").read_text("utf-8")) for method in results}
    counts = {method: RowCounts.from_dict(content) for method, content in written.items()}
    of_base = next((content["base"] for content in written.values() if "base" in content), None)
    return recommend(comparison, counts, RowCounts.from_dict(of_base) if of_base else None)


def _base(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The record of the run that also scored the base; empty when that one failed."""
    return next((record for record in results.values() if "base_score" in record), {})


def _details(
    settings: CompareSettings,
    comparison: Comparison,
    results: dict[str, dict[str, Any]],
    folder: Path,
    inspected: dict[str, Any],
    command: str,
) -> Any:
    """What the page shows beside the table: mistakes where labels were learned, answers where text was."""
    from capotune.api import page_content
    from capotune.report import PageDetails

    predictions = {method: _predictions(folder / method) for method in results}
    chosen = comparison.recommended
    if comparison.task == "classification":
        sections = page_content.label_sections(folder / chosen, chosen, predictions[chosen]) if chosen else []
    else:
        sections = page_content.answer_sections({"base": _base(results).get("base_answers", []), **predictions})
    return PageDetails(
        sections=sections,
        snippets=page_content.snippets(comparison),
        base_note=page_content.base_note(comparison.task),
        settings={
            name: {**record["settings"], **record[name], "out": str(settings.out / name)}
            for name, record in results.items()
        },
        data=inspected,
        environment=next(iter(results.values()))["environment"],
        command=command,
    )


def _predictions(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def _name_final_folder(folder: Path, final: Path, method: str) -> dict[str, Any]:
    """The run was written under a temporary name; say the final one in its record, which is returned, and its card."""
    from capotune.files import write_atomic

    run = folder / method
    for path in (run / "run.json", run / "adapter" / "capotune.json", run / "adapter" / "README.md"):
        text = path.read_text(encoding="utf-8").replace(str(folder), str(final))
        write_atomic(path, text.replace(_in_json(folder), _in_json(final)))
    record: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    record["result"]["adapter_bytes"] = sum(path.stat().st_size for path in (run / "adapter").iterdir())
    write_atomic(run / "run.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return record


def _in_json(path: Path) -> str:
    """As the path stands inside a JSON string, where quotes and backslashes are escaped."""
    return json.dumps(str(path), ensure_ascii=False)[1:-1]
