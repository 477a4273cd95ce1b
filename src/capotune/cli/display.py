"""What a run looks like on the terminal: the data, a progress bar per technique, the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from capotune import api
from capotune.files import human_bytes

Reporter = Callable[[str, dict[str, Any]], None]


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
            _show_data(console, event["report"], shown)
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
            console.print(f"[red]{method}: {event['text']}[/red]", highlight=False)

    return report


def _plain_lines(console: Console) -> Reporter:
    shown: set[str] = set()

    def report(method: str, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "data":
            _show_data(console, event["report"], shown)
        elif kind == "start":
            console.print(_trainable(method, event))
        elif kind == "stage" or kind == "failed":
            console.print(f"{method}: {event['text']}", highlight=False)
        elif kind == "epoch":
            text = f"epoch {event['epoch']}: loss {event['loss']:.4f}, held-out accuracy {event['score']:.2%}"
            console.print(f"{method}: {text}", highlight=False)
        elif kind == "result":
            console.print(f"{method}: {_scored(event)} in {event['train_seconds']:.1f} s", highlight=False)

    return report


def _scored(event: dict[str, Any]) -> str:
    return f"{event['score']:.2%}" if event["test_rows"] else "done"


def _show_data(console: Console, report: dict[str, Any], shown: set[str]) -> None:
    """The data report, once for all techniques."""
    if not shown:
        console.print(api.render_data_report(report))
        console.print()
    shown.add("data")


def _trainable(method: str, event: dict[str, Any]) -> Text:
    share = event["trainable"] / event["total"]
    return Text(f"{method}: {event['trainable']:,} trainable parameters, {share:.2%} of the base's {event['total']:,}")


def show_comparison(comparison: Any, out: Path) -> None:
    """The table and where everything is."""
    console = Console()
    console.print(api.render_comparison(comparison))
    console.print()
    for name, what in (("compare.html", "the page"), ("compare.png", "the picture"), ("compare.json", "the numbers")):
        console.print(f"{out / name}  {what}", highlight=False, soft_wrap=True)
    if comparison.recommended:
        adapter = out / comparison.recommended / "adapter"
        console.print(f'\nTry it: capo predict {adapter} "your text"', highlight=False, soft_wrap=True)


def show_run(record: dict[str, Any], out: Path) -> None:
    """One technique's result and how to use it."""
    result = record["result"]
    grid = _grid()
    if result["test_rows"]:
        grid.add_row("accuracy", f"{result['score']:.2%} on {result['test_rows']:,} test rows")
        grid.add_row("macro F1", f"{result['macro_f1']:.4f}")
    else:
        grid.add_row("accuracy", f"{result['held_out_score']:.2%} on the held-out rows (no test rows)")
    grid.add_row("trained", f"{result['epochs']:g} epochs, {result['train_seconds']:.1f} s")
    share = result["trainable_parameters"] / result["total_parameters"]
    grid.add_row("trainable", f"{result['trainable_parameters']:,} parameters, {share:.2%} of the base")
    grid.add_row("peak memory", human_bytes(result["peak_memory_bytes"]))
    grid.add_row("adapter", f"{out / 'adapter'}, {human_bytes(result['adapter_bytes'])}")
    console = Console()
    console.print(grid)
    console.print(f'\nTry it: capo predict {out / "adapter"} "your text"', highlight=False, soft_wrap=True)


def show_scores(scores: dict[str, Any]) -> None:
    """Accuracy with its interval, F1, loss."""
    grid = _grid()
    low, high = scores["interval"]
    interval = f"95 % interval {low:.2%} to {high:.2%}"
    grid.add_row("accuracy", f"{scores['accuracy']:.2%} on {scores['rows']:,} rows ({interval})")
    grid.add_row("macro F1", f"{scores['macro_f1']:.4f}")
    grid.add_row("loss", f"{scores['loss']:.4f}")
    Console().print(grid)


def show_info(facts: dict[str, Any]) -> None:
    """An adapter's facts, settings, and a soft prompt's nearest tokens."""
    grid = _grid()
    grid.add_row("method", facts["method"])
    grid.add_row("base", f"{facts['base']['name']} (fingerprint {facts['base']['fingerprint'][:16]}…)")
    labels = facts["labels"]
    grid.add_row("labels", f"{len(labels)}: {', '.join(labels[:12])}{', …' if len(labels) > 12 else ''}")
    grid.add_row("weights", f"{facts['trained_weights']:,} ({human_bytes(facts['bytes'])} on disk)")
    grid.add_row("text", f"up to {facts['max_length']} tokens, {facts['pooling']} pooling")
    trained = facts["trained"]
    score = f"accuracy {trained['score']:.2%} on {trained['test_rows']:,} rows" if trained["test_rows"] else "no test"
    grid.add_row("trained", f"{trained['train_rows']:,} rows, {trained['train_seconds']:.1f} s, {score}")
    grid.add_row("settings", ", ".join(f"{name} {value}" for name, value in facts["settings"].items()))
    for number, near in enumerate(facts.get("nearest_tokens", [])):
        words = ", ".join(f"{token} {similarity:.2f}" for token, similarity in near)
        grid.add_row(f"vector {number}", f"near {words}")
    Console().print(grid)


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid
