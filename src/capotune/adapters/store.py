"""What is written when training ends, and read back: PEFT's adapter folder plus ``capotune.json``.

    adapter_config.json          PEFT's configuration
    adapter_model.safetensors    the trained weights under PEFT's keys, LoRA's as every loader scales them (alpha/rank)
    capotune.json                task (labels, pooling; chat template), base fingerprint, settings, how it was trained
    README.md                    a model card made from the same record

Only safetensors and JSON are read. Nothing in the folder knows where the folder is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import torch
from safetensors.torch import save

from capotune import methods
from capotune.adapters.assemble import Assembled, attach, peft_config
from capotune.adapters.card import card
from capotune.adapters.checksums import check, signed
from capotune.adapters.files import CONFIG, RECORD, WEIGHTS, inside, read_json, read_tensors
from capotune.adapters.fingerprint import earlier_fingerprint, fingerprint
from capotune.adapters.foreign import is_foreign, read_foreign
from capotune.adapters.locate import adapter_folder
from capotune.errors import AdapterError, CapotuneError, ModelError, SettingError, quoted
from capotune.events import Reporter, Warned, alive, ignore, nothing
from capotune.files import output_folder, write_atomic
from capotune.methods.base import Start
from capotune.models.base import Base, find
from capotune.settings import TrainingSettings

FORMAT = 1
ABOVE = ".."
"""How an adapter names a base in whose folder its own folder is."""
CARD = "README.md"


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter folder, read and checked, not yet put on a base."""

    folder: Path
    settings: TrainingSettings
    record: dict[str, Any]
    """``capotune.json``."""
    tensors: dict[str, torch.Tensor]
    allow_different_base: bool = False
    """Whether it may be put on weights that it was not trained on."""
    notices: tuple[str, ...] = ()
    """What the user should know of how it was read, each in one sentence."""

    @property
    def is_foreign(self) -> bool:
        """Whether another program wrote it: it has no record of its task, and its base is known by name only."""
        return self.record["base"]["fingerprint"] is None

    @property
    def base(self) -> str:
        """Name of the base it was trained on. A base in the folder above is recorded as ``..``: both move together."""
        name = str(self.record["base"]["name"])
        return str((self.folder / name).resolve()) if name == ABOVE else name

    @property
    def task(self) -> str:
        """The task's name."""
        return str(self.record["task"])

    @property
    def nbytes(self) -> int:
        """Size of the folder's files."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())

    @property
    def dtype(self) -> torch.dtype:
        """What the base computed in."""
        dtype: torch.dtype = getattr(torch, self.record["trained"].get("dtype", "float32"))
        return dtype


class _Base(pydantic.BaseModel):
    name: str
    fingerprint: str


_Choice = tuple[pydantic.NonNegativeInt, pydantic.FiniteFloat]
_Choices = Annotated[list[_Choice], pydantic.Field(min_length=1)]


class GoldenAnswer(pydantic.BaseModel):
    """What an adapter answered to a text where it was trained."""

    text: str
    rows: list[_Choices] = pydantic.Field(min_length=1)
    """Of each distribution the most probable choices and their probabilities."""


class _CombinedFrom(pydantic.BaseModel):
    name: str
    weight: float


class _Combined(pydantic.BaseModel):
    """How an adapter was combined of others, in place of a training."""

    method: str
    rank: pydantic.NonNegativeInt
    held: float
    density: float = 1.0
    adapters: list[_CombinedFrom]


class _Trained(pydantic.BaseModel):
    """What is read again of how an adapter was trained; more may stand there."""

    train_rows: pydantic.NonNegativeInt
    test_rows: pydantic.NonNegativeInt
    train_seconds: pydantic.FiniteFloat | None = None
    metric: str | None = None
    score: float | None = None
    scores: dict[str, float | None] | None = None
    held_out_score: float | None = None
    held_out_metric: str | None = None
    combined: _Combined | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"


class StoredRecord(pydantic.BaseModel):
    """What must stand in ``capotune.json`` whatever the task; a task's own record adds to it."""

    task: str
    method: str
    settings: dict[str, Any]
    max_length: int = pydantic.Field(ge=1)
    base: _Base
    trained: _Trained
    golden: list[GoldenAnswer] = []
    left_out: list[str] = []
    """What stayed where it was trained when it was pushed to the hub."""
    sha256: dict[str, str] = {}
    """Checksums by files' names (``adapters.checksums``)."""


def save_adapter(
    folder: Path, assembled: Assembled, trained: dict[str, Any], golden: Sequence[dict[str, Any]] = ()
) -> None:
    """Write the adapter folder, complete or not at all.

    ``trained`` says how it was trained, for record and card; ``golden`` are a few of its answers (``tasks.golden``).
    """
    base = assembled.base
    name = ABOVE if folder.parent == base.folder else base.lasting_name
    record = {
        "format": FORMAT,
        "method": assembled.method.name,
        "settings": assembled.method.settings.model_dump(mode="json"),
        **assembled.task.record(assembled.model),
        "base": {"name": name, "fingerprint": fingerprint(base)},
        "trained": trained,
        "golden": [*golden],
    }
    tensors = assembled.stored()
    content, config = save(tensors, metadata={"format": "pt"}), peft_config(assembled, name)
    config_text = json.dumps(config, indent=2) + "\n"
    words, parameters = assembled.task.card(record), sum(tensor.numel() for tensor in tensors.values())
    with output_folder(folder) as new:
        write_atomic(new / WEIGHTS, content)
        write_atomic(new / CONFIG, config_text)
        whole = signed(record, {WEIGHTS: content, CONFIG: config_text.encode()})
        write_atomic(new / RECORD, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
        write_atomic(new / CARD, card(record, words, parameters, config))


def read_adapter(folder: str | Path, *, allow_different_base: bool = False) -> StoredAdapter:
    """Read and check an adapter, a folder or a name on the hub. ``AdapterError`` says which file is missing or damaged.

    ``allow_different_base``: it may be put on another base than its own, of the same shapes.
    """
    folder = adapter_folder(folder)
    if not (folder / RECORD).is_file() and is_foreign(folder):
        return _foreign(folder)
    if not (folder / RECORD).exists():
        raise AdapterError(
            f"{RECORD} is missing; this is not a complete capotune adapter.", where=str(folder), advice=_hint(folder)
        )
    record = read_json(folder, RECORD)
    if record.get("format") != FORMAT:
        raise AdapterError(
            f"format {record.get('format')!r}; this version reads format {FORMAT}.", where=str(folder / RECORD)
        )
    check_record(folder, record, StoredRecord)
    notices = check(folder, record) if inside(folder, WEIGHTS).is_file() else []
    config, tensors = read_json(folder, CONFIG), read_tensors(folder)
    try:
        method = methods.get(record["method"])
        settings = method.Settings.of_record(record["settings"])
        tensors = method.trained(settings, tensors, config)
    except CapotuneError as error:
        raise AdapterError(str(error), where=str(folder / RECORD)) from None
    return StoredAdapter(folder, settings, record, tensors, allow_different_base, tuple(notices))


def _foreign(folder: Path) -> StoredAdapter:
    """An adapter that PEFT wrote, with as much of a record as it has."""
    found = read_foreign(folder)
    record = {
        "task": found.task,
        "method": found.settings.method,
        "settings": {
            name: value for name, value in found.settings.config.items() if value not in (None, False, {}, [])
        },
        "base": {"name": found.base, "fingerprint": None},
        "trained": {},
    }
    unchecked = "PEFT wrote this adapter and noted no fingerprint: that the base is the right one is not checked."
    return StoredAdapter(folder, found.settings, record, found.tensors, notices=(unchecked, *found.notices))


def check_record(folder: Path, record: dict[str, Any], kind: type[pydantic.BaseModel]) -> None:
    """``AdapterError`` unless the record holds what ``kind`` asks for."""
    try:
        kind.model_validate_json(json.dumps(record), strict=True)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"]))
        raise AdapterError(
            f"'{name}' is not as capotune writes it: {problem['msg']}.", where=str(folder / RECORD)
        ) from None


def find_base(
    stored: StoredAdapter, model: str | None = None, *, trust_remote_code: bool = False, report: Reporter = ignore
) -> Base:
    """The adapter's base, or ``model``, not yet compared with it. ``AdapterError`` when it is not to be found."""
    if not (model or stored.base):
        raise AdapterError("it names no base.", where=str(stored.folder), advice="Name it with `model`.")
    try:
        return find(model or stored.base, trust_remote_code=trust_remote_code, report=report)
    except ModelError as error:
        if model is not None:
            raise
        raise AdapterError(
            f"its base '{stored.base}' cannot be used from here. {error}",
            where=str(stored.folder),
            advice="If the base is in another place, name it with `model`.",
        ) from None


def is_own_base(stored: StoredAdapter, base: Base, alive: Callable[[], object] = nothing) -> bool:
    """Whether ``base`` has the very weights that the adapter was trained on. They are read where their hash is not
    remembered; ``alive`` is called meanwhile. Of an adapter that another program wrote they are not known: it is taken
    at its word."""
    if stored.is_foreign:
        return True
    expected = stored.record["base"]["fingerprint"]
    return expected == fingerprint(base, alive) or bool(expected == earlier_fingerprint(base, alive))


def check_base(stored: StoredAdapter, base: Base, report: Reporter = ignore) -> bool:
    """Whether ``base`` is the adapter's own, by content. For another one ``AdapterError``, or where that is allowed, a
    warning."""
    if is_own_base(stored, base, alive(report)):
        return True
    expected, found = stored.record["base"]["fingerprint"], fingerprint(base)
    problem = (
        f"this adapter belongs to another base. It was trained on '{stored.base}' (fingerprint {expected[:12]}…); "
        f"'{base.name}' has {found[:12]}…."
    )
    if not stored.allow_different_base:
        raise AdapterError(
            problem,
            where=str(stored.folder),
            advice="Give the right base with `model`, or use this one all the same with `allow_different_base=True`.",
        )
    report(Warned(text=f"{problem} It is used all the same, and its scores do not hold here."))
    return False


def put_on(stored: StoredAdapter, assembled: Assembled) -> None:
    """Attach the method and put the stored weights in place. ``AdapterError`` when they do not fit."""
    try:
        attach(assembled, Start(torch.Generator().manual_seed(0), token_ids=[0]))
    except SettingError as error:
        raise AdapterError(str(error), where=str(stored.folder / RECORD)) from None
    try:
        assembled.method.load(stored.tensors)
        with torch.no_grad():
            for path, weight in assembled.task.head_parameters(assembled.model).items():
                tensor = stored.tensors[assembled.method.key_prefix + path]
                if tensor.shape != weight.shape:
                    raise ValueError(f"{path} is {tuple(tensor.shape)}, expected {tuple(weight.shape)}")
                weight.copy_(tensor)
        if not stored.is_foreign:
            _check_all_used(stored, assembled)
    except KeyError as error:
        raise AdapterError(f"the tensor {error} is missing.", where=str(stored.folder / WEIGHTS)) from None
    except AdapterError as error:
        raise AdapterError(error.problem, where=str(stored.folder / WEIGHTS), advice=error.advice) from None
    except (ValueError, RuntimeError) as error:
        raise AdapterError(str(error), where=str(stored.folder / WEIGHTS)) from None


def _check_all_used(stored: StoredAdapter, assembled: Assembled) -> None:
    """``AdapterError`` for a stored tensor that has no place."""
    extra = sorted(stored.tensors.keys() - assembled.stored().keys())
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise AdapterError(f"the tensor {quoted(extra[0])}{more} belongs to no part of the adapter.")


def _hint(folder: Path) -> str | None:
    """What a folder without a record may be."""
    inside = sorted(path.parent for path in (*folder.glob(f"adapter/{RECORD}"), *folder.glob(f"*/adapter/{RECORD}")))
    if inside:
        return f"Did you mean {' or '.join(map(str, inside[:4]))}?"
    if (folder / CONFIG).is_file():
        return "Capotune wrote it and its record is lost: copy the adapter again."
    named = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    return f"Did you mean {' or '.join(map(str, named[:4]))}?" if named else None
