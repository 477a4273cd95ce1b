"""What a run looks like on the terminal: the data, a progress bar per technique, the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from capotune.cli import data_report
from capotune.cli.comparison_table import comparison_table
from capotune.files import human_bytes

Reporter = Callable[[str, dict[str, Any]], None]

_SHARES = ("accuracy", "exact_match")  # shown as percentages
_NAMES = {"macro_f1": "macro F1", "exact_match": "exact match", "rouge_l": "ROUGE-L"}


class _Steps(ProgressColumn):
    """step/total where steps are counted."""

    def render(self, task: Task) -> Text:
        return Text(f"{int(task.completed):,}/{int(task.total):,}" if task.total else "")


@contextmanager
def watch(methods: Sequence[str]) -> Iterator[Reporter]:
    """A live bar per technique on standard error; where that is no terminal, a line per stage and epoch."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        _Steps(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bars = {
            method: progress.add_task(f"{method:18}", total=None, start=False, note="waiting") for method in methods
        }
        yield _bars(progress, bars, console)


def _bars(progress: Progress, bars: dict[str, Any], console: Console) -> Reporter:
    shown: set[str] = set()

    def report(method: str, event: dict[str, Any]) -> None:
        bar, kind = bars[method], event["kind"]
        if not progress.tasks[bar].started:
            progress.start_task(bar)
        if kind == "data":
            _show_data(console, event, shown)
        elif kind == "start":
            progress.console.print(_trainable(method, event))
        elif kind == "stage":
            progress.update(bar, note=event["text"], total=None, completed=0)
        elif kind == "step":
            note = f"loss {event['loss']:.3f}" if event["loss"] is not None else progress.tasks[bar].fields["note"]
            progress.update(bar, completed=event["step"], total=event["total"], note=note)
        elif kind == "result":
            progress.update(bar, note=_scored(event), total=1, completed=1)
            progress.stop_task(bar)
        elif kind == "failed":
            progress.update(bar, note="failed")
            console.print(f"{method}: {event['text']}", style="red", markup=False, highlight=False)

    return report


def _plain_lines(console: Console) -> Reporter:
    shown: set[str] = set()

    def report(method: str, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "data":
            _show_data(console, event, shown)
        elif kind == "start":
            console.print(_trainable(method, event))
        elif kind == "stage" or kind == "failed":
            console.print(f"{method}: {event['text']}", highlight=False)
        elif kind == "epoch":
            held_out = f"held-out {_score(event['metric'], event['score'])}"
            text = f"epoch {event['epoch']}: loss {event['loss']:.4f}, {held_out}"
            console.print(f"{method}: {text}", highlight=False)
        elif kind == "result":
            console.print(f"{method}: {_scored(event)} in {event['train_seconds']:.1f} s", highlight=False)

    return report


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A count on standard error, ``what done/total``, while something long is done; None where that is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with Progress(TextColumn(what), BarColumn(bar_width=24), _Steps(), console=console, transient=True) as progress:
        bar = progress.add_task(what, total=None, visible=False)
        yield lambda done, total: progress.update(bar, completed=done, total=total, visible=True)


def _scored(event: dict[str, Any]) -> str:
    return _score(event["metric"], event["score"]) if event["test_rows"] else "done"


def _score(metric: str, value: float) -> str:
    """A score with its name; perplexity with the loss whose exponential it is."""
    if metric == "perplexity":
        return f"loss {math.log(value):.3f}, perplexity {value:.2f}"
    return (
        f"{_NAMES.get(metric, metric)} {value:.2%}"
        if metric in _SHARES
        else f"{_NAMES.get(metric, metric)} {value:.4f}"
    )


def _show_data(console: Console, event: dict[str, Any], shown: set[str]) -> None:
    """The data report, once for all techniques."""
    if not shown:
        console.print(data_report.draw(event["report"]))
        console.print()
    shown.add("data")


def show_data(found: dict[str, Any]) -> None:
    """A data report, and whose tokens it counts."""
    console = Console(markup=False)
    console.print(data_report.draw(found["report"]))
    what = "text to write" if found["task"] == "generation" else "labelled text"
    console.print(f"\nRead as {what}; tokens are those of {found['model']}.", highlight=False, soft_wrap=True)


def _trainable(method: str, event: dict[str, Any]) -> Text:
    share = event["trainable"] / event["total"]
    return Text(f"{method}: {event['trainable']:,} trainable parameters, {share:.2%} of the base's {event['total']:,}")


def show_comparison(comparison: Any, out: Path) -> None:
    """The table and where everything is."""
    console = Console(markup=False)
    console.print(comparison_table(comparison))
    console.print()
    for name, what in (("compare.html", "the page"), ("compare.png", "the picture"), ("compare.json", "the numbers")):
        console.print(f"{out / name}  {what}", highlight=False, soft_wrap=True)
    if comparison.recommended:
        _try_it(console, comparison.task, out / comparison.recommended / "adapter")


def show_run(record: dict[str, Any], out: Path) -> None:
    """One technique's result and how to use it."""
    result = record["result"]
    grid = _grid()
    if result["test_rows"]:
        for name, value in _main_first(result["metric"], result["scores"]).items():
            rows = f" on {result['test_rows']:,} test rows" if name == result["metric"] else ""
            grid.add_row(_NAMES.get(name, name), f"{_number(name, value)}{rows}")
    else:
        metric = "perplexity" if record["settings"]["task"] == "generation" else "accuracy"
        held_out = _number(metric, result["held_out_score"])
        grid.add_row(metric, f"{held_out} on the held-out rows (no test rows)")
    grid.add_row(
        "trained", f"{result['epochs']:g} epoch{'' if result['epochs'] == 1 else 's'}, {result['train_seconds']:.1f} s"
    )
    share = result["trainable_parameters"] / result["total_parameters"]
    grid.add_row("trainable", f"{result['trainable_parameters']:,} parameters, {share:.2%} of the base")
    grid.add_row("peak memory", human_bytes(result["peak_memory_bytes"]))
    grid.add_row("adapter", f"{out / 'adapter'}, {human_bytes(result['adapter_bytes'])}")
    console = Console(markup=False)
    console.print(grid)
    _try_it(console, record["settings"]["task"], out / "adapter")


def _try_it(console: Console, task: str, adapter: Path) -> None:
    command = "generate" if task == "generation" else "predict"
    console.print(f'\nTry it: capo {command} {adapter} "your text"', highlight=False, soft_wrap=True)


def show_scores(scores: dict[str, Any]) -> None:
    """Every score with its interval, and how many rows it is from."""
    grid = _grid()
    if "accuracy" in scores:
        low, high = scores["interval"]
        interval = f"95 % interval {low:.2%} to {high:.2%}"
        grid.add_row("accuracy", f"{scores['accuracy']:.2%} on {scores['rows']:,} rows ({interval})")
        grid.add_row("macro F1", f"{scores['macro_f1']:.4f}")
        grid.add_row("loss", f"{scores['loss']:.4f}")
    else:
        for name in ("exact_match", "rouge_l", "perplexity", "loss"):
            if name in scores:
                grid.add_row(_NAMES.get(name, name), _with_interval(name, scores))
    Console(markup=False).print(grid)


def _with_interval(name: str, scores: dict[str, Any]) -> str:
    answered, rows = scores["answered"], scores["rows"]
    if name in ("perplexity", "loss"):
        where = f"{scores['tokens']:,} tokens of {rows:,} rows"
    else:
        where = f"{answered:,} rows" if answered == rows else f"{answered:,} of {rows:,} rows, drawn by a fixed seed"
    interval = ""
    if name in scores["intervals"]:
        low, high = (_number(name, value) for value in scores["intervals"][name])
        interval = f" (95 % interval {low} to {high})"
    return f"{_number(name, scores[name])} on {where}{interval}"


def _number(metric: str, value: float) -> str:
    if metric in _SHARES:
        return f"{value:.2%}"
    return f"{value:.2f}" if metric == "perplexity" else f"{value:.4f}"


def _main_first(metric: str, scores: dict[str, float]) -> dict[str, float]:
    return {metric: scores[metric], **scores} if metric in scores else scores


def show_info(facts: dict[str, Any]) -> None:
    """An adapter's facts, settings, and a prompt's words or its vectors' nearest tokens."""
    grid = _grid()
    grid.add_row("method", facts["method"])
    grid.add_row("base", f"{facts['base']['name']} (fingerprint {facts['base']['fingerprint'][:16]}…)")
    if facts["task"] == "classification":
        labels = facts["labels"]
        grid.add_row("labels", f"{len(labels)}: {', '.join(labels[:12])}{', …' if len(labels) > 12 else ''}")
        text = f"up to {facts['max_length']} tokens, {facts['pooling']} pooling"
    else:
        grid.add_row("writes", "answers in a conversation" if facts["chat"] else "text that goes on from a prompt")
        grid.add_row("template", facts["template_from"])
        turns = " assistant turn" if facts["learn"] == "last" else " assistant turns"
        learned = f", learned: {facts['learn']}{turns}" if facts["chat"] else ""
        text = f"up to {facts['max_length']} tokens{learned}"
    grid.add_row("weights", f"{facts['trained_weights']:,} ({human_bytes(facts['bytes'])} on disk)")
    grid.add_row("text", text)
    grid.add_row("trained", _trained(facts["trained"]))
    grid.add_row("settings", ", ".join(f"{name} {value}" for name, value in facts["settings"].items()))
    if "hard_prompt" in facts:
        grid.add_row("prompt", repr(facts["hard_prompt"]))
    for number, near in enumerate(facts.get("nearest_tokens", [])):
        words = ", ".join(f"{token} {similarity:.2f}" for token, similarity in near)
        grid.add_row(f"vector {number}", f"near {words}")
    Console(markup=False).print(grid)


def _trained(trained: dict[str, Any]) -> str:
    score = "no test"
    if trained["test_rows"]:
        score = f"{_score(trained['metric'], trained['score'])} on {trained['test_rows']:,} rows"
    return f"{trained['train_rows']:,} rows, {trained['train_seconds']:.1f} s, {score}"


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid
