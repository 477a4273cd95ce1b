"""Coverage-guided fuzzing of every reader of adapter files: each input must end in content or in a ``CapotuneError``.

    pip install atheris
    python scripts/fuzz.py record                     # 20,000 inputs
    python scripts/fuzz.py all --runs 50000
    python scripts/fuzz.py --list

A reader starts from a small adapter that this script makes on capo-tiny. atheris (libFuzzer) changes the bytes of one
file: as they are, or, where the file is JSON or begins with it, the values in it (``fuzz_mutations``). What is raised
beside ``CapotuneError`` is a finding, and so is an input that takes longer than ``SLOW`` seconds; each is printed once
with the place, and its bytes are written to ``--out``. Memory beyond ``MEMORY_MB`` ends the run.
docs/fuzzing.md holds the counts.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import atheris
from fuzz_mutations import mutate_json, mutate_safetensors

with atheris.instrument_imports(include=["capotune"]):
    from capotune.adapters import files, store
    from capotune.adapters.files import RECORD
    from capotune.api import inference
    from capotune.cli.info import show_info
    from capotune.models import shards
    from capotune.models.gguf import file as gguf_file
    from capotune.tasks import golden, loading

import gguf
import numpy as np
import torch

from capotune.adapters.assemble import assemble, attach
from capotune.errors import CapotuneError
from capotune.methods.base import Start
from capotune.methods.lora.settings import LoraSettings
from capotune.models.base import find
from capotune.settings import Context
from capotune.tasks.classification.task import Classification
from capotune.tasks.generation.task import Generation

SLOW, MEMORY_MB, LONGEST_INPUT = 10.0, 3000, 1 << 16
TRAINED = {"train_rows": 8, "test_rows": 0, "held_out_score": 0.5, "score": None, "train_seconds": 1.0}
ANSWERS = golden._probabilities
SETTINGS = LoraSettings(rank=2, target_modules=("q_proj",), layers=(3,))


def make_adapter(folder: Path, task: Any) -> Any:
    """A LoRA adapter of rank 2 in one layer, with golden answers; returns it on its base."""
    settings = SETTINGS.completed(Context(task.base.hidden_size, task.has_head))
    assembled = assemble(task, settings, device=torch.device("cpu"))
    attach(assembled, Start(torch.Generator().manual_seed(0), [4, 5]))
    with torch.no_grad():
        for weight in assembled.trainable().values():
            weight += 0.01
    store.save_adapter(folder, assembled, TRAINED, golden.golden_answers(assembled))
    record = json.loads((folder / RECORD).read_text())
    del record["sha256"]  # or no changed file would be read any further
    (folder / RECORD).write_text(json.dumps(record))
    return assembled


@dataclass
class Fuzzed:
    """What a reader is given: a folder with one file to change."""

    folder: Path
    base: Any
    assembled: Any
    known: dict[str, torch.Tensor] = field(default_factory=dict)

    def read(self) -> Any:
        """The adapter, its task checked and put on the base's files."""
        stored = store.read_adapter(self.folder)
        loading.task_on(stored, self.base)
        return stored

    def put_on(self) -> None:
        """The same, and its weights in a model."""
        stored = store.read_adapter(self.folder)
        loading.load_adapter(stored, model="capo-tiny", device=torch.device("cpu"))

    def check_golden(self) -> None:
        """The adapter's golden answers against those of the model, which is asked our own texts alone, and once."""
        known = self.known = self.known or {text: ANSWERS(self.assembled, text) for text in golden.TEXTS}
        golden._probabilities = lambda _, text: known.get(text, known[golden.TEXTS[0]])
        golden.check_golden(store.read_adapter(self.folder), self.assembled)

    def info(self) -> None:
        """What ``capo info`` prints."""
        with redirect_stdout(io.StringIO()):
            show_info(inference.info(self.folder), plot=True)

    def gguf(self) -> None:
        """A GGUF adapter, every tensor read."""
        found = gguf_file.open_gguf(self.folder / "adapter.gguf", "adapter")
        for name in found.tensors:
            found.read(name)

    def shards(self) -> None:
        """The safetensors file as a base's, every tensor read."""
        found = shards.Shards([self.folder / files.WEIGHTS])
        for stored in found:
            found.read(stored.name)


@dataclass(frozen=True)
class Reader:
    """What is changed, and what reads it then."""

    file: str
    read: Callable[[Fuzzed], Any]
    mutate: Callable[..., bytes] | None
    """A change of the file's values; None: bytes alone."""
    task: str = "text"
    is_foreign: bool = False
    part: str | None = None
    """The value of the JSON file that is changed, where it is not all of it."""


READERS = {
    "safetensors": Reader(files.WEIGHTS, Fuzzed.read, mutate_safetensors),
    "safetensors-labels": Reader(files.WEIGHTS, Fuzzed.read, mutate_safetensors, "labels"),
    "shards": Reader(files.WEIGHTS, Fuzzed.shards, mutate_safetensors),
    "config": Reader(files.CONFIG, Fuzzed.read, mutate_json),
    "record": Reader(store.RECORD, Fuzzed.read, mutate_json),
    "record-labels": Reader(store.RECORD, Fuzzed.read, mutate_json, "labels"),
    "info": Reader(store.RECORD, Fuzzed.info, mutate_json),
    "golden": Reader(store.RECORD, Fuzzed.check_golden, mutate_json, "labels", part="golden"),
    "template": Reader(store.RECORD, Fuzzed.read, None, part="chat_template"),
    "gguf": Reader("adapter.gguf", Fuzzed.gguf, None),
    "peft-config": Reader(files.CONFIG, Fuzzed.read, mutate_json, is_foreign=True),
    "peft-safetensors": Reader(files.WEIGHTS, Fuzzed.read, mutate_safetensors, is_foreign=True),
    "peft-on-base": Reader(files.WEIGHTS, Fuzzed.put_on, mutate_safetensors, is_foreign=True),
    "on-base": Reader(store.RECORD, Fuzzed.put_on, mutate_json, "labels"),
}


@dataclass
class Counts:
    """What came of the inputs."""

    runs: int = 0
    accepted: int = 0
    slowest: float = 0.0
    findings: dict[str, int] = field(default_factory=dict)


def prepare(reader: Reader, folder: Path) -> Fuzzed:
    """The folder, with files whole."""
    base = find("capo-tiny")
    task: Any = Generation.on(base, 64, 0, chat=True)
    if reader.task == "labels":
        task = Classification.on(base, ["late", "broken", "money"], 64, 0)
    assembled = make_adapter(folder, task)
    if reader.is_foreign:
        (folder / store.RECORD).unlink()
        (folder / store.CARD).unlink()
    if reader.file.endswith(".gguf"):
        write_gguf(folder / reader.file)
    return Fuzzed(folder, base, assembled)


def write_gguf(path: Path) -> None:
    """A LoRA delta of rank 2 of one layer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 4.0)
    for name, shape in (("a", (2, 64)), ("b", (64, 2))):
        writer.add_tensor(f"blk.0.attn_q.weight.lora_{name}", np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def fuzz(name: str, runs: int, out: Path) -> None:
    """Run one reader in this process, which ends with it; prints a line of the table in docs/fuzzing.md."""
    reader, counts = READERS[name], Counts()
    folder = Path(tempfile.mkdtemp(prefix="capotune-fuzz-")) / "adapter"
    fuzzed = prepare(reader, folder)
    path = folder / reader.file
    whole = path.read_bytes()
    values = json.loads(whole) if reader.part else {}
    seed = json.dumps(values[reader.part]).encode() if reader.part else whole

    def one(data: bytes) -> None:
        counts.runs += 1
        path.write_bytes(with_part(values, reader.part, data) if reader.part else data)
        began = time.perf_counter()
        try:
            reader.read(fuzzed)
            counts.accepted += 1
        except CapotuneError:
            pass
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            found(name, error, data, counts, out)
        took = time.perf_counter() - began
        counts.slowest = max(counts.slowest, took)
        if took > SLOW:
            found(name, TimeoutError(f"{took:.0f} s"), data, counts, out)
        if counts.runs >= runs:
            finish(name, counts, folder)

    corpus = folder.parent / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(seed)
    options = [sys.argv[0], str(corpus), f"-max_len={LONGEST_INPUT}", f"-rss_limit_mb={MEMORY_MB}", "-verbosity=0"]
    mutator = {} if reader.mutate is None else {"custom_mutator": mutator_of(reader.mutate, seed)}
    atheris.Setup(options, one, **mutator)
    atheris.Fuzz()


def mutator_of(change: Callable[..., bytes], whole: bytes) -> Callable[[bytes, int, int], bytes]:
    """Three in four inputs have a value changed, one of them in the whole file; the others have bytes changed."""

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        kind = seed % 4
        mutated = change(whole if kind == 0 else data, seed) if kind < 3 else atheris.Mutate(data, len(data))
        return bytes(mutated[:longest])

    return mutate


def with_part(values: dict[str, Any], part: str, data: bytes) -> bytes:
    """The JSON file with ``data`` as one of its values; as text where it is no JSON."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = data.decode(errors="replace")
    return json.dumps({**values, part: value}).encode()


def found(name: str, error: Exception, data: bytes, counts: Counts, out: Path) -> None:
    """Count a finding; a new one is shown with its place and its input written."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "capotune" in frame.filename] or list(frames)
    place = f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else str(error)
    counts.findings[place] = counts.findings.get(place, 0) + 1
    if counts.findings[place] == 1:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}-{len(counts.findings)}").write_bytes(data)
        print(f"FOUND {name}: {place}: {str(error)[:300]}", "".join(traceback.format_list(frames[-4:])), sep="\n")


def finish(name: str, counts: Counts, folder: Path) -> None:
    """Print the table's line and end the process, which libFuzzer would not."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(
        f"| {name} | {counts.runs:,} | {counts.accepted:,} | {len(counts.findings)} | {counts.slowest:.2f} s "
        f"| {peak:,} MB |"
    )
    for place, times in counts.findings.items():
        print(f"  {place}: {times} inputs")
    shutil.rmtree(folder.parent)
    sys.stdout.flush()
    os._exit(1 if counts.findings else 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", nargs="?", choices=[*READERS, "all"], default="all")
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument(
        "--out", type=Path, default=Path("fuzz-findings"), help="folder for inputs that found something"
    )
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    if given.list:
        print(*READERS, sep="\n")
        return 0
    if given.reader == "all":  # each in a process of its own: libFuzzer ends it
        command = [sys.executable, __file__]
        more = ["--runs", str(given.runs), "--out", str(given.out)]
        return max(subprocess.run([*command, name, *more], check=False).returncode for name in READERS)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    fuzz(given.reader, given.runs, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
