"""Everything that the command line can do, as functions.

>>> import capotune
>>> result = capotune.compare(data="tickets.csv", out="compared")   # doctest: +SKIP
>>> result.recommended                                              # doctest: +SKIP
'lora'
>>> classifier = capotune.load("compared/lora/adapter")             # doctest: +SKIP
>>> classifier.predict(["where is my parcel?"])                     # doctest: +SKIP
['order_status']
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capotune.config import (
    CompareSettings,
    MethodSettings,
    QuantizeSettings,
    RunSettings,
    TrainSettings,
    build,
    method_class,
    nearest,
)
from capotune.errors import DataError, SettingError

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from capotune.adapters.assemble import Assembled
    from capotune.report import Comparison

Reporter = Callable[[dict[str, Any]], None]
CompareReporter = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Prediction:
    """One text's answer."""

    text: str
    label: str
    probability: float
    """Of ``label``, from 0 to 1."""


class Classifier:
    """A base with an adapter on it, ready to answer. Made by ``load``."""

    def __init__(self, assembled: Assembled) -> None:
        self._assembled = assembled

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names, in the order of ``predict_proba``'s columns."""
        return self._assembled.task.labels

    @property
    def model(self) -> nn.Module:
        """The PyTorch module: token ids (rows, tokens) and mask in, ``.logits`` (rows, labels) out."""
        return self._assembled.model

    @property
    def method(self) -> Any:
        """The attached method (``capotune.methods``)."""
        return self._assembled.method

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return self._assembled.task.tokenizer

    def predict_proba(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, labels) fp32 probabilities."""
        import numpy as np

        from capotune.data.batches import Rows
        from capotune.training.loop import predict_logits

        _check_texts(texts)
        if not len(texts):
            return np.zeros((0, len(self.labels)), dtype=np.float32)
        task = self._assembled.task
        rows = Rows(task.encode(list(texts)), task.pad_id, self._assembled.method.virtual_token_ids)
        probabilities: np.ndarray = predict_logits(self._assembled, rows).softmax(1).numpy()
        return probabilities

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The most probable label of each text."""
        return [prediction.label for prediction in self.answer(texts)]

    def answer(self, texts: Sequence[str]) -> list[Prediction]:
        """The most probable label of each text, with its probability."""
        probabilities = self.predict_proba(texts)
        best = probabilities.argmax(1)
        return [
            Prediction(text, self.labels[number], float(row[number]))
            for text, number, row in zip(texts, best, probabilities, strict=True)
        ]

    def merge(self) -> bool:
        """Write the adapter's change into plain layers, in memory. False for methods that have none to write."""
        return self._assembled.method.merge()


def train(
    method: str, *, data: str, out: str | Path = "capo-train", resume: bool = False, report: Reporter | None = None,
    **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train one technique on labelled text and write its run folder; returns what ``run.json`` holds.

    ``method`` is ``feature-extraction``, ``lora``, ``qlora`` or ``prompt-tuning``; ``settings`` are those of
    ``capo train METHOD --help`` by name (``rank=8``, ``test="test.csv"``). ``report`` is called with progress events.

    Raises ``CapotuneError`` subclasses, all ``ValueError``s, for unusable settings, data, models and folders.
    """
    shared, own = _separate(method, settings)
    return train_run(build(TrainSettings, {"data": str(data), "out": out, **shared}), own, resume=resume, report=report)


def train_run(
    settings: TrainSettings, method: MethodSettings, *, resume: bool = False, report: Reporter | None = None
) -> dict[str, Any]:
    """``train`` with settings already validated."""
    from capotune.training.run import run

    return run(settings, method, report or (lambda _: None), resume=resume)


def compare(
    *, data: str, out: str | Path = "capo-compare", report: CompareReporter | None = None, **settings: Any
) -> Comparison:
    """Run the techniques side by side; writes ``compare.json``, ``.png``, ``.html`` and an adapter each into ``out``.

    ``settings`` are those of ``capo compare --help`` by name: ``test``, ``model``, ``methods``, ``seed``, and one
    dictionary per method (``lora={"rank": 8}``). Raises as ``train``.
    """
    return compare_run(build(CompareSettings, {"data": str(data), "out": out, **settings}), report=report)


def compare_run(
    settings: CompareSettings, *, report: CompareReporter | None = None, command: str | None = None
) -> Comparison:
    """``compare`` with settings already validated; ``command`` is shown on the page as the way to repeat it."""
    from capotune.comparison import run_techniques
    from capotune.files import output_folder
    from capotune.report import write

    if settings.test_fraction == 0 and settings.test is None:
        raise SettingError("--test-fraction 0 leaves no rows to compare on; allowed are values between 0 and 1.")
    inspected: dict[str, Any] = {}

    def listen(method: str, event: dict[str, Any]) -> None:
        if event["kind"] == "data" and not inspected:  # once: a soft prompt only shortens the room for text
            inspected.update(event["report"])
        if report:
            report(method, event)

    with output_folder(settings.out) as new:
        results = run_techniques(settings, new, listen)
        results = {method: _name_final_folder(new, settings.out, method) for method in results}
        comparison = _comparison(settings, results)
        details = _details(
            settings, comparison, results, new, inspected, command or f"capo compare --data {settings.data}"
        )
        write(comparison, details, new)
    return comparison


def load(adapter: str | Path, *, model: str | None = None, trust_remote_code: bool = False) -> Classifier:
    """Put an adapter on its base. ``model`` names another place where the same base is.

    Raises ``AdapterError`` when the folder is incomplete or damaged or the base is another one.
    """
    from capotune.adapters.store import load_adapter, read_adapter
    from capotune.device import pick_device

    stored = read_adapter(adapter)
    return Classifier(load_adapter(stored, model=model, device=pick_device(), trust_remote_code=trust_remote_code))


def load_base(adapter: str | Path, *, model: str | None = None) -> nn.Module:
    """The frozen base with pooling and a blank head, on which PEFT can load the adapter.

    For QLoRA it holds the 4-bit weights' values in plain layers, since PEFT does not know this package's.

    >>> base = capotune.load_base("compared/lora/adapter")                     # doctest: +SKIP
    >>> peft.PeftModel.from_pretrained(base, "compared/lora/adapter").eval()   # doctest: +SKIP
    """
    from capotune.adapters.store import bare_base, read_adapter

    return bare_base(read_adapter(adapter), model=model).model


def predict(adapter: str | Path, texts: Sequence[str], *, model: str | None = None) -> list[Prediction]:
    """Label and probability of each text. For many calls, ``load`` once and use its methods."""
    return load(adapter, model=model).answer(texts)


def evaluate(
    adapter: str | Path,
    *,
    data: str,
    text_column: str | None = None,
    label_column: str | None = None,
    model: str | None = None,
) -> dict[str, Any]:
    """Score an adapter on labelled text: the test rows when a `split` column marks some, else all rows.

    Returns accuracy, macro_f1, loss, rows, and the 95 % interval of the accuracy. Raises ``DataError`` for a label that
    the adapter does not know.
    """
    import torch

    from capotune.data.labelled import read_to_score
    from capotune.evaluation.metrics import classification_scores
    from capotune.report import wilson_interval

    rows = read_to_score(str(data), text_column=text_column, label_column=label_column)
    classifier = load(adapter, model=model)
    for label, line in zip(rows.labels, rows.lines, strict=True):
        if label not in classifier.labels:
            raise DataError(
                f"{data}:{line}: the label '{label}' is not one the adapter knows.{nearest(label, classifier.labels)} "
                f"It knows: {', '.join(classifier.labels[:10])}{', …' if len(classifier.labels) > 10 else ''}."
            )
    number = {label: at for at, label in enumerate(classifier.labels)}
    logits = torch.from_numpy(classifier.predict_proba(rows.texts)).clamp_min(1e-12).log()
    scores = classification_scores(logits, torch.tensor([number[label] for label in rows.labels]))
    low, high = wilson_interval(scores.accuracy, scores.rows)
    return {**asdict(scores), "interval": [low, high]}


def info(adapter: str | Path, *, model: str | None = None) -> dict[str, Any]:
    """What an adapter is: method, base, labels, size, settings, how it scored; a soft prompt's nearest real tokens."""
    from capotune.adapters.store import read_adapter

    stored = read_adapter(adapter)
    facts = {
        "adapter": str(stored.folder),
        "method": stored.settings.method,
        "base": stored.record["base"],
        "labels": list(stored.labels),
        "pooling": stored.record["pooling"],
        "max_length": stored.record["max_length"],
        "trained_weights": sum(tensor.numel() for tensor in stored.tensors.values()),
        "bytes": stored.nbytes,
        "settings": stored.settings.model_dump(mode="json"),
        "trained": stored.record["trained"],
    }
    if stored.settings.method == "prompt-tuning":
        classifier = load(adapter, model=model)
        facts["nearest_tokens"] = [
            [(classifier.tokenizer.convert_ids_to_tokens(token), round(similarity, 3)) for token, similarity in near]
            for near in classifier.method.nearest_tokens(len(classifier.tokenizer))
        ]
    return facts


def quantize(model: str, *, out: str | Path, progress: Reporter | None = None, **settings: Any) -> dict[str, Any]:
    """Write a model with its linear weights in 4 bits into the new folder ``out``; returns sizes and errors.

    The folder loads in Transformers with bitsandbytes and trains with qlora. ``settings`` are those of ``capo quantize
    --help`` by name (``quant_type="fp4"``, ``report=True``, ``text="mine.txt"``). ``progress`` is called with events.
    Raises as ``train``.
    """
    from capotune import conversion

    built = build(QuantizeSettings, {"model": model, "out": out, **settings})
    return conversion.quantize(built, progress or (lambda _: None))


def render_data_report(report: dict[str, Any]) -> Any:
    """What a ``data`` event says, for a rich console."""
    import pydantic

    from capotune.data.report import DataReport, render

    return render(pydantic.TypeAdapter(DataReport).validate_python(report))


def render_comparison(comparison: Comparison) -> Any:
    """The table of a comparison, for a rich console."""
    from capotune.report import table

    return table(comparison)


def read_texts(source: str, text_column: str | None = None) -> Iterable[str]:
    """Texts to label: a column of a csv, tsv, jsonl or parquet file, or the lines of any other file but blank ones."""
    from capotune.data.labelled import TEXT_NAMES
    from capotune.data.records import ENDINGS, describe_bad_lines, did_you_mean, read_records

    path = Path(source).expanduser()
    if not path.exists():
        near = did_you_mean(path.name, [one.name for one in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise DataError(f"{source}: no such file. {near}Give a file of texts.")
    if path.is_file() and path.suffix.lower() not in ENDINGS:
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{source}: cannot be read as UTF-8 text ({error}).") from None
        return [line for line in lines if line.strip()]
    records = read_records(source)
    column = text_column or next((name for name in TEXT_NAMES if name in records.columns), None)
    if column is None and len(records.columns) == 1:
        column = records.columns[0]
    if column not in records.columns:
        given = f"'{column}' is no column" if column else "it is not clear which column holds the text"
        raise DataError(f"{source}: {given}. The columns are {', '.join(records.columns)}. Give --text-column.")
    texts: list[Any] = [row.get(column) for row in records.rows]
    bad = {
        line: f"the column {column!r} holds {text!r}"
        for line, text in zip(records.lines, texts, strict=True)
        if not isinstance(text, str) or not text.strip()
    }
    if bad:
        raise DataError(describe_bad_lines(source, "rows without a text", bad, "Fill these in or delete the lines."))
    return texts


def _check_texts(texts: Sequence[str]) -> None:
    """``DataError`` for what no tokenizer takes."""
    if isinstance(texts, str):
        raise DataError(f"a list of texts is needed, found one string: {texts[:40]!r}. Put it in a list.")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"text {number}: a string is needed, found {type(text).__name__} {text!r}.")
        try:
            text.encode()
        except UnicodeEncodeError:  # what the shell or a pipe gave was not UTF-8
            raise DataError(f"text {number} is not UTF-8: {text[:40]!r}. Convert it first, say with iconv.") from None


def _separate(method: str, settings: dict[str, Any]) -> tuple[dict[str, Any], MethodSettings]:
    """Split flat keyword settings into the run's own and the method's."""
    cls = method_class(method)
    known = [*RunSettings.model_fields, *cls.model_fields]
    for name in settings:
        if name not in known:
            raise SettingError(f"unknown setting '{name}' for {method}.{nearest(name, known)}")
    own = build(cls, {name: value for name, value in settings.items() if name in cls.model_fields})
    return {name: value for name, value in settings.items() if name in RunSettings.model_fields}, own


def _comparison(settings: CompareSettings, results: dict[str, dict[str, Any]]) -> Comparison:
    from capotune.report import Comparison, ComparisonRow, recommend

    copied = [field.name for field in fields(ComparisonRow) if field.name not in ("method", "adapter")]
    rows = tuple(
        ComparisonRow(method=method, adapter=f"{method}/adapter", **{name: record["result"][name] for name in copied})
        for method, record in results.items()
    )
    first = next(iter(results.values()))
    base_score = next((record["base_score"] for record in results.values() if "base_score" in record), float("nan"))
    test_rows = first["result"]["test_rows"]
    recommended, why = recommend(rows, test_rows, base_score=base_score)
    return Comparison(
        model=settings.model,
        task="classification",
        metric="accuracy",
        higher_is_better=True,
        train_rows=first["result"]["train_rows"],
        test_rows=test_rows,
        base_score=base_score,
        rows=rows,
        recommended=recommended,
        why=why,
    )


def _details(
    settings: CompareSettings,
    comparison: Comparison,
    results: dict[str, dict[str, Any]],
    folder: Path,
    inspected: dict[str, Any],
    command: str,
) -> Any:
    """What the page shows beside the table, from the recommended technique's predictions."""
    import numpy as np

    from capotune.evaluation.metrics import confusion
    from capotune.report import Mistake, PageDetails

    method = comparison.recommended
    lines = (folder / method / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    predictions = [json.loads(line) for line in lines]
    labels = json.loads((folder / method / "adapter" / "capotune.json").read_text(encoding="utf-8"))["labels"]
    number = {label: at for at, label in enumerate(labels)}
    wrong = sorted(
        (row for row in predictions if row["label"] != row["predicted"]), key=lambda row: -row["probability"]
    )
    return PageDetails(
        labels=labels,
        confusion=confusion(
            np.array([number[row["predicted"]] for row in predictions]),
            np.array([number[row["label"]] for row in predictions]),
            len(labels),
        ),
        confusion_method=method,
        mistakes=[Mistake(row["text"], row["label"], row["predicted"], row["probability"]) for row in wrong[:12]],
        settings={
            name: {**record["settings"], **record[name], "out": str(settings.out / name)}
            for name, record in results.items()
        },
        data=inspected,
        environment=next(iter(results.values()))["environment"],
        command=command,
    )


def _name_final_folder(folder: Path, final: Path, method: str) -> dict[str, Any]:
    """The run was written under a temporary name; say the final one in its record, which is returned, and its card."""
    from capotune.files import write_atomic

    run = folder / method
    for path in (run / "run.json", run / "adapter" / "capotune.json", run / "adapter" / "README.md"):
        text = path.read_text(encoding="utf-8").replace(str(folder), str(final))
        write_atomic(path, text.replace(_in_json(folder), _in_json(final)))
    record: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    record["result"]["adapter_bytes"] = sum(path.stat().st_size for path in (run / "adapter").iterdir())
    write_atomic(run / "run.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return record


def _in_json(path: Path) -> str:
    """As the path stands inside a JSON string, where quotes and backslashes are escaped."""
    return json.dumps(str(path), ensure_ascii=False)[1:-1]
