"""Many rows: what is worked out over whole columns is what is worked out row by row; of texts enough are counted."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import capo
from hypothesis import given
from hypothesis import strategies as st

from capotune import api
from capotune.data.batches import IGNORE_INDEX, Encoded, TokenLists, TokenRows, taken
from capotune.data.classes import CLASSES
from capotune.data.encoded_rows import EncodedRows
from capotune.data.generation import load_samples
from capotune.data.inspect import measures
from capotune.data.labelled import LabelledData
from capotune.data.readers import read_table
from capotune.data.split import _quotas, hold_out, normalised, text_numbers
from capotune.data.table import ColumnRows
from capotune.errors import DataError
from capotune.models.base import find
from capotune.tasks.classification.task import Classification
from capotune.tasks.generation.task import Generation
from capotune.tasks.text_targets import run as run_module

WORDS = st.sampled_from(["late", "Late ", "where  is it", "where is it", "lost", "", "é", "e\u0301"])


def held_out_row_by_row(labels: list[int], fraction: float, seed: int, groups: list[str]) -> list[int]:
    """The rows that ``hold_out`` held out before it worked on whole arrays."""
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    units: dict[int, list[list[int]]] = {}
    for rows in members.values():
        if len({labels[row] for row in rows}) == 1:
            units.setdefault(labels[rows[0]], []).append(rows)
    rng = np.random.default_rng(seed)
    quotas = _quotas([len(of_label) for of_label in units.values()], fraction, rng)
    return sorted(
        row
        for of_label, quota in zip(units.values(), quotas, strict=True)
        for chosen in rng.permutation(len(of_label))[:quota]
        for row in of_label[chosen]
    )


@given(
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from("abcdefghijklmnop")), min_size=2, max_size=60),
    st.floats(0.05, 0.9),
    st.integers(0, 9),
)
def test_rows_held_out_are_those_of_before(rows: list[tuple[int, str]], fraction: float, seed: int) -> None:
    labels, groups = [label for label, _ in rows], [group for _, group in rows]
    try:
        fit, held = hold_out(labels, fraction, seed, groups)
    except DataError:
        texts = {label: {g for other, g in rows if other == label} for label in labels}
        mixed = {g for g in groups if len({label for label, other in rows if other == g}) > 1}
        assert all(len(of_label - mixed) < 2 for of_label in texts.values())
        return
    assert held.tolist() == held_out_row_by_row(labels, fraction, seed, groups)
    assert sorted([*fit.tolist(), *held.tolist()]) == list(range(len(rows)))


@given(st.lists(WORDS, max_size=30))
def test_texts_have_one_number_where_they_are_equal_as_compared(texts: list[str]) -> None:
    first: dict[str, int] = {}
    expected = [first.setdefault(normalised(text), len(first)) for text in texts]
    assert text_numbers(texts).tolist() == expected


@given(st.lists(st.lists(st.integers(0, 200_000), max_size=9), max_size=20))
def test_token_lists_are_lists_of_tokens(sequences: list[list[int]]) -> None:
    held = TokenLists.of(iter(sequences))
    assert list(held) == sequences
    assert held[1:-1] == sequences[1:-1]
    assert TokenRows(held, 0).digest() == TokenRows(sequences, 0).digest()
    rows = list(range(0, len(sequences), 2))
    assert isinstance(taken(held, rows), TokenLists)
    assert list(taken(held, rows)) == list(taken(sequences, rows)) == sequences[::2]
    with pytest.raises(IndexError):
        held[len(sequences)]


@given(
    st.lists(st.lists(st.tuples(st.lists(st.tuples(st.integers(0, 200_000), st.booleans()), max_size=6)), max_size=3))
)
def test_encoded_rows_are_what_was_put_in(rows: list[list[tuple[list[tuple[int, bool]]]]]) -> None:
    expected = [
        [
            Encoded(
                [token for token, _ in tokens],
                [token if in_loss else IGNORE_INDEX for token, in_loss in tokens],
                len(tokens) + number,
                answer_cut=number == 0,
                straddles=number == 1,
            )
            for number, (tokens,) in enumerate(of_row)
        ]
        for of_row in rows
    ]
    held = EncodedRows.of(expected)
    assert list(held) == expected
    assert held[1:] == expected[1:]
    with pytest.raises(IndexError):
        held[len(expected)]


def test_samples_are_tokenised_some_at_a_time(colour_chats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capotune.tasks.generation.encoding._AT_ONCE", 1000)
    samples = load_samples(str(colour_chats)).train
    task = Generation.on(find("capo-tiny"), 64, 0, chat=True)
    whole = task.encode(samples)
    monkeypatch.setattr("capotune.tasks.generation.encoding._AT_ONCE", 3)
    assert list(task.encode(samples)) == list(whole)
    assert len(whole) == len(samples) > 3


@pytest.mark.parametrize("rows", [3, 7])
def test_data_hash_is_that_of_one_json_text(tickets: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "_HASHED_AT_ONCE", rows)
    every = CLASSES.load(str(tickets))
    for data in (every, LabelledData(every.train, every.train.take([]))):
        content = [data.train.texts, data.train.labels, data.test.texts, data.test.labels]
        assert run_module._data_hash(data) == hashlib.sha256(json.dumps(content).encode()).hexdigest()


def test_texts_are_cut_and_counted_in_one_pass(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capotune.tasks.text_targets.task._AT_ONCE", 3)
    task = Classification.on(find(str(bert)), ["a", "b"], 6, 0)
    texts = ["late", "where is my parcel late lost card", "the", "a a a a", "a a a a a", "lost", "where where"]
    held, lengths = task.encode_many(texts)
    whole = task.tokenizer(texts, verbose=False)["input_ids"]
    assert lengths == [len(ids) for ids in whole] == task.token_lengths(texts)
    assert list(held) == task.encode(texts)
    assert list(held) == task.tokenizer(texts, truncation=True, max_length=6)["input_ids"]
    assert max(map(len, held)) == 6 < max(lengths)
    assert task.encode_many([])[1] == []


# ---------------------------------------------------------------------------------------------------------- the report


def inspected(path: Path, bert: Path, **settings: Any) -> dict[str, Any]:
    report: dict[str, Any] = api.inspect(data=str(path), model=str(bert), **settings)["report"]
    return report


def test_of_many_texts_the_longest_and_some_others_are_counted(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All else is that of every row."""
    texts = [" ".join(["late"] * (1 + number % 7)) + f" {number}" for number in range(200)]
    texts[77] = " ".join(["late"] * 90)
    rows = [{"text": text, "label": "ab"[number % 2], "split": "train"} for number, text in enumerate(texts)]
    rows += [{"text": text, "label": "a", "split": "test"} for text in texts[:40]]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = inspected(path, bert)
    assert whole["counted"] is None
    monkeypatch.setattr(measures, "MOST_COUNTED", 60)
    monkeypatch.setattr(measures, "LONGEST_COUNTED", 5)
    some = inspected(path, bert)
    assert 55 <= some["counted"] <= 60
    assert some["train_truncated"] == whole["train_truncated"] == {"count": 1, "first": [78], "unit": "line"}
    assert some["train_tokens"]["max"] == whole["train_tokens"]["max"]
    assert abs(some["train_tokens"]["median"] - whole["train_tokens"]["median"]) <= 2
    different = {name for name in whole if whole[name] != some[name]}
    assert different <= {"counted", "train_tokens", "test_tokens"}
    shown = capo("data", path, "--model", bert)
    assert f"the tokens of {some['counted']} training texts: the longest, and others at random" in shown.said


def test_what_training_refuses_is_refused_of_many_rows_too(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "MOST_COUNTED", 10)
    monkeypatch.setattr(measures, "LONGEST_COUNTED", 2)
    path = tmp_path / "rows.csv"
    lines = [f"{'late' if number % 2 else 'lost'},{number % 2},train\n" for number in range(30)]
    path.write_text("text,label,split\n" + "".join(lines) + "card,1,test\n")
    found = api.inspect(data=str(path), model=str(bert))
    assert "nothing can be held out" in found["refused"]
    assert found["report"]["counted"] == 10


# ------------------------------------------------------------------------------------------------------------- readers


def test_rows_of_one_form_are_held_by_column(tmp_path: Path) -> None:
    rows = [{"text": f"text {number}", "label": f"label {number % 3}", "n": [number]} for number in range(20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    table = read_table(str(path))
    assert isinstance(table.rows, ColumnRows)
    assert list(table.rows) == rows
    assert (table.rows[3], table.rows[-2:], len(table.rows)) == (rows[3], rows[-2:], 20)
    assert table.column("text") == [row["text"] for row in rows]
    labels = table.column("label")
    assert labels[0] is labels[3]
    assert table.column("other") == [None] * 20


@pytest.mark.parametrize("first", [{"a": 1}, {}])
def test_rows_of_other_forms_keep_their_own_keys(first: dict[str, int], tmp_path: Path) -> None:
    rows = [first, first, {"a": 2, "b": None}, {"b": 3}, {}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    table = read_table(str(path))
    assert list(table.rows) == rows
    assert table.column("b") == [None, None, None, 3, None]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_places_in_a_file_read_line_by_line_are_the_editors(kind: str, tmp_path: Path) -> None:
    """Broken rows are named with their line and shown, and what follows them is read on."""
    good = 'text,label\n"two\nlines",a\n' if kind == "csv" else '{"text": "x", "label": "a"}\n\n'
    bad = '"never closed\n' if kind == "csv" else "{never closed\n"
    path = tmp_path / f"rows.{kind}"
    path.write_text(f"\ufeff{good}{bad}{bad}")
    with pytest.raises(DataError) as caught:
        read_table(str(path))
    at = 4 if kind == "csv" else 3
    assert f"{path}:{at}: " in str(caught.value)
    assert f"{path}:{at + 1}: " in str(caught.value)
    assert str(caught.value).count("never closed»") == 2


def test_text_that_breaks_late_is_named_by_its_line(tmp_path: Path) -> None:
    for broken, words in ((b"\xe9t\xe9", "the byte 0xe9 is not UTF-8"), (b"a\0b", "a zero byte")):
        path = tmp_path / "rows.csv"
        path.write_bytes(b"text,label\n" + b"a text,a\n" * 5000 + broken + b",b\n")
        with pytest.raises(DataError) as caught:
            read_table(str(path))
        assert f"{path}:5002" in str(caught.value)
        assert words in str(caught.value)


def test_parquet_with_metadata_of_nobody_is_read(tmp_path: Path) -> None:
    """What datasets writes names classes; anything else there says nothing."""
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["a", "b"], "label": [{"x": 1}, {"x": 2}], "n": [0, -1]})
    kind = {"_type": "ClassLabel", "names": ["no", "yes"]}
    for number, said in enumerate(
        ["{", "[]", '{"info": [1]}', '{"info": {"features": {"n": {"_type": "ClassLabel"}}}}']
    ):
        path = tmp_path / f"{number}.parquet"
        pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": said}), path)
        assert read_table(str(path)).column("n") == [0, -1]
    features = json.dumps({"info": {"features": {"n": kind, "label": kind, "other": kind}}})
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": features}), path)
    found = read_table(str(path))
    assert found.column("n") == ["no", None]
    assert found.column("label") == [{"x": 1}, {"x": 2}]
    assert read_table(str(path), limit=1).rows == [{"text": "a", "label": {"x": 1}, "n": "no"}]


def test_parquet_with_text_that_is_none_is_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a text that is long enough"] * 3, "label": [0, 1, 0]}), path)
    path.write_bytes(path.read_bytes().replace(b"a text that", b"\xff text that"))
    with pytest.raises(DataError, match="is not whole parquet"):
        read_table(str(path))


def test_parquet_that_lies_about_its_rows_is_refused(tmp_path: Path) -> None:
    """At fewer than none pyarrow would end the process."""
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": [1, 2]}).select([]), path)
    whole = path.read_bytes()
    group = b"\x19\x1c\x19\x0c\x16\x00\x16\x00"  # one, of no columns, no bytes and no rows
    assert whole.count(group) == 1
    path.write_bytes(whole.replace(group, group[:-1] + b"\x09"))
    with pytest.raises(DataError, match=r"is not whole parquet .*the number of its rows"):
        read_table(str(path))
