"""What is written when training ends, and read back: PEFT's adapter folder plus ``capotune.json``.

    adapter_config.json          PEFT's configuration
    adapter_model.safetensors    the trained weights under PEFT's keys
    capotune.json                task (labels, pooling; chat template), base fingerprint, settings, how it was trained
    README.md                    a model card made from the same record

Only safetensors and JSON are read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from capotune.adapters.assemble import (
    Assembled,
    assemble,
    attach,
    classification_task,
    generation_task,
    peft_config,
)
from capotune.adapters.fingerprint import fingerprint
from capotune.errors import AdapterError, CapotuneError, ModelError
from capotune.files import human_bytes, output_folder, write_atomic
from capotune.kernels.nf4 import Linear4bit
from capotune.methods import Start, Untouched, make
from capotune.models.architecture import plain_linear, swap
from capotune.models.load import Pooling, Source, find
from capotune.settings import MethodSettings, build, method_class

FORMAT = 1
CONFIG, WEIGHTS, RECORD, CARD = "adapter_config.json", "adapter_model.safetensors", "capotune.json", "README.md"


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter folder, read and checked, not yet put on a base."""

    folder: Path
    settings: MethodSettings
    record: dict[str, Any]
    """``capotune.json``."""
    tensors: dict[str, torch.Tensor]

    @property
    def base(self) -> str:
        """Name of the base it was trained on."""
        return str(self.record["base"]["name"])

    @property
    def task(self) -> str:
        """``classification`` or ``generation``."""
        return str(self.record["task"])

    @property
    def nbytes(self) -> int:
        """Size of the folder's files."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())


class _Base(pydantic.BaseModel):
    name: str
    fingerprint: str


class _Record(pydantic.BaseModel):
    """What must stand in ``capotune.json`` for the adapter to be put on a base."""

    method: str
    settings: dict[str, Any]
    max_length: int = pydantic.Field(ge=1)
    base: _Base
    trained: dict[str, Any]


class _ClassificationRecord(_Record):
    task: Literal["classification"]
    labels: list[str] = pydantic.Field(min_length=1)
    pooling: Pooling
    feature_layers: list[int]


class _GenerationRecord(_Record):
    task: Literal["generation"]
    chat_template: str | None
    template_from: str
    learn: Literal["all", "last"]
    separator: str
    chat: bool


def save_adapter(folder: Path, assembled: Assembled, trained: dict[str, Any]) -> None:
    """Write the adapter folder, complete or not at all. ``trained`` says how it was trained, for record and card."""
    record = {
        "format": FORMAT,
        "method": assembled.method.name,
        "settings": assembled.method.settings.model_dump(mode="json"),
        **assembled.task.record(assembled.model),
        "base": {"name": assembled.source.lasting_name, "fingerprint": fingerprint(assembled.source)},
        "trained": trained,
    }
    tensors = {key: weight.detach().cpu().contiguous() for key, weight in assembled.trainable().items()}
    with output_folder(folder) as new:
        write_atomic(new / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        write_atomic(new / CONFIG, json.dumps(peft_config(assembled), indent=2) + "\n")
        write_atomic(new / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        write_atomic(new / CARD, _card(record, sum(tensor.numel() for tensor in tensors.values())))


def read_adapter(folder: str | Path) -> StoredAdapter:
    """Read and check an adapter folder. ``AdapterError`` says which file is missing or damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(
            f"{folder}: no such adapter folder. `capo train` and `capo compare` write one named adapter."
        )
    record = _read_json(folder, RECORD)
    if record.get("format") != FORMAT:
        raise AdapterError(f"{folder / RECORD}: format {record.get('format')!r}; this version reads format {FORMAT}.")
    kinds: dict[Any, type[_Record]] = {"classification": _ClassificationRecord, "generation": _GenerationRecord}
    if record.get("task") not in kinds:
        raise AdapterError(
            f"{folder / RECORD}: 'task' is {record.get('task')!r}, and not as capotune writes it: {', '.join(kinds)}."
        )
    try:
        kinds[record["task"]].model_validate(record)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"]))
        raise AdapterError(f"{folder / RECORD}: '{name}' is not as capotune writes it: {problem['msg']}.") from None
    try:
        settings = build(method_class(record["method"]), record["settings"])
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise AdapterError(f"{folder}: {WEIGHTS} is missing; the adapter is incomplete.") from None
    except SafetensorError as error:
        raise AdapterError(f"{folder / WEIGHTS}: damaged or incomplete ({error}). Train or copy it again.") from None
    except CapotuneError as error:
        raise AdapterError(f"{folder / RECORD}: {error}") from None
    return StoredAdapter(folder, settings, record, tensors)


def load_adapter(
    stored: StoredAdapter, *, model: str | None, device: torch.device, trust_remote_code: bool = False
) -> Assembled:
    """Put the adapter on its base (``model`` names another place of the same base).

    Raises ``AdapterError`` when the base is another one by content, or the weights do not fit.
    """
    return _on_base(stored, model, device, trust_remote_code, with_method=True)


def load_plain(
    source: Source, *, device: torch.device, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> Assembled:
    """A language model without an adapter."""
    task = generation_task(source, None, 0, trust=trust_remote_code)
    return assemble(source, None, task, device=device, dtype=dtype, trust_remote_code=trust_remote_code)


def switch(assembled: Assembled, stored: StoredAdapter | None) -> Assembled:
    """Take the adapter off a language model in place and put another one on; None leaves the base alone.

    Raises ``AdapterError`` when the other one is for another task, base or packing. The model is then as it was.
    """
    if stored is None:
        assembled.method.detach()
        task = generation_task(assembled.source, None, 0)
        task = replace(task, plain_head=assembled.generation.plain_head)
        return replace(assembled, task=task, method=Untouched(assembled.method.quantization))
    if stored.task != "generation":
        raise AdapterError(f"{stored.folder}: this adapter labels texts and writes none. Use it with `capo predict`.")
    check_base(stored, assembled.source)
    method = make(stored.settings.completed("generation", assembled.architecture.hidden_size))
    if method.quantization != assembled.method.quantization:
        packed = "a base in 4 bits" if method.quantization else "a base in full precision"
        raise AdapterError(
            f"{stored.folder}: this adapter was trained over {packed}, and another one is loaded. "
            f"Start again with: capo chat {stored.folder}"
        )
    assembled.method.detach()
    task = replace(task_of(stored, assembled.source, False), plain_head=assembled.generation.plain_head)
    switched = replace(assembled, task=task, method=method)
    _fill(stored, switched)
    return switched


def bare_base(stored: StoredAdapter, *, model: str | None = None, device: torch.device | None = None) -> Assembled:
    """The frozen base with pooling and a blank head, as the adapter expects it, for other programs such as PEFT.

    4-bit layers become plain ones of the same values: other programs do not know this package's.
    """
    assembled = _on_base(stored, model, device or torch.device("cpu"), False, with_method=False)
    for path in assembled.architecture.linears:
        layer = assembled.model.get_submodule(path)
        if isinstance(layer, Linear4bit):
            swap(assembled.model, path, plain_linear(layer.dense_weight(torch.float32), layer.bias))
    return assembled


def check_base(stored: StoredAdapter, source: Source) -> None:
    """``AdapterError`` unless ``source`` has the very weights that the adapter was trained on."""
    expected, found = stored.record["base"]["fingerprint"], fingerprint(source)
    if found != expected:
        raise AdapterError(
            f"{stored.folder}: this adapter belongs to another base. It was trained on '{stored.base}' "
            f"(fingerprint {expected[:12]}…); '{source.name}' has {found[:12]}…. Give the right base with --model."
        )


def find_base(stored: StoredAdapter, model: str | None = None) -> Source:
    """The adapter's base, or ``model``, not yet compared with it. ``AdapterError`` when it is not to be found."""
    try:
        return find(model or stored.base)
    except ModelError as error:
        if model is not None:
            raise
        raise AdapterError(
            f"{stored.folder}: its base '{stored.base}' cannot be used from here. {error} "
            "If the base is in another place, name it with --model."
        ) from None


def _on_base(
    stored: StoredAdapter, model: str | None, device: torch.device, trust_remote_code: bool, with_method: bool
) -> Assembled:
    source = find_base(stored, model)
    check_base(stored, source)
    task = task_of(stored, source, trust_remote_code)
    dtype = getattr(torch, stored.record["trained"].get("dtype", "float32"))
    assembled = assemble(source, stored.settings, task, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    if with_method:
        _fill(stored, assembled)
    elif stored.task == "classification":
        assembled.model.virtual_tokens = int(stored.record["settings"].get("num_virtual_tokens", 0))
    return assembled


def task_of(stored: StoredAdapter, source: Source, trust: bool) -> Any:
    """The task that the adapter was trained for, on its base."""
    record = stored.record
    if stored.task == "classification":
        labels = tuple(record["labels"])
        return classification_task(source, labels, record["pooling"], record["max_length"], 0, trust)
    task = generation_task(source, record["max_length"], 0, learn=record["learn"], chat=record["chat"], trust=trust)
    also = {name: record[name] for name in ("chat_template", "template_from", "separator")}
    return replace(task, **also)


def _fill(stored: StoredAdapter, assembled: Assembled) -> None:
    """Attach the method and put the stored weights in place."""
    attach(assembled, Start(torch.Generator().manual_seed(0), token_ids=[0]))
    try:
        assembled.method.load(stored.tensors)
        with torch.no_grad():
            for path, weight in assembled.task.head_parameters(assembled.model).items():
                tensor = stored.tensors[assembled.method.key_prefix + path]
                if tensor.shape != weight.shape:
                    raise ValueError(f"{path} is {tuple(tensor.shape)}, expected {tuple(weight.shape)}")
                weight.copy_(tensor)
    except KeyError as error:
        raise AdapterError(f"{stored.folder / WEIGHTS}: the tensor {error} is missing.") from None
    except (ValueError, RuntimeError) as error:
        raise AdapterError(f"{stored.folder / WEIGHTS}: {error}") from None


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        values = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        foreign = (folder / CONFIG).is_file() and name == RECORD
        why = " It looks like an adapter of another program." if foreign else ""
        inside = sorted(path.parent for path in (*folder.glob(f"adapter/{name}"), *folder.glob(f"*/adapter/{name}")))
        if inside:
            why = f" Did you mean {' or '.join(map(str, inside[:4]))}?"
        raise AdapterError(f"{folder}: {name} is missing; this is not a complete capotune adapter.{why}") from None
    except (ValueError, OSError) as error:
        raise AdapterError(f"{folder / name}: not readable JSON ({error}).") from None
    if not isinstance(values, dict):
        raise AdapterError(f"{folder / name}: expected an object, found a {type(values).__name__}.")
    return values


def _card(record: dict[str, Any], parameters: int) -> str:
    """README.md of the adapter: what it is, how it scored, how to use it."""
    trained = record["trained"]
    settings = "\n".join(f"| {name} | {value} |" for name, value in record["settings"].items())
    what, score, shell, python = (
        _classifier_card(record) if record["task"] == "classification" else _writer_card(record)
    )
    return f"""---
base_model: {record["base"]["name"]}
library_name: capotune
tags: [capotune, {record["method"]}]
---
# {record["method"]} adapter for {record["base"]["name"]}

{what}

{score}, trained on {trained["train_rows"]:,} rows.
{parameters:,} trained weights ({human_bytes(parameters * 4)}); the base itself is unchanged
(fingerprint `{record["base"]["fingerprint"]}`).

```
{shell}
```

```python
import capotune

{python}
```

| setting | value |
| --- | --- |
{settings}
"""


def _classifier_card(record: dict[str, Any]) -> tuple[str, str, str, str]:
    """What it is, how it scored, and how to use it, in the shell and in Python."""
    trained, labels = record["trained"], record["labels"]
    shown = ", ".join(labels[:20]) + (f" and {len(labels) - 20} more" if len(labels) > 20 else "")
    tested = f"Test accuracy {trained['score']:.2%} on {trained['test_rows']:,} rows" if trained["test_rows"] else ""
    return (
        f"Classifies a text into {len(labels)} labels: {shown}.",
        tested or f"No test rows; accuracy on the held-out part {trained['held_out_score']:.2%}",
        f'capo predict {trained["adapter"]} "your text"',
        f'classifier = capotune.load({trained["adapter"]!r})\nclassifier.predict(["your text"])',
    )


def _writer_card(record: dict[str, Any]) -> tuple[str, str, str, str]:
    """As ``_classifier_card``."""
    trained = record["trained"]
    scores = {name: value for name, value in (trained.get("scores") or {}).items() if value is not None}
    named = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in scores.items())
    tested = f"On {trained['test_rows']:,} test rows: {named}" if trained["test_rows"] else ""
    verb, what = ("capo chat", "answers in a conversation") if record["chat"] else ("capo generate", "text")
    return (
        f"Writes {what}. Chat template: {record['template_from']}.",
        tested or f"No test rows; perplexity on the held-out part {trained['held_out_score']:.4g}",
        f"{verb} {trained['adapter']}" + ("" if record["chat"] else ' "your prompt"'),
        f'model = capotune.load({trained["adapter"]!r})\nmodel.generate(["your prompt"])',
    )
