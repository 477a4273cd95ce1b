"""A data report on the terminal: facts, what needs a look in yellow, and labels, or lengths and some rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

__all__ = ["draw"]

Report = Mapping[str, Any]
"""A report of ``capotune.data.inspect`` as plain JSON."""
Fact = tuple[str, str, bool]
"""Name, value, and whether it deserves a look."""

SHOWN_LABELS: Final = 5  # biggest, and as many smallest
IMBALANCE_WORTH_A_WORD: Final = 10.0
BAR: Final = 30  # columns of the longest bar

_LABEL_CHECKS: Final = (
    ("Cut", "train_truncated", "in train: longer than {limit}, the end is lost"),
    ("Cut", "test_truncated", "in test: longer than {limit}, the end is lost"),
    ("Empty", "train_empty", "in train: no text"),
    ("Empty", "test_empty", "in test: no text"),
    ("Twice", "duplicates", "in train: the repeat of an earlier row"),
    ("Conflict", "conflicts", "in train: the same text stands under another label too"),
    ("Leak", "leaked", "in test: the text is in train too, so the score will be too good"),
)
_SAMPLE_CHECKS: Final = (
    ("Lost", "train_without_loss", "in train: nothing to train on stands within {limit}; left out"),
    ("Lost", "test_without_loss", "in test: nothing to score stands within {limit}; left out"),
    ("Cut", "train_answers_cut", "in train: longer than {limit}, the end of what is trained on is lost"),
    ("Cut", "test_answers_cut", "in test: longer than {limit}, the end of what is scored is lost"),
    ("End", "train_ends_cut", "in train: only the token that ends the text is beyond {limit}"),
    ("Open", "unanswered", "in train: not answered at the end; what follows the last answer is not trained on"),
    ("Twice", "duplicates", "in train: the repeat of an earlier row"),
    ("Leak", "leaked", "in test: the question is in train too, so the score will be too good"),
)
"""Name of a fact, the report's field that holds the rows, and what is true of them."""


def draw(report: Report) -> RenderableType:
    """The report, to be given to a rich ``Console``."""
    if "labels" in report:
        return Group(_table(_label_facts(report)), "", _label_table(report["labels"]))
    histogram: list[RenderableType] = ["", _histogram(report)] if len(report["bins"]) > 1 else []
    return Group(_table(_sample_facts(report)), *histogram, "", *_sample_rows(report))


def _table(facts: Iterable[Fact]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value, needs_a_look in facts:
        table.add_row(Text(name), Text(value, style="yellow" if needs_a_look else ""))
    return table


def _label_facts(report: Report) -> Iterable[Fact]:
    columns = f"text in {report['text_column']!r}, label in {report['label_column']!r}"
    yield "Data", f"{report['source']}, {columns}", False
    rows = f"{report['train_rows']:,} to train, {report['test_rows']:,} to test ({report['test_from']})"
    yield "Rows", rows, False
    yield _tokens(report)
    labels = report["labels"]
    rarest = min(label["train"] for label in labels if label["train"])
    balance = f"{len(labels):,}, with {rarest:,} to {labels[0]['train']:,} training rows each"
    yield "Labels", balance, report["imbalance"] >= IMBALANCE_WORTH_A_WORD
    found = list(_found(report, _LABEL_CHECKS))
    found += [
        ("Labels", f"{' and '.join(map(repr, group))} count as different labels", True)
        for group in report["similar_labels"]
    ]
    nothing = "no text is cut, empty, repeated, labelled twice, or in both train and test"
    yield from found or [("Checked", nothing, False)]


def _sample_facts(report: Report) -> Iterable[Fact]:
    yield "Data", f"{report['source']}, read as {report['described']}", False
    test, test_from = report["test_rows"], report["test_from"]
    tested = f", {test:,} to test ({test_from})" if test else f"; test: {test_from}"
    yield "Rows", f"{report['train_rows']:,} to train{tested}", False
    if report["template_from"] is not None:
        yield "Chat", f"written out with {report['template_from']}", False
    share = f"{report['loss_tokens']:,} of {report['sequence_tokens']:,} tokens ({report['loss_share']:.0%})"
    yield "In the loss", f"{share}, {report['loss_part']}", not report["loss_tokens"]
    yield _tokens(report)
    if report["train_sequences"] > report["train_rows"]:
        limit = f"{report['max_length']:,} tokens"
        yield "Windows", f"{report['train_sequences']:,}, as texts longer than {limit} are read piece by piece", False
    nothing = "no row is cut, repeated, without an answer, or in both train and test"
    yield from list(_found(report, _SAMPLE_CHECKS)) or [("Checked", nothing, False)]


def _tokens(report: Report) -> Fact:
    return "Tokens", f"{_lengths(report['train_tokens'])}; the model reads {report['max_length']:,}", False


def _lengths(lengths: Mapping[str, int]) -> str:
    """How lengths spread, in a sentence."""
    low, median, p95, high = (lengths[name] for name in ("min", "median", "p95", "max"))
    return f"{high:,} a text" if low == high else (
        f"{low:,} to {high:,} a text, half at most {median:,}, 95 % at most {p95:,}"
    )  # fmt: skip


def _found(report: Report, checks: Sequence[tuple[str, str, str]]) -> Iterable[Fact]:
    """The checks that found rows."""
    limit = f"{report['max_length']:,} tokens"
    for name, field, what in checks:
        lines = report[field]
        if lines["count"]:
            yield name, f"{lines['count']:,} {what.format(limit=limit)} ({_first_lines(lines)})", True


def _first_lines(lines: Mapping[str, Any]) -> str:
    noun = lines["unit"] if lines["count"] == 1 else f"{lines['unit']}s"
    return f"{noun} {', '.join(map(str, lines['first']))}{', …' if lines['count'] > len(lines['first']) else ''}"


# Labels


def _label_table(labels: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    table.add_column("Label", overflow="ellipsis", no_wrap=True, max_width=50)
    table.add_column("Train", justify="right")
    table.add_column("Test", justify="right")
    hidden = len(labels) - 2 * SHOWN_LABELS
    for position, label in enumerate(labels):
        if hidden <= 1 or position < SHOWN_LABELS or position >= len(labels) - SHOWN_LABELS:
            table.add_row(Text(label["name"]), f"{label['train']:,}", f"{label['test']:,}")
        elif position == SHOWN_LABELS:
            table.add_row(Text(f"… and {hidden:,} more", style="dim"), "", "")
    return table


# Lengths, and rows as the model gets them


def _histogram(report: Report) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("Tokens", justify="right", no_wrap=True)
    table.add_column("Rows", justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    most = max(one["rows"] for one in report["bins"])
    something_is_cut = report["train_without_loss"]["count"] + report["train_answers_cut"]["count"]
    for one in report["bins"]:
        style = "yellow" if something_is_cut and one["low"] >= report["max_length"] else "cyan"
        bar = Text(_bar(one["rows"] / most), style=style)
        table.add_row(f"{one['low']:,}–{one['high']:,}", f"{one['rows']:,}", bar)
    return table


def _bar(share: float) -> str:
    """A bar in eighths of a column; what is not nothing shows."""
    eighths = max(round(8 * BAR * share), share > 0)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _sample_rows(report: Report) -> Iterable[RenderableType]:
    """Some rows. The marks stand there in colour too, so that nothing hangs on it."""
    legend = Text.assemble(("⟦what is in the loss⟧", "green"), ", ", ("what is only read", "dim"), ", ↵ a line break")
    yield Text.assemble(("Rows as the model gets them: ", "bold"), legend)
    for row in report["samples"]:
        part = ""
        if row["tokens"] > report["max_length"]:
            cut = f", cut to {report['max_length']:,}"
            part = f", the first of {row['windows']:,} windows" if row["windows"] > 1 else cut
        yield Text(f"{row['unit'].capitalize()} {row['line']}, {row['tokens']:,} tokens{part}")
        yield Padding(_in_colour(row["spans"]), (0, 0, 0, 2))


def _in_colour(spans: Sequence[Mapping[str, Any]]) -> Text:
    text = Text(overflow="fold")
    for span in spans:
        shown = _visible(span["text"])
        text.append(f"⟦{shown}⟧" if span["in_loss"] else shown, "green" if span["in_loss"] else "dim")
    return text


def _visible(text: str) -> str:
    """Line breaks and what else would vanish or reach the terminal, spelled out."""
    signs = {"\n": "↵", "\t": "⇥"}
    return "".join(signs.get(char) or (char if char.isprintable() else ascii(char)[1:-1]) for char in text)
