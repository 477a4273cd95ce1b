"""Every format is read to the same rows, every row knows its line, and what is broken is named."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import SHARED, needs_shared

from capotune.data.readers import is_hub_id, read_table
from capotune.data.table import Origin, Table
from capotune.errors import DataError

Write = Callable[[str, str | bytes], str]
ROWS = [{"text": "hi", "label": "a"}, {"text": "yo 🎸", "label": "b"}]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file as given, to the byte, and return its path."""

    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def error_of(source: str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_table(source, **options)
    return str(caught.value)


# Formats

CSV = "text,label\nhi,a\nyo 🎸,b\n"


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.csv", CSV, [2, 3]),
        ("a.CSV", CSV, [2, 3]),
        ("crlf.csv", CSV.replace("\n", "\r\n"), [2, 3]),
        ("old_mac.csv", CSV.replace("\n", "\r"), [2, 3]),
        ("no_newline_at_end.csv", CSV.rstrip(), [2, 3]),
        ("semicolon.csv", CSV.replace(",", ";"), [2, 3]),
        ("tab.csv", CSV.replace(",", "\t"), [2, 3]),
        ("bar.csv", CSV.replace(",", "|"), [2, 3]),
        ("excel.csv", "sep=;\r\n" + CSV.replace(",", ";"), [3, 4]),
        ("a.tsv", CSV.replace(",", "\t"), [2, 3]),
        ("quoted.csv", '"text","label"\n"hi","a"\n"yo 🎸","b"\n', [2, 3]),
        ("spaced_header.csv", CSV.replace("text,label", " text , label "), [2, 3]),
        ("blank_lines.csv", "\n\n" + CSV.replace("\n", "\n\n") + ",\n  ,\n\n", [5, 7]),
        ("bom.csv", CSV.encode("utf-8-sig"), [2, 3]),
        ("quoted_bom.csv", ('"text",label' + CSV[10:]).encode("utf-8-sig"), [2, 3]),
        ("utf16.csv", CSV.encode("utf-16"), [2, 3]),
        ("utf16_be.csv", b"\xfe\xff" + CSV.encode("utf-16-be"), [2, 3]),
        ("utf16.jsonl", "\n".join(map(json.dumps, ROWS)).encode("utf-16"), [1, 2]),
        ("a.jsonl", '{"text": "hi", "label": "a"}\n{"text": "yo 🎸", "label": "b"}\n', [1, 2]),
        ("escaped.ndjson", '{"text": "hi", "label": "a"}\r\n\r\n{"text": "yo \\ud83c\\udfb8", "label": "b"}', [1, 3]),
        ("a.json", '[\n  {"text": "hi",\n   "label": "a"},\n\n  {"text": "yo 🎸", "label": "b"}\n]\n', [2, 5]),
        ("one_line.json", json.dumps(ROWS), [1, 1]),
        ("lines.json", "\n".join(map(json.dumps, ROWS)), [1, 2]),
    ],
)
def test_every_format_gives_the_same_rows(write: Write, name: str, content: str | bytes, lines: list[int]) -> None:
    source = write(name, content)
    assert read_table(source) == Table(["text", "label"], ROWS, lines, Origin(source))


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows: list[dict[str, Any]] = [{"text": "hi", "label": 1.0}, {"text": None, "label": float("inf")}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    table = read_table(str(tmp_path / "a.parquet"))
    assert (table.columns, table.rows, table.lines) == (["text", "label"], rows, [1, 2])


def test_a_path_may_be_a_path_object_and_start_at_home(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(write("a.csv", CSV))
    assert read_table(source).rows == ROWS
    monkeypatch.setenv("HOME", str(source.parent))
    assert read_table("~/a.csv").rows == ROWS


def test_quotes_hold_delimiters_quotes_and_line_breaks_and_lines_stay_right(write: Write) -> None:
    source = write("a.csv", 'text,label\n"one\ntwo, ""three""\r\nfour",a\nplain "quotes" inside,b\n')
    table = read_table(source)
    assert [row["text"] for row in table.rows] == ['one\ntwo, "three"\r\nfour', 'plain "quotes" inside']
    assert table.lines == [2, 5]


def test_a_delimiter_inside_a_quoted_name_does_not_count(write: Write) -> None:
    assert read_table(write("a.csv", '"a,b,c";label\nx;y\n')).columns == ["a,b,c", "label"]


def test_columns_without_a_name_are_called_by_their_place(write: Write) -> None:
    assert read_table(write("a.csv", ",text,\n0,hi,\n")).rows == [{"column 1": "0", "text": "hi", "column 3": ""}]


def test_json_keeps_types_and_keys_as_they_are(write: Write) -> None:
    table = read_table(write("a.jsonl", '{"a": 1, "b": [true, null]}\n{"c": {"d": 1.5}}\n'))
    assert table.rows == [{"a": 1, "b": [True, None]}, {"c": {"d": 1.5}}]
    assert table.columns == ["a", "b", "c"]


def test_only_a_newline_ends_a_json_line(write: Write) -> None:
    """str.splitlines would break at these."""
    texts = ["a\u2028b", "c\x85d", "e\u2029f"]
    source = write("a.jsonl", "\n".join(json.dumps({"t": text}, ensure_ascii=False) for text in texts))
    assert [row["t"] for row in read_table(source).rows] == texts


def test_a_huge_field_is_read_and_csv_is_left_as_it_was(write: Write) -> None:
    before = csv.field_size_limit()
    huge = "x" * 2_000_000
    assert len(huge) > before
    assert read_table(write("a.csv", f'text,label\n"{huge}",a\n')).rows[0]["text"] == huge
    error_of(write("b.csv", f'text,label\n"{huge}\n'))
    assert csv.field_size_limit() == before


def test_a_hundred_thousand_rows(write: Write) -> None:
    many = 100_000
    source = write("a.csv", "text,label\n" + "".join(f"text number {i},{i % 7}\n" for i in range(many)))
    table = read_table(source)
    assert len(table.rows) == many
    assert (table.rows[-1], table.lines[-1]) == ({"text": f"text number {many - 1}", "label": "4"}, many + 1)
    source = write("a.json", json.dumps(list(table.rows), indent=1))
    assert read_table(source).rows == table.rows


ANY_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


@settings(deadline=None)
@given(st.lists(st.tuples(ANY_TEXT, ANY_TEXT), min_size=1, max_size=8), st.sampled_from([(",", "csv"), ("\t", "tsv")]))
def test_what_csv_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]], kind: tuple[str, str]
) -> None:
    delimiter, ending = kind
    rows = [{"text": text, "label": f"x{label}"} for text, label in pairs]  # no row is all blank
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerow(["text", "label"])
    lines = []
    for row in rows:
        lines.append(len(list(io.StringIO(buffer.getvalue(), newline=""))) + 1)
        writer.writerow(row.values())
    path = tmp_path_factory.mktemp("csv") / f"a.{ending}"
    path.write_bytes(buffer.getvalue().encode())
    table = read_table(str(path))
    assert (table.rows, table.lines) == (rows, lines)


VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | ANY_TEXT | st.lists(ANY_TEXT, max_size=2)
)


@settings(deadline=None)
@given(st.lists(st.dictionaries(ANY_TEXT, VALUES, max_size=3), min_size=1, max_size=8), st.booleans(), st.booleans())
def test_what_json_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], is_array: bool, ascii_only: bool
) -> None:
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    content = "[\n" + ",\n".join(lines) + "\n]" if is_array else "\n".join(lines)
    path = tmp_path_factory.mktemp("json") / ("a.json" if is_array else "a.jsonl")
    path.write_bytes(content.encode())
    table = read_table(str(path))
    assert table.rows == rows
    assert table.lines == [number + is_array for number in range(1, len(rows) + 1)]


# Lines that do not fit


def test_wrong_numbers_of_fields_are_named_with_their_lines(write: Write) -> None:
    source = write("a.csv", 'text,label\nhi,a\nan unquoted, comma,a\n"a\nb",c\nalone\n')
    message = error_of(source)
    assert f"{source}:3: 3 fields, where the header has 2: «an unquoted, comma,a»" in message
    assert f"{source}:6: 1 field, where the header has 2: «alone»" in message
    assert "2 lines cannot be read as fields separated by ','" in message
    assert "Double quotes go around a field" in message


def test_an_unbalanced_quote_is_named_where_it_opens_and_the_rest_is_still_read(write: Write) -> None:
    source = write("a.csv", 'text,label\nhi,a\n"never closed,a\nyo,b\ntoo,many,fields\n')
    message = error_of(source)
    assert f'{source}:3: a double quote opens a field here and is never closed: «"never closed,a»' in message
    assert f"{source}:5: 3 fields" in message
    assert f"{source}:4" not in message


def test_text_after_a_closing_quote_is_not_glued_to_the_field(write: Write) -> None:
    source = write("a.csv", 'text,label\n"so" he said,a\n')
    assert f"{source}:2: its double quotes do not pair up" in error_of(source)


def test_broken_json_lines_are_named(write: Write) -> None:
    lines = ['{"t": 1}', '{"t": 1', "[1]", '"text"', '{"t": 1, "t": 2}', '{"t": "\\ud83d"}']
    source = write("a.jsonl", "\n".join(lines))
    message = error_of(source)
    assert f"{source}:2: broken JSON, expecting ',' delimiter at column 8: «{{\"t\": 1»" in message
    assert f"{source}:3: not an object but list" in message
    assert f"{source}:4: not an object but str" in message
    assert f"{source}:5: the key 't' stands twice in one object" in message
    assert f"{source}:6: half of a two-part" in message
    assert f"{source}:1:" not in message


@pytest.mark.parametrize(
    ("content", "line", "why"),
    [
        ('[\n{"t": 1}\n{"t": 2}]', 3, "a comma or the closing ] is missing"),
        ('[{"t": 1},\n{"t": 2}\n', 3, "a comma or the closing ] is missing"),
        ('[{"t": 1},\n]', 2, "expecting value"),
        ('[{"t": 1},\n{"t": \n}]', 3, "expecting value"),
        ('[{"t": 1}]\n\n{"t": 2}', 3, "something follows the array's closing ]"),
        ('[{"t": 1},\n{"t": 1, "t": 2}]', 2, "stands twice"),
        ('[{"t": 1},\n' + "[" * 100_000, 2, "nested too deeply"),
        ('["t", "u"]', 1, "not an object but str"),
        ("{\n}", 1, "broken JSON"),
        ("null", 1, "not an object but null"),
    ],
)
def test_a_broken_array_is_named_where_it_breaks(write: Write, content: str, line: int, why: str) -> None:
    source = write("a.json", content)
    message = error_of(source)
    assert f"{source}:{line}: " in message
    assert why in message


@pytest.mark.parametrize(("name", "bad"), [("a.csv", "a,b,c\n"), ("a.csv", '"a"b,\n'), ("a.jsonl", "{\n")])
def test_one_message_names_five_bad_lines(write: Write, name: str, bad: str) -> None:
    source = write(name, "text,label\n" * name.endswith("csv") + bad * 9)
    message = error_of(source)
    assert message.count(f"{source}:") == 1 + 5
    assert "5 lines or more" in message


def test_an_excerpt_is_short_and_prints_no_control_characters(write: Write) -> None:
    message = error_of(write("a.tsv", "text\tlabel\n\x1b[31mred\tb\tc" + "x" * 500))
    assert "«\\x1b[31mred\\tb\\tcxxx" in message
    assert "x…»" in message
    assert "\x1b" not in message
    assert len(message) < 600


# Encodings


def test_latin_1_is_named_by_its_line_and_not_guessed(write: Write) -> None:
    source = write("my tickets.csv", "text,label\nhi,a\nUn café crème,b\n".encode("latin-1"))
    message = error_of(source)
    assert f"{source}:3: the byte 0xe9 is not UTF-8" in message
    assert "«Un café crème,b»" in message
    assert "Windows-1252" in message
    assert f"iconv -f WINDOWS-1252 -t UTF-8 '{source}' > '{source[:-4]}-utf8.csv'" in message


def test_the_line_is_right_behind_a_byte_order_mark(write: Write) -> None:
    source = write("a.csv", b"\xef\xbb\xbftext,label\nhi,a\n\xe9,b\n")
    assert f"{source}:3: the byte 0xe9" in error_of(source)


def test_the_iconv_command_does_what_the_message_says(write: Write) -> None:
    source = write("a.csv", "text,label\ncafé,a\n".encode("cp1252"))
    command = error_of(source).rpartition("convert it: ")[2]
    if subprocess.run("command -v iconv", shell=True, check=False, capture_output=True).returncode:
        pytest.skip("iconv is not installed")
    subprocess.run(command, shell=True, check=True)
    assert read_table(f"{source[:-4]}-utf8.csv").rows == [{"text": "café", "label": "a"}]


def test_utf16_without_its_mark_and_binary_files_are_refused(write: Write) -> None:
    source = write("a.csv", "text,label\nhi,a\n".encode("utf-16-le"))
    message = error_of(source)
    assert f"{source}:1: a zero byte" in message
    assert "iconv -f UTF-16LE" in message
    assert ":2: a zero byte" in error_of(write("sheet.csv", b"PK\x03\x04\n\xff\0\0"))


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: raw[:-2] + b"\0\0"])
def test_damaged_utf16_is_named(write: Write, damage: Callable[[bytes], bytes]) -> None:
    source = write("a.csv", damage("text,label\nhi,a\n".encode("utf-16")))
    assert f"{source}:2: starts as UTF-16" in error_of(source)


# Files that are not there or hold nothing


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf\n", b"\xff\xfe"])
def test_empty_files(write: Write, ending: str, content: bytes) -> None:
    if ending == "parquet" and content.strip():
        content = b""  # parquet has no byte-order mark
    assert "is empty" in error_of(write(f"a.{ending}", content))


def test_a_header_alone_and_an_empty_array_hold_no_rows(write: Write) -> None:
    assert "holds no rows, only the header 'text', 'label'" in error_of(write("a.csv", "text,label\n\n,\n"))
    assert "holds no rows" in error_of(write("a.json", " [ ] "))


def test_columns_of_one_name_are_refused(write: Write) -> None:
    source = write("a.csv", "\ntext,label,text\na,b,c\n")
    assert f"{source}:2: more than one column is named 'text'" in error_of(source)


def test_a_missing_file_suggests_what_is_near(write: Write, tmp_path: Path) -> None:
    write("tickets.csv", CSV)
    message = error_of(str(tmp_path / "Tickest.csv"))
    assert "no such file. Did you mean 'tickets.csv'?" in message
    assert "Allowed: " in message
    assert "Data files there: 'tickets.csv'" in error_of(str(tmp_path / "nothing alike"))
    assert f"no such folder: {tmp_path / 'gone'}" in error_of(str(tmp_path / "gone" / "a.csv"))


def test_a_folder_lists_its_data_files(write: Write, tmp_path: Path) -> None:
    assert "is a folder" in error_of(str(tmp_path))
    assert "holds no data file" in error_of(str(tmp_path))
    write("b.jsonl", "")
    write("notes.txt", "")
    assert error_of(str(tmp_path)).endswith("Data files there: 'b.jsonl'.")


@pytest.mark.parametrize(("name", "advice"), [("a.xlsx", "CSV UTF-8"), ("a.csv.gz", "Unpack"), ("a.txt", "convert")])
def test_other_endings_are_refused_with_a_way_out(write: Write, name: str, advice: str) -> None:
    message = error_of(write(name, CSV))
    assert f"files ending in {Path(name).suffix!r} are not read" in message
    assert advice in message


def test_an_unreadable_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    source = write("a.csv", CSV)
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert f"{source}: cannot be read: Permission denied" in error_of(source)


def test_damaged_parquet(write: Write, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    assert "is not whole parquet" in error_of(write("a.parquet", "text,label\n"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 1000]}), tmp_path / "b.parquet")
    whole = (tmp_path / "b.parquet").read_bytes()
    assert "is not whole parquet" in error_of(write("cut.parquet", whole[: len(whole) // 2]))


def test_a_split_of_a_file_is_refused(write: Write) -> None:
    assert "is a file, and split='train'" in error_of(write("a.csv", CSV), split="train")


# The hub, without a network


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub that holds one dataset, ``bank/intents``, with a train and a test split."""
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    splits = datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features),
        test=datasets.Dataset.from_dict({"text": ["c"], "label": [-1]}, features=features),
    )

    def load_dataset(name: str, split: str | None = None) -> Any:
        if name != "bank/intents":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        if split is not None and split not in splits:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(splits)}.')
        return splits if split is None else splits[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return splits


@pytest.mark.usefixtures("hub")
def test_a_hub_dataset_gives_its_splits_and_the_names_of_its_classes() -> None:
    train = [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}]
    assert read_table("bank/intents:train") == Table(
        ["text", "label"], train, [1, 2], Origin("bank/intents:train"), True
    )
    assert read_table("bank/intents", split="train").rows == train
    everything = read_table("bank/intents")
    assert everything.columns == ["text", "label", "split"]
    assert [row["split"] for row in everything.rows] == ["train", "train", "test"]
    assert everything.rows[2]["label"] is None
    assert everything.lines == [1, 2, 3]


@pytest.mark.usefixtures("hub")
def test_what_the_hub_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = error_of("bank/tellers")
    assert "no such file, and no such dataset on the hub; both were tried" in message
    assert "Dataset 'bank/tellers' doesn't exist on the Hub" in message
    assert 'Unknown split "dev"' in error_of("bank/intents:dev")
    assert "names a split" in error_of("bank/intents:train", split="test")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tickets.csv").touch()
    monkeypatch.chdir(tmp_path)
    assert "Did you mean 'tickets.csv'?" in error_of("data/tickets")


def test_a_hub_dataset_with_a_column_called_split(hub: Any) -> None:
    hub["train"] = hub["train"].add_column("split", ["x", "y"])
    assert "several splits and a column 'split'. Choose one: 'train', 'test'" in error_of("bank/intents")


def test_class_names_survive_in_a_parquet_file_that_datasets_wrote(hub: Any, tmp_path: Path) -> None:
    hub["train"].to_parquet(str(tmp_path / "a.parquet"))
    assert [row["label"] for row in read_table(str(tmp_path / "a.parquet")).rows] == ["yes", "no"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", True),
        ("owner/na-me.v2:train", True),
        ("data/train.csv", False),
        ("name", False),
        ("./a/b", False),
        ("a/b/c", False),
        ("/a/b", False),
    ],
)
def test_what_is_written_like_a_hub_id(source: str, expected: bool) -> None:
    assert is_hub_id(source) is expected


def test_a_file_name_is_never_looked_up_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "no such folder" in error_of("data/gone.csv")
    assert "no such file" in error_of("x" * 5000)


# Real data, and the price of importing


@needs_shared
def test_banking77() -> None:
    table = read_table(str(SHARED / "data" / "banking77" / "train.csv"))
    assert (len(table.rows), table.columns) == (10_003, ["text", "category"])
    assert table.rows[0] == {"text": "I am still waiting on my card?", "category": "card_arrival"}
    on_disk = (SHARED / "data" / "banking77" / "train.csv").read_text().split("\n")
    for row, line in zip(table.rows[::50], table.lines[::50], strict=True):
        assert row["text"].split("\n")[0].replace('"', '""') in on_disk[line - 1]


@needs_shared
@pytest.mark.parametrize(("name", "rows"), [("gsm8k/test.jsonl", 1_319), ("wikisql/train.jsonl", 1_000)])
def test_real_json_lines(name: str, rows: int) -> None:
    table = read_table(str(SHARED / "data" / name))
    assert len(table.rows) == rows
    assert table.lines == list(range(1, rows + 1))


def test_importing_is_cheap() -> None:
    code = (
        "import sys, csv; before = csv.field_size_limit()\n"
        "import capotune.data.readers, capotune.data.classes, capotune.data.inspect.labels\n"
        "assert csv.field_size_limit() == before\n"
        "print([m for m in ('datasets', 'pandas', 'pyarrow', 'sklearn', 'torch', 'rich') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
