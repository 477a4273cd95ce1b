"""Data that is larger than memory: what is read, tokenised and found again is what it is of small data."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_cases import CASES

from capotune import cache
from capotune.data import byte_store, documents
from capotune.data.batches import TokenLists, TokenRows, taken
from capotune.data.byte_store import ByteStore
from capotune.data.encoded_rows import EncodedRows
from capotune.data.generation import load_samples
from capotune.data.inspect.samples import inspect_samples
from capotune.data.readers import read_table, text
from capotune.data.row_store import DEEPEST, RowStore
from capotune.data.sample_facts import facts_of
from capotune.data.samples import Document, Samples
from capotune.data.split import normalised
from capotune.errors import DataError, OutputError
from capotune.events import Event, Warned
from capotune.files import cache_folder
from capotune.memory_table import Unreadable
from capotune.models.base import find
from capotune.tasks.generation import token_cache, tokens
from capotune.tasks.generation.notices import Notices
from capotune.tasks.generation.task import Generation
from capotune.tasks.generation.token_cache import encoded_once

GENERAL = Path(documents.__file__).parents[1] / "examples" / "general.txt"
PIECES = ["a", "Red ", " ", "\n", "\n\n", "é", "日本", "İ", "<|endoftext|>", "<|endof", "text|>", "\r\n"]
TEXTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=24).map("".join)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits at which a few rows are much."""
    monkeypatch.setattr(byte_store, "IN_MEMORY", 64)
    monkeypatch.setattr(byte_store, "_AT_ONCE", 16)
    monkeypatch.setattr(documents, "PART", 7)
    monkeypatch.setattr(documents, "_LOOKED_AT", 3)
    monkeypatch.setattr(text, "_PART", 5)
    monkeypatch.setattr(token_cache, "LARGE", 1)


# ------------------------------------------------------------------------------------------------------------- bytes


@given(st.lists(st.binary(max_size=40), max_size=20), st.randoms(use_true_random=False))
def test_bytes_are_read_as_they_were_appended(parts: list[bytes], random: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byte_store, "IN_MEMORY", 64)
        patch.setattr(byte_store, "_AT_ONCE", 16)
        store, whole = ByteStore(), b"".join(parts)
        for at, part in enumerate(parts):
            store.append(part)
            held = b"".join(parts[: at + 1])
            start, end = sorted(random.choices(range(len(held) + 1), k=2))
            assert store.read(start, end) == held[start:end]
        assert (store.size, store.sha256) == (len(whole), hashlib.sha256(whole).hexdigest())
        assert [path for path in cache_folder().iterdir() if path.is_file()] == []


@pytest.mark.usefixtures("tiny")
def test_much_goes_where_something_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    real = byte_store.tempfile.TemporaryFile

    def refused(dir: Path, **options: Any) -> Any:
        made.append(Path(dir))
        if dir in closed:
            raise PermissionError
        return real(dir=tmp_path, **options)

    monkeypatch.setattr(byte_store.tempfile, "TemporaryFile", refused)
    monkeypatch.setattr(byte_store.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    closed = [cache_folder()]
    store = ByteStore()
    store.append(b"x" * 100)
    assert store.read(98, 100) == b"xx"
    assert made == [cache_folder(), tmp_path / "temporary"]
    closed.append(tmp_path / "temporary")
    with pytest.raises(OutputError, match=r"cannot be written to.*CAPOTUNE_CACHE"):
        ByteStore().append(b"x" * 100)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
@pytest.mark.usefixtures("tiny")
def test_full_disk_is_said_while_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_store.tempfile, "TemporaryFile", lambda **_: open("/dev/full", "r+b", buffering=0))  # noqa: PTH123, SIM115
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a long question", "completion": "an answer"}\n' * 9)
    with pytest.raises(OutputError, match="no space left on the disk"):
        load_samples(str(path))


# -------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.usefixtures("tiny")
def test_rows_in_a_store_are_those_in_columns(tmp_path: Path) -> None:
    rows = [{"text": f"text {at}", "n": at, "list": [at, {"é": None}]} for at in range(20)] + [{"text": "", "x": 1.5}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    stored, columns = read_table(str(path), place=RowStore), read_table(str(path))
    assert list(stored.rows) == list(columns.rows) == rows
    assert list(stored.lines) == columns.lines == list(range(1, 42, 2))
    assert (stored.columns, stored.rows[-2:], stored.column("n")) == (columns.columns, rows[-2:], columns.column("n"))
    with pytest.raises(IndexError):
        stored.rows[len(rows)]


def test_values_that_json_has_no_form_for_are_named_by_their_type(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "completion": [date(2026, 1, 1)]}), path)
    assert read_table(str(path), place=RowStore).rows[0] == {"prompt": "a", "completion": Unreadable("date")}
    with pytest.raises(DataError, match="completion is date, not text"):
        load_samples(str(path))


def test_what_stands_in_for_a_value_may_be_written_in_a_row(tmp_path: Path) -> None:
    row = {"\0unreadable": "a kind", "inner": {"\0unreadable": 5}}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    assert list(read_table(str(path), place=RowStore).rows) == [row]


@pytest.mark.parametrize("depth", [DEEPEST + 1, 100_000])
def test_rows_nested_too_deeply_are_named(depth: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = '{"prompt": "a", "completion": "b", "more": %s}\n' % ("[" * (DEEPEST - 2) + "]" * (DEEPEST - 2))
    path.write_text(good + '{"prompt": "a", "completion": "b", "more": %s}\n' % ("[" * depth + "]" * depth))
    with pytest.raises(DataError, match=r"rows.jsonl:2: nested too deeply") as caught:
        load_samples(str(path))
    assert "rows.jsonl:1" not in str(caught.value)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "txt"])
def test_file_that_is_written_to_while_it_is_read_is_refused(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"rows.{ending}"
    path.write_text(
        {"jsonl": '{"prompt": "a", "completion": "b"}\n', "csv": "prompt,completion\na,b\n", "txt": "a\n"}[ending]
    )
    real = Path.open

    def opened(self: Path, *arguments: Any, **options: Any) -> Any:
        file = real(self, *arguments, **options)
        if self == path and "encoding" in options and path.stat().st_size < 100:
            with real(path, "a") as more:
                more.write("\n" * 100)
        return file

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(DataError, match="it was changed while it was read"):
        load_samples(str(path))


# -------------------------------------------------------------------------------------------------------------- facts


@given(TEXTS, st.integers(1, 9))
def test_texts_in_parts_are_compared_as_whole_ones(whole: str, size: int) -> None:
    class InParts(Document):
        @property
        def parts(self) -> Iterator[str]:
            return (self.text[at : at + size] for at in range(0, len(self.text), size))

    both = facts_of([Document(whole), InParts(whole), Document(normalised(whole))])
    assert both[0] == both[1]
    assert both["question"][2] == both["question"][0]


@settings(deadline=None)
@given(TEXTS)
@example("\n\n<|endoftext|>\n\na\n<|endoftext|> \n<|endoftext|>b")
def test_documents_are_those_of_the_whole_text(whole: str) -> None:
    path = cache_folder() / "text.txt"
    path.write_bytes(whole.encode())
    whole = whole.replace("\r\n", "\n")
    expected = [(whole, 1)]
    if "<|endoftext|>" in whole:
        line, expected = 1, []
        for part in whole.split("<|endoftext|>"):
            if part.strip():
                expected.append((part.strip("\n"), line + len(part) - len(part.lstrip("\n"))))
            line += part.count("\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PART", 7)
        patch.setattr(documents, "_LOOKED_AT", 2)
        patch.setattr(text, "_PART", 5)
        if not any(part.strip() for part, _ in expected):
            with pytest.raises(DataError, match=r"is empty|and no text"):
                documents.read_documents(str(path))
            return
        found = documents.read_documents(str(path))
        texts = [sample.text for sample in found.samples if isinstance(sample, Document)]
        assert list(zip(texts, found.lines, strict=True)) == expected


# ------------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("name", CASES)
def test_tokens_of_a_text_in_parts_are_those_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_OVERLAP", 128)
    monkeypatch.setattr(tokens, "_AGREED", 16)
    own, whole = CASES[name](), GENERAL.read_text(encoding="utf-8")[:3000]
    if own.is_fast:  # a run of one character, in which no reading agrees with another
        whole = whole[:1500] + "a" * 900 + whole[1500:]
    expected = list(own(whole, add_special_tokens=False, verbose=False)["input_ids"])
    for size in (300, 1100) if own.is_fast else (300,):
        parts = [whole[at : at + size] for at in range(0, len(whole), size)]
        found = list(tokens.tokenize_parts(own, parts))
        assert [token for part in found for token in part] == expected
        assert len(found) > 1 or not own.is_fast


@pytest.mark.usefixtures("tiny")
def test_long_text_becomes_the_windows_of_a_short_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.txt"
    path.write_text(GENERAL.read_text(encoding="utf-8")[:3000])
    task = replace(Generation.on(find("capo-tiny"), 64, 0), max_length=50)
    samples = load_samples(str(path)).train
    whole = task.encode(replace(samples, samples=[Document(path.read_text(encoding="utf-8"))], known=None))
    monkeypatch.setattr("capotune.tasks.generation.encoding._CHARACTERS_AT_ONCE", 100)
    assert type(samples.samples[0]) is not Document
    for length in (2, 3, 50, 64):
        windows = replace(task, max_length=length).encode(samples)
        assert windows == replace(task, max_length=length).encode(
            replace(samples, samples=[Document(path.read_text(encoding="utf-8"))], known=None)
        )
    assert len(whole[0]) > 5


def test_digest_of_tokens_is_that_of_earlier_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is gone on with on the data that it was started on."""
    monkeypatch.setattr("capotune.data.batches._HASHED_AT_ONCE", 3)
    sequences = [[1, 2], [], [3], [4, 5, 6], [], [7]]
    total = hashlib.sha256(repr((0, range(0))).encode())
    for sequence in sequences:
        total.update(np.asarray([len(sequence), *sequence], dtype=np.int64).tobytes())
    for held in (sequences, TokenLists.of(sequences), taken(TokenLists.of([[9], *sequences]), range(1, 7))):
        assert TokenRows(held, 0).digest() == total.hexdigest()
    assert TokenRows([], 0).digest() == hashlib.sha256(repr((0, range(0))).encode()).hexdigest()


# -------------------------------------------------------------------------------------------------- tokens on the disk


class Said:
    """Collects what is said."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Warned):
            self.texts.append(event.text)


def entries() -> list[Path]:
    return sorted((cache_folder() / "tokens").glob("*")) if (cache_folder() / "tokens").is_dir() else []


@pytest.fixture
def chats(colour_chats: Path) -> Samples:
    return load_samples(str(colour_chats)).train


@pytest.fixture
def task() -> Generation:
    return Generation.on(find("capo-tiny"), 64, 0, chat=True)


@pytest.mark.usefixtures("tiny")
def test_tokens_of_large_data_are_found_again(
    chats: Samples, task: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    notices, said = Notices(), Said()
    expected = task.encode(chats, notices)
    again = [Notices(), Notices()]
    first = encoded_once(task, chats, again[0], said)
    assert isinstance(first, EncodedRows)
    assert first == expected
    (entry,) = entries()
    assert entry.stat().st_mode & 0o077 == 0 or cache_folder().stat().st_mode & 0o077 == 0
    monkeypatch.setattr(Generation, "encoded", None)
    assert encoded_once(task, chats, again[1], said) == expected
    assert [list(one.sentences()) for one in again] == [list(notices.sentences())] * 2
    assert said.texts == []


@pytest.mark.usefixtures("tiny")
def test_tokens_are_found_for_what_they_were_made_of_alone(chats: Samples, task: Generation) -> None:
    others = [
        task,
        replace(task, max_length=63),
        replace(task, learn="last"),
        replace(task, chat_template="{% for message in messages %}{{ message.role + message.content }}{% endfor %}"),
    ]
    for number, other in enumerate(others, start=1):
        encoded_once(other, chats, Notices(), Said())
        assert len(entries()) == number
    encoded_once(task, chats.take(range(1, len(chats))), Notices(), Said())
    assert len(entries()) == len(others) + 1
    encoded_once(task, replace(chats, content=""), Notices(), Said())
    assert len(entries()) == len(others) + 1


@pytest.mark.usefixtures("tiny")
def test_damaged_tokens_are_made_again(chats: Samples, task: Generation) -> None:
    expected, said = encoded_once(task, chats, Notices(), Said()), Said()
    held = list(expected)
    (entry,) = entries()
    content = bytearray((entry / "ids").read_bytes())
    content[5] ^= 1
    (entry / "ids").unlink()  # what is mapped stays
    (entry / "ids").write_bytes(content)
    cache._whole.clear()
    assert encoded_once(task, chats, Notices(), said) == held
    assert said.texts == [f"what was tokenised before in {entry} is damaged on the disk, and is tokenised again."]
    assert (entry / "ids").read_bytes() != content


@pytest.mark.usefixtures("tiny")
def test_tokens_go_elsewhere_where_the_cache_takes_none(
    chats: Samples, task: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, said = task.encode(chats), Said()
    monkeypatch.setenv("CAPOTUNE_CACHE_LIMIT", "0")
    assert encoded_once(task, chats, Notices(), said) == expected
    assert "more than the cache has room for (at most 0 B): the next run tokenises again." in said.texts[0]
    assert entries() == []
    monkeypatch.delenv("CAPOTUNE_CACHE_LIMIT")
    (cache_folder() / "tokens").rmdir() if (cache_folder() / "tokens").exists() else None
    (cache_folder() / "tokens").write_text("a file where a folder should be")
    other = chats.take(range(2, len(chats)))
    assert encoded_once(task, other, Notices(), said) == task.encode(other)
    assert "The cache is done without" in said.texts[-1]


@pytest.mark.usefixtures("tiny")
def test_killed_in_the_middle_no_half_of_an_entry_is_found(chats: Samples, task: Generation) -> None:
    program = (
        warm.WARM
        + f"""
import os, signal
import capotune.tasks.generation.token_cache as cache
from capotune.data.generation import load_samples
from capotune.models.base import find
from capotune.tasks.generation.notices import Notices
from capotune.tasks.generation.task import Generation
cache.LARGE = 1
def killed(rows, files):
    for number, row in enumerate(rows):
        write([row], files)
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
write, cache.write_encoded = cache.write_encoded, killed
task = Generation.on(find("capo-tiny"), 64, 0, chat=True)
cache.encoded_once(task, load_samples({str(chats.source)!r}).train, Notices(), print)
"""
    )
    died = subprocess.run([sys.executable, "-c", program], check=False)
    assert died.returncode == -signal.SIGKILL
    assert [path.name for path in entries() if not path.name.startswith(".")] == []
    (left,) = entries()
    assert encoded_once(task, chats, Notices(), Said()) == task.encode(chats)
    os.utime(left, (0, 0))
    encoded_once(task, chats.take(range(2, len(chats))), Notices(), Said())
    assert not left.exists()


@pytest.mark.usefixtures("tiny")
def test_report_of_large_data_is_that_of_small(colour_chats: Path, task: Generation) -> None:
    data = load_samples(str(colour_chats))
    options: dict[str, Any] = {"max_length": 64, "text_of": task.decode, "template_from": "a test", "learn": "all"}
    large = [encoded_once(task, rows, Notices(), Said()) for rows in (data.train, data.test)]
    small = [task.encode(rows) for rows in (data.train, data.test)]
    assert asdict(inspect_samples(data, *large, **options)) == asdict(inspect_samples(data, *small, **options))
