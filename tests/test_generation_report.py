"""What the report on text to write counts, which parts of a row it shows as in the loss, and that it reads well."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import pydantic
import pytest
from rich.console import Console
from shared import SHARED, needs_shared

from capotune.cli import data_report
from capotune.data.batches import IGNORE_INDEX, Encoded
from capotune.data.encoded_rows import EncodedRows
from capotune.data.generation import load_samples
from capotune.data.inspect.measures import Lengths, Lines
from capotune.data.inspect.samples import GenerationReport, LengthBin, SampleRow, Span, inspect_samples
from capotune.data.samples import Conversation, Document, Format, GenerationData, Pair, Sample, Samples
from capotune.data.table import Origin
from capotune.tasks.generation import Generation

END = "<end>"


class Words:
    """A tokenizer of words and line breaks, each with the space before it."""

    def __init__(self) -> None:
        self.known: list[str] = []

    def ids(self, text: str) -> list[int]:
        found = re.findall(r" ?[^ \n<]+|\n|<[^>]*>", text)
        self.known += [word for word in dict.fromkeys(found) if word not in self.known]
        return [self.known.index(word) for word in found]

    def text(self, ids: Sequence[int]) -> str:
        return "".join(self.known[one] for one in ids)

    def encode(self, sample: Sample, limit: int) -> list[Encoded]:
        if isinstance(sample, Document):
            ids = self.ids(sample.text)
            return [
                Encoded(part, list(part), len(part))
                for at in range(0, len(ids), limit)
                if (part := ids[at : at + limit])
            ]
        parts = [(sample.prompt, False), (sample.completion + END, True)] if isinstance(sample, Pair) else []
        if isinstance(sample, Conversation):
            parts = [(f"{message['content']}{END}", message["role"] == "assistant") for message in sample.messages]
        tokens = [(one, in_loss) for text, in_loss in parts for one in self.ids(text)]
        ids = [one for one, _ in tokens]
        labels = [one if in_loss else IGNORE_INDEX for one, in_loss in tokens]
        lost = [self.known[one] for one in labels[limit:] if one != IGNORE_INDEX]
        return [Encoded(ids[:limit], labels[:limit], len(ids), any(word != END for word in lost), END in lost)]


def rows(*samples: Sample, source: str = "a.jsonl", format: Format = "messages") -> Samples:
    return Samples(list(samples), list(range(1, len(samples) + 1)), Origin(source), format, ("messages",))


def chat(*contents: str) -> Conversation:
    """User and assistant by turns."""
    roles = ["user", "assistant"] * len(contents)
    return Conversation(tuple({"role": role, "content": text} for role, text in zip(roles, contents, strict=False)))


def measure(
    data: GenerationData, train: Iterable[list[Encoded]], test: Iterable[list[Encoded]], **options: Any
) -> GenerationReport:
    settings: dict[str, Any] = {"template_from": "a test", "learn": "all", **options}
    return inspect_samples(data, EncodedRows.of(train), EncodedRows.of(test), **settings)


def inspect(train: Samples, test: Samples, limit: int = 12, learn: str = "all", **options: Any) -> GenerationReport:
    words = Words()
    encoded = ([words.encode(sample, limit) for sample in part.samples] for part in (train, test))
    return measure(GenerationData(train, test), *encoded, max_length=limit, text_of=words.text, learn=learn, **options)


def drawn(report: GenerationReport) -> Any:
    return data_report.draw(Generation.describe_data(dataclasses.asdict(report)))


def shown(report: GenerationReport, width: int = 80, **options: Any) -> str:
    console = Console(width=width, color_system=None, **options)
    with console.capture() as capture:
        console.print(drawn(report))
    return capture.get()


def in_one_line(report: GenerationReport) -> str:
    return " ".join(shown(report).split())


CLEAN = inspect(rows(chat("what is one", "1"), chat("two", "it is 2"), chat("three", "3")), rows(chat("four", "4")))


# What is counted


def test_rows_tokens_and_what_in_loss() -> None:
    assert (CLEAN.train_rows, CLEAN.test_rows, CLEAN.train_sequences) == (3, 1, 3)
    assert CLEAN.train_tokens == Lengths(4, 6, 6, 6)
    assert CLEAN.test_tokens == Lengths(4, 4, 4, 4)
    assert (CLEAN.sequence_tokens, CLEAN.loss_tokens) == (16, 8)
    assert CLEAN.loss_share == 0.5
    assert (CLEAN.described, CLEAN.template_from) == ("messages (column 'messages')", "a test")


def test_clean_data_finds_nothing() -> None:
    found = [getattr(CLEAN, field.name) for field in dataclasses.fields(CLEAN) if field.type == "Lines"]
    assert found == [Lines(0, [])] * 10


def test_what_is_cut_is_told_apart() -> None:
    train = rows(
        chat("a", "b"),  # whole: 4 tokens
        chat("a b", "c d"),  # the end alone is beyond 5
        chat("a b c", "d e"),  # so is a word of the answer
        chat("a b c d", "e"),  # and all that could be in the loss
        chat("a b c d e f", "g"),
    )
    report = inspect(train, train, limit=5)
    assert report.train_ends_cut == Lines(1, [2])
    assert report.train_answers_cut == Lines(1, [3])
    assert report.train_without_loss == Lines(2, [4, 5])
    assert (report.test_answers_cut, report.test_without_loss) == (report.train_answers_cut, report.train_without_loss)
    assert report.train_tokens == Lengths(4, 7, 9, 9)
    assert (report.sequence_tokens, report.loss_tokens) == (4 + 4 * 5, 2 + 2 + 1)


def test_a_row_without_a_sequence_has_nothing_to_learn() -> None:
    data = GenerationData(rows(Document("x"), format="text"), rows(format="text"))
    report = measure(data, [[]], [], max_length=8, text_of=Words().text)
    assert report.train_without_loss == Lines(1, [1])
    assert report.samples == [SampleRow(1, 0, 0, [])]
    assert (report.loss_share, report.test_tokens) == (0, None)
    shown(report)


def test_repeats_and_leaks_ignore_case_and_space() -> None:
    train = rows(
        chat("Hi", "yes"),
        chat(" hi ", "YES"),
        chat("hi", "no"),
        Conversation(chat("hi", "no").messages, (), frozenset({1})),
    )
    report = inspect(train, rows(chat("new", "yes"), chat("HI", "maybe")))
    assert report.duplicates == Lines(2, [2, 4])
    assert report.leaked == Lines(1, [2])


def test_long_conversations_are_not_equal_for_their_last_turn() -> None:
    train = rows(chat("hi", "yes", "and then", "no"), chat("ho", "yes", "and then", "no"))
    report = inspect(
        train, rows(chat("what", "yes", "and then", "no"), chat("ho", "other words", "and then", "nothing"))
    )
    assert report.duplicates.count == 0
    assert report.leaked == Lines(1, [2])


def test_pairs_and_documents_are_compared_whole() -> None:
    train = rows(Pair("a", "b"), Pair("a", "c"), Pair("A", "b"), format="template")
    assert inspect(train, rows(Pair("a ", "d"))).duplicates == Lines(1, [3])
    assert inspect(train, rows(Pair("a ", "d"))).leaked == Lines(1, [1])
    train = rows(*(Document("same start " * 30 + end) for end in ("one", "two", "One")), format="text")
    report = inspect(train, rows(Document("same start")))
    assert (report.duplicates, report.leaked.count) == (Lines(1, [3]), 0)


def test_rows_that_end_without_an_answer_are_counted() -> None:
    report = inspect(rows(chat("hi", "yes", "so"), chat("ho", "no")), rows(chat("new", "x")))
    assert report.unanswered == Lines(1, [1])


def test_windows_of_long_texts() -> None:
    report = inspect(rows(Document("word " * 30), format="text"), rows(format="text"))
    assert (report.train_rows, report.train_sequences) == (1, 3)
    assert report.train_tokens == Lengths(30, 30, 30, 30)
    assert (report.loss_share, report.template_from) == (1, None)
    assert report.samples[0].windows == 3


def test_other_numbers_of_rows_are_refused() -> None:
    data = GenerationData(rows(chat("a", "b"), chat("c", "d")), rows(chat("e", "f")))
    one = [Words().encode(data.train.samples[0], 8)]
    for train, test in ((one, one), (one * 2, one * 2)):
        with pytest.raises(ValueError, match="rows of tokens for"):
            measure(data, train, test, max_length=8, text_of=Words().text)


def test_the_report_is_json_and_comes_back() -> None:
    again = json.loads(json.dumps(dataclasses.asdict(CLEAN)))
    assert again["samples"][0]["spans"][0] == {"text": "what is one<end>", "in_loss": False}
    assert pydantic.TypeAdapter(GenerationReport).validate_python(again) == CLEAN


# Lengths


def bins(*lengths: int) -> list[LengthBin]:
    return inspect(rows(*(Document("x " * length) for length in lengths), format="text"), rows(), limit=5000).bins


def test_bins_have_round_borders_and_hold_every_row() -> None:
    found = bins(*range(23, 123))
    assert [(one.low, one.high) for one in found] == [(low, low + 9) for low in range(20, 130, 10)]
    assert [one.rows for one in found] == [7, *[10] * 9, 3]


def test_one_row_in_a_hundred_does_not_stretch_the_bins() -> None:
    found = bins(*range(1, 100), 4321)
    assert found[-1] == LengthBin(100, 4321, 1)
    assert sum(one.rows for one in found) == 100
    assert len(found) <= 12
    assert found[1] == LengthBin(10, 19, 10)


@pytest.mark.parametrize("lengths", [(7,), (7, 7, 7), (1, 2), (1, 3000), tuple(range(1, 1500, 7))])
def test_bins_of_any_lengths(lengths: tuple[int, ...]) -> None:
    found = bins(*lengths)
    assert sum(one.rows for one in found) == len(lengths)
    assert 1 <= len(found) <= 13
    assert found[0].low <= min(lengths)
    assert found[-1].high >= max(lengths)
    assert all(one.low <= one.high for one in found)
    assert all(left.high + 1 == right.low for left, right in pairwise(found))
    for one in found:
        assert one.rows == sum(one.low <= length <= one.high for length in lengths)


# Sample rows


def test_spans_are_in_the_loss_or_only_read() -> None:
    report = inspect(rows(chat("hi there", "yes", "so\nwhat", "no more")), rows(), limit=11)
    (row,) = report.samples
    assert row == SampleRow(
        1,
        12,
        1,
        [
            Span("hi there<end>", False),
            Span("yes<end>", True),
            Span("so\nwhat<end>", False),
            Span("no more", True),
        ],
    )


def test_the_first_the_middle_and_the_last_row_are_shown() -> None:
    train = rows(*(chat(f"question {number}", "x") for number in range(9)))
    assert [row.line for row in inspect(train, rows()).samples] == [1, 5, 9]
    assert [row.line for row in inspect(train.take([0, 1]), rows()).samples] == [1, 2]


def test_long_spans_and_long_conversations_lose_their_middle() -> None:
    report = inspect(rows(Document("start " + "more " * 500 + "stop"), format="text"), rows(), limit=1000)
    (span,) = report.samples[0].spans
    assert span.text.startswith("start more")
    assert span.text.endswith("more stop")
    assert " … " in span.text
    assert len(span.text) < 400
    report = inspect(rows(chat(*(f"turn {number}" for number in range(40)))), rows(), limit=1000)
    texts = [span.text for span in report.samples[0].spans]
    assert texts == [*(f"turn {at}{END}" for at in range(4)), " … ", *(f"turn {at}{END}" for at in range(36, 40))]


def test_pairs_without_white_space_between_and_tokens_across_the_border_are_counted() -> None:
    pairs = [
        ("a:", "red"),
        ("a: ", "red"),
        ("a:", " red"),
        ("2+2=", "4"),
        ("問い：", "赤"),
        ("a:\n", "red"),
        ("a", "B"),
    ]
    train = rows(*(Pair(*both) for both in pairs), format="template")
    encoded = [[Encoded([1, 2], [IGNORE_INDEX, 2], 2, straddles=at in (1, 4))] for at in range(len(pairs))]
    report = measure(GenerationData(train, train), encoded, encoded, max_length=8, text_of=str)
    assert report.joined == Lines(2, [1, 7])
    assert report.straddling == Lines(2, [2, 5])
    text = in_one_line(report)
    assert (
        "Joined 2 in train: no white space between prompt and completion, which are joined as given (lines 1, 7)"
        in text
    )
    assert "Across 2 in train: one token holds the end of what is asked and the start of the answer" in text


def test_what_a_token_reads_like_may_hang_on_those_before_it() -> None:
    """A decoder that gives one text, drops the space at the front of what it is given, and knows no half characters."""
    pieces = [b" hi", b" \xc3", b"\xa9", b" no"]
    encoded = Encoded([0, 1, 2, 3], [IGNORE_INDEX, 1, 2, 3], 4)
    report = measure(
        GenerationData(rows(Pair("hi", " é no"), format="template"), rows()), [[encoded]], [], max_length=8,
        text_of=lambda ids: b"".join(pieces[one] for one in ids).decode(errors="replace").lstrip(" "),
    )  # fmt: skip
    assert report.samples[0].spans == [Span("hi", False), Span(" é no", True)]


# How it is shown


def test_clean_data_says_what_was_checked() -> None:
    text = in_one_line(CLEAN)
    assert "Data a.jsonl, read as messages (column 'messages')" in text
    assert "Rows 3 to train, 1 to test (given)" in text
    assert "Chat written out with a test" in text
    assert "In the loss 8 of 16 tokens (50%), every answer" in text
    assert "4 to 6 a text, half at most 6, 95 % at most 6; the model reads 12" in text
    assert "Checked no row is cut, repeated, without an answer, or in both train and test" in text
    for name in ("Lost", "Cut", "End", "Open", "Twice", "Leak", "Windows"):
        assert name not in text


def test_every_finding_is_shown_with_its_lines() -> None:
    cut = [chat("a b", "c d"), chat("a b c", "d e"), chat("a b c d", "e")]
    train = rows(*cut, chat("q", "r"), chat("q", "r"), chat("s", "t", "u"))
    text = in_one_line(inspect(train, rows(chat("Q", "x"), chat("a b c", "e f"), chat("a b c d", "x")), limit=5))
    assert "Lost 1 in train: nothing to train on stands within 5 tokens; left out (line 3)" in text
    assert "Lost 1 in test: nothing to score stands within 5 tokens; left out (line 3)" in text
    assert "Cut 1 in train: longer than 5 tokens, the end of what is trained on is lost (line 2)" in text
    assert "Cut 1 in test: longer than 5 tokens, the end of what is scored is lost (line 2)" in text
    assert "End 1 in train: only the token that ends the text is beyond 5 tokens (line 1)" in text
    assert "Open 1 in train: not answered at the end" in text
    assert "Twice 1 in train: the repeat of an earlier row (line 5)" in text
    assert "Leak 3 in test: the question is in train too, so the score will be too good (lines 1, 2, 3)" in text
    assert "Checked" not in text
    assert "Line 1, 6 tokens, cut to 5" in text


def test_one_long_text_says_where_its_test_is() -> None:
    data = GenerationData(rows(Document("word " * 30), format="text"), rows(format="text"), "the end of the text")
    words = Words()
    report = measure(data, [words.encode(data.train.samples[0], 12)], [], max_length=12, text_of=words.text)
    text = in_one_line(report)
    assert "Rows 1 to train; test: the end of the text" in text
    assert "In the loss 30 of 30 tokens (100%), all of the text" in text
    assert "Tokens 30 a text; the model reads 12" in text
    assert "Windows 3, as texts longer than 12 tokens are read piece by piece" in text
    assert "Line 1, 30 tokens, the first of 3 windows" in text
    assert "Chat" not in text
    assert "█" not in text


MARKED = dataclasses.replace(chat("a", "b", "c", "d"), read_only=frozenset({1}))


@pytest.mark.parametrize(
    ("sample", "learn", "expected"),
    [
        (chat("a", "b"), "all", "every answer"),
        (chat("a", "b"), "last", "the last answer of each row"),
        (MARKED, "all", "every answer but for 1 that the rows say not to train on"),
        (Pair("a b", "c"), "last", "the completions"),
        (Document("a b"), "last", "all of the text"),
    ],
)
def test_what_is_in_the_loss_is_said(sample: Sample, learn: str, expected: str) -> None:
    assert f"tokens ({100 if isinstance(sample, Document) else 50}%), {expected}" in in_one_line(
        inspect(rows(sample), rows(), learn=learn)
    )


def test_text_in_the_loss_has_marks_and_no_character_vanishes() -> None:
    train = rows(chat("hi\nthere", "tab\tend \x1b[31m[bold]"))
    text = shown(inspect(train, rows(), limit=30))
    assert "⟦what is in the loss⟧" in text
    assert f"hi↵there{END}⟦tab⇥end \\x1b[31m[bold]{END}⟧" in text
    assert "\x1b" not in text


def test_text_in_the_loss_is_green_and_what_is_cut_is_yellow() -> None:
    train = rows(*(chat("a " * number, "b") for number in range(1, 40)))
    console = Console(width=80, color_system="standard", force_terminal=True)
    with console.capture() as capture:
        console.print(drawn(inspect(train, rows(), limit=40)))
    text = capture.get()
    assert "\x1b[32m⟦b<end>⟧" in text
    assert "\x1b[2ma<end>" in text
    bars = [line for line in text.splitlines() if "█" in line]
    assert ["\x1b[33m" in line for line in bars] == [int(re.findall(r"(\d+)–", line)[0]) >= 40 for line in bars]
    assert "\x1b[33m1 in train: nothing to train on" in text


def test_a_text_read_in_windows_is_not_a_warning() -> None:
    train = rows(*(Document("word " * number) for number in range(1, 40)), format="text")
    console = Console(width=80, color_system="standard", force_terminal=True)
    with console.capture() as capture:
        console.print(drawn(inspect(train, rows(), limit=20)))
    assert "\x1b[33m" not in capture.get()


def test_bars_are_as_long_as_their_rows() -> None:
    train = rows(*(Document("x " * length) for length in [5] * 800 + [15] * 400 + [25]), format="text")
    lines = shown(inspect(train, rows(), limit=100)).splitlines()
    bars = {line.split()[0]: line.split()[1:] for line in lines if "–" in line and len(line.split()) == 3}
    assert bars["4–5"] == ["800", "█" * 30]
    assert bars["14–15"] == ["400", "█" * 15]
    assert bars["16–25"] == ["1", "▏"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_it_fits_the_terminal(width: int) -> None:
    train = rows(chat("long " * 300, "x" * 300), chat("[red]", "y"), source="very/long/" * 30 + "[bold].jsonl")
    text = shown(inspect(train, train, limit=1000), width)
    assert max(map(len, text.splitlines())) <= width
    assert "[red]" in text
    assert "[bold].jsonl" in text.replace("\n", "").replace(" ", "")


@needs_shared
def test_gsm8k() -> None:
    folder = SHARED / "data" / "gsm8k"
    data = load_samples(str(folder / "train.jsonl"), test=str(folder / "test.jsonl"))
    words = Words()
    words.ids = lambda text: list(text.encode())  # type: ignore[method-assign]
    words.known = [chr(byte) for byte in range(256)]
    train, test = ([words.encode(sample, 512) for sample in part.samples] for part in (data.train, data.test))
    report = measure(data, train, test, max_length=512, text_of=words.text)
    assert report.train_rows == sum(one.rows for one in report.bins) == 7_470
    assert report.loss_tokens == sum(label >= 0 for of_row in train for one in of_row for label in one.labels)
    assert report.train_answers_cut.count + report.train_ends_cut.count + report.train_without_loss.count == sum(
        one.tokens > 512 for of_row in train for one in of_row
    )
    text = shown(report)
    assert max(map(len, text.splitlines())) <= 80
    assert "⟦Natalia sold 48/2 = <<48/2=24>>24 clips in May.↵" in text.replace("\n  ", " ").replace("  ", "")


def test_importing_is_cheap() -> None:
    code = (
        "import sys, capotune.data.generation, capotune.data.inspect.samples\n"
        "print([m for m in ('datasets', 'pandas', 'pyarrow', 'sklearn', 'torch', 'rich') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
