"""Rows in memory are read as the same rows of a file are, to the bit, and what does not fit is named by its row."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest

import capotune
from capotune import api, events
from capotune.data.classes import CLASSES
from capotune.data.generation import load_samples, looks_like_generation, read_samples_to_score
from capotune.data.readers import as_source, read_table
from capotune.errors import CapotuneError, DataError, SettingError
from capotune.memory_table import MemoryTable, Unreadable
from capotune.settings import TrainSettings, build

Rows = list[dict[str, Any]]

ROWS: Rows = [
    {"text": f"{words} {number}", "label": label}
    for number in range(12)
    for words, label in (("my lamp is broken", "broken"), ("the parcel was late", "late"), ("paid twice", "money"))
]
TEST: Rows = [{"text": "the lamp was broken", "label": "broken"}, {"text": "parcel late", "label": "late"}]
CHATS: Rows = [
    {"messages": [{"role": "user", "content": f"how many is {number}?"}, {"role": "assistant", "content": str(number)}]}
    for number in range(12)
]

KINDS: dict[str, Callable[[Rows], Any]] = {
    "list": lambda rows: rows,
    "tuple": tuple,
    "frame": pandas.DataFrame,
    "dataset": datasets.Dataset.from_list,
}


def frame(**columns: Any) -> pandas.DataFrame:
    return pandas.DataFrame(columns)


def jsonl(folder: Path, name: str, rows: Rows) -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def error_of(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(CapotuneError) as caught:
        call(*arguments, **options)
    return str(caught.value)


# What is read


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_memory_are_those_of_the_file(kind: str, tmp_path: Path) -> None:
    table, file = read_table(KINDS[kind](ROWS)), read_table(jsonl(tmp_path, "a.jsonl", ROWS))
    assert (table.rows, table.columns) == (file.rows, file.columns)
    assert table.lines == [line - 1 for line in file.lines]  # a position, as in ROWS[3]
    assert table.source.at(3) == "row 3"
    assert str(table.source).startswith("data in memory (")
    assert str(table.source).endswith(" of 36 rows)")


@pytest.mark.parametrize("kind", KINDS)
def test_the_split_by_seed_is_that_of_the_file(kind: str, tmp_path: Path) -> None:
    in_memory, file = CLASSES.load(KINDS[kind](ROWS), seed=3), CLASSES.load(jsonl(tmp_path, "a.jsonl", ROWS), seed=3)
    for one, other in ((in_memory.train, file.train), (in_memory.test, file.test)):
        assert (one.texts, one.labels) == (other.texts, other.labels)
        assert list(one.lines) == [line - 1 for line in other.lines]
    assert in_memory.test_from == file.test_from


@pytest.mark.parametrize("kind", KINDS)
def test_conversations_in_memory_are_those_of_the_file(kind: str, tmp_path: Path) -> None:
    in_memory, file = load_samples(KINDS[kind](CHATS)), load_samples(jsonl(tmp_path, "a.jsonl", CHATS))
    assert in_memory.train.samples == file.train.samples
    assert in_memory.test.samples == file.test.samples
    assert looks_like_generation(KINDS[kind](CHATS))
    assert not looks_like_generation(KINDS[kind](ROWS))
    assert len(read_samples_to_score(KINDS[kind](CHATS))) == 12


def test_rows_of_several_keys_have_all_columns() -> None:
    table = read_table([{"a": 1}, {"b": [True, None]}, {"a": None}])
    assert table.columns == ["a", "b"]
    assert table.rows == [{"a": 1}, {"b": [True, None]}, {"a": None}]
    assert not table.nulls_are_absent


def test_the_callers_rows_stay_as_they_were() -> None:
    rows = [{"text": "a b", "label": math.nan}, {"text": "c", "label": 1}]
    read_table(rows)
    assert math.isnan(rows[0]["label"])


def test_a_limit_reads_the_first_rows_alone() -> None:
    assert len(read_table(ROWS, limit=2).rows) == 2


def test_numpys_values_become_pythons() -> None:
    row = {"a": np.int8(3), "b": np.float64(0.5), "c": np.bool_(True), "d": np.str_("x"), "e": np.arange(2)}
    (found,) = read_table([row]).rows
    assert found == {"a": 3, "b": 0.5, "c": True, "d": "x", "e": [0, 1]}
    assert [type(value) for value in found.values()] == [int, float, bool, str, list]


def test_missing_values_of_a_frame_are_none() -> None:
    data = frame(
        text=["a", None, "c"], label=pandas.array([1, pandas.NA, 2], dtype="Int64"), x=[0.5, math.nan, math.inf],
        when=[pandas.NaT, pandas.NaT, pandas.NaT],
    )  # fmt: skip
    assert read_table(data).rows == [
        {"text": "a", "label": 1, "x": 0.5, "when": None},
        {"text": None, "label": None, "x": None, "when": None},
        {"text": "c", "label": 2, "x": math.inf, "when": None},
    ]


def test_categories_and_numbers_are_labels() -> None:
    data = frame(text=["a b", "c d", "e f"], label=pandas.Categorical(["x", "y", "x"]))
    assert CLASSES.read(data).labels == ["x", "y", "x"]
    assert CLASSES.read(frame(text=["a b", "c d"], label=[1.0, 2.0])).labels == ["1", "2"]
    assert CLASSES.read(frame(text=["a b", "c d"], label=[True, False])).labels == ["true", "false"]


def test_the_index_of_a_frame_is_not_its_rows_place() -> None:
    data = pandas.DataFrame({"text": ["a", None], "label": ["x", "y"]}, index=[70, 80])
    assert "row 1: empty text (text)" in error_of(CLASSES.read, data)


def test_a_class_label_has_its_names() -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"text": ["a b", "c d", "e f"], "label": [1, 0, 1]}
    assert CLASSES.read(datasets.Dataset.from_dict(rows, features=features)).labels == ["yes", "no", "yes"]


def test_a_dataset_dict_says_which_rows_are_the_test() -> None:
    both = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(TEST))
    data = CLASSES.load(both)
    assert data.train.texts == [row["text"] for row in ROWS]
    assert data.test.texts == [row["text"] for row in TEST]
    assert CLASSES.read_to_score(both).texts == data.test.texts
    assert "several splits and a column 'split'" in error_of(
        CLASSES.load, datasets.DatasetDict(a=datasets.Dataset.from_list([{"split": "x"}]), b=both["test"])
    )


@pytest.mark.parametrize("kind", KINDS)
def test_test_rows_in_memory_have_their_own_name(kind: str) -> None:
    data = CLASSES.load(ROWS, test=KINDS[kind](TEST))
    assert data.test.texts == [row["text"] for row in TEST]
    assert data.test_from.startswith("test data in memory (")
    assert data.test.where(1) == "test row 1"


def test_a_subclass_of_a_frame_is_a_frame() -> None:
    class Mine(pandas.DataFrame):
        pass

    assert read_table(Mine({"text": ["a"], "label": ["b"]})).rows == [{"text": "a", "label": "b"}]


# What does not fit


@pytest.mark.parametrize("kind", KINDS)
def test_bad_rows_are_named_by_their_position(kind: str) -> None:
    rows = [*ROWS[:3], {"text": " ", "label": "late"}, {"text": "a b", "label": None}]
    message = error_of(CLASSES.load, KINDS[kind](rows))
    assert "2 of 5 rows cannot be used:\n  row 3: empty text (text)\n  row 4: missing label (label)\n" in message
    assert message.startswith("data in memory (")


def test_a_nan_label_is_a_missing_label() -> None:
    assert "  row 1: missing label (label)\n" in error_of(
        CLASSES.read, frame(text=["a", "b", "c"], label=[1.0, math.nan, 2.0])
    )


def test_values_of_other_types_are_refused_where_they_are_read() -> None:
    day = pandas.Timestamp("2020-01-01")
    data = frame(text=["a b", "c d"], label=["x", "y"], day=[day, day], price=[Decimal(1), Decimal(2)])
    assert CLASSES.read(data).labels == ["x", "y"]
    assert "  row 0: label (day) is Timestamp, neither text nor a number\n" in error_of(
        CLASSES.read, data, label_column="day"
    )
    assert "  row 0: text (price) is Decimal, not a string\n" in error_of(CLASSES.read, data, text_column="price")
    assert "  row 0: price is Decimal, not text\n" in error_of(
        load_samples, data, prompt_template="{price}", completion_column="text"
    )
    assert read_table(data).rows[0]["day"] == Unreadable("Timestamp")


@pytest.mark.parametrize("empty", [[], (), frame(), frame(text=[], label=[]), datasets.Dataset.from_list([])])
def test_no_rows_are_refused(empty: Any) -> None:
    assert "of 0 rows): holds no rows" in error_of(read_table, empty)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["a", "b"], "2 rows cannot be read as a dict of columns:\n  row 0: not a dict but str\n"),
        ([{"text": "a"}, None], "1 row cannot be read as a dict of columns:\n  row 1: not a dict but NoneType\n"),
        ([{"text": "a", 3: "b"}], "  row 0: a column is named 3, which is no text\n"),
        ([{"text": "a\ud83d"}], "  row 0: text that is not UTF-8\n"),
        ([{"text": "a"}, {"text": {"b": ["\udc00"]}}], "  row 1: text that is not UTF-8\n"),
        (pandas.DataFrame([["a", "b"]]), "a column is named 0, which is no text. Name the columns"),
        (pandas.DataFrame([["a", "b"]], columns=["x", "x"]), "more than one column is named 'x'"),
        ({"text": ["a"], "label": ["b"]}, "`data` of the type dict is not read. Allowed: a path"),
        (3, "`data` of the type int is not read"),
        (None, "`data` of the type NoneType is not read"),
        (iter(ROWS), "`data` of the type list_iterator is not read"),
        (pandas.Series(["a"]), "`data` of the type Series is not read"),
        (datasets.Dataset.from_list(ROWS).to_iterable_dataset(), "`data` of the type IterableDataset is not read"),
    ],
)  # fmt: skip
def test_other_things_are_refused(data: Any, message: str) -> None:
    assert message in error_of(read_table, data)


def test_test_rows_of_another_type_name_their_setting() -> None:
    assert "`test` of the type int is not read" in error_of(CLASSES.load, ROWS, test=3)
    assert "test data in memory (list of 0 rows): holds no rows" in error_of(CLASSES.load, ROWS, test=[])


def test_the_same_rows_twice_are_refused() -> None:
    for same in (ROWS, list(ROWS), pandas.DataFrame(ROWS)):
        assert "is given as test data (`test`) and as training data" in error_of(CLASSES.load, ROWS, test=same)


def test_a_label_of_the_test_rows_alone_is_named_by_its_row() -> None:
    message = error_of(CLASSES.load, ROWS, test=[*TEST, {"text": "a", "label": "brokn"}])
    assert "  test row 2: 'brokn'\n" in message
    assert "Did you mean 'broken'?" in message


# Settings that hold it


def test_settings_hold_rows_and_record_their_name_and_hash() -> None:
    source = as_source(ROWS)
    settings = build(TrainSettings, {"data": source, "test": Path("test.csv")})
    assert settings.data is source
    assert settings.test == "test.csv"
    recorded = json.loads(json.dumps(settings.model_dump(mode="json")))
    assert recorded["data"] == {"name": "data in memory (list of 36 rows)", "sha256": source.sha256}
    assert as_source(pandas.DataFrame(ROWS)).sha256 == source.sha256
    assert as_source(ROWS[1:]).sha256 != source.sha256
    assert repr(settings).count("my lamp") == 0
    with pytest.raises(SettingError, match="data: a path, a hub id or rows in memory are needed, but int was given"):
        build(TrainSettings, {"data": 3})


@pytest.mark.parametrize("kind", KINDS)
def test_rows_go_to_another_process_and_stay_the_same(kind: str) -> None:
    rows = [*ROWS, {"text": "naïve ☕ 🎸", "label": "x", "when": pandas.Timestamp("2020"), "n": math.inf}]
    source = as_source(KINDS[kind](rows), "test")
    assert isinstance(source, MemoryTable)
    assert source.sha256
    other = build(TrainSettings, {"data": json.loads(json.dumps(source.packed()))}).data
    assert other == source
    assert other is not source
    assert isinstance(other, MemoryTable)
    assert other.sha256 == source.sha256


def test_importing_is_cheap() -> None:
    code = (
        "import sys, capotune.data.readers, capotune.settings\n"
        "capotune.data.readers.read_table([{'text': 'a', 'label': 'b'}])\n"
        "print([m for m in ('datasets', 'pandas', 'pyarrow', 'torch') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# The commands


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_rows_in_memory_gives_the_weights_of_the_file(kind: str, bert: Path, tmp_path: Path) -> None:
    own = {"model": str(bert), "epochs": 1, "rank": 2, "test_fraction": 0.25, "cache": False}
    file = capotune.train("lora", data=jsonl(tmp_path, "a.jsonl", ROWS), out=tmp_path / "file", **own)
    here = capotune.train("lora", data=KINDS[kind](ROWS), out=tmp_path / "memory", **own)
    first, second = (
        (tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("file", "memory")
    )
    assert first == second
    assert here["data_sha256"] == file["data_sha256"]
    assert here["result"]["score"] == file["result"]["score"]
    assert here["settings"]["data"]["name"].startswith("data in memory (")
    assert "my lamp" not in (tmp_path / "memory" / "run.json").read_text("utf-8")
    rows = [json.loads(line) for line in (tmp_path / "memory" / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert all(ROWS[row["line"]]["text"] == row["text"] for row in rows)
    scores = [capotune.evaluate(tmp_path / "memory" / "adapter", data=one) for one in (TEST, KINDS[kind](TEST))]
    assert scores[0] == scores[1]
    assert scores[0] == capotune.evaluate(tmp_path / "file" / "adapter", data=jsonl(tmp_path, "b.jsonl", TEST))
    unknown = [*TEST, {"text": "a card", "label": "brokn"}]
    assert error_of(capotune.evaluate, tmp_path / "memory" / "adapter", data=KINDS[kind](unknown)).startswith("row 2: ")


def test_comparing_on_rows_in_memory_sends_them_to_the_workers(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    own = {"model": str(bert), "methods": ("feature-extraction",)}
    file = capotune.compare(
        data=jsonl(tmp_path, "a.jsonl", ROWS), test=jsonl(tmp_path, "b.jsonl", TEST), out=tmp_path / "file", **own
    )
    here = capotune.compare(
        data=pandas.DataFrame(ROWS), test=datasets.Dataset.from_list(TEST), out=tmp_path / "memory", **own
    )
    assert here.rows[0].score == file.rows[0].score
    adapters = [tmp_path / run / "feature-extraction/adapter/adapter_model.safetensors" for run in ("file", "memory")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert not list((tmp_path / "temporary").iterdir())
    page = (tmp_path / "memory" / "compare.html").read_text("utf-8")
    assert "data in memory (DataFrame of 36 rows)" in page
    assert "capotune.compare(data=…)" in page


def test_a_bad_row_ends_a_comparison_with_its_position(bert: Path, tmp_path: Path) -> None:
    rows = [*ROWS, {"text": "", "label": "late"}]
    with pytest.raises(CapotuneError, match="row 36: empty text"):
        capotune.compare(data=rows, model=str(bert), methods=("feature-extraction",), out=tmp_path / "out")
    with pytest.raises(DataError, match="holds no rows"):
        capotune.compare(data=[], model=str(bert), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inspecting_rows_in_memory_counts_in_rows(bert: Path) -> None:
    found = api.inspect(data=[*ROWS, ROWS[0]], model=str(bert), test_fraction=0.2)
    report = found["report"]
    assert report["source"] == "data in memory (list of 37 rows)"
    assert {**report["duplicates"], "first": []} == {"count": 1, "first": [], "unit": "row"}


def test_a_text_without_a_token_is_named_by_its_line(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small tokenizer makes two tokens of anything; one that adds none makes none of some texts."""
    from capotune.tasks.classification import Classification

    def without(self: Classification, texts: list[str], **options: Any) -> list[list[int]]:
        return [[] if "paid" in text else ids for text, ids in zip(texts, before(self, texts, **options), strict=True)]

    before = Classification._ids
    monkeypatch.setattr(Classification, "_ids", without)
    own = {"model": str(bert), "test_fraction": 0, "out": tmp_path / "out"}
    message = error_of(capotune.train, "feature-extraction", data=ROWS, **own)
    assert message.startswith("row 2: the base's tokenizer makes no token of the text 'paid twice 0'")
    path = jsonl(tmp_path, "a.jsonl", ROWS)
    assert error_of(capotune.train, "feature-extraction", data=path, **own).startswith(f"{path}:3: ")


def test_a_stopped_run_goes_on_with_the_same_rows_alone(bert: Path, tmp_path: Path) -> None:
    own = {"model": str(bert), "epochs": 3, "patience": 3, "rank": 2, "cache": False}

    def stop(event: events.Event) -> None:
        if isinstance(event, events.EpochEnded) and event.epoch == 2:
            raise KeyboardInterrupt

    capotune.train("lora", data=ROWS, out=tmp_path / "whole", **own)
    with pytest.raises(KeyboardInterrupt):
        capotune.train("lora", data=ROWS, out=tmp_path / "stopped", report=stop, **own)
    changed = [*ROWS[:-1], {**ROWS[-1], "text": "where is my card"}]
    assert "Give the same rows again in Python" in error_of(capotune.resume, tmp_path / "stopped")
    assert "the data is another than when" in error_of(capotune.resume, tmp_path / "stopped", data=changed)
    capotune.resume(tmp_path / "stopped", data=pandas.DataFrame(ROWS))
    first, second = (
        (tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("whole", "stopped")
    )
    assert first == second


@pytest.mark.parametrize("kind", KINDS)
def test_tagged_words_in_memory_are_those_of_the_file(kind: str, tmp_path: Path) -> None:
    from capotune.tasks.token_classification.data import is_tagged, load_tagged

    rows = [
        {"tokens": ["Anna", "lives", "in", f"Town{number}"], "tags": ["B-PER", "O", "O", "B-LOC"]}
        for number in range(8)
    ]  # fmt: skip
    assert is_tagged(as_source(KINDS[kind](rows)))
    in_memory, file = load_tagged(as_source(KINDS[kind](rows))), load_tagged(jsonl(tmp_path, "a.jsonl", rows))
    assert (in_memory.train.words, in_memory.train.tags) == (file.train.words, file.train.tags)
    assert in_memory.test.where(0) == f"row {in_memory.test.lines[0]}"
