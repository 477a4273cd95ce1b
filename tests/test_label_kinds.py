"""Which kind of label a file holds, how it is read, and what is said of what cannot be."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from capotune import api
from capotune.data.numbers import NUMBERS
from capotune.data.several_labels import SEVERAL_LABELS
from capotune.errors import CapotuneError, DataError
from capotune.tasks.multi_label.facade import LabelSet
from capotune.tasks.ordinal.facade import OrdinalLabel
from capotune.tasks.regression.facade import Numbers

Rows = list[dict[str, Any]]
NAMES = ("toxic", "rude", "spam")


def rows(count: int = 30, **columns: Any) -> Rows:
    return [{name: value(at) if callable(value) else value for name, value in columns.items()} for at in range(count)]


def text(at: int) -> str:
    return f"where is parcel {at}"


def joined(separator: str) -> Any:
    return lambda at: separator.join(name for bit, name in enumerate(NAMES) if at >> bit & 1)


def fraction(at: int) -> float:
    return (at * 37 % 29) / 7


COLUMNS = {name: (lambda at, bit=bit: at >> bit & 1) for bit, name in enumerate(NAMES)}


@pytest.mark.parametrize(
    ("data", "kind", "said"),
    [
        (
            rows(text=text, labels=lambda at: list(NAMES[: at % 4])),
            "multi-label",
            "several a row, as a list: 1.4 a row",
        ),
        (rows(text=text, label=joined("; ")), "multi-label", "several a row, separated by ';'"),
        (rows(text=text, label=joined("|")), "multi-label", "several a row, separated by '|'"),
        (rows(text=text, label=lambda at: str(list(NAMES[: at % 4]))), "multi-label", "several a row, as a list"),
        (rows(text=text, **COLUMNS), "multi-label", "a column of 0 and 1 each: 1.4 a row; 4 rows without any"),
        (rows(sentence=text, **COLUMNS), "multi-label", "a column of 0 and 1 each"),
        (rows(text=text, score=fraction), "regression", "Numbers"),
        (rows(text=text, label=fraction), "regression", "Numbers"),
        (rows(sentence=text, Rating=lambda at: str(fraction(at))), "regression", "label in 'Rating'"),
        (rows(sentence1=text, sentence2=text, score=fraction), "regression", "Numbers"),
        (rows(text=text, stars=lambda at: at % 5), "classification", "5, with"),
        (rows(text=text, score=lambda at: at % 5), "classification", "5, with"),
        (rows(text=text, label=lambda at: NAMES[at % 3], score=fraction), "classification", "3, with"),
        (rows(text=text, label=lambda at: (at % 6) / 2), "classification", "6, with"),
    ],
)
def test_the_kind_shows_in_columns_and_values(data: Rows, kind: str, said: str, bert: Path) -> None:
    found = api.inspect(data=data, model=str(bert), test_fraction=0)
    assert found["task"] == kind
    shown = [one for block in api.describe_data(kind, found["report"]) for one in getattr(block, "findings", [])]
    assert any(said in f"{one.name} {one.text}" for one in shown), shown


def test_text_to_write_stays_text_to_write() -> None:
    from capotune.data.generation import looks_like_generation

    assert looks_like_generation(rows(text=text, id=lambda at: at))
    assert looks_like_generation(rows(text=text, timestamp=fraction))
    assert looks_like_generation(rows(prompt=text, completion=text))
    assert not looks_like_generation(rows(text=text, score=fraction))


def error_of(reading: Any, data: object, **given: Any) -> str:
    with pytest.raises(CapotuneError) as caught:
        reading.load(data, test_fraction=0, **given)
    return str(caught.value)


def several(*labels: Any) -> Rows:
    return [{"text": text(at), "labels": own} for at, own in enumerate(labels)]


def scores(*values: Any) -> Rows:
    return [{"text": text(at), "score": own} for at, own in enumerate(values)]


@pytest.mark.parametrize(
    ("reading", "data", "expected"),
    [
        (SEVERAL_LABELS, several(["a"], ["a"]), "all 2 training rows have the same labels, 'a' (column 'labels')"),
        (SEVERAL_LABELS, several([], []), "all 2 training rows have the same labels, none"),
        (SEVERAL_LABELS, several(["a"], ["b", None]), "row 1: labels (labels) are ['b', None], of which not every"),
        (SEVERAL_LABELS, several(["a"], ["b", ""]), "row 1: labels (labels) are ['b', ''], of which not every one is"),
        (SEVERAL_LABELS, several(["a"], {"b": 1}), "row 1: labels (labels) are an object"),
        (NUMBERS, scores(1.5, math.nan, 2.5), "row 1: missing number (score)"),
        (NUMBERS, scores(1.5, "high", 2.5), "row 1: number (score) is 'high', not a finite number"),
        (NUMBERS, scores(1.5, "inf", 2.5), "row 1: number (score) is 'inf', not a finite number"),
        (NUMBERS, scores(1.5, [2.0], 2.5), "row 1: number (score) is a list, not a finite number"),
        (NUMBERS, scores(1.5, True, 2.5), "row 1: number (score) is 'true', not a finite number"),
        (NUMBERS, scores(2.5, 2.5), "all 2 training rows have one number, 2.5 (column 'score')"),
        (NUMBERS, scores(*["high"] * 6), "it is not clear which column holds the label"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used_are_named(reading: Any, data: Rows, expected: str) -> None:
    given = {} if "not clear" in expected else {"label_column": "labels" if reading is SEVERAL_LABELS else "score"}
    assert expected in error_of(reading, data, **given)


def test_a_column_of_0_and_1_with_something_else_is_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,toxic,rude\na b,1,0\nc d,0,maybe\ne f,0,1\n", "utf-8")
    message = error_of(SEVERAL_LABELS, str(path), label_columns=("toxic", "rude"))
    assert f"{path}:3: rude is 'maybe', neither 0 nor 1" in message


def test_test_rows_with_unknown_labels_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text('{"text": "a b", "labels": ["a"]}\n{"text": "c d", "labels": ["a", "bb"]}\n', "utf-8")
    message = error_of(SEVERAL_LABELS, several(["a"], ["b"], []), test=str(path))
    assert f"{path}:2: 'bb'" in message
    assert "test rows have labels that no training row has (1 of them)" in message


def test_a_test_file_without_a_column_is_named(tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    path.write_text("text,toxic\na b,1\n", "utf-8")
    data = rows(text=text, **COLUMNS)
    message = error_of(SEVERAL_LABELS, data, test=str(path), label_columns=NAMES)
    assert re.search(r"test\.csv: no column 'rude', which .* names", message)


def test_a_test_file_is_read_as_the_training_file() -> None:
    """One label a row there, which could be a name with a comma."""
    test = [{"text": "x y", "label": "toxic"}, {"text": "y z", "label": "toxic;rude"}]
    data = SEVERAL_LABELS.load(rows(text=text, label=joined(";")), test=test)
    assert data.test.labels == [("toxic",), ("rude", "toxic")]
    assert data.train.form == data.test.form == ";"


def test_classes_of_another_kind_lead_to_the_task_that_reads_them(bert: Path) -> None:
    for data, named in (
        (rows(text=text, label=fraction), "`task=regression`"),
        (rows(text=text, label=lambda at: "a;b" if at % 3 else "ab"[at % 2]), "`task=multi-label`"),
        (rows(text=text, labels=lambda at: ["a"] * (at % 2)), "`task=multi-label`"),
        (rows(stuff=text, **COLUMNS), "`task=multi-label`"),
    ):
        with pytest.raises(DataError) as caught:
            api.inspect(data=data, model=str(bert), task="classification")
        assert named in str(caught.value)


def test_answers_to_pairs_of_texts_stand_in_one_line() -> None:
    pair = ("a\nb", "c")
    for one in (
        Numbers(pair, {"score": 1.5}, {"score": 0.25}),
        LabelSet(pair, ("x",), {"x": 0.9, "y": 0.1}),
        OrdinalLabel(pair, "x", {"x": 0.9, "y": 0.1}),
    ):
        assert one.as_line().endswith("\ta b\tc")
        assert "\n" not in one.as_line()


def test_contradictory_rows_are_counted(bert: Path) -> None:
    data = [*scores(1.5, 2.25, 0.5, 7.5), {"text": text(0), "score": 3.5}]
    path_lines = api.inspect(data=data, model=str(bert), task="regression", test_fraction=0)["report"]
    assert path_lines["conflicts"]["count"] == 2
    assert json.dumps(path_lines)
