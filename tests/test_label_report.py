"""What the data report counts, and that it reads well in a terminal of 80 columns."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import pytest
from rich.console import Console
from shared import SHARED, needs_shared

from capotune.cli import data_report
from capotune.data.classes import CLASSES
from capotune.data.inspect.labels import LabelCount, LabelReport, inspect_data
from capotune.data.inspect.measures import Lengths, Lines
from capotune.data.labelled import LabelledData, LabelledText
from capotune.data.table import Origin
from capotune.tasks.classification import Classification


def rows(*pairs: tuple[str, str], source: str = "a.csv") -> LabelledText[str]:
    lines = list(range(2, 2 + len(pairs)))
    return LabelledText(
        [text for text, _ in pairs], [label for _, label in pairs], lines, Origin(source), "text", ("label",)
    )


def words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def inspect(train: LabelledText[str], test: LabelledText[str], max_length: int = 8) -> LabelReport:
    return inspect_data(LabelledData(train, test), words(train.texts), words(test.texts), max_length)


def shown(report: LabelReport, width: int = 80) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(data_report.draw(Classification.describe_data(dataclasses.asdict(report))))
    return capture.get()


CLEAN = inspect(rows(("one", "a"), ("two two", "a"), ("three", "b")), rows(("four four four", "b")))


def test_rows_labels_and_lengths() -> None:
    assert (CLEAN.train_rows, CLEAN.test_rows) == (3, 1)
    assert CLEAN.labels == [LabelCount("a", 2, 0), LabelCount("b", 1, 1)]
    assert CLEAN.imbalance == 2
    assert CLEAN.train_tokens == Lengths(1, 1, 2, 2)
    assert CLEAN.test_tokens == Lengths(3, 3, 3, 3)
    assert (CLEAN.source, CLEAN.text_column, CLEAN.label_column) == ("a.csv", "text", "label")


def test_p95_is_a_length_that_occurs_and_covers_95_of_100() -> None:
    train = rows(*((" ".join("x" * number), "ab"[number % 2]) for number in range(1, 101)))
    assert inspect(train, train).train_tokens == Lengths(1, 50, 95, 100)


def test_clean_data_finds_nothing() -> None:
    nothing = Lines(0, [])
    found = [getattr(CLEAN, field.name) for field in dataclasses.fields(CLEAN) if field.type == "Lines"]
    assert found == [nothing] * 8
    assert CLEAN.similar_labels == []


def test_texts_longer_than_the_model_reads() -> None:
    train = rows(*(("x " * length, "ab"[length % 2]) for length in range(1, 21)))
    report = inspect(train, rows(("x " * 8, "a"), ("x " * 9, "a")))
    assert report.train_truncated == Lines(12, [10, 11, 12, 13, 14])
    assert report.test_truncated == Lines(1, [3])


def test_empty_rows_are_those_without_a_character_or_a_token() -> None:
    train = rows(("  ", "a"), ("b", "b"), ("\u00ad", "a"))
    report = inspect_data(LabelledData(train, train), [2, 1, 0], [1, 1, 1], 8)
    assert report.train_empty == Lines(2, [2, 4])
    assert report.test_empty == Lines(1, [2])


def test_duplicates_conflicts_and_leaks_ignore_case_and_space() -> None:
    train = rows(("My card", "a"), ("my  CARD ", "a"), ("my card", "b"), ("other", "b"), ("My card", "a"))
    report = inspect(train, rows(("MY CARD", "a"), ("new", "a"), ("Other", "b"), source="b.csv"))
    assert report.duplicates == Lines(2, [3, 6])
    assert report.conflicts == Lines(4, [2, 3, 4, 6])
    assert report.leaked == Lines(2, [2, 4])
    assert report.test_source == "b.csv"


def test_labels_that_differ_in_case_or_space_alone() -> None:
    train = rows(("t", "Card lost"), ("u", "card  lost"), ("v", "cash"))
    assert inspect(train, train).similar_labels == [["Card lost", "card  lost"]]


def test_the_report_is_json() -> None:
    again = json.loads(json.dumps(dataclasses.asdict(CLEAN)))
    assert again["labels"][0] == {"name": "a", "train": 2, "test": 0}
    assert again["train_tokens"]["max"] == 2
    assert set(again) == {field.name for field in dataclasses.fields(LabelReport)}


def test_lengths_for_other_rows_are_refused() -> None:
    data = LabelledData(rows(("one", "a")), rows(("two", "b")))
    with pytest.raises(ValueError, match="2 values for 1 rows"):
        inspect_data(data, [1, 1], [1], 8)


# How it is shown


def test_clean_data_says_what_was_checked() -> None:
    text = shown(CLEAN)
    assert "3 to train, 1 to test (given)" in text
    assert "no text is cut, empty, repeated, labelled twice" in text
    for name in ("Cut", "Empty", "Twice", "Conflict", "Leak"):
        assert name not in text


def test_every_finding_is_shown_with_its_lines() -> None:
    train = rows(("x " * 9, "A"), ("same", "a"), ("same", "a"), ("Same", "b"), (" ", "b"))
    text = " ".join(shown(inspect(train, rows(("same", "a"), ("x " * 10, "A"), ("", "a")))).split())
    assert "Cut 1 in train: longer than 8 tokens, the end is lost (line 2)" in text
    assert "Cut 1 in test: longer than 8 tokens, the end is lost (line 3)" in text
    assert "Empty 1 in train: no text (line 6)" in text
    assert "Empty 1 in test: no text (line 4)" in text
    assert "Twice 1 in train: the repeat of an earlier row (line 4)" in text
    assert "Conflict 3 in train: the same text stands under another label too (lines 3, 4, 5)" in text
    assert "the text is in train too, so the score will be too good (lines 2, 4)" in text
    assert "'a' and 'A' count as different labels" in text
    assert "no text is cut" not in text


def test_only_first_lines_are_shown() -> None:
    train = rows(*(("x " * 9 + str(number), "ab"[number % 2]) for number in range(1200)))
    assert "1,200 in train: longer than 8 tokens, the end is lost (lines 2, 3, 4, 5, 6, …)" in " ".join(
        shown(inspect(train, rows(("y", "a")))).split()
    )


def labels_shown(number: int) -> list[str]:
    pairs = [(f"text {name} {copy}", f"l{name}") for name in range(number) for copy in range(number - name)]
    return shown(inspect(rows(*pairs), rows(("new", "l0")))).partition("Label ")[2].splitlines()[1:]


def test_many_labels_are_shortened_to_the_biggest_and_the_smallest() -> None:
    lines = labels_shown(77)
    assert len(lines) == 11
    assert lines[0].split() == ["l0", "77", "1"]
    assert lines[5].strip() == "… and 67 more"
    assert lines[-1].split() == ["l76", "1", "0"]
    assert len(labels_shown(12)) == 11


@pytest.mark.parametrize("number", [2, 10, 11])
def test_few_labels_are_all_shown(number: int) -> None:
    lines = labels_shown(number)
    assert [line.split()[0] for line in lines] == [f"l{name}" for name in range(number)]


def test_long_names_and_markup_keep_their_place() -> None:
    source = "a/very/long/" + "path/" * 30 + "[bold].csv"
    train = rows(("t", "[red]x[/red]"), ("u", "long " * 40), source=source)
    text = shown(inspect(train, train))
    assert max(map(len, text.splitlines())) <= 80
    assert "[red]x[/red]" in text
    assert "[bold].csv" in text.replace("\n", "").replace(" ", "")


@needs_shared
def test_banking77() -> None:
    folder = SHARED / "data" / "banking77"
    data = CLASSES.load(str(folder / "train.csv"), test=str(folder / "test.csv"))
    report = inspect_data(data, words(data.train.texts), words(data.test.texts), 64)
    assert len(report.labels) == 77
    assert report.labels[0] == LabelCount("card_payment_fee_charged", 187, 40)
    assert report.imbalance == pytest.approx(187 / 35)
    assert report.leaked.count == 7
    assert report.conflicts.count == 0
    text = shown(report)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "… and 67 more" in text
