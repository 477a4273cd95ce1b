"""Text to write: lengths, which tokens are in the loss, and what is cut.

``inspect_samples`` only measures; nothing is changed or refused. Texts are compared without regard to case and space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from capotune.data.inspect.findings import columns_not_used, rows_found, rows_lost, token_lengths
from capotune.data.inspect.measures import Lengths, Lines, lengths_of, lines_where
from capotune.data.samples import GenerationData, Pair, Samples
from capotune.data_blocks import Bar, Bars, Block, Finding, Findings, MarkedRow, MarkedRows
from capotune.sections import Part

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from capotune.data.batches import Encoded
    from capotune.data.encoded_rows import EncodedRows

__all__ = ["GenerationReport", "LengthBin", "SampleRow", "Span", "describe_samples", "inspect_samples", "lost_samples"]

_CHECKS: Final = (
    ("Lost", "train_without_loss", "in train: nothing to train on stands within {limit}; left out"),
    ("Lost", "test_without_loss", "in test: nothing to score stands within {limit}; left out"),
    ("Cut", "train_answers_cut", "in train: longer than {limit}, the end of what is trained on is lost"),
    ("Cut", "test_answers_cut", "in test: longer than {limit}, the end of what is scored is lost"),
    ("End", "train_ends_cut", "in train: only the token that ends the text is beyond {limit}"),
    ("Joined", "joined", "in train: no white space between prompt and completion, which are joined as given"),
    (
        "Across",
        "straddling",
        "in train: one token holds the end of what is asked and the start of the answer, so that a model is asked with "
        "other tokens than it is trained on; white space belongs to the start of the answer",
    ),
    ("Open", "unanswered", "in train: not answered at the end; what follows the last answer is not trained on"),
    ("Twice", "duplicates", "in train: the repeat of an earlier row"),
    ("Leak", "leaked", "in test: the question is in train too, so the score will be too good"),
)

BINS: Final = 10
SHOWN_SPANS: Final = 9  # of one sample row; of a long conversation the first and the last turns
SHOWN_START: Final = 240  # characters of one span: its start …
SHOWN_END: Final = 120  # … and its end


@dataclass(frozen=True)
class LengthBin:
    """How many training rows have between ``low`` and ``high`` tokens, both included."""

    low: int
    high: int
    rows: int


@dataclass(frozen=True)
class Span:
    """Text of tokens that stand together and are all in the loss, or all only read."""

    text: str
    in_loss: bool


@dataclass(frozen=True)
class SampleRow:
    """A training row as the model gets it: ``tokens`` before it was cut, and what it, or its first window, became."""

    line: int
    tokens: int
    windows: int
    spans: list[Span]
    unit: str = "line"


@dataclass(frozen=True)
class GenerationReport:
    """What ``inspect_samples`` found. ``dataclasses.asdict`` gives plain JSON.

    Attributes:
        source, test_source: where the rows are from.
        test_from: how the test rows were chosen, in words.
        described: the format and the columns that were read.
        template_from: where the chat template is from; None when the rows are plain text, which needs none.
        loss_part: what of a row is in the loss, in words.
        train_rows, test_rows: number of rows.
        train_sequences: what the training rows became; more than the rows where long texts are read in windows.
        max_length: tokens that the model reads at once.
        base_length: tokens that the base takes.
        train_tokens, test_tokens: lengths of the rows in tokens before anything is cut.
        sequence_tokens, loss_tokens: tokens of the training sequences in all, and those of them that are in the loss.
        loss_share: the second divided by the first.
        train_without_loss, test_without_loss: rows without a token in the loss, as all of those stand beyond
            ``max_length``.
        train_answers_cut, test_answers_cut: other rows of which text in the loss is cut off.
        train_ends_cut: training rows that are whole but for the end of the text, so that stopping is not trained.
        joined: training pairs of a prompt and a completion that begins with a letter, without white space between.
        straddling: training rows of which a token holds the end of what is asked and the start of the answer.
        unanswered: training rows that go on after the last answer.
        duplicates: training rows that repeat an earlier one.
        leaked: test rows whose question also stands in train.
        bins: how the lengths of the training rows spread.
        samples: some training rows.
        notices: what the chat template changes or leaves out, a sentence each.
        unused: columns that are not read.
    """

    source: str
    test_source: str
    test_from: str
    described: str
    template_from: str | None
    loss_part: str
    train_rows: int
    test_rows: int
    train_sequences: int
    max_length: int
    base_length: int
    train_tokens: Lengths
    test_tokens: Lengths | None
    sequence_tokens: int
    loss_tokens: int
    loss_share: float
    train_without_loss: Lines
    test_without_loss: Lines
    train_answers_cut: Lines
    test_answers_cut: Lines
    train_ends_cut: Lines
    joined: Lines
    straddling: Lines
    unanswered: Lines
    duplicates: Lines
    leaked: Lines
    bins: list[LengthBin]
    samples: list[SampleRow]
    notices: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def inspect_samples(
    data: GenerationData,
    train: EncodedRows,
    test: EncodedRows,
    *,
    max_length: int,
    base_length: int | None = None,
    text_of: Callable[[Sequence[int]], str],
    template_from: str,
    learn: str,
    notices: Sequence[str] = (),
) -> GenerationReport:
    """Measure what is to be trained on.

    Args:
        data: the rows.
        train: for each training row the sequences that it became: one, or the windows of a long text.
        test: the same of the test rows.
        max_length: tokens that the model reads at once.
        base_length: tokens that the base takes; None: as many.
        text_of: the text of tokens. It is called with the first tokens of a sequence only, as what a token reads like
            may depend on those before it.
        template_from: where the chat template is from, in words.
        learn: ``all`` or ``last``, the answers of a conversation that are trained on.
        notices: what the chat template changes or leaves out, a sentence each.

    Raises:
        ValueError: ``train`` or ``test`` are not as many as the rows.
    """
    train_rows, test_rows = _measured(data.train, train), _measured(data.test, test)
    in_all, in_loss = int(train.lengths.sum()), int(train_rows.in_loss.sum())
    facts = data.train.facts
    return GenerationReport(
        source=str(data.train.source),
        test_source=str(data.test.source),
        test_from=data.test_from,
        described=data.train.described,
        template_from=template_from if data.train.are_conversations else None,
        loss_part=_loss_part(data.train, learn),
        train_rows=len(data.train),
        test_rows=len(data.test),
        train_sequences=len(train.lengths),
        max_length=max_length,
        base_length=base_length or max_length,
        train_tokens=lengths_of(train_rows.tokens),
        test_tokens=lengths_of(test_rows.tokens) if len(data.test) else None,
        sequence_tokens=in_all,
        loss_tokens=in_loss,
        loss_share=in_loss / max(in_all, 1),
        train_without_loss=lines_where(data.train, train_rows.in_loss == 0),
        test_without_loss=lines_where(data.test, test_rows.in_loss == 0),
        train_answers_cut=lines_where(data.train, train_rows.loses_answer),
        test_answers_cut=lines_where(data.test, test_rows.loses_answer),
        train_ends_cut=lines_where(data.train, train_rows.loses_end),
        joined=lines_where(data.train, facts["joined"]),
        straddling=lines_where(data.train, train_rows.straddles),
        unanswered=lines_where(data.train, facts["open"]),
        duplicates=lines_where(data.train, _repeats(facts["row"])),
        leaked=lines_where(data.test, np.isin(data.test.facts["question"], facts["question"])),
        bins=_bins(train_rows.tokens),
        samples=_sample_rows(data.train, train, train_rows.tokens, text_of),
        notices=list(notices),
        unused=list(data.train.unused),
    )


def lost_samples(rows: Samples, encoded: EncodedRows, max_length: int) -> list[str]:
    """What of rows that are to be scored is too long, a sentence each; ``encoded`` as in ``inspect_samples``."""
    limit, found = f"{max_length:,} tokens", _measured(rows, encoded)
    without = lines_where(rows, found.in_loss == 0)
    cut = lines_where(rows, found.loses_answer)
    return rows_lost(
        [
            (without, f"have nothing to score within {limit} and are left out"),
            (cut, f"are longer than {limit}: the end of what is scored is lost"),
        ],
        len(rows),
    )


def describe_samples(report: GenerationReport) -> list[Block]:
    """The report in words, how the lengths of the rows spread, and some rows."""
    findings = Findings(list(_findings(report)))
    rows = MarkedRows(
        "Rows as the model gets them",
        "what is in the loss",
        "what is only read",
        [MarkedRow(_row_title(row, report), _parts(row)) for row in report.samples],
    )
    return [findings, _length_bars(report), rows] if len(report.bins) > 1 else [findings, rows]


def _findings(report: GenerationReport) -> Iterable[Finding]:
    yield Finding("Data", f"{report.source}, read as {report.described}")
    yield from columns_not_used(report.unused)
    tested = (
        f", {report.test_rows:,} to test ({report.test_from})" if report.test_rows else f"; test: {report.test_from}"
    )
    yield Finding("Rows", f"{report.train_rows:,} to train{tested}")
    if report.template_from is not None:
        yield Finding("Chat", f"written out with {report.template_from}")
    share = f"{report.loss_tokens:,} of {report.sequence_tokens:,} tokens ({report.loss_share:.0%})"
    yield Finding("In the loss", f"{share}, {report.loss_part}", needs_a_look=not report.loss_tokens)
    yield token_lengths(report.train_tokens, report.max_length, report.base_length)
    if report.train_sequences > report.train_rows and report.template_from is not None:
        texts = f"{report.train_sequences:,}, as the template writes an earlier answer otherwise once others follow"
        yield Finding("Texts", f"{texts}; each answer is trained on as it will be asked for")
    elif report.train_sequences > report.train_rows:
        limit = f"{report.max_length:,} tokens"
        yield Finding("Windows", f"{report.train_sequences:,}, as texts longer than {limit} are read piece by piece")
    for sentence in report.notices:
        yield Finding("Note", f"{sentence[0].upper()}{sentence[1:]}", needs_a_look=True)
    yield from rows_found(report, _CHECKS, "no row is cut, repeated, without an answer, or in both train and test")


def _length_bars(report: GenerationReport) -> Bars:
    """Rows by their length; those longer than the model reads need a look where that loses something."""
    loses = report.train_without_loss.count + report.train_answers_cut.count > 0
    bars = [Bar(f"{one.low:,}–{one.high:,}", one.rows, loses and one.low >= report.max_length) for one in report.bins]
    return Bars(("Tokens", "Rows"), bars)


def _row_title(row: SampleRow, report: GenerationReport) -> str:
    part = ""
    if row.windows > 1:
        part = f", the first of {row.windows:,} {'windows' if report.template_from is None else 'texts'}"
    elif row.tokens > report.max_length:
        part = f", cut to {report.max_length:,}"
    return f"{row.unit.capitalize()} {row.line}, {row.tokens:,} tokens{part}"


def _parts(row: SampleRow) -> list[Part]:
    return [Part(span.text, "in the loss" if span.in_loss else "") for span in row.spans]


@dataclass(frozen=True)
class _Measured:
    """What there is to know of each row's sequences."""

    tokens: NDArray[np.int64]
    """Of all windows of a text together, of the longest of a conversation's texts."""
    in_loss: NDArray[np.int64]
    loses_answer: NDArray[np.bool_]
    loses_end: NDArray[np.bool_]
    straddles: NDArray[np.bool_]


def _measured(rows: Samples, encoded: EncodedRows) -> _Measured:
    if len(rows) != len(encoded):
        raise ValueError(f"{len(encoded)} rows of tokens for {len(rows)} rows")
    cut, in_loss = encoded.of_each("answer_cut"), encoded.summed(encoded.of_each("in_loss"))
    lengths = encoded.of_each("tokens")
    return _Measured(
        encoded.largest(lengths) if rows.are_conversations else encoded.summed(lengths),
        in_loss,
        loses_answer=(in_loss > 0) & (encoded.summed(cut) > 0),
        loses_end=(in_loss > 0) & (encoded.summed(encoded.of_each("end_cut") & ~cut) > 0),
        straddles=encoded.summed(encoded.of_each("straddles")) > 0,
    )


def _loss_part(rows: Samples, learn: str) -> str:
    if rows.are_conversations:
        marked = int(rows.facts["read_only"].sum())
        but = f" but for {marked:,} that the rows say not to train on" if marked else ""
        return {"all": f"every answer{but}", "last": "the last answer of each row"}[learn]
    return "the completions" if isinstance(rows.samples[0], Pair) else "all of the text"


def _repeats(rows: NDArray[Any]) -> NDArray[np.bool_]:
    """Which rows, given by what they are compared by, repeat an earlier one."""
    repeats = np.ones(len(rows), dtype=bool)
    repeats[np.unique(rows, return_index=True)[1]] = False
    return repeats


def _bins(lengths: NDArray[np.int64]) -> list[LengthBin]:
    """About ten bins of one width with round borders; the longest one in a hundred share the last one."""
    low, high = int(lengths.min()), int(lengths.max())
    most = int(np.percentile(lengths, 99, method="inverted_cdf"))
    step = _round_step((most - low + 1) / BINS)
    starts = list(range(low // step * step, most + 1, step))
    if high >= starts[-1] + step:
        starts.append(starts[-1] + step)
    counts = np.bincount(np.minimum((lengths - starts[0]) // step, len(starts) - 1), minlength=len(starts)).tolist()
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
    rows: Samples, encoded: EncodedRows, tokens: NDArray[np.int64], text_of: Callable[[Sequence[int]], str]
) -> list[SampleRow]:
    """The first, the middle and the last row, of so many ``tokens``; of a long text its first window."""
    chosen = sorted({0, len(rows) // 2, len(rows) - 1})
    found = []
    for row in chosen:
        first, after = encoded.bounds[row : row + 2].tolist()
        spans = _spans(encoded.one(first), text_of) if after > first else []
        found.append(SampleRow(rows.lines[row], int(tokens[row]), after - first, spans, rows.source.unit))
    return found


def _spans(one: Encoded, text_of: Callable[[Sequence[int]], str]) -> list[Span]:
    spans: list[Span] = []
    text, end = "", 0
    for in_loss, run in groupby(token == label for token, label in zip(one.ids, one.labels, strict=True)):
        before, end = text.rstrip("\ufffd"), end + len(list(run))  # half a character goes to what completes it
        text = text_of(one.ids[:end])
        spans.append(Span(_shortened(text[len(before) :]), in_loss))
    if len(spans) > SHOWN_SPANS:
        spans = [*spans[: SHOWN_SPANS // 2], Span(" … ", False), *spans[-(SHOWN_SPANS // 2) :]]
    return spans


def _shortened(text: str) -> str:
    is_long = len(text) > SHOWN_START + SHOWN_END
    return f"{text[:SHOWN_START]} … {text[-SHOWN_END:]}" if is_long else text
