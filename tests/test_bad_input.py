"""What users get wrong: exit code 2, one message that helps, nothing left behind. What is odd but right works."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import Result, capo, tree

from capotune.cli import main

ROWS = "text,label\n" + "".join(
    f"{word} {number},{label}\n"
    for number in range(6)
    for word, label in (("my lamp is broken", "broken"), ("the parcel was late", "late"))
)


@dataclass(frozen=True)
class Place:
    """A user's folder: the working directory of the command, with good data, a good base and a good adapter in it."""

    folder: Path

    def write(self, name: str, content: str | bytes) -> None:
        (self.folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    def parquet(self, name: str, **columns: list[Any]) -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), self.folder / name)

    def base(self, **changes: Callable[[bytes], bytes] | None) -> None:
        """``other``: a copy of the base, whose files (``model_safetensors``) are changed or removed."""
        self._copy("base", "other", changes)

    def adapter(self, **changes: Callable[[bytes], bytes] | None) -> None:
        """``mine``: a copy of the adapter, changed likewise."""
        self._copy("adapter", "mine", changes)

    def _copy(self, source: str, target: str, changes: dict[str, Callable[[bytes], bytes] | None]) -> None:
        shutil.copytree(self.folder / source, self.folder / target)
        for name, change in changes.items():
            ending = next(end for end in ("safetensors", "json") if name.endswith(end))
            path = self.folder / target / f"{name.removesuffix('_' + ending)}.{ending}"
            if change is None:
                path.unlink()
            else:
                path.write_bytes(change(path.read_bytes()))


@pytest.fixture(scope="module")
def furnished(bert: Path, tickets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each test gets a copy of: ``base``, ``adapter`` (broken, late, money), ``tickets.csv``, ``rows.csv``."""
    folder = tmp_path_factory.mktemp("furnished")
    shutil.copytree(bert, folder / "base")
    shutil.copy(tickets, folder / "tickets.csv")
    (folder / "rows.csv").write_text(ROWS, encoding="utf-8")
    before = Path.cwd()
    os.chdir(folder)
    try:
        made = capo(
            "train", "lora", "--data", "tickets.csv", "--model", "base", "--out", "run", "--epochs", 1, "--rank", 2
        )
    finally:
        os.chdir(before)
    assert made.code == 0, made.err
    (folder / "run" / "adapter").rename(folder / "adapter")
    shutil.rmtree(folder / "run")
    return folder


@pytest.fixture
def place(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    shutil.copytree(furnished, tmp_path / "work")
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    yield Place(tmp_path / "work")
    assert not list((tmp_path / "temporary").iterdir())


def refuse(place: Place, command: str, *words: str) -> Result:
    """Run ``command``; it must be refused with all ``words``, and leave every file and folder as it was."""
    before = tree(place.folder)
    result = capo(*command.split())
    assert result.code == 2, result
    assert "Traceback" not in result.said
    assert not result.out
    assert ".partial" not in result.said
    for word in words:
        assert word in result.said, f"{word!r} is missing in: {result.err}"
    assert tree(place.folder) == before
    return result


def nothing(_place: Place) -> None:
    pass


def without(*names: str) -> Callable[[bytes], bytes]:
    """Take tensors out of a safetensors file."""

    def change(content: bytes) -> bytes:
        from safetensors.torch import load, save

        return save({key: value for key, value in load(content).items() if not key.endswith(names)}, {"format": "pt"})

    return change


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def one_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def base_gone(record: bytes) -> bytes:
    """``capotune.json`` of an adapter whose base was in a folder that is no more."""
    return re.sub(rb'"name": "[^"]+"', b'"name": "/gone/base"', record)


def misshapen(content: bytes) -> bytes:
    import torch
    from safetensors.torch import load, save

    return save({key: torch.zeros(3, 3) if "query.weight" in key else value for key, value in load(content).items()})


def not_finite(content: bytes) -> bytes:
    from safetensors.torch import load, save

    return save({k: v.float() * float("nan") if v.is_floating_point() else v for k, v in load(content).items()})


def edited(**values: Any) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps({**json.loads(content), **values}).encode()


TRAIN = "train lora --model base --out new/run --epochs 1 --data "
ROW_TRAIN = TRAIN + "rows.csv "
BASE = "train lora --data rows.csv --out new/run --epochs 1 --model "
PROMPT = "train prompt-tuning --data rows.csv --model base --out new/run "

# name → what to put into the folder, the command, what the message must say
CASES: dict[str, tuple[Callable[[Place], Any], str, tuple[str, ...]]] = {
    # data
    "missing file": (nothing, TRAIN + "tickts.csv", ("tickts.csv: no such file", "mean 'tickets.csv'?", ".jsonl")),
    "missing folder": (nothing, TRAIN + "no/where.csv", ("no/where.csv", "no such folder: no")),
    "a folder as data": (nothing, TRAIN + ".", ("is a folder", "'rows.csv', 'tickets.csv'")),
    "missing column": (nothing, ROW_TRAIN + "--text-column txt", ("no column 'txt'", "--text-column", "mean 'text'?")),
    "no known column": (
        lambda place: place.write("odd.csv", "a,b\n1,2\n3,4\n"),
        TRAIN + "odd.csv",
        ("which column holds the text", "'a', 'b'", "--text-column", "--label-column"),
    ),
    "empty file": (lambda place: place.write("empty.csv", ""), TRAIN + "empty.csv", ("empty.csv: is empty", "Give")),
    "header only": (
        lambda place: place.write("head.csv", "text,label\n"),
        TRAIN + "head.csv",
        ("head.csv: holds no rows", "'text', 'label'", "Add rows"),
    ),
    "one class": (
        lambda place: place.write("one.csv", "text,label\nthe lamp,a\nmy card,a\n"),
        TRAIN + "one.csv",
        ("all 2 training rows have one label, 'a'", "at least two", "--label-column"),
    ),
    "a label only in test": (
        lambda place: place.write("test.csv", "text,label\nmy card,brokn\n"),
        ROW_TRAIN + "--test test.csv",
        ("test.csv:2: 'brokn'", "no training row has", "Did you mean 'broken'?"),
    ),
    "a label only in the test split": (
        lambda place: place.write("split.csv", "text,label,split\na b,x,train\nc d,y,train\ne f,z,test\n"),
        TRAIN + "split.csv",
        ("split.csv:4: 'z'", "Add training rows"),
    ),
    "not UTF-8": (
        lambda place: place.write("latin.csv", "text,label\ncafé late,a\n".encode("latin-1")),
        TRAIN + "latin.csv",
        ("latin.csv:2:", "0xe9 is not UTF-8", "iconv -f WINDOWS-1252"),
    ),
    "a broken line in the middle": (
        lambda place: place.write("broken.csv", ROWS + "a,b,c\n" + "the lamp,late\n"),
        TRAIN + "broken.csv",
        ("broken.csv:14: 3 fields, where the header has 2", "«a,b,c»"),
    ),
    "a broken JSON line": (
        lambda place: place.write("rows.jsonl", '{"text": "a b", "label": "x"}\n{"text": "c\n'),
        TRAIN + "rows.jsonl",
        ("rows.jsonl:2: broken JSON", "one object a line"),
    ),
    "NaN label": (
        lambda place: place.parquet("nan.parquet", text=["a b", "c d", "e f"], label=[1.0, float("nan"), 2.0]),
        TRAIN + "nan.parquet",
        ("nan.parquet:2: missing label (label)", "Fill these in or delete"),
    ),
    "empty text": (
        lambda place: place.write("gap.csv", "text,label\na b,x\n ,y\n"),
        TRAIN + "gap.csv",
        ("gap.csv:3: empty text",),
    ),
    "too few rows": (
        lambda place: place.write("two.csv", "text,label\na b,x\nc d,y\n"),
        TRAIN + "two.csv",
        ("two.csv: nothing can be held out", "Add rows", "--test"),
    ),
    "test is the training file": (nothing, ROW_TRAIN + "--test ./rows.csv", ("--test", "--data", "mean nothing")),
    "test fraction 1.5": (nothing, ROW_TRAIN + "--test-fraction 1.5", ("--test-fraction 1.5", "less than 1")),
    "compare without test": (
        nothing,
        "compare --data rows.csv --model base --out new/run --test-fraction 0",
        ("--test-fraction 0", "no rows to compare on"),
    ),
    "a dataset that the hub does not have": (nothing, TRAIN + "no/such", ("no such file, and no such dataset",)),
    # base
    "unknown model folder": (nothing, BASE + "./no/such/folder", ("./no/such/folder: no such folder", "minilm")),
    "unknown hub model offline": (nothing, BASE + "no/such", ("--model no/such", "hub cannot be reached", "minilm")),
    "mistyped default": (nothing, BASE + "minilmm", ("--model minilmm", "Did you mean 'minilm'?")),
    "no weights": (
        lambda place: place.base(model_safetensors=None),
        BASE + "other",
        ("--model other: no *.safetensors weights in other", "save_pretrained"),
    ),
    "pickled weights only": (
        lambda place: (place.base(model_safetensors=None), place.write("other/pytorch_model.bin", b"pickle")),
        BASE + "other",
        ("pytorch_model.bin", "can run code", "save_pretrained"),
    ),
    "truncated weights": (
        lambda place: place.base(model_safetensors=cut), BASE + "other", ("other/model.safetensors: not a complete",)
    ),
    "weights of no bytes": (
        lambda place: place.base(model_safetensors=lambda _: b""), BASE + "other", ("not a complete safetensors file",)
    ),
    "weights that lack tensors": (
        lambda place: place.base(model_safetensors=without("word_embeddings.weight", "1.output.dense.bias")),
        BASE + "other",
        ("the weights in other lack", "embeddings.word_embeddings.weight", "encoder.layer.1.output.dense.bias"),
    ),
    "weights that lack tensors, in 4 bits": (
        lambda place: place.base(model_safetensors=without("1.output.dense.weight")),
        BASE.replace("lora", "qlora") + "other",
        ("the weights in other lack", "encoder.layer.1.output.dense.weight"),
    ),
    "weights of another shape": (
        lambda place: place.base(model_safetensors=misshapen),
        BASE + "other",
        ("query.weight in other is (3, 3), where config.json asks for (32, 32)",),
    ),
    "weights of another shape, in 4 bits": (
        lambda place: place.base(model_safetensors=misshapen),
        BASE.replace("lora", "qlora") + "other",
        ("query.weight in other is (3, 3), where config.json asks for (32, 32)",),
    ),
    "weights that are not numbers": (
        lambda place: place.base(model_safetensors=not_finite), BASE + "other --no-cache", ("--model other", "NaN")
    ),
    "no config": (lambda place: place.base(config_json=None), BASE + "other", ("no config.json in other",)),
    "broken config": (lambda place: place.base(config_json=cut), BASE + "other", ("config.json is not readable JSON",)),
    "config of nothing known": (
        lambda place: place.base(config_json=lambda _: b"{}"), BASE + "other", ("cannot be used", "model_type")
    ),
    "no tokenizer": (
        lambda place: place.base(tokenizer_json=None, tokenizer_config_json=None),
        BASE + "other",
        ("--model other: no tokenizer in other", "tokenizer.save_pretrained"),
    ),
    "broken tokenizer": (
        lambda place: place.base(tokenizer_json=cut), BASE + "other", ("--model other: its tokenizer cannot be loaded",)
    ),
    # settings
    "rank 0": (nothing, ROW_TRAIN + "--rank 0", ("--rank 0", "greater than or equal to 1", "--help")),
    "rank 10000": (nothing, ROW_TRAIN + "--rank 10000", ("--rank 10000", "Allowed: 1 to 32", "8 to 64 is usual")),
    "rank 10000 in a comparison": (
        nothing,
        "compare --data rows.csv --model base --out new/run --methods lora --lora.rank 10000",
        ("--rank 10000", "Allowed: 1 to 32"),
    ),
    "epochs 0": (nothing, ROW_TRAIN + "--epochs 0", ("--epochs 0", "greater than or equal to 1")),
    "several wrong": (nothing, ROW_TRAIN + "--rank 0 --warmup 2", ("--rank 0", "--warmup 2")),
    "learning rate nan": (nothing, ROW_TRAIN + "--learning-rate nan", ("--learning-rate nan", "finite")),
    "learning rate diverges": (
        nothing, ROW_TRAIN + "--learning-rate 1e30 --batch-size 2", ("the loss is nan", "diverged", "--learning-rate")
    ),
    "a word for a number": (nothing, ROW_TRAIN + "--rank abc", ("--rank", "abc")),
    "target that matches nothing": (
        nothing, ROW_TRAIN + "--target-modules nonsense", ("'nonsense' matches no", "mean 'dense'?", "all-linear")
    ),
    "one bad target of several": (
        nothing, ROW_TRAIN + "--target-modules query valeu", ("'valeu' matches no", "Did you mean 'value'?")
    ),
    "target that is no expression": (
        nothing, ROW_TRAIN + "--target-modules (", ("'('", "not a valid regular expression")
    ),
    "no target": (nothing, ROW_TRAIN + "--target-modules", ("--target-modules", "at least one", "all-linear")),
    "layers 99": (nothing, ROW_TRAIN + "--layers 99", ("--layers 99", "blocks 0 to 2")),
    "too many trainable layers": (
        nothing,
        "train feature-extraction --data rows.csv --model base --out new/run --trainable-layers 9",
        ("--trainable-layers 9", "0 to 3"),
    ),
    "virtual tokens 10000": (
        nothing, PROMPT + "--num-virtual-tokens 10000", ("tokens 10000", "64 tokens", "Allowed: 1 to 32")
    ),
    "init text without words": (nothing, PROMPT + "--init text", ("--init-text",)),
    "init text without init": (nothing, PROMPT + "--init-text hello", ("--init-text", "--init text")),
    "rank of a prompt": (nothing, PROMPT + "--rank 8", ("has no --rank", "--help")),
    "max length 0": (nothing, ROW_TRAIN + "--max-length 0", ("--max-length 0", "greater than or equal to 1")),
    "max length 2": (nothing, ROW_TRAIN + "--max-length 2", ("--max-length 2", "Allowed: 3 to 64")),
    "max length 100000": (nothing, ROW_TRAIN + "--max-length 100000", ("--max-length 100000", "at most 64 tokens")),
    "unknown method": (nothing, "train lroa --data rows.csv", ("unknown method 'lroa'", "Did you mean 'lora'?")),
    "unknown flag": (nothing, ROW_TRAIN + "--rnak 8", ("--rnak", "--rank")),
    "a method twice": (
        nothing, "compare --data rows.csv --model base --methods lora lora", ("each once", "lora, lora", "qlora")
    ),
    "no method": (nothing, "compare --data rows.csv --model base --methods", ("at least one method", "qlora")),
    "broken YAML": (
        lambda place: place.write("bad.yaml", "lora: {rank: [\n"),
        ROW_TRAIN + "--config bad.yaml",
        ("--config bad.yaml: not valid YAML", "line 2"),
    ),
    "unknown key in YAML": (
        lambda place: place.write("bad.yaml", "rnk: 8\n"),
        ROW_TRAIN + "--config bad.yaml",
        ("--config bad.yaml: unknown setting 'rnk'", "Did you mean 'rank'?"),
    ),
    "missing YAML": (nothing, ROW_TRAIN + "--config no.yaml", ("--config no.yaml: cannot be read",)),
    "resume of nothing": (nothing, "resume new/run", ("no run in new/run", "Name the folder")),
    "resume of something else": (
        lambda place: place.write("run.json", "{}"), "resume .", ("run.json: is no record of a run",)
    ),
    "checkpoint of nothing": (nothing, "checkpoint new/run", ("no process trains in new/run",)),
    "checkpoints every nothing": (nothing, ROW_TRAIN + "--save-every 0s", ("--save-every 0s", "Allowed: 500, 30s")),
    "checkpoints every something": (nothing, ROW_TRAIN + "--save-every often", ("--save-every often", "10min")),
    # where to write
    "an output folder that exists": (
        lambda place: (place.folder / "new" / "run").mkdir(parents=True),
        ROW_TRAIN,
        ("the output folder new/run exists already", "another --out"),
    ),
    "a comparison into a folder that exists": (
        lambda place: (place.folder / "new").mkdir(),
        "compare --data rows.csv --model base --out new",
        ("the output folder new exists already", "another --out"),
    ),
    "an output below a file": (
        nothing, "train lora --data rows.csv --model base --out rows.csv/run", ("cannot write rows.csv/run",)
    ),
    # adapters
    "no adapter": (nothing, "predict nowhere hello", ("nowhere: no such adapter folder", "capo train")),
    "a run instead of its adapter": (
        lambda place: (place.adapter(), (place.folder / "run").mkdir(), (place.folder / "mine").rename("run/adapter")),
        "predict run hello",
        ("run: capotune.json is missing", "Did you mean run/adapter?"),
    ),
    "another base": (
        lambda place: place.base(model_safetensors=one_bit),
        "predict adapter hello --model other",
        ("adapter: this adapter belongs to another base", "/base'", "'other'", "--model"),
    ),
    "the base is gone": (
        lambda place: place.adapter(capotune_json=base_gone),
        "predict mine hello",
        ("mine: its base '/gone/base' cannot be used from here", "in another place", "--model"),
    ),
    "adapter without record": (
        lambda place: place.adapter(capotune_json=None),
        "predict mine hello",
        ("mine: capotune.json is missing", "its record is lost"),
    ),
    "adapter without weights": (
        lambda place: place.adapter(adapter_model_safetensors=None),
        "info mine",
        ("adapter_model.safetensors is missing", "incomplete"),
    ),
    "adapter with a broken record": (
        lambda place: place.adapter(capotune_json=cut), "predict mine hello", ("mine/capotune.json: not readable JSON",)
    ),
    "adapter with a record of something else": (
        lambda place: place.adapter(capotune_json=lambda _: b"[]"), "info mine", ("expected an object, found a list",)
    ),
    "adapter of another format": (
        lambda place: place.adapter(capotune_json=edited(format=99)), "info mine", ("format 99", "reads format 1")
    ),
    "adapter with a wrong label list": (
        lambda place: place.adapter(capotune_json=edited(labels=3)), "predict mine hello", ("'labels'", "valid array")
    ),
    "adapter with an unknown pooling": (
        lambda place: place.adapter(capotune_json=edited(pooling="odd")), "predict mine hello", ("'pooling'", "'mean'")
    ),
    "adapter with fewer labels than its head": (
        lambda place: place.adapter(capotune_json=edited(labels=["a"])),
        "predict mine hello",
        ("classifier.weight is (3, 32), expected (1, 32)",),
    ),
    "adapter with truncated weights": (
        lambda place: place.adapter(adapter_model_safetensors=cut), "predict mine hello", ("damaged or incomplete",)
    ),
    "adapter with weights of something else": (
        lambda place: place.adapter(adapter_model_safetensors=lambda _: b"garbage"), "info mine", ("damaged",)
    ),
    "adapter with one flipped bit in its weights": (
        lambda place: place.adapter(adapter_model_safetensors=one_bit),
        "predict mine hello",
        ("mine/adapter_model.safetensors: damaged or incomplete", "Copy or train", "remove 'sha256' from"),
    ),
    "adapter that lacks a tensor": (
        lambda place: place.adapter(
            adapter_model_safetensors=without("classifier.bias"), capotune_json=edited(sha256={})
        ),
        "predict mine hello",
        ("classifier.bias' is missing",),
    ),
    # use
    "evaluate with an unknown label": (
        lambda place: place.write("more.csv", "text,label\nthe lamp,late\nmy card,brokn\n"),
        "evaluate adapter --data more.csv",
        ("more.csv:3: the label 'brokn'", "Did you mean 'broken'?", "'broken', 'late', 'money'"),
    ),
    "evaluate without the file": (nothing, "evaluate adapter --data row.csv", ("no such file", "mean 'rows.csv'?")),
    "predict from a missing file": (nothing, "predict adapter --file row.csv", ("no such file", "mean 'rows.csv'?")),
    "predict from text and file": (nothing, "predict adapter hello --file rows.csv", ("texts or --file, not both",)),
    "predict from a missing column": (
        nothing,
        "predict adapter --file rows.csv --text-column txt",
        ("no column 'txt', which --text-column names", "Did you mean 'text'?", "'text', 'label'"),
    ),
    "predict from rows without text": (
        lambda place: place.parquet("gap.parquet", text=["a b", None, ""]),
        "predict adapter --file gap.parquet",
        ("gap.parquet:2: the column 'text' holds None", "gap.parquet:3:"),
    ),
    "predict from lines that are not UTF-8": (
        lambda place: place.write("latin.txt", "café\n".encode("latin-1")),
        "predict adapter --file latin.txt",
        ("latin.txt:1: the byte 0xe9 is not UTF-8", "iconv -f WINDOWS-1252"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_with_a_message_that_helps_and_leaves_nothing(name: str, place: Place) -> None:
    prepare, command, words = CASES[name]
    prepare(place)
    refuse(place, command, *words)


# Disks and permissions


def test_a_place_that_cannot_be_written(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    make = os.mkdir

    def forbid(path: Any, *rest: Any, **more: Any) -> None:
        if "new" in Path(path).parts:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        make(path, *rest, **more)

    monkeypatch.setattr(os, "mkdir", forbid)
    refuse(place, ROW_TRAIN, "not allowed to write new/run", "Choose a folder")
    refuse(
        place, "compare --data rows.csv --model base --out new/run", "not allowed to write new/run", "Choose a folder"
    )


@pytest.mark.parametrize("number", [1, 3, 6, 12])
def test_a_disk_that_fills_up_while_files_are_made_durable(
    number: int, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th fsync fails: at the first record, inside the checkpoint, inside the adapter."""
    sync, calls = os.fsync, iter(range(1, 1000))

    def full(handle: int) -> None:
        if next(calls) >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    before = tree(place.folder)
    result = capo(*ROW_TRAIN.split(), "--no-cache")
    assert result.code == 2
    assert "no space left on the disk while writing new/run" in result.said
    assert "Free some space" in result.said
    after = tree(place.folder)
    assert not [name for name in after if ".partial" in name]
    if not list(place.folder.glob("new/run/checkpoints/step-*")):  # with one, the run can be gone on with
        assert after == before
    assert not (place.folder / "new" / "run" / "adapter").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_disk_that_fills_up_while_the_log_grows(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from capotune.engine.metrics_log import MetricsLog

    def full(log: MetricsLog, *_: object) -> None:
        log._file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115

    monkeypatch.setattr(MetricsLog, "__init__", full)
    refuse(place, ROW_TRAIN, "no space left on the disk while writing new/run")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 128 kB, where the machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k,mode=700", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here (needs root with CAP_SYS_ADMIN)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.usefixtures("place")
def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    command = f"train lora --data rows.csv --model base --epochs 1 --no-cache --out {small_disk}/run"
    result = capo(*command.split())
    assert result.code == 2
    assert "no space left on the disk" in result.said
    assert not list(small_disk.iterdir())


@pytest.mark.usefixtures("place")
def test_a_cache_that_is_full(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small_disk / "filler").write_bytes(bytes(124_000))
    monkeypatch.setenv("CAPOTUNE_CACHE", str(small_disk))
    result = capo(*ROW_TRAIN.split(), "--validation-fraction", "0.1")
    assert result.code == 0, result
    assert "more than the cache has room for" in result.said
    assert [path.name for path in small_disk.rglob("*") if path.is_file()] == ["filler"]


@pytest.mark.usefixtures("place")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_cannot_be_written_is_one_message() -> None:
    said = io.StringIO()
    with io.FileIO("/dev/full", "w") as device:
        full = io.TextIOWrapper(device, write_through=True)  # type: ignore[arg-type]
        with redirect_stdout(full), redirect_stderr(said):
            code = main(["info", "adapter", "--json"])
        full.detach()
    assert (code, said.getvalue()) == (2, "capo: No space left on device.\n")


# The hub


def test_an_unknown_model_is_refused_without_waiting_for_a_network(place: Place, tmp_path: Path) -> None:
    """Neither the hub's offline switch nor a dead network makes anyone wait for retries."""
    program = (
        "import sys, time\nslept = []\ntime.sleep = slept.append\nfrom capotune.cli import main\n"
        "for line in sys.argv[1:]:\n    print('exit code', main(line.split()), sum(slept), file=sys.stderr)"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "0",
    }
    unknown = {
        BASE + "no/such": ("--model no/such", "no such folder", "hub cannot be reached"),
        TRAIN + "no/such": ("no/such: no such file, and no such dataset", "Check the spelling and the network"),
    }
    done = subprocess.run(
        [sys.executable, "-c", program, *unknown], capture_output=True, text=True, env=environment, cwd=place.folder
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    base, data, rest = re.split(r"exit code 2 (?=.+\n)", done.stderr)
    for said, words in zip((base, data), unknown.values(), strict=True):
        assert all(word in said for word in words), done.stderr
    assert float(rest) < 8
    assert not (place.folder / "new").exists()


# Odd but right


def train(*more: object, data: str = "odd.csv", method: str = "feature-extraction") -> dict[str, Any]:
    """Train on ``data`` and check that the adapter answers; what ``run.json`` holds."""
    made = capo("train", method, "--data", data, "--model", "base", "--out", "out", *more)
    assert made.code == 0, made.err
    answered = capo("predict", "out/adapter", "the lamp", "--json")
    assert answered.code == 0
    record = json.loads(Path("out/run.json").read_text(encoding="utf-8"))
    labels = json.loads(Path("out/adapter/capotune.json").read_text(encoding="utf-8"))["labels"]
    assert json.loads(answered.out)["label"] in labels
    return {**record, "labels": labels, "said": made.said}


def test_three_rows_a_class(place: Place) -> None:
    place.write(
        "odd.csv", "text,label\n" + "".join(f"lamp {at} {label},{label}\n" for at in range(3) for label in "ab")
    )
    result = train("--epochs", 1, method="lora")["result"]
    assert (result["train_rows"], result["test_rows"]) == (5, 1)


def test_texts_of_five_thousand_words_are_cut_and_reported(place: Place) -> None:
    chooser = random.Random(0)
    words = ["lamp", "parcel", "card", "late", "broken", "refund"]
    rows = [(" ".join(chooser.choices(words, k=5000)), "ab"[at % 2]) for at in range(12)]
    place.write("odd.csv", "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    said = train("--epochs", 1, method="prompt-tuning")["said"]
    assert "longer than 44 tokens, the end is lost" in said  # 64 positions, 20 of them the prompt's
    assert "5,002 a text" in said


def test_emoji_and_other_scripts(place: Place) -> None:
    rows = "".join(f"🎸🔥 {at} שלום,🙂\n日本語 {at} ﷽ e\u0301,😡 böse\n" for at in range(6))
    place.write("odd.csv", "text,label\n" + rows)
    assert train()["labels"] == sorted(["😡 böse", "🙂"])


def test_one_giant_text(place: Place) -> None:
    place.write("odd.csv", ROWS + "lamp " * 400_000 + ",late\n")
    assert "1 in train: longer than 64 tokens" in train("--test-fraction", 0)["said"]


def test_two_hundred_labels_with_two_rows_each(place: Place) -> None:
    rows = "".join(f"lamp {at} {row},intent {at}\n" for at in range(200) for row in range(2))
    place.write("odd.csv", "text,label\n" + rows)
    record = train("--epochs", 1, method="lora")
    assert len(record["labels"]) == 200
    assert record["result"]["test_rows"] == 80


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_numbers_as_labels_are_ordered_as_numbers(ending: str, place: Place) -> None:
    texts, labels = [f"the lamp {at}" for at in range(12)], [10, 9, -1] * 4
    if ending == "parquet":
        place.parquet("odd.parquet", text=texts, label=labels)
    else:
        form = '{{"text": "{}", "label": {}}}\n' if ending == "jsonl" else "{},{}\n"
        rows = "".join(form.format(*row) for row in zip(texts, labels, strict=True))
        place.write(f"odd.{ending}", rows if ending == "jsonl" else "text,label\n" + rows)
    assert train(data=f"odd.{ending}")["labels"] == ["-1", "9", "10"]


def test_windows_line_ends(place: Place) -> None:
    place.write("odd.csv", "\ufeff" + ROWS.replace("\n", "\r\n"))
    assert train()["labels"] == ["broken", "late"]


def test_the_same_rows_give_the_same_run_whatever_the_format(place: Place) -> None:
    rows = [line.split(",") for line in ROWS.splitlines()[1:]]
    place.write("odd.csv", ROWS.replace("\n", "\r\n"))
    place.write("odd.jsonl", "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    first = train(data="odd.csv")["result"]["data_sha256"]
    shutil.rmtree("out")
    assert train(data="odd.jsonl")["result"]["data_sha256"] == first
