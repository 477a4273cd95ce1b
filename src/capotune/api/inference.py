"""Adapters and models at work: put one on its base, ask it, let it write, score it, say what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capotune.device import collector_at_rest
from capotune.errors import AdapterError, ModelError, SettingError
from capotune.events import CancelToken, Reporter, Stage, alive, ignore
from capotune.settings import EvaluateSettings, build

if TYPE_CHECKING:
    from torch import nn

    from capotune.adapters.assemble import Assembled
    from capotune.adapters.store import StoredAdapter
    from capotune.tasks.base import Task
    from capotune.tasks.facade import Predictor
    from capotune.tasks.generation import Generator
    from capotune.tasks.several import Adapters


def load(
    adapter: str | Path,
    *,
    model: str | None = None,
    trust_remote_code: bool = False,
    allow_different_base: bool = False,
    report: Reporter = ignore,
) -> Any:
    """Put an adapter on its base: a ``Classifier`` for labels, a ``Generator`` for text, or what another task makes.

    ``model`` names another place where the same base is; with ``allow_different_base`` it may be another one of the
    same shapes, of which ``report`` is told. Raises ``AdapterError`` when the folder is incomplete or damaged or the
    base is another one.
    """
    on = _On(model, allow_different_base, trust_remote_code)
    return _facade(_adapter_on_base(adapter, on, report=report))


def load_model(model: str | Path, *, trust_remote_code: bool = False) -> Generator:
    """A language model without an adapter: an embedded one by name, a folder, a GGUF file, or a model id on the hub.

    Raises ``ModelError`` when there is none or it writes no text.
    """
    generator: Generator = _facade(_model_alone(model, trust_remote_code))
    return generator


def load_adapters(
    adapters: Mapping[str, str | Path], *, model: str | None = None, report: Reporter = ignore
) -> Adapters:
    """Several adapters on one base in memory, by name: switched in place, or each row of text with its own. The first
    is in use.

    The base is that of the first, or ``model``. Raises ``AdapterError`` for an adapter of another base or quantization,
    and for one that writes text beside one that gives labels.

    >>> adapters = capotune.load_adapters({"polite": "polite/adapter", "terse": "terse/adapter"})  # doctest: +SKIP
    >>> adapters.use("terse").generate(["What colour is the sky?"])                                # doctest: +SKIP
    """
    _import_engine()
    from capotune.adapters.store import read_adapter
    from capotune.device import pick_device
    from capotune.tasks.loading import load_adapter
    from capotune.tasks.several import Adapters

    stored = {name: read_adapter(folder) for name, folder in adapters.items()}
    if not stored:
        raise SettingError("name at least one adapter.", setting="adapters")
    (first, on_base), *others = stored.items()
    found = Adapters(load_adapter(on_base, model=model, device=pick_device(), report=report), first)
    for name, one in others:
        found.add(name, one, report)
    return found


def load_predictor(
    adapter: str | Path, *, model: str | None = None, allow_different_base: bool = False, report: Reporter = ignore
) -> Predictor:
    """``load`` for an adapter that is used with ``predict``; ``AdapterError`` for one that writes text."""
    predictor: Predictor = _facade(
        _adapter_on_base(adapter, _On(model, allow_different_base), command="predict", report=report)
    )
    return predictor


def load_generator(
    adapter_or_model: str | Path,
    *,
    model: str | None = None,
    allow_different_base: bool = False,
    report: Reporter = ignore,
) -> Generator:
    """``load`` or ``load_model``, whichever fits; ``AdapterError`` for an adapter that writes no text.

    ``model`` names another place of an adapter's base. ``report`` is called while a GGUF file is converted.
    """
    on = _On(model, allow_different_base)
    generator: Generator = _facade(_adapter_or_model(adapter_or_model, on, command="generate", report=report))
    return generator


def is_adapter(name: str | Path) -> bool:
    """Whether a name means an adapter and not a model: a folder, or a name on the hub, of which the adapter's files are
    fetched then."""
    from capotune.adapters.locate import find_adapter

    return find_adapter(name) is not None


@dataclass(frozen=True)
class _On:
    """Which base an adapter is put on."""

    model: str | None = None
    allow_different: bool = False
    trust_remote_code: bool = False


def _adapter_or_model(name: str | Path, on: _On, command: str | None = None, report: Reporter = ignore) -> Assembled:
    """An adapter on its base, or a language model alone, whichever ``name`` means."""
    from capotune.adapters.locate import find_adapter

    folder = find_adapter(name)
    if folder is not None:
        return _adapter_on_base(folder, on, command=command, report=report)
    for setting, given in (("model", on.model), ("allow_different_base", on.allow_different or None)):
        if given is not None:
            raise SettingError(
                f"belongs to an adapter, and '{name}' is none.", setting=setting, given=given, advice="Leave it out."
            )
    from capotune.models.base import EMBEDDED, existing, find

    if str(name) not in EMBEDDED and existing(str(name)) is None:
        try:
            find(str(name))
        except ModelError as error:
            raise AdapterError(f"no such adapter folder, and no model either. {error}", where=str(name)) from None
    return _model_alone(name, trust_remote_code=False, report=report)


def _import_engine() -> None:
    """What loads and runs models, with PyTorch and Transformers: at once, before the functions here name its parts."""
    with collector_at_rest():
        import capotune.tasks.loading  # noqa: F401 - for the import alone


def _model_alone(model: str | Path, trust_remote_code: bool, report: Reporter = ignore) -> Assembled:
    _import_engine()
    from capotune.device import compute_dtype, pick_device
    from capotune.models.base import find
    from capotune.tasks.loading import load_plain

    device, base = pick_device(), find(str(model), trust_remote_code=trust_remote_code, report=report)
    return load_plain(base, device=device, dtype=compute_dtype(device))


def _adapter_on_base(
    adapter: str | Path,
    on: _On,
    *,
    command: str | None = None,
    report: Reporter = ignore,
) -> Assembled:
    """``AdapterError`` before anything is loaded when another command uses the adapter."""
    _import_engine()
    from capotune.adapters.store import read_adapter
    from capotune.device import pick_device
    from capotune.tasks.loading import load_adapter, task_class

    stored = read_adapter(adapter, allow_different_base=on.allow_different)
    task = task_class(stored)
    if command not in (None, task.command):
        raise AdapterError(
            f"this adapter {task.gives}.",
            where=str(stored.folder),
            advice=f'Use it with: capo {task.command} {stored.folder} "your text"',
        )
    trust = on.trust_remote_code
    return load_adapter(stored, model=on.model, device=pick_device(), trust_remote_code=trust, report=report)


def _facade(assembled: Assembled) -> Any:
    return assembled.task.facade(assembled)


def load_base(adapter: str | Path, *, model: str | None = None) -> nn.Module:
    """The frozen base with pooling and a blank head, on which PEFT can load the adapter.

    For QLoRA it holds the 4-bit weights' values in plain layers, since PEFT does not know this package's.

    >>> base = capotune.load_base("compared/lora/adapter")                     # doctest: +SKIP
    >>> peft.PeftModel.from_pretrained(base, "compared/lora/adapter").eval()   # doctest: +SKIP
    """
    _import_engine()
    from capotune.adapters.store import read_adapter
    from capotune.tasks.loading import bare_base

    base: nn.Module = bare_base(read_adapter(adapter), model=model).model
    return base


def predict(adapter: str | Path, texts: Sequence[Any], *, model: str | None = None) -> list[Any]:
    """What the adapter says of each text (of a pair, a tuple), such as its label and probability. For many calls,
    ``load`` once and use its methods."""
    return list(load_predictor(adapter, model=model).answer(texts))


def generate(
    adapter_or_model: str | Path, prompts: Sequence[str], *, model: str | None = None, **decoding: Any
) -> list[str]:
    """What a model writes after each text. For many calls, ``load`` once and use its methods."""
    return load_generator(adapter_or_model, model=model).generate(prompts, **decoding)


def evaluate(
    adapter: str | Path,
    *,
    data: Any,
    answers: int | None = None,
    general: str | None = None,
    model: str | None = None,
    allow_different_base: bool = False,
    report: Reporter = ignore,
    cancel: CancelToken | None = None,
    **columns: Any,
) -> dict[str, Any]:
    """Score an adapter, or a language model alone, on data: the test rows when a `split` column marks some, else all.

    ``data``: a path, a dataset id on the hub, or rows in memory, as in ``train``.

    It is the score of the run that made the adapter, by the same code and decoding: on that run's test file, the same
    values to the last digit. For labels: accuracy, macro_f1, loss; for several labels micro_f1 too; for numbers rmse,
    mae, pearson, spearman and coverage (of the intervals). For text: loss (nats a token in the loss), perplexity, and
    exact_match and rouge_l of at most ``answers`` rows where the data holds answers; of an adapter also ``general``,
    how it differs from its base on general text (a file of yours, or passages of ours, as many as the run read):
    ``base_loss`` and ``loss`` in nats a token, ``agreement`` of the next token, ``words``. Also ``metric``, the one to
    compare by, ``rows``, and ``intervals``, the 95 % interval of each; on weights that the adapter was not trained on
    ``different_base``, True.

    ``columns`` are ``text_column``, ``label_column``, ``label_columns`` (several), ``pair_columns`` (two),
    ``prompt_template``, ``completion_column``.

    Raises ``DataError`` for data that cannot be read or a label that the adapter does not know.
    """
    from capotune.adapters.locate import find_adapter
    from capotune.data.readers import as_source

    settings = build(EvaluateSettings, {"data": as_source(data), "answers": answers, "general": general, **columns})
    report = (cancel or CancelToken()).watching(report)
    folder = find_adapter(adapter)
    assembled = _adapter_or_model(folder or adapter, _On(model, allow_different_base), report=report)
    report(Stage(text="scoring"))
    task: Task = assembled.task
    task.check_settings({**columns, "general": general}, f"'{adapter}'")
    values = task.evaluate(assembled, settings, report).values()
    return {**values, "different_base": True} if folder and not _on_its_own(folder, assembled) else values


def _on_its_own(adapter: str | Path, assembled: Assembled) -> bool:
    """Whether the base is the one that the adapter was trained on."""
    from capotune.adapters.store import is_own_base, read_adapter

    return is_own_base(read_adapter(adapter), assembled.base)


def info(
    adapter: str | Path,
    *,
    check: bool = False,
    model: str | None = None,
    allow_different_base: bool = False,
    report: Reporter = ignore,
) -> dict[str, Any]:
    """What an adapter is: task, method, base, size, settings, how it scored; labels, or how it writes.

    A soft prompt comes with its vectors' nearest real tokens, a hard one with its words. ``in_words`` holds the task's
    own facts as lines for people, ``exports`` what ``capo export`` writes for each program: an ``adapter``, a
    ``merged`` model, or nothing (None). ``tensors`` holds the shape of each, ``delta`` the LoRA deltas' ranks, scales
    and norms, of all and of each block, None where there are none. ``base`` ``matches`` where it is on this machine: by
    content, None where it is not.

    With ``check`` the adapter is put on its base and asked what it was asked where it was trained: ``check`` holds the
    largest ``distance`` of a probability, the ``tolerance``, and whether it ``agrees``. Raises ``AdapterError`` then
    for one without golden answers.
    """
    _import_engine()
    from capotune import methods
    from capotune.adapters.loaders import verdicts
    from capotune.adapters.store import read_adapter
    from capotune.tasks.loading import task_class

    stored = read_adapter(adapter)
    task = task_class(stored)
    matches = _base_here(stored, model, report)
    facts = {} if stored.is_foreign else task.facts(stored.record)
    settings = stored.record["settings"] if stored.is_foreign else stored.settings.model_dump(mode="json")
    technique = methods.get(stored.settings.method)
    own = technique.stored_facts(stored.settings)
    checked: dict[str, Any] = {}
    if own is None or check:
        assembled = _adapter_on_base(stored.folder, _On(model, allow_different_base), report=report)
        checked = {"check": _check(stored, assembled)} if check else {}
    if own is None:
        own = assembled.method.facts(assembled.task.tokenizer)
    return {
        "adapter": str(stored.folder),
        "task": stored.task,
        "method": stored.settings.method,
        "base": {**stored.record["base"], "name": stored.base, "matches": matches},
        **facts,
        "in_words": [("task", task.name), ("kind", settings["peft_type"])]
        if stored.is_foreign
        else task.facts_in_words(facts),
        "notices": list(stored.notices),
        "trained_weights": technique.trained_count(stored.settings, stored.tensors),
        "bytes": stored.nbytes,
        "tensors": {key: list(tensor.shape) for key, tensor in stored.tensors.items()},
        "delta": _delta(stored),
        "settings": settings,
        "trained": stored.record["trained"],
        "left_out": stored.record.get("left_out", []),
        "exports": {one.loader.name: one.form for one in verdicts(stored, task.has_head)},
        **own,
        **checked,
    }


def _base_here(stored: StoredAdapter, model: str | None, report: Reporter) -> bool | None:
    """Whether the base on this machine is the adapter's own; None where none is, or it is not known which is."""
    from capotune.adapters.store import find_base, is_own_base
    from capotune.models.base import EMBEDDED, existing

    name = model or stored.base
    if stored.is_foreign or not name or (name not in EMBEDDED and existing(name) is None):
        return None
    try:
        return is_own_base(stored, find_base(stored, model, report=report), alive(report))
    except (AdapterError, ModelError):
        return None


def _delta(stored: StoredAdapter) -> dict[str, Any] | None:
    from capotune import methods
    from capotune.adapters.deltas import block_norms

    found = methods.get(stored.settings.method).low_rank(stored.settings, stored.tensors)
    if found is None:
        return None
    blocks = block_norms(found)
    return {
        "targets": sorted({path.rpartition(".")[2] for path in found}),
        "layers": len(found),
        "ranks": sorted({one.rank for one in found.values()}),
        "scales": sorted({one.scale for one in found.values()}),
        "norm": sum(norm**2 for norm in blocks.values()) ** 0.5,
        "blocks": blocks,
        "magnitudes": any(one.magnitude is not None for one in found.values()),
    }


def _check(stored: StoredAdapter, assembled: Assembled) -> dict[str, Any]:
    from capotune.tasks.golden import check_golden

    found = check_golden(stored, assembled)
    return {**asdict(found), "agrees": found.agrees}


def read_texts(
    source: str,
    text_column: str | None = None,
    predictor: Predictor | None = None,
    pair_columns: tuple[str, str] | None = None,
) -> list[Any]:
    """Texts to predict: a column of a csv, tsv, jsonl or parquet file, or the lines of any other file but blank ones.

    ``predictor``: what they are for, made by ``load_predictor``; it may know other forms, such as lists of words, or
    pairs of texts in two columns.
    """
    from capotune.data import texts

    if predictor is None:
        return list(texts.read_texts(source, text_column))
    return predictor.read_texts(source, text_column, pair_columns)


def read_prompts(source: str, prompt_column: str | None = None) -> list[str]:
    """Prompts to continue: a column of a csv, tsv, jsonl or parquet file, or any other file as one prompt."""
    from capotune.data import texts

    return texts.read_prompts(source, prompt_column)


def install_command(name: str) -> str | None:
    """The command that installs the package of an embedded base; None where it is installed."""
    from capotune.models.base import EMBEDDED, embedded_file

    file = embedded_file(name)
    return None if file is not None and file.is_file() else EMBEDDED[name].command
