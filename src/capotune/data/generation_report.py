"""What text to learn to write looks like before a minute is spent on training: lengths, what is learned, what is cut.

``inspect_samples`` only measures; nothing is changed or refused. Texts are compared without regard to case and space.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Final

import numpy as np

from capotune.data.conversations import Conversation, GenerationData, Pair, Sample, Samples, answer_of, asked
from capotune.data.labelled import normalised
from capotune.data.report import (
    Lengths,
    Lines,
    facts_table,
    findings,
    lengths_in_words,
    lengths_of,
    lines_where,
)

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from capotune.data.batches import Encoded

__all__ = ["GenerationReport", "LengthBin", "Piece", "SampleRow", "inspect_samples", "render"]

BINS: Final = 10
BAR: Final = 30  # columns of the longest bar
SHOWN_PIECES: Final = 9  # of one sample row; of a long conversation the first and the last turns
SHOWN_START: Final = 240  # characters of one piece: its start …
SHOWN_END: Final = 120  # … and its end


@dataclass(frozen=True)
class LengthBin:
    """How many training rows have between ``low`` and ``high`` tokens, both included."""

    low: int
    high: int
    rows: int


@dataclass(frozen=True)
class Piece:
    """Text of tokens that stand together and are all learned, or all only read."""

    text: str
    is_learned: bool


@dataclass(frozen=True)
class SampleRow:
    """A training row as the model gets it: ``tokens`` before it was cut, and what it, or its first window, became."""

    line: int
    tokens: int
    windows: int
    pieces: list[Piece]


@dataclass(frozen=True)
class GenerationReport:
    """What ``inspect_samples`` found. ``dataclasses.asdict`` gives plain JSON.

    Attributes:
        source, test_source: where the rows are from.
        test_from: how the test rows were chosen, in words.
        described: the format and the columns that were read.
        template_from: where the chat template is from; None when the rows are plain text, which needs none.
        learned_part: what of a row is learned, in words.
        train_rows, test_rows: number of rows.
        train_sequences: what the training rows became; more than the rows where long texts are read in windows.
        max_length: tokens that the model reads at once.
        train_tokens, test_tokens: lengths of the rows in tokens before anything is cut.
        kept_tokens, learned_tokens: tokens of the training sequences in all, and those of them that are learned.
        learned_share: the second divided by the first.
        train_unlearned, test_unlearned: rows of which nothing is learned, as all of it stands beyond ``max_length``.
        train_answers_cut, test_answers_cut: other rows of which learned text is cut off.
        train_ends_cut: training rows that are whole but for the end of the text, so that stopping is not learned.
        unanswered: training rows that go on after the last answer.
        duplicates: training rows that repeat an earlier one.
        leaked: test rows whose question also stands in train.
        bins: how the lengths of the training rows spread.
        samples: some training rows.
    """

    source: str
    test_source: str
    test_from: str
    described: str
    template_from: str | None
    learned_part: str
    train_rows: int
    test_rows: int
    train_sequences: int
    max_length: int
    train_tokens: Lengths
    test_tokens: Lengths | None
    kept_tokens: int
    learned_tokens: int
    learned_share: float
    train_unlearned: Lines
    test_unlearned: Lines
    train_answers_cut: Lines
    test_answers_cut: Lines
    train_ends_cut: Lines
    unanswered: Lines
    duplicates: Lines
    leaked: Lines
    bins: list[LengthBin]
    samples: list[SampleRow]


def inspect_samples(
    data: GenerationData,
    train: Sequence[Sequence[Encoded]],
    test: Sequence[Sequence[Encoded]],
    *,
    max_length: int,
    tokens_of: Callable[[Sequence[int]], list[str]],
    template_from: str,
    learn: str,
) -> GenerationReport:
    """Measure what is to be learned.

    Args:
        data: the rows.
        train: for each training row the sequences that it became: one, or the windows of a long text.
        test: the same of the test rows.
        max_length: tokens that the model reads at once.
        tokens_of: the texts of tokens, one each or all in one; joined they are what the model reads. It is called with
            the first tokens of a sequence only, as what a token reads like may depend on those before it.
        template_from: where the chat template is from, in words.
        learn: ``all`` or ``last``, the answers of a conversation that are learned.

    Raises:
        ValueError: ``train`` or ``test`` are not as many as the rows.
    """
    train_tokens, test_tokens = _token_counts(train), _token_counts(test)
    kept = sum(len(one.ids) for of_row in train for one in of_row)
    learned = [sum(one.learned for one in of_row) for of_row in train]
    questions = {normalised(asked(sample)) for sample in data.train.samples}
    first = data.train.samples[0]
    return GenerationReport(
        source=data.train.source,
        test_source=data.test.source,
        test_from=data.test_from,
        described=data.train.described,
        template_from=template_from if isinstance(first, Conversation) else None,
        learned_part=_learned_part(first, learn),
        train_rows=len(data.train),
        test_rows=len(data.test),
        train_sequences=sum(map(len, train)),
        max_length=max_length,
        train_tokens=lengths_of(train_tokens),
        test_tokens=lengths_of(test_tokens) if test_tokens else None,
        kept_tokens=kept,
        learned_tokens=sum(learned),
        learned_share=sum(learned) / max(kept, 1),
        train_unlearned=_rows_where(data.train, train, lambda of_row: not _learns(of_row)),
        test_unlearned=_rows_where(data.test, test, lambda of_row: not _learns(of_row)),
        train_answers_cut=_rows_where(data.train, train, _loses_its_answer),
        test_answers_cut=_rows_where(data.test, test, _loses_its_answer),
        train_ends_cut=_rows_where(data.train, train, _loses_its_end),
        unanswered=lines_where(data.train.lines, map(_is_unanswered, data.train.samples)),
        duplicates=lines_where(data.train.lines, _repeats(data.train.samples)),
        leaked=lines_where(data.test.lines, (normalised(asked(sample)) in questions for sample in data.test.samples)),
        bins=_bins(train_tokens),
        samples=_sample_rows(data.train, train, tokens_of),
    )


def _token_counts(rows: Sequence[Sequence[Encoded]]) -> list[int]:
    return [sum(one.tokens for one in of_row) for of_row in rows]


def _learned_part(sample: Sample, learn: str) -> str:
    if isinstance(sample, Conversation):
        return {"all": "every answer", "last": "the last answer of each row"}[learn]
    return "the completions" if isinstance(sample, Pair) else "all of the text"


def _rows_where(
    rows: Samples, encoded: Sequence[Sequence[Encoded]], is_so: Callable[[Sequence[Encoded]], bool]
) -> Lines:
    return lines_where(rows.lines, map(is_so, encoded))


def _learns(of_row: Sequence[Encoded]) -> bool:
    return any(one.learned for one in of_row)


def _loses_its_answer(of_row: Sequence[Encoded]) -> bool:
    return _learns(of_row) and any(one.answer_cut for one in of_row)


def _loses_its_end(of_row: Sequence[Encoded]) -> bool:
    return _learns(of_row) and any(one.end_cut and not one.answer_cut for one in of_row)


def _is_unanswered(sample: Sample) -> bool:
    return isinstance(sample, Conversation) and sample.messages[-1]["role"] != "assistant"


def _repeats(samples: Sequence[Sample]) -> Iterable[bool]:
    seen: set[Hashable] = set()
    for sample in samples:
        row = _compared(sample)
        yield row in seen
        seen.add(row)


def _compared(sample: Sample) -> Hashable:
    """The whole row, as it is compared."""
    if isinstance(sample, Conversation):
        return json.dumps([{**message, "content": normalised(message["content"])} for message in sample.messages])
    return normalised(asked(sample)), normalised(answer_of(sample) or "")


def _bins(lengths: Sequence[int]) -> list[LengthBin]:
    """About ten bins of one width with round borders; the longest one in a hundred share the last one."""
    low, most, high = min(lengths), int(np.percentile(lengths, 99, method="inverted_cdf")), max(lengths)
    step = _round_step((most - low + 1) / BINS)
    starts = list(range(low // step * step, most + 1, step))
    if high >= starts[-1] + step:
        starts.append(starts[-1] + step)
    counts = Counter(min((length - starts[0]) // step, len(starts) - 1) for length in lengths)
    ends = [*(start - 1 for start in starts[1:]), max(high, starts[-1] + step - 1)]
    return [LengthBin(start, end, counts[at]) for at, (start, end) in enumerate(zip(starts, ends, strict=True))]


def _round_step(width: float) -> int:
    """The first of 1, 2, 5, 10, 20, 50 … that is at least ``width``."""
    power = 1
    while True:
        for step in (power, 2 * power, 5 * power):
            if step >= width:
                return step
        power *= 10


def _sample_rows(
    rows: Samples, encoded: Sequence[Sequence[Encoded]], tokens_of: Callable[[Sequence[int]], list[str]]
) -> list[SampleRow]:
    """The first, the middle and the last row; of a long text its first window."""
    chosen = sorted({0, len(rows) // 2, len(rows) - 1})
    return [
        SampleRow(
            rows.lines[row],
            sum(one.tokens for one in encoded[row]),
            len(encoded[row]),
            _pieces(encoded[row][0], tokens_of) if encoded[row] else [],
        )
        for row in chosen
    ]


def _pieces(one: Encoded, tokens_of: Callable[[Sequence[int]], list[str]]) -> list[Piece]:
    pieces: list[Piece] = []
    text, end = "", 0
    for is_learned, run in groupby(token == label for token, label in zip(one.ids, one.labels, strict=True)):
        before, end = text, end + len(list(run))
        text = "".join(tokens_of(one.ids[:end]))
        pieces.append(Piece(_shortened(text[len(before) :]), is_learned))
    if len(pieces) > SHOWN_PIECES:
        pieces = [*pieces[: SHOWN_PIECES // 2], Piece(" … ", False), *pieces[-(SHOWN_PIECES // 2) :]]
    return pieces


def _shortened(text: str) -> str:
    is_long = len(text) > SHOWN_START + SHOWN_END
    return f"{text[:SHOWN_START]} … {text[-SHOWN_END:]}" if is_long else text


# How it is shown


def render(report: GenerationReport) -> RenderableType:
    """Facts, lengths and some rows, to be given to a rich ``Console``; what needs a look is yellow."""
    from rich.console import Group

    parts: list[RenderableType] = [facts_table(_facts_in_words(report))]
    if len(report.bins) > 1:
        parts += ["", _histogram(report)]
    return Group(*parts, "", *_rows_in_colour(report))


def _facts_in_words(report: GenerationReport) -> Iterable[tuple[str, str, bool]]:
    """Name, value, and whether it deserves a look. What was looked for and not found is said in one line."""
    limit = f"{report.max_length:,} tokens"
    yield "Data", f"{report.source}, read as {report.described}", False
    tested = (
        f", {report.test_rows:,} to test ({report.test_from})" if report.test_rows else f"; test: {report.test_from}"
    )
    yield "Rows", f"{report.train_rows:,} to train{tested}", False
    if report.template_from is not None:
        yield "Chat", f"written out with {report.template_from}", False
    share = f"{report.learned_tokens:,} of {report.kept_tokens:,} tokens ({report.learned_share:.0%})"
    yield "Learned", f"{share}, {report.learned_part}", not report.learned_tokens
    yield "Tokens", f"{lengths_in_words(report.train_tokens)}; the model reads {report.max_length:,}", False
    if report.train_sequences > report.train_rows:
        yield "Windows", f"{report.train_sequences:,}, as texts longer than {limit} are read piece by piece", False
    found = [
        ("Lost", report.train_unlearned, f"in train: nothing to learn stands within {limit}; not trained on"),
        ("Lost", report.test_unlearned, f"in test: nothing to learn stands within {limit}; not scored"),
        ("Cut", report.train_answers_cut, f"in train: longer than {limit}, the end of what is learned is lost"),
        ("Cut", report.test_answers_cut, f"in test: longer than {limit}, the end of what is scored is lost"),
        ("End", report.train_ends_cut, f"in train: only the token that ends the text is beyond {limit}"),
        ("Open", report.unanswered, "in train: not answered at the end; what follows the last answer is not learned"),
        ("Twice", report.duplicates, "in train: the repeat of an earlier row"),
        ("Leak", report.leaked, "in test: the question is in train too, so the score will be too good"),
    ]
    yield from findings(found)
    if not any(lines.count for _, lines, _ in found):
        yield "Checked", "no row is cut, repeated, without an answer, or in both train and test", False


def _histogram(report: GenerationReport) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("Tokens", justify="right", no_wrap=True)
    table.add_column("Rows", justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    most = max(one.rows for one in report.bins)
    something_is_cut = report.train_unlearned.count + report.train_answers_cut.count
    for one in report.bins:
        style = "yellow" if something_is_cut and one.low >= report.max_length else "cyan"
        table.add_row(f"{one.low:,}–{one.high:,}", f"{one.rows:,}", Text(_bar(one.rows / most), style=style))
    return table


def _bar(share: float) -> str:
    """A bar in eighths of a column; what is not nothing shows."""
    eighths = max(round(8 * BAR * share), share > 0)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _rows_in_colour(report: GenerationReport) -> Iterable[RenderableType]:
    """The sample rows. The marks stand there in colour too, so that nothing hangs on it."""
    from rich.padding import Padding
    from rich.text import Text

    legend = Text.assemble(("⟦what is learned⟧", "green"), ", ", ("what is only read", "dim"), ", ↵ a line break")
    yield Text.assemble(("Rows as the model gets them: ", "bold"), legend)
    for row in report.samples:
        part = ""
        if row.tokens > report.max_length:
            part = f", the first of {row.windows:,} windows" if row.windows > 1 else f", cut to {report.max_length:,}"
        yield Text(f"Line {row.line}, {row.tokens:,} tokens{part}")
        yield Padding(_in_colour(row.pieces), (0, 0, 0, 2))


def _in_colour(pieces: Sequence[Piece]) -> Text:
    from rich.text import Text

    text = Text(overflow="fold")
    for piece in pieces:
        shown = _visible(piece.text)
        text.append(f"⟦{shown}⟧" if piece.is_learned else shown, "green" if piece.is_learned else "dim")
    return text


def _visible(text: str) -> str:
    """Line breaks and what else would vanish or reach the terminal, spelled out."""
    signs = {"\n": "↵", "\t": "⇥"}
    return "".join(signs.get(char) or (char if char.isprintable() else ascii(char)[1:-1]) for char in text)
