"""Coverage-guided fuzzing of every reader of adapter files: each input must end in content or in a ``CapotuneError``.

    pip install atheris
    python scripts/fuzz.py record                     # 20,000 inputs
    python scripts/fuzz.py all --runs 50000
    python scripts/fuzz.py --list

A reader starts from a small adapter that this script makes on capo-tiny. atheris (libFuzzer) changes the bytes of one
file: as they are, or, where the file is JSON or begins with it, the values in it (``fuzz_mutations``). ``fuzz_engine``
says what a finding is; docs/fuzzing.md holds the counts.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import atheris
from fuzz_engine import Target, command_line, folder_for, fuzz
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


def start(name: str, runs: int, out: Path) -> None:
    """Fuzz one reader in this process, which ends with it."""
    torch.set_num_threads(1)
    reader, folder = READERS[name], folder_for(name)
    fuzzed = prepare(reader, folder / "adapter")
    path = fuzzed.folder / reader.file
    whole = path.read_bytes()
    values = json.loads(whole) if reader.part else {}
    seed = json.dumps(values[reader.part]).encode() if reader.part else whole

    def read(data: bytes) -> None:
        path.write_bytes(with_part(values, reader.part, data) if reader.part else data)
        reader.read(fuzzed)

    fuzz(name, Target(read, (CapotuneError,), [seed], reader.mutate), runs, out, folder)


def with_part(values: dict[str, Any], part: str, data: bytes) -> bytes:
    """The JSON file with ``data`` as one of its values; as text where it is no JSON."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = data.decode(errors="replace")
    return json.dumps({**values, part: value}).encode()


if __name__ == "__main__":
    sys.exit(command_line(__file__, READERS, start, __doc__))
