"""Data of strangers that would not end or fill the memory: refused in one message."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from capotune.data.readers import parquet, read_table
from capotune.data.readers.lines import LONGEST
from capotune.errors import DataError

pyarrow = pytest.importorskip("pyarrow")
needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes and links")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@needs_pipes
@pytest.mark.parametrize("make", [pipe, device])
@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_pipes_and_devices_are_not_read(make: Callable[[Path], None], ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{ending}"
    make(path)
    with pytest.raises(DataError, match="is a pipe or a device; a file is needed"):
        read_table(str(path))


def test_a_header_of_a_million_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    line = ",".join(map(str, range(1_000_000)))
    path.write_text(f"{line}\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match="the header has 1,000,000 columns; at most 10,000 are read"):
        read_table(str(path))


def test_ten_thousand_columns_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    line = ",".join(map(str, range(10_000)))
    path.write_text(f"{line}\n{line}\n", encoding="utf-8")
    assert len(read_table(str(path)).columns) == 10_000


def test_parquet_that_unpacks_to_far_more_than_its_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One text of a dictionary in each of many rows: some kilobytes on the disk."""
    from pyarrow.parquet import write_table

    monkeypatch.setattr(parquet, "_LARGEST", 10**7)  # the real bound is found as surely, with gigabytes
    path = tmp_path / "rows.parquet"
    write_table(pyarrow.table({"text": ["a" * 1000] * 50_000, "label": ["x"] * 50_000}), path, compression="zstd")
    assert path.stat().st_size < 20_000
    with pytest.raises(DataError, match="holds more than 100 times the values"):
        read_table(str(path))
    assert len(read_table(str(path), limit=5).rows) == 5


def test_parquet_whose_footer_lies_is_refused(tmp_path: Path) -> None:
    from pyarrow.parquet import write_table

    path = tmp_path / "rows.parquet"
    write_table(pyarrow.table({"text": ["a"], "label": ["x"]}), path)
    content = bytearray(path.read_bytes())
    content[-8:-4] = b"\xff\xff\xff\x7f"
    path.write_bytes(content)
    with pytest.raises(DataError, match="is not whole parquet"):
        read_table(str(path))


@pytest.mark.parametrize("content", ['{"text":' + "[" * 1_000_000, "[" * 1_000_000, '{"text":' * 500_000])
def test_json_nested_very_deep_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="nested too deeply"):
        read_table(str(path))


LONG = "a" * (LONGEST + 1)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("rows.csv", f"text,label\na,b\n{LONG},b\n", 3),
        ("rows.csv", 'text,label\na,b\n"' + "a\n" * (LONGEST // 2 + 1), 3),
        ("rows.jsonl", f'{{"text": "a"}}\n{{"text": "{LONG}"}}\n', 2),
        ("rows.json", f'[{{"text": "a"}},\n{{"text": "{LONG}"}}]', 2),
    ],
    ids=["csv", "a quote that is never closed", "jsonl", "json"],
)
def test_a_text_that_takes_minutes_to_tokenise_is_refused(name: str, content: str, line: int, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=rf"{name}:{line}: more than 4,194,304 characters; divide such a text"):
        read_table(str(path))


def test_a_long_text_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"text,label\n{LONG[1:]},b\n", encoding="utf-8")
    assert read_table(str(path)).rows[0]["text"] == LONG[1:]


@pytest.mark.parametrize("name", ["rows.pkl", "rows.joblib", "rows.npy", "rows.pt", "rows.bin", "rows.pickle"])
def test_pickled_data_is_not_opened(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch PWNED'\ntR.")
    with pytest.raises(DataError, match="are not read"):
        read_table(str(tmp_path / name))
    assert not Path("PWNED").exists()
