"""Columns are found or asked for, every row is checked, and the test rows are the right ones."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import SHARED, needs_shared

from capotune.data.classes import CLASSES, class_names
from capotune.data.labelled import LabelledText
from capotune.data.split import hold_out, normalised
from capotune.data.table import Origin
from capotune.errors import DataError, SettingError

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write lines to a file and return its path."""

    def write(name: str, *lines: str) -> str:
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def tickets(write: Write) -> str:
    """Ten rows, ``a`` and ``b`` by turns, on lines 2 to 11."""
    return write("tickets.csv", "text,label", *(f"text {number},{'ab'[number % 2]}" for number in range(10)))


def error_of(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        call(*arguments, **options)
    return str(caught.value)


# Columns


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("text,label", ("text", "label")),
        ("label,text", ("text", "label")),
        ("Utterance,INTENT", ("Utterance", "INTENT")),
        ("message,category", ("message", "category")),
        ("review,sentiment", ("review", "sentiment")),
        ("TEXT,text,label", ("text", "label")),
        ("title,text,label", ("text", "label")),
        ("question,label,category", ("question", "label")),
        ("Category,label,sentence", ("sentence", "label")),
        ("id,query,topic", ("query", "topic")),
    ],
)
def test_columns_are_found_by_name(write: Write, header: str, expected: tuple[str, str]) -> None:
    width = header.count(",") + 1
    source = write(
        "a.csv", header, ",".join(f"one{i}" for i in range(width)), ",".join(f"two{i}" for i in range(width))
    )
    data = CLASSES.read(source)
    assert (data.text_column, data.label_column) == expected
    columns = header.split(",")
    assert data.texts == [f"one{columns.index(expected[0])}", f"two{columns.index(expected[0])}"]
    assert data.labels == [f"one{columns.index(expected[1])}", f"two{columns.index(expected[1])}"]


def test_given_columns_win_and_may_be_in_another_case(write: Write) -> None:
    source = write("a.csv", "text,label,Answer,Kind", "one,two,three,four", "a,b,c,d")
    data = CLASSES.read(source, text_column="Answer", label_column="kind")
    assert (data.texts, data.labels) == (["three", "c"], ["four", "d"])
    assert (data.text_column, data.label_column) == ("Answer", "Kind")
    assert CLASSES.read(source, text_column="label", label_column="text").texts == ["two", "b"]


def test_columns_are_found_by_content_where_only_one_fits(write: Write) -> None:
    rows = (f"{number},hello number {number},kind {number % 2},0.{number}" for number in range(20))
    data = CLASSES.read(write("a.csv", "id,stuff,what is it,score", *rows))
    assert (data.text_column, data.label_column) == ("stuff", "what is it")


def test_content_is_judged_over_the_whole_file_and_not_at_its_start(write: Write) -> None:
    """A file sorted by label shows one label alone for thousands of rows."""
    rows = (f"hello number {number},{'late' if number >= 4000 else 'early'}" for number in range(5000))
    assert CLASSES.read(write("a.csv", "stuff,what", *rows)).label_column == "what"


def test_two_columns_that_could_be_meant_are_asked_about(write: Write) -> None:
    rows = (f"hello number {number},bye number {number},x{number % 2},y{number % 3}" for number in range(20))
    source = write("a.csv", "greeting,farewell,one,two", *rows)
    message = error_of(CLASSES.read, source)
    assert "the text ('greeting' or 'farewell'?) and the label ('one' or 'two'?)" in message
    assert "Give `text_column` and `label_column`" in message
    message = error_of(CLASSES.read, source, text_column="farewell")
    assert "which column holds the label ('one' or 'two'?)" in message
    assert "Give `label_column`" in message


def test_unknown_columns_are_listed_with_the_flags_and_near_names(write: Write) -> None:
    source = write("a.csv", "txt,lable,when", "a,b,c", "d,e,f")
    message = error_of(CLASSES.read, source)
    assert "the text ('txt'?) and the label ('lable'?)" in message
    assert "'txt', 'lable', 'when'" in message
    message = error_of(CLASSES.read, source, text_column="text")
    assert "no column 'text', which `text_column` names. Did you mean 'txt'?" in message


def test_a_file_without_column_names_is_not_trained_on(write: Write) -> None:
    rows = [f"hello number {number},{('card', 'cash')[number % 2]}" for number in range(20)]
    assert "the column names look like data" in error_of(CLASSES.read, write("a.csv", *rows))
    assert "the column names look like data" in error_of(CLASSES.read, write("a.csv", "Where is my card?,x", *rows))


def test_one_column_cannot_be_both(write: Write) -> None:
    source = write("a.csv", "text,label", "a,b")
    assert "given as text and as label" in error_of(CLASSES.read, source, text_column="label", label_column="label")


# Rows


def test_rows_know_their_lines(write: Write) -> None:
    source = write("a.csv", "text,label", '"two\nlines",a', "", "  kept as it is , b ")
    expected = LabelledText(["two\nlines", "  kept as it is "], ["a", "b"], [2, 5], Origin(source), "text", ("label",))
    assert CLASSES.read(source) == expected
    assert len(expected) == 2
    assert expected.take([1]) == LabelledText(["  kept as it is "], ["b"], [5], Origin(source), "text", ("label",))


@pytest.mark.parametrize(
    ("value", "label"),
    [("1", "1"), ("1.0", "1"), ("-2", "-2"), ("0.5", "0.5"), ("1e3", "1000"), ("true", "true"), ('" x "', "x")],
)
def test_numbers_and_truth_values_are_labels(write: Write, value: str, label: str) -> None:
    assert CLASSES.read(write("a.jsonl", f'{{"text": "t", "label": {value}}}')).labels == [label]


def test_text_of_a_csv_is_not_reinterpreted(write: Write) -> None:
    assert CLASSES.read(write("a.csv", "text,label", "1,nan", "2,1.0")).labels == ["nan", "1.0"]


def test_bad_rows_are_named_with_what_is_wrong(write: Write) -> None:
    rows = [
        {"text": "fine", "label": "a"},
        {"text": " \t", "label": "a"},
        {"text": "no label", "label": None},
        {"label": "a"},
        {"text": "not a number", "label": math.nan},
        {"text": 3, "label": ["a", "b"]},
        {"text": "fine", "label": "b"},
        {"text": "", "label": " "},
    ]
    source = write("a.jsonl", *map(json.dumps, rows))
    message = error_of(CLASSES.read, source)
    assert "6 of 8 rows cannot be used" in message
    assert f"{source}:2: empty text (text)\n" in message
    assert f"{source}:3: missing label (label)\n" in message
    assert f"{source}:4: empty text (text)\n" in message
    assert f"{source}:5: missing label (label)\n" in message
    assert f"{source}:6: text (text) is int, not a string and label (label) is a list; give" in message
    assert "… and 1 more" in message
    assert "Fill these in or delete the rows. Or is another column meant?" in message


def test_one_bad_row_of_many_does_not_put_the_column_in_doubt(write: Write) -> None:
    message = error_of(CLASSES.read, write("a.csv", "text,label", "a,b", "c,d", "e,"))
    assert "1 row cannot be used" in message
    assert ":4: missing label (label)" in message
    assert "another column" not in message


def test_nan_of_a_parquet_file_is_a_missing_label(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "label": [1.0, math.nan, None]}), path)
    message = error_of(CLASSES.read, path)
    assert f"{path}:2: missing label" in message
    assert f"{path}:3: missing label" in message
    assert f"{path}:1:" not in message


# Where the test rows are from


def test_test_rows_of_a_second_file(tickets: str, write: Write) -> None:
    other = write("other.csv", "label,text", "b,hello", "a,bye")
    data = CLASSES.load(tickets, test=other)
    assert data.train == CLASSES.read(tickets)
    assert data.test == CLASSES.read(other)
    assert data.test_from == other


def test_the_second_file_needs_the_same_columns(tickets: str, write: Write) -> None:
    other = write("other.csv", "text,kind", "hello,b")
    assert f"{other}: no column 'label', which {tickets} names" in error_of(CLASSES.load, tickets, test=other)


def test_test_rows_by_the_column_split(write: Write) -> None:
    parts = ["train", "Test", "validation", "val", "test", "dev"]
    source = write("a.csv", "Split,text,label", *(f"{part},t{i},{'ab'[i % 2]}" for i, part in enumerate(parts)))
    data = CLASSES.load(source)
    assert (data.train.texts, data.train.lines) == (["t0", "t2", "t3", "t5"], [2, 4, 5, 7])
    assert (data.test.texts, data.test.lines) == (["t1", "t4"], [3, 6])
    assert data.test_from == "the column 'split'"


def test_a_second_file_does_not_put_rows_marked_test_into_training(tickets: str, write: Write) -> None:
    source = write("a.csv", "text,label,split", "t0,a,train", "t1,b,train", "t2,a,test")
    assert CLASSES.load(source, test=tickets).train.texts == ["t0", "t1"]
    assert CLASSES.load(tickets, test=source).test.texts == ["t2"]


def test_a_split_column_without_test_rows_leaves_it_to_the_seed(write: Write) -> None:
    source = write("a.csv", "text,label,split", *(f"t{i},{'ab'[i % 2]},train" for i in range(10)))
    assert len(CLASSES.load(source).test) == 2
    no_train = write("b.csv", "text,label,split", "t0,a,test", "t1,b,test")
    assert "marks no row as train" in error_of(CLASSES.load, no_train)


def test_unknown_parts_are_named(write: Write) -> None:
    source = write("a.csv", "text,label,split", "t0,a,train", "t1,b,banana", "t2,a,")
    message = error_of(CLASSES.load, source)
    assert f"{source}:3: split is 'banana'" in message
    assert f"{source}:4: split is ''" in message
    assert "Allowed: train, validation, test" in message


def test_a_column_split_may_be_the_label(write: Write) -> None:
    rows = (f"t{i},{('banana', 'pea')[i % 2]}" for i in range(10))
    data = CLASSES.load(write("a.csv", "text,split", *rows), label_column="split")
    assert class_names(data.train.labels) == ["banana", "pea"]


def test_the_same_file_twice_is_refused(tickets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link.csv").symlink_to(tickets)
    monkeypatch.chdir(tmp_path)
    for same in (tickets, "tickets.csv", "./tickets.csv", "link.csv"):
        assert "is given as test data" in error_of(CLASSES.load, tickets, test=same)


# Held out by seed


def test_the_seed_decides_which_rows_and_each_label_keeps_its_part(tickets: str) -> None:
    data = CLASSES.load(tickets, seed=3)
    assert Counter(data.test.labels) == {"a": 1, "b": 1}
    assert sorted(data.train.lines + data.test.lines) == list(range(2, 12))
    assert data.train.lines == sorted(data.train.lines)
    assert CLASSES.load(tickets, seed=3) == data
    assert len({tuple(CLASSES.load(tickets, seed=seed).test.lines) for seed in range(10)}) > 3
    assert len(CLASSES.load(tickets, test_fraction=0.6).test) == 6
    assert data.test_from == "20% of the rows, stratified, seed 3"


def test_a_label_with_one_row_stays_in_train(write: Write) -> None:
    source = write("a.csv", "text,label", "alone,c", *(f"t{i},{'ab'[i % 2]}" for i in range(8)))
    for seed in range(20):
        data = CLASSES.load(source, seed=seed, test_fraction=0.5)
        assert "alone" in data.train.texts
        assert len(data.test) == 4


def test_equal_texts_stay_on_one_side_and_contradictions_in_train(write: Write) -> None:
    rows = [f"{'Same ' if i % 3 else 'same  '}{i % 8},{'ab'[i % 2]}" for i in range(48)]
    source = write("a.csv", "text,label", *rows, "torn,a", "Torn,b")
    for seed in range(10):
        data = CLASSES.load(source, seed=seed, test_fraction=0.3)
        assert not set(map(normalised, data.train.texts)) & set(map(normalised, data.test.texts))
        assert {"torn", "Torn"} <= set(data.train.texts)


def test_nothing_can_be_held_out(write: Write) -> None:
    source = write("a.csv", "text,label", "a,x", "b,y", "B,y")
    message = error_of(CLASSES.load, source)
    assert f"{source}: nothing can be held out, as no label has two different texts" in message
    assert "`test`" in message


def test_a_fraction_of_0_holds_nothing_out(tickets: str) -> None:
    data = CLASSES.load(tickets, test_fraction=0)
    assert len(data.test) == 0
    assert data.train == CLASSES.read(tickets)


@pytest.mark.parametrize("fraction", [1, -0.1, 1.5, math.nan])
def test_a_fraction_out_of_range(tickets: str, fraction: float) -> None:
    with pytest.raises(SettingError, match="Allowed: more than 0 and less than 1"):
        CLASSES.load(tickets, test_fraction=fraction)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60),
    st.floats(0.05, 0.95),
    st.integers(0, 2**32),
)
def test_hold_out_keeps_its_promises(labels: list[int], fraction: float, seed: int) -> None:
    counts = Counter(labels)
    if max(counts.values()) < 2:
        with pytest.raises(DataError, match="nothing can be held out"):
            hold_out(labels, fraction, seed)
        return
    train, held = hold_out(labels, fraction, seed)
    assert sorted([*train, *held]) == list(range(len(labels)))
    assert len(held) >= 1
    assert len(held) <= max(1, round(fraction * len(labels)))
    for label, count in counts.items():
        held_of_label = int(np.sum(np.array(labels)[held] == label))
        assert held_of_label <= count - 1
        assert abs(held_of_label - min(count * fraction, count - 1)) <= 1
    again = hold_out(labels, fraction, seed)
    assert np.array_equal(train, again[0])
    assert np.array_equal(held, again[1])


def test_many_small_labels_give_the_whole_part() -> None:
    """Where rounding down each label would hold out nothing, the sum is still right."""
    labels = [label for label in range(77) for _ in range(3)]
    train, held = hold_out(labels, 0.2, seed=0)
    assert len(held) == round(0.2 * len(labels))
    assert len(train) + len(held) == len(labels)
    assert max(Counter(labels[row] for row in held).values()) == 1


def test_the_row_that_is_left_goes_to_the_label_that_lost_most() -> None:
    labels = [0] * 11 + [1] * 19  # 1.1 and 1.9 rows of a tenth
    for seed in range(10):
        assert Counter(labels[row] for row in hold_out(labels, 0.1, seed)[1]) == {0: 1, 1: 2}


# Labels


def test_label_names_are_sorted_by_number_or_by_letter() -> None:
    def names(*labels: str) -> list[str]:
        return class_names(labels)

    assert names("10", "9", "-1", "9") == ["-1", "9", "10"]
    assert names("10", "9", "x") == ["10", "9", "x"]


def test_one_label_alone_is_refused(write: Write, tickets: str) -> None:
    source = write("a.csv", "text,label", "a,x", "b,x")
    expected = f"{source}: all 2 training rows have one label, 'x' (column 'label')"
    assert expected in error_of(CLASSES.load, source)
    assert expected in error_of(CLASSES.load, source, test=tickets)


def test_a_label_of_the_test_rows_alone_is_named_with_its_lines(tickets: str, write: Write) -> None:
    other = write("other.csv", "text,label", "t,a", "t,A", "t,z", "t,z")
    message = error_of(CLASSES.load, tickets, test=other)
    assert "test rows have labels that no training row has (2 of them)" in message
    assert f"{other}:3: 'A'" in message
    assert f"{other}:4: 'z'" in message
    assert f"{other}:5: 'z'" in message
    assert f"{other}:2:" not in message
    assert "Did you mean 'a'?" in message


def test_a_test_file_needs_not_show_every_label(tickets: str, write: Write) -> None:
    assert class_names(CLASSES.load(tickets, test=write("other.csv", "text,label", "t,a")).train.labels) == ["a", "b"]


# Real data


@needs_shared
def test_banking77() -> None:
    folder = SHARED / "data" / "banking77"
    data = CLASSES.load(str(folder / "train.csv"), test=str(folder / "test.csv"))
    assert (len(data.train), len(data.test)) == (10_003, 3_080)
    assert class_names(data.train.labels) == sorted(json.loads((folder / "categories.json").read_text()))
    assert (data.train.text_column, data.train.label_column) == ("text", "category")
    halves = CLASSES.load(str(folder / "train.csv"), seed=1)
    assert len(halves.test) / 10_003 == pytest.approx(0.2, abs=0.001)
    assert set(halves.test.labels) == set(class_names(data.train.labels))
