"""What a run looks like on the terminal: the data, a progress bar per technique, the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as ProgressBars
from rich.table import Table
from rich.text import Text

from capotune import api
from capotune.cli import data_report
from capotune.cli.comparison_table import comparison_table
from capotune.cli.console import terminal
from capotune.cli.grid import two_columns
from capotune.events import (
    DataInspected,
    EpochEnded,
    Event,
    Failed,
    Finished,
    Progress,
    Reporter,
    Stage,
    StepTaken,
    TrainingStarted,
    Warned,
)
from capotune.files import human_bytes

_SHOWN_LABELS = 20


class _Steps(ProgressColumn):
    """step/total where steps are counted."""

    def render(self, task: Task) -> Text:
        return Text(f"{int(task.completed):,}/{int(task.total):,}" if task.total else "")


@contextmanager
def watch(methods: Sequence[str]) -> Iterator[Reporter]:
    """A live bar per technique on standard error; where that is no terminal, a line per stage and epoch.

    Events that name no method are those of the first.
    """
    console = terminal(stderr=True)
    if not console.is_terminal:
        yield _Lines(console, methods[0])
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        _Steps(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with ProgressBars(*columns, console=console) as bars:
        yield _Bars(bars, console, methods)


class _Watcher:
    """What both kinds of watching share: the data report, once for all techniques."""

    def __init__(self, console: Console, first: str) -> None:
        self.console, self.first, self.shown_data = console, first, False
        self.said: set[str] = set()

    def method(self, event: Event) -> str:
        return event.method or self.first

    def is_new(self, event: Warned) -> bool:
        """Whether no technique has said it yet: what concerns the base concerns them all."""
        new = event.text not in self.said
        self.said.add(event.text)
        return new

    def show_data(self, event: DataInspected) -> None:
        if not self.shown_data:
            self.console.print(data_report.draw(api.describe_data(event.task, event.report or {})))
            self.console.print()
        self.shown_data = True


class _Bars(_Watcher):
    """A bar per technique."""

    def __init__(self, bars: ProgressBars, console: Console, methods: Sequence[str]) -> None:
        super().__init__(console, methods[0])
        self.bars = bars
        self.tasks = {name: bars.add_task(f"{name:18}", total=None, start=False, note="waiting") for name in methods}

    def __call__(self, event: Event) -> None:
        method = self.method(event)
        bar = self.tasks[method]
        if not self.bars.tasks[bar].started:
            self.bars.start_task(bar)
        if isinstance(event, DataInspected):
            self.show_data(event)
        elif isinstance(event, TrainingStarted):
            self.bars.console.print(_trainable(method, event))
        elif isinstance(event, Stage):
            self.bars.update(bar, note=event.text, total=None, completed=0)
        elif isinstance(event, StepTaken):
            self.bars.update(bar, completed=event.step, total=event.total, note=f"loss {event.loss:.3f}")
        elif isinstance(event, Progress):
            self.bars.update(bar, completed=event.done, total=event.total)
        elif isinstance(event, Finished):
            self.bars.update(bar, note=_scored(event), total=1, completed=1)
            self.bars.stop_task(bar)
        elif isinstance(event, Failed):
            self.bars.update(bar, note="failed")
            self.console.print(f"{method}: {event.text}", style="red", markup=False, highlight=False)
        elif isinstance(event, Warned) and self.is_new(event):
            self.console.print(f"{method}: {event.text}", style="yellow", markup=False, highlight=False)


class _Lines(_Watcher):
    """A line per stage and epoch."""

    def __call__(self, event: Event) -> None:
        if isinstance(event, DataInspected):
            self.show_data(event)
        elif isinstance(event, TrainingStarted):
            self.console.print(_trainable(self.method(event), event))
        elif isinstance(event, Stage | Failed) or (isinstance(event, Warned) and self.is_new(event)):
            self._line(event, event.text)
        elif isinstance(event, EpochEnded):
            held_out = f"held-out {score_text(event.metric, event.score)}"
            self._line(event, f"epoch {event.epoch}: loss {event.loss:.4f}, {held_out}")
        elif isinstance(event, Finished):
            seconds = (event.result or {})["train_seconds"]
            self._line(event, f"{_scored(event)} in {seconds:.1f} s")

    def _line(self, event: Event, text: str) -> None:
        self.console.print(f"{self.method(event)}: {text}", highlight=False)


@contextmanager
def counting(what: str) -> Iterator[Reporter]:
    """A count on standard error, ``what done/total``, while something long is done; nothing where it is no terminal."""
    console = terminal(stderr=True)

    def say(event: Warned) -> None:
        console.print(event.text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    if not console.is_terminal:
        yield lambda event: say(event) if isinstance(event, Warned) else None
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), _Steps()
    with ProgressBars(*columns, console=console, transient=True) as bars:
        bar = bars.add_task(what, total=None, visible=False)

        def report(event: Event) -> None:
            if isinstance(event, Stage):
                bars.update(bar, description=event.text, completed=0, total=None)
            elif isinstance(event, Progress):
                bars.update(bar, completed=event.done, total=event.total, visible=True)
            elif isinstance(event, Warned):
                say(event)

        yield report


@contextmanager
def watch_bytes() -> Iterator[Reporter]:
    """A bar of bytes on standard error from the first stage on; where that is no terminal, a line per stage."""
    console = terminal(stderr=True)

    def say(event: Stage | Warned) -> None:
        console.print(event.text, markup=False, highlight=False, soft_wrap=True)

    if not console.is_terminal:
        yield lambda event: say(event) if isinstance(event, Stage | Warned) else None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with ProgressBars(*columns, console=console) as bars:
        bar = bars.add_task("", total=None, visible=False)

        def report(event: Event) -> None:
            if isinstance(event, Stage):
                bars.update(bar, description=event.text, total=None, completed=0, visible=True)
            elif isinstance(event, Progress):
                bars.update(bar, completed=event.done, total=event.total)
            elif isinstance(event, Warned):
                say(event)

        yield report


def _scored(event: Finished) -> str:
    result = event.result or {}
    return score_text(result["metric"], result["score"]) if result["test_rows"] else "done"


def score_text(name: str, value: float) -> str:
    """A score with its metric's name."""
    return f"{api.metric(name).words} {_number(name, value)}"


def show_data(found: dict[str, Any]) -> None:
    """A data report, and whose tokens it counts."""
    console = terminal()
    console.print(data_report.draw(api.describe_data(found["task"], found["report"])))
    text = f"\nRead as {found['title']}; tokens are those of {found['model']}."
    console.print(text, highlight=False, soft_wrap=True)


def _trainable(method: str, event: TrainingStarted) -> Text:
    share = event.trainable / event.total
    return Text(f"{method}: {event.trainable:,} trainable parameters, {share:.2%} of the base's {event.total:,}")


def show_comparison(comparison: Any, out: Path) -> None:
    """The table and where everything is."""
    console = terminal()
    console.print(comparison_table(comparison))
    console.print()
    for name, what in (("compare.html", "the page"), ("compare.png", "the picture"), ("compare.json", "the numbers")):
        console.print(f"{out / name}  {what}", highlight=False, soft_wrap=True)
    if comparison.recommended:
        _try_it(console, comparison.task, out / comparison.recommended / "adapter")


def show_run(record: dict[str, Any], out: Path) -> None:
    """One technique's result and how to use it."""
    result = record["result"]
    grid = two_columns()
    if result["test_rows"]:
        for name, value in _main_first(result["metric"], result["scores"]).items():
            rows = f" on {result['test_rows']:,} test rows" if name == result["metric"] else ""
            grid.add_row(api.metric(name).words, f"{_number(name, value)}{rows}")
    else:
        metric = result["held_out_metric"]
        held_out = _number(metric, result["held_out_score"])
        grid.add_row(api.metric(metric).words, f"{held_out} on the held-out rows (no test rows)")
    if result.get("metric_why"):
        grid.add_row("compared by", result["metric_why"])
    if "general" in result:
        grid.add_row("elsewhere", result["general"]["words"])
    if "part_of_change" in result:
        part = f"{result['part_of_change']:.0%} of what training changed, chosen on the held-out rows"
        grid.add_row("left of it", part)
    grid.add_row(
        "trained", f"{result['epochs']:g} epoch{'' if result['epochs'] == 1 else 's'}, {result['train_seconds']:.1f} s"
    )
    share = result["trainable_parameters"] / result["total_parameters"]
    grid.add_row("trainable", f"{result['trainable_parameters']:,} parameters, {share:.2%} of the base")
    grid.add_row("peak memory", human_bytes(result["peak_memory_bytes"]))
    grid.add_row("adapter", f"{out / 'adapter'}, {human_bytes(result['adapter_bytes'])}")
    console = terminal()
    console.print(grid)
    _try_it(console, record["settings"]["task"], out / "adapter")


def _try_it(console: Console, task: str, adapter: Path) -> None:
    console.print(f"\nTry it: {api.usage(task, adapter)}", highlight=False, soft_wrap=True)


def show_scores(scores: dict[str, Any]) -> None:
    """Every score with its interval and what it was measured on, the compared one first."""
    grid = two_columns()
    measured = {name: scores[name] for name in scores["measured_on"]}
    for name, value in _main_first(scores["metric"], measured).items():
        interval = ""
        if name in scores["intervals"]:
            low, high = (_number(name, end) for end in scores["intervals"][name])
            interval = f" (95 % interval {low} to {high})"
        text = f"{_number(name, value)} on {scores['measured_on'][name]}{interval}"
        grid.add_row(api.metric(name).words, text)
    if "general" in scores:
        grid.add_row("elsewhere", scores["general"]["words"])
    console = terminal()
    console.print(grid)
    if "label_scores" in scores:
        console.print()
        console.print(_by_label(scores["label_scores"]))


def _by_label(scores: dict[str, dict[str, float]]) -> Table:
    """Each label's scores, the lowest F1 first; of many the lowest."""
    lowest = sorted(((label, one) for label, one in scores.items() if one["rows"]), key=lambda one: one[1]["f1"])
    table = Table(box=None, pad_edge=False)
    more = f"label (of {len(lowest)} the lowest F1; --json gives all)" if len(lowest) > _SHOWN_LABELS else "label"
    table.add_column(more)
    for name in ("precision", "recall", "F1", "rows"):
        table.add_column(name, justify="right")
    for label, one in lowest[:_SHOWN_LABELS]:
        table.add_row(Text(label), *(f"{one[name]:.2%}" for name in ("precision", "recall", "f1")), f"{one['rows']:,}")
    return table


def _number(name: str, value: float) -> str:
    known = api.metric(name)
    return f"{value:.2%}" if known.is_percentage else known.text(value, 2)


def _main_first(metric: str, scores: dict[str, float]) -> dict[str, float]:
    return {metric: scores[metric], **scores} if metric in scores else scores
