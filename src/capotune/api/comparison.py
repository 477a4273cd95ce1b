"""Run several techniques side by side, and write what they come to: table, picture and page."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capotune.api.trackers import tracked
from capotune.api.training import run_config, sources
from capotune.errors import SettingError, without_secrets
from capotune.events import CancelToken, DataInspected, Event, Reporter, ignore
from capotune.files import check_own, full_disk_is_said, growing_folder, remove_partial, write_atomic
from capotune.folder_lock import locked
from capotune.memory_table import MemoryTable
from capotune.run_folder import COMPARISON, as_json, check_nothing_there, recorded_settings
from capotune.settings import CompareSettings, build

if TYPE_CHECKING:
    from capotune.report import Comparison, ComparisonRow, PageDetails, Snippet
    from capotune.sections import Section

Records = dict[str, dict[str, Any]]
"""Each finished technique's ``run.json``."""


def compare(
    *,
    data: Any,
    out: str | Path = "capo-compare",
    report: Reporter = ignore,
    cancel: CancelToken | None = None,
    **settings: Any,
) -> Comparison:
    """Run the techniques side by side; writes ``compare.json``, ``.png``, ``.html`` and an adapter each into ``out``.

    ``data`` and ``test`` as in ``train``; ``settings`` are those of ``capo compare --help`` by name: ``model``,
    ``methods``, ``seed``, and one dictionary per method (``lora={"rank": 8}``). Events carry their method's name.
    Raises as ``train``.
    """
    built = build(compare_settings(), {"out": out, **sources(data, settings)})
    own = [f"{method}.{name}" for method, values in settings.items() if isinstance(values, dict) for name in values]
    given = dict.fromkeys(["data", *settings, *own], "argument")
    return compare_run(built, report=report, cancel=cancel, given=given)


def compare_settings() -> type[CompareSettings]:
    """The settings of ``compare``, with a field of settings for each known method."""
    from capotune import methods

    return methods.compare_settings()


def compare_run(
    settings: CompareSettings,
    *,
    report: Reporter = ignore,
    cancel: CancelToken | None = None,
    command: str | None = None,
    given: Mapping[str, str] | None = None,
) -> Comparison:
    """``compare`` with settings already validated; ``command`` is shown on the page as the way to repeat it, and
    ``given`` says where settings that are no defaults came from: ``{"seed": "flag", "lora.rank": "file"}``."""
    from capotune.runs.compare import is_worth_keeping, record_of

    if settings.test_fraction == 0 and settings.test is None:
        raise SettingError(
            "leaves no rows to compare on.", setting="test_fraction", given=0, allowed="values between 0 and 1"
        )
    out = settings.out
    check_nothing_there(out)
    record = record_of(settings, command or _command(settings), given or {})
    with growing_folder(out, {COMPARISON: as_json(record)}, keep=lambda: is_worth_keeping(out)):
        return _complete(settings, record, report, cancel or CancelToken())


def resume_comparison(
    out: Path,
    record: dict[str, Any],
    rows: dict[str, MemoryTable],
    trust_remote_code: bool,
    report: Reporter,
    cancel: CancelToken,
) -> Comparison:
    """Go on with the comparison in ``out``, whose ``settings.json`` holds ``record``; the rest as in ``resume``."""
    from capotune.runs.compare import check_same

    check_own(out)
    record = {**record, "command": without_secrets(record["command"])}  # earlier versions wrote it as it was given
    values = recorded_settings(record, out, rows, trust_remote_code)
    settings = build(compare_settings(), values, str(out / COMPARISON))
    with locked(out), full_disk_is_said(out):
        check_same(record, settings, cancel.watching(report))
        remove_partial(out)
        return _complete(settings, record, report, cancel)


def _complete(settings: CompareSettings, record: dict[str, Any], report: Reporter, cancel: CancelToken) -> Comparison:
    """From a folder that holds ``record``, and maybe some techniques, to a complete comparison."""
    from capotune.report import write
    from capotune.runs.compare import run_techniques

    out = settings.out

    def listen(event: Event) -> None:
        if isinstance(event, DataInspected) and not record["data"]:  # a soft prompt only takes tokens from the text
            record["data"] = event.report or {}
            write_atomic(out / COMPARISON, as_json(record))
        report(event)

    configs: dict[str | None, dict[str, Any]] = {
        method: run_config(settings, settings.for_method(method)) for method in settings.methods
    }
    with tracked(settings.report_to, out, configs, cancel.watching(listen)) as told:
        results = run_techniques(settings, told, cancel, record.get("settings_from", {}))
    comparison = _comparison(results, out, settings.tolerance)
    write(comparison, _details(comparison, results, out, record["data"], record["command"]), out)
    return comparison


def _command(settings: CompareSettings) -> str:
    """How to make the comparison again."""
    if isinstance(settings.data, MemoryTable) or isinstance(settings.test, MemoryTable):
        return "capotune.compare(data=…)"
    return f"capotune.compare(data={settings.data!r})"


def _comparison(results: Records, folder: Path, tolerance: float) -> Comparison:
    from capotune import tasks
    from capotune.evaluation.metrics import metric
    from capotune.evaluation.pairs import RowCounts
    from capotune.report import Comparison, ComparisonRow, recommend

    first = next(iter(results.values()))
    result, base, task = first["result"], _base(results), tasks.get(first["settings"]["task"])
    taken_over = ({field.name for field in fields(ComparisonRow)} & result.keys()) - {"adapter"}
    rows = tuple(
        replace(
            ComparisonRow(
                method=method, adapter=f"{method}/adapter", **{name: record["result"][name] for name in taken_over}
            ),
            scores=record["result"]["scores"] | _elsewhere(record["result"]),
        )
        for method, record in results.items()
    )
    chance, chance_words = task.chance(result["metric"], _predictions(folder / next(iter(results))))
    comparison = Comparison(
        model=first["settings"]["model"],
        task=task.name,
        metric=result["metric"],
        higher_is_better=metric(result["metric"]).higher_is_better,
        train_rows=result["train_rows"],
        test_rows=result["test_rows"],
        base_score=base.get("base_score", float("nan")),
        base_scores=base.get("base_scores", {}),
        rows=rows,
        tolerance=tolerance,
        base_label=task.base_label,
        columns=task.further_columns(result["metric"], rows[0].scores),
        metric_why=result.get("metric_why", ""),
        chance=chance,
        chance_words=chance_words,
    )
    written = {method: json.loads((folder / method / "test_rows.json").read_text("utf-8")) for method in results}
    counts = {method: RowCounts.from_dict(content) for method, content in written.items()}
    of_base = next((content["base"] for content in written.values() if "base" in content), None)
    return recommend(comparison, counts, RowCounts.from_dict(of_base) if of_base else None)


def _elsewhere(result: dict[str, Any]) -> dict[str, float]:
    """What training cost on text that is not the user's, and which part of its change was left for that; as scores,
    where they are known."""
    left = {name: result[name] for name in ("part_of_change",) if name in result}
    cost = result.get("general")
    if cost is None:
        return left
    return {"general_change": cost["loss"] - cost["base_loss"], "general_agreement": cost["agreement"]} | left


def _base(results: Records) -> dict[str, Any]:
    """The record of the run that also scored the base; empty when that one failed."""
    return next((record for record in results.values() if "base_score" in record), {})


def _details(
    comparison: Comparison, results: Records, folder: Path, inspected: dict[str, Any], command: str
) -> PageDetails:
    """What the page shows beside the table."""
    from capotune import tasks
    from capotune.adapters.files import RECORD
    from capotune.report import PageDetails

    task = tasks.get(comparison.task)
    shown = comparison.recommended or next((row.method for row in comparison.rows if math.isfinite(row.score)), "")
    predictions = {method: _predictions(folder / method) for method in results}
    sections: list[Section] = []
    record: dict[str, Any] = {}
    if shown:
        record = json.loads((folder / shown / "adapter" / RECORD).read_text(encoding="utf-8"))
        sections = task.page_sections(record, shown, predictions, _base(results).get("base_answers", []))
    return PageDetails(
        sections=sections,
        snippets=_snippets(comparison, task.example(record)),
        base_note=task.base_note,
        settings=without_secrets({name: {**record["settings"], **record[name]} for name, record in results.items()}),
        data=inspected,
        environment=next(iter(results.values()))["environment"],
        command=without_secrets(command),
    )


def _predictions(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def _snippets(comparison: Comparison, example: tuple[str, str]) -> list[Snippet]:
    """How to use the recommended adapter on the ``example`` (``Task.example``), and one in PEFT's format."""
    from capotune import methods, tasks
    from capotune.report import Snippet

    chosen = next((row for row in comparison.rows if row.method == comparison.recommended), None)
    if chosen is None:
        return []
    command = tasks.get(comparison.task).command
    shell, texts = example
    python = f"import capotune\n\nmodel = capotune.load({json.dumps(chosen.adapter)})\nmodel.{command}([{texts}])"
    found = [
        Snippet("Command line", f"capo {command} {shlex.quote(chosen.adapter)} {shell}"),
        Snippet("Python", python),
    ]
    in_peft = [row for row in (chosen, *comparison.rows) if methods.get(row.method).known_to_peft]
    return found + [Snippet(f"PEFT, for {row.method}", _peft_code(row, comparison)) for row in in_peft[:1]]


def _peft_code(row: ComparisonRow, comparison: Comparison) -> str:
    """The adapter on its base; without Capotune where others can load the base: not with a head, nor in 4 bits."""
    from capotune import methods, tasks

    adapter, has_head = json.dumps(row.adapter), tasks.get(comparison.task).has_head
    quantized = methods.get(row.method)(methods.get(row.method).Settings()).quantization is not None
    model = "" if has_head or quantized else _known_to_others(comparison.model)
    if model:
        imports = "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM"
        base = f"AutoModelForCausalLM.from_pretrained({json.dumps(model)})"
    else:
        imports = "import capotune\nfrom peft import PeftModel"
        what = " with a blank head" if has_head else ""
        base = f"capotune.load_base({adapter})  # the frozen base{what}"
    return f"{imports}\n\nbase = {base}\nmodel = PeftModel.from_pretrained(base, {adapter})"


def _known_to_others(model: str) -> str:
    """A folder's whole path or a hub id; empty for a bare name, which may be that of an embedded model."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return str(folder.absolute())
    return model if "/" in model else ""
