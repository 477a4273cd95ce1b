"""Coverage-guided fuzzing of what a user gives: records, settings, checkpoints, and what a page shows.

    pip install atheris
    python scripts/fuzz_data.py csv                    # 20,000 inputs
    python scripts/fuzz_data.py all --runs 50000
    python scripts/fuzz_data.py --list

``csv``, ``tsv``, ``jsonl``, ``json``, ``parquet``, ``text``
    A file of records is given to what ``capo data`` does, its report drawn and put into JSON.
``yaml``
    A file of settings is given to ``capo compare --config`` and ``capo train lora --config``, as far as the settings.
``checkpoint``
    One file of a checkpoint is changed, which is then resumed from.
``page``
    Texts and numbers of a comparison's record are changed; the page must hold no tag or attribute of theirs. Of one
    page in twenty the pictures are drawn too, which take most of the time.

``fuzz_engine`` says what a finding is; docs/fuzzing.md holds the counts.
"""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings
import zlib
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import atheris
from fuzz_engine import Target, command_line, folder_for, fuzz
from fuzz_mutations import mutate_json, mutate_safetensors
from fuzz_rows import SEEDS, mutate_delimited, mutate_lines, mutate_parquet, mutate_texts, mutate_yaml

with atheris.instrument_imports(include=["capotune"]):
    from capotune import api, report
    from capotune.cli import data_report, flags
    from capotune.engine import checkpoint
    from capotune.report import _page
    from capotune.runs import run

import torch
from rich.console import Console

from capotune.engine.state import TrainingState
from capotune.errors import CapotuneError
from capotune.methods.lora.settings import LoraSettings
from capotune.models import base as models_base
from capotune.settings import TrainSettings

_DRAWN = 20


def records(path: Path, seeds: list[bytes], mutate: Callable[[bytes, int], bytes]) -> Target:
    """A file of records, read as ``capo data`` reads it."""
    base = models_base.find("capo-tiny")
    run.find = lambda *_, **__: base  # one for all inputs

    def read(data: bytes) -> None:
        path.write_bytes(data)
        seen = api.inspect(data=str(path), model="capo-tiny")
        json.dumps(seen, allow_nan=False).encode()
        with redirect_stdout(io.StringIO()):
            Console(markup=False).print(data_report.draw(api.describe_data(seen["task"], seen["report"])))

    return Target(read, (CapotuneError,), seeds, mutate)


def settings(path: Path) -> Target:
    """A file of settings, for both commands that take one."""
    train: Any = type("Train", (TrainSettings, LoraSettings), {})

    def read(data: bytes) -> None:
        path.write_bytes(data)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            if data[:1] != b"#":
                flags.parse(api.compare_settings(), ["--data", "x.csv"], "capo compare", path)
            else:
                flags.parse(train, ["--data", "x.csv"], "capo train lora", path)

    return Target(read, (CapotuneError, SystemExit), SEEDS["yaml"], mutate_yaml)


def page(path: Path) -> Target:
    """The page of a comparison, of which every text and number may be anybody's."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "Glyph")  # the picture's font has not all of them
    drawn, _page._template = _page.svg, cache(_page._template)  # compiled once

    def read(data: bytes) -> None:
        content = json.loads(data)
        _page.svg = drawn if zlib.crc32(data) % _DRAWN == 0 else lambda *_: "<svg></svg>"
        made, details = report.Comparison.from_dict(content), report.PageDetails.from_dict(content["details"])
        report.page(made, details, path)
        Tags(path.read_text("utf-8"))

    seeds = [json.dumps(one).encode() for one in comparisons()]
    return Target(read, (CapotuneError, json.JSONDecodeError), seeds, mutate_texts, whole=True)


class Tags(HTMLParser):
    """Reads a page and raises for what would run or load something, and for a tag that is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(html)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in {"meta", "br", "wbr"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in {"script", "link", "img", "iframe", "object", "base", "form"}, tag
        for name, value in attrs:
            assert not name.startswith("on"), name
            assert "href" not in name or (value or "").startswith("#"), value
            assert name != "src", value

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag


def comparisons() -> list[dict[str, Any]]:
    """Records as ``compare.json`` holds them: of labels and of text."""
    rows = [
        {
            "method": name, "score": score, "trainable_parameters": 1_205_780, "total_parameters": 22_713_216,
            "adapter_bytes": 10**6, "train_seconds": 41.5, "peak_memory_bytes": 10**9, "epochs": 4.0,
            "adapter": f"{name}/adapter", "interval": [score - 0.01, score + 0.01],
            "scores": {"loss": 0.3, "rouge_l": 0.8},
            "difference": score - 0.94, "difference_interval": [score - 0.95, score - 0.93], "paired_rows": 300,
        }
        for name, score in (("lora", 0.94), ("qlora", 0.92), ("prompt-tuning", 0.71))
    ]  # fmt: skip
    parts = [{"text": "where is ", "mark": ""}, {"text": "my parcel", "mark": "LOC"}]
    sections: list[dict[str, Any]] = [
        {"kind": "confusion_matrix", "title": "Confuses", "labels": ["late", "lost"], "counts": [[9, 1], [2, 8]]},
        {"kind": "quotes", "title": "Mistakes", "note": "Read", "quotes": [
            {"parts": parts, "facts": [{"words": "labelled", "value": "late", "wrong": True}]}]},
        {"kind": "side_by_side", "title": "Answers", "note": "Test rows", "prompts": [
            {"prompt": "squares", "expected": "[1, 4]", "by": {"base": "?", "lora": "[1, 4]"}}]},
        {"kind": "table", "title": "Types", "note": "F1", "columns": ["type", "F1"], "rows": [["PER", "0.9"]]},
    ]  # fmt: skip
    data = {
        "test_from": "the column 'split'", "train_tokens": {"min": 3, "median": 14}, "similar_labels": [["a", "A"]],
        "labels": [{"name": "late", "train": 30, "test": 10}], "leaked": {"count": 2, "first": [4, 12], "unit": "line"},
        "bins": [{"low": 1, "high": 9, "rows": 4}, {"low": 10, "high": 19, "rows": 2}],
        "samples": [{"line": 3, "tokens": 5, "windows": 1, "spans": [{"text": "hi", "in_loss": True}], "unit": "line"}],
    }  # fmt: skip
    details = {
        "settings": {"lora": {"seed": 0, "layers": None}}, "data": data, "environment": {"torch": "2.9"},
        "command": "capo compare --data f.csv", "sections": sections, "base_note": "As it is.",
        "snippets": [{"heading": "Predict", "code": "capo predict lora/adapter"}],
    }  # fmt: skip
    labels = {
        "model": "minilm", "task": "classification", "metric": "accuracy", "higher_is_better": True, "train_rows": 1000,
        "test_rows": 300, "base_score": 0.6, "rows": rows, "recommended": "lora", "why": "It is the best.",
        "base_scores": {"loss": 1.0}, "best": "lora", "tolerance": 0.0, "base_difference": -0.3,
        "base_difference_interval": [-0.4, -0.2], "base_label": "base", "columns": ["loss"], "metric_why": "",
        "chance": 0.5,
        "chance_words": "the share of the most frequent label", "details": details,
    }  # fmt: skip
    text = {**labels, "task": "generation", "metric": "perplexity", "higher_is_better": False, "columns": ["rouge_l"]}
    return [labels, text]


def trained(part: str) -> Callable[[Path], Target]:
    """One file of a checkpoint of a few weights."""

    def make(folder: Path) -> Target:
        one, two, three, four = torch.ones(4, 2, 3).unbind()
        weights, best = {"a.weight": one.clone()}, {"a.weight": two.clone()}
        moments = {"a.weight": {"exp_avg": three.clone(), "exp_avg_sq": four.clone(), "step": torch.tensor(7.0)}}
        state = TrainingState(
            epoch=1, step=7, weights=weights, best_weights=best, best_score=(0.5, -1.0), optimizer=moments
        )
        checkpoint.save_checkpoint(folder, state)
        (path,) = folder.rglob(part)

        def read(data: bytes) -> None:
            path.write_bytes(data)
            files = {name: (path.parent / name).read_bytes() for name in ("state.safetensors", "state.json")}
            (path.parent / "SHA256SUMS").write_bytes(checkpoint._sums(files))  # as whoever changes it can
            checkpoint.load_checkpoint(folder)

        change = mutate_json if part.endswith(".json") else mutate_safetensors
        return Target(read, (CapotuneError,), [path.read_bytes()], change)

    return make


TARGETS: dict[str, Callable[[Path], Target]] = {
    "csv": lambda folder: records(folder / "rows.csv", SEEDS["csv"], mutate_delimited),
    "tsv": lambda folder: records(folder / "rows.tsv", SEEDS["tsv"], mutate_delimited),
    "jsonl": lambda folder: records(folder / "rows.jsonl", SEEDS["jsonl"], mutate_lines),
    "json": lambda folder: records(folder / "rows.json", SEEDS["json"], mutate_lines),
    "parquet": lambda folder: records(folder / "rows.parquet", SEEDS["parquet"], mutate_parquet),
    "text": lambda folder: records(folder / "rows.txt", SEEDS["text"], mutate_lines),
    "yaml": lambda folder: settings(folder / "settings.yaml"),
    "page": lambda folder: page(folder / "compare.html"),
    "checkpoint-state": trained("state.json"),
    "checkpoint-tensors": trained("state.safetensors"),
}


def start(name: str, runs: int, out: Path) -> None:
    """Fuzz one target in this process, which ends with it."""
    torch.set_num_threads(1)
    folder = folder_for(name)
    (folder / "given").mkdir()
    fuzz(name, TARGETS[name](folder / "given"), runs, out, folder)


if __name__ == "__main__":
    sys.exit(command_line(__file__, TARGETS, start, __doc__))
