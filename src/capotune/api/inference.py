"""Adapters and models at work: put one on its base, ask it, let it write, score it, say what it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capotune.errors import AdapterError, DataError, ModelError, SettingError
from capotune.settings import DecodingSettings, build, nearest

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from capotune.adapters.assemble import Assembled
    from capotune.adapters.store import StoredAdapter
    from capotune.data.samples import Samples

Messages = Sequence[dict[str, Any]]
"""Turns of a conversation, or tools, in OpenAI's form."""


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
        return self._assembled.classification.labels

    @property
    def model(self) -> nn.Module:
        """The PyTorch module: token ids (rows, tokens) and mask in, ``.logits`` (rows, labels) out."""
        model: nn.Module = self._assembled.model
        return model

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

        from capotune.data.batches import TokenRows
        from capotune.engine.loop import predict_logits

        _check_texts(texts)
        if not len(texts):
            return np.zeros((0, len(self.labels)), dtype=np.float32)
        task = self._assembled.classification
        rows = TokenRows(task.encode(list(texts)), task.pad_id, self._assembled.method.virtual_token_ids)
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


class Generator:
    """A language model, with or without an adapter, ready to write. Made by ``load`` and ``load_model``.

    ``decoding`` are the settings of ``capo generate --help`` by name (``max_tokens=64``). Every method raises
    ``SettingError`` for a setting out of range and for a prompt that leaves no room in the model's context.
    """

    def __init__(self, assembled: Assembled) -> None:
        self._assembled = assembled

    @property
    def model(self) -> Any:
        """Transformers' own causal language model, with the adapter inside."""
        return self._assembled.model

    @property
    def method(self) -> Any:
        """The attached method (``capotune.methods``)."""
        return self._assembled.method

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return self._assembled.task.tokenizer

    @property
    def chats(self) -> bool:
        """Whether the adapter was trained on conversations."""
        return self._assembled.generation.chat

    @property
    def has_chat_template(self) -> bool:
        """Whether ``chat`` can be used."""
        return self._assembled.generation.chat_template is not None

    @property
    def context_length(self) -> int:
        """Most tokens that the model can hold, prompt and answer together."""
        from capotune.evaluation.generate import context_length

        return context_length(self._assembled)

    def generate(
        self, prompts: Sequence[str], *, progress: Callable[[int, int], None] | None = None, **decoding: Any
    ) -> list[str]:
        """What the model writes after each text, without the text itself. ``progress``: (answered, all)."""
        _check_texts(prompts)
        return self._write([self._assembled.generation.encode_prompt(text) for text in prompts], decoding, progress)

    def stream(self, prompt: str, **decoding: Any) -> Iterator[str]:
        """As ``generate`` for one text, in pieces as they are written. Close the iterator to stop the model."""
        _check_texts([prompt])
        return self._stream(self._assembled.generation.encode_prompt(prompt), decoding)

    def chat(self, messages: Messages, tools: Messages = (), **decoding: Any) -> str:
        """The assistant's next turn in a conversation: ``[{"role": "user", "content": "…"}]``.

        ``tools`` are the functions that the model may call, as JSON schemas. Raises ``SettingError`` when the model has
        no chat template.
        """
        return self._write([self._encode_chat(messages, tools)], decoding)[0]

    def stream_chat(self, messages: Messages, tools: Messages = (), **decoding: Any) -> Iterator[str]:
        """As ``chat``, in pieces as they are written. Close the iterator to stop the model."""
        return self._stream(self._encode_chat(messages, tools), decoding)

    def chat_each(
        self, prompts: Sequence[str], *, progress: Callable[[int, int], None] | None = None, **decoding: Any
    ) -> list[str]:
        """The answer to each text as a conversation of its own, in batches."""
        _check_texts(prompts)
        return self._write([self._encode_chat([user_turn(text)], ()) for text in prompts], decoding, progress)

    def room(self, messages: Messages, tools: Messages = ()) -> int:
        """Tokens that the context leaves for the next turn of a conversation; none or fewer when it is too long."""
        from capotune.evaluation.generate import room_after

        return room_after(self._assembled, self._encode_chat(messages, tools))

    def use(self, adapter: str | Path | None) -> None:
        """Put another adapter on in place of the one there is; None: the base alone.

        Without a chat template of its own the new one is asked in the template of the one before, so that a
        conversation can go on. Raises ``AdapterError`` when it is for another task or base; the model is then as it
        was.
        """
        from capotune.adapters.store import read_adapter, switch

        before = self._assembled.generation
        switched = switch(self._assembled, None if adapter is None else read_adapter(adapter))
        if switched.generation.chat_template is None:
            task = replace(switched.generation, chat_template=before.chat_template, template_from=before.template_from)
            switched = replace(switched, task=task)
        self._assembled = switched

    def merge(self) -> bool:
        """Write the adapter's change into plain layers, in memory. False for methods that have none to write."""
        return self._assembled.method.merge()

    def _encode_chat(self, messages: Messages, tools: Messages) -> list[int]:
        if isinstance(messages, str) or not all(isinstance(turn, dict) and "role" in turn for turn in messages):
            raise DataError(
                'a list of messages is needed, such as [{"role": "user", "content": "Hello"}]; found '
                f"{str(messages)[:60]!r}."
            )
        _check_texts([turn["content"] for turn in messages if isinstance(turn.get("content"), str)])
        return self._assembled.generation.encode_chat(messages, tools)

    def _write(
        self,
        prompts: list[list[int]],
        decoding: dict[str, Any],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        from capotune.evaluation.generate import generate

        return generate(self._assembled, prompts, build(DecodingSettings, decoding), progress)

    def _stream(self, prompt: list[int], decoding: dict[str, Any]) -> Iterator[str]:
        from capotune.evaluation.generate import stream

        return stream(self._assembled, prompt, build(DecodingSettings, decoding))


def user_turn(text: str) -> dict[str, Any]:
    """A text as a message of the user's."""
    return {"role": "user", "content": text}


def load(adapter: str | Path, *, model: str | None = None, trust_remote_code: bool = False) -> Classifier | Generator:
    """Put an adapter on its base: a ``Classifier`` or a ``Generator``, by the task that it was trained for.

    ``model`` names another place where the same base is. Raises ``AdapterError`` when the folder is incomplete or
    damaged or the base is another one.
    """
    from capotune.adapters.store import read_adapter

    return _loaded(read_adapter(adapter), model, trust_remote_code)


def load_model(model: str | Path, *, trust_remote_code: bool = False) -> Generator:
    """A language model without an adapter: an embedded one by name, a folder, or a model id on the hub.

    Raises ``ModelError`` when there is none or it writes no text.
    """
    from capotune.adapters.store import load_plain
    from capotune.device import compute_dtype, pick_device
    from capotune.models.load import find

    device, source = pick_device(), find(str(model))
    dtype = compute_dtype(device)
    return Generator(load_plain(source, device=device, dtype=dtype, trust_remote_code=trust_remote_code))


def load_classifier(adapter: str | Path, *, model: str | None = None) -> Classifier:
    """``load`` for an adapter that gives labels; ``AdapterError`` for one that writes text."""
    from capotune.adapters.store import read_adapter

    loaded = _loaded(read_adapter(adapter), model, wanted="classification")
    assert isinstance(loaded, Classifier)
    return loaded


def load_generator(adapter_or_model: str | Path, *, model: str | None = None) -> Generator:
    """``load`` or ``load_model``, whichever fits; ``AdapterError`` for an adapter that gives labels.

    ``model`` names another place of an adapter's base.
    """
    from capotune.adapters.store import read_adapter

    if not is_adapter(adapter_or_model):
        return _named_model(adapter_or_model, model)
    loaded = _loaded(read_adapter(adapter_or_model), model, wanted="generation")
    assert isinstance(loaded, Generator)
    return loaded


def is_adapter(name: str | Path) -> bool:
    """Whether a name means an adapter folder and not a model: it is a folder, and no model's files are in it."""
    folder = Path(name).expanduser()
    return (folder / "capotune.json").is_file() or (folder.is_dir() and not (folder / "config.json").is_file())


def _named_model(name: str | Path, model: str | None) -> Generator:
    if model is not None:
        raise SettingError(f"--model {model}: belongs to an adapter, and '{name}' is none. Leave --model out.")
    from capotune.models.load import EMBEDDED, find

    if str(name) not in EMBEDDED and not Path(name).expanduser().is_dir():
        try:
            find(str(name))
        except ModelError as error:
            raise AdapterError(f"{name}: no such adapter folder, and no model either. {error}") from None
    return load_model(name)


def _loaded(
    stored: StoredAdapter, model: str | None, trust_remote_code: bool = False, wanted: str | None = None
) -> Classifier | Generator:
    """The adapter on its base; ``AdapterError`` before anything is loaded when it is for another task than wanted."""
    from capotune.adapters.store import load_adapter
    from capotune.device import pick_device

    if wanted not in (None, stored.task):
        does, use = (
            ("writes text and knows no labels", "generate")
            if wanted == "classification"
            else ("gives labels and writes no text", "predict")
        )
        raise AdapterError(f'{stored.folder}: this adapter {does}. Use it with: capo {use} {stored.folder} "your text"')
    assembled = load_adapter(stored, model=model, device=pick_device(), trust_remote_code=trust_remote_code)
    return Classifier(assembled) if stored.task == "classification" else Generator(assembled)


def load_base(adapter: str | Path, *, model: str | None = None) -> nn.Module:
    """The frozen base with pooling and a blank head, on which PEFT can load the adapter.

    For QLoRA it holds the 4-bit weights' values in plain layers, since PEFT does not know this package's.

    >>> base = capotune.load_base("compared/lora/adapter")                     # doctest: +SKIP
    >>> peft.PeftModel.from_pretrained(base, "compared/lora/adapter").eval()   # doctest: +SKIP
    """
    from capotune.adapters.store import bare_base, read_adapter

    base: nn.Module = bare_base(read_adapter(adapter), model=model).model
    return base


def predict(adapter: str | Path, texts: Sequence[str], *, model: str | None = None) -> list[Prediction]:
    """Label and probability of each text. For many calls, ``load`` once and use its methods."""
    return load_classifier(adapter, model=model).answer(texts)


def generate(
    adapter_or_model: str | Path, prompts: Sequence[str], *, model: str | None = None, **decoding: Any
) -> list[str]:
    """What a model writes after each text. For many calls, ``load`` once and use its methods."""
    return load_generator(adapter_or_model, model=model).generate(prompts, **decoding)


def evaluate(
    adapter: str | Path,
    *,
    data: object,
    text_column: str | None = None,
    label_column: str | None = None,
    prompt_template: str | None = None,
    completion_column: str | None = None,
    answers: int = 200,
    model: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score an adapter, or a language model alone, on data: the test rows when a `split` column marks some, else all.

    ``data``: a path, a dataset id on the hub, or rows in memory, as in ``train``.

    For labels: accuracy, macro_f1, loss, rows, and the accuracy's 95 % interval. For text: loss (nats a learned token),
    perplexity, rows, tokens; exact_match and rouge_l of at most ``answers`` rows, drawn by a fixed seed, when the data
    holds answers; ``intervals`` with the 95 % interval of each. ``progress``: (rows answered, rows to answer).

    Raises ``DataError`` for data that cannot be read or a label that the adapter does not know.
    """
    from capotune.adapters.store import read_adapter

    loaded = _loaded(read_adapter(adapter), model) if is_adapter(adapter) else _named_model(adapter, model)
    classifies = isinstance(loaded, Classifier)
    columns = {"text_column": text_column, "label_column": label_column}
    templates = {"prompt_template": prompt_template, "completion_column": completion_column}
    for name, value in (templates if classifies else columns).items():
        if value is not None:
            task = "labels" if classifies else "text"
            raise SettingError(f"--{name.replace('_', '-')} {value}: '{adapter}' gives {task}; leave this setting out.")
    if isinstance(loaded, Classifier):
        return _evaluate_labels(loaded, data, **columns)
    return _evaluate_text(loaded, data, answers, progress, **templates)


def _evaluate_labels(classifier: Classifier, data: object, **columns: str | None) -> dict[str, Any]:
    import torch

    from capotune.data.labelled import read_to_score
    from capotune.evaluation.metrics import classification_scores, wilson_interval

    rows = read_to_score(data, **columns)
    for row, label in enumerate(rows.labels):
        if label not in classifier.labels:
            raise DataError(
                f"the label '{label}' is not one the adapter knows.{nearest(label, classifier.labels)} It knows: "
                f"{', '.join(classifier.labels[:10])}{', …' if len(classifier.labels) > 10 else ''}.",
                where=rows.where(row),
            )
    number = {label: at for at, label in enumerate(classifier.labels)}
    logits = torch.from_numpy(classifier.predict_proba(rows.texts)).clamp_min(1e-12).log()
    scores = classification_scores(logits, torch.tensor([number[label] for label in rows.labels]))
    low, high = wilson_interval(scores.accuracy, scores.rows)
    return {**asdict(scores), "interval": [low, high]}


def _evaluate_text(
    generator: Generator,
    data: object,
    most: int,
    progress: Callable[[int, int], None] | None,
    **templates: str | None,
) -> dict[str, Any]:
    from capotune.data.generation import read_samples_to_score
    from capotune.evaluation.answers import answer_rows
    from capotune.evaluation.metrics import mean_interval, perplexity

    samples = read_samples_to_score(data, **templates)
    assembled = generator._assembled
    nats, tokens = _losses(assembled, samples)
    loss = sum(nats) / max(sum(tokens), 1)
    spread = mean_interval(nats, tokens)
    answered = answer_rows(assembled, samples, most, DecodingSettings(), progress)
    intervals = {"loss": spread, "perplexity": tuple(map(perplexity, spread))} if spread else {}
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "rows": len(samples),
        "tokens": sum(tokens),
        **answered.scores,
        "answered": len(answered.rows),
        "intervals": {name: list(ends) for name, ends in {**intervals, **answered.intervals}.items()},
    }


def _losses(assembled: Assembled, samples: Samples) -> tuple[list[float], list[int]]:
    """Of each sample the sum of its losses in nats and the number of its learned tokens, all its windows together."""
    from capotune.data.batches import TokenRows
    from capotune.engine.loop import Examples, outputs

    task = assembled.generation
    parts = [(number, part) for number, of_sample in enumerate(task.encode(samples)) for part in of_sample]
    rows = TokenRows([part.ids for _, part in parts], task.pad_id, assembled.method.virtual_token_ids)
    found = outputs(assembled, Examples(rows, [part.labels for _, part in parts])).double().tolist()
    nats, tokens = [0.0] * len(samples), [0] * len(samples)
    for (number, _), (loss, learned) in zip(parts, found, strict=True):
        nats[number] += loss
        tokens[number] += int(learned)
    return nats, tokens


def info(adapter: str | Path, *, model: str | None = None) -> dict[str, Any]:
    """What an adapter is: task, method, base, size, settings, how it scored; labels, or how it writes.

    A soft prompt comes with its vectors' nearest real tokens, a hard one with its words.
    """
    from capotune.adapters.store import read_adapter

    stored = read_adapter(adapter)
    own = (
        ("labels", "pooling")
        if stored.task == "classification"
        else ("chat", "chat_template", "template_from", "learn")
    )
    facts = {
        "adapter": str(stored.folder),
        "task": stored.task,
        "method": stored.settings.method,
        "base": stored.record["base"],
        **{name: stored.record[name] for name in own},
        "max_length": stored.record["max_length"],
        "trained_weights": sum(tensor.numel() for tensor in stored.tensors.values()),
        "bytes": stored.nbytes,
        "settings": stored.settings.model_dump(mode="json"),
        "trained": stored.record["trained"],
    }
    if getattr(stored.settings, "hard", False):
        facts["hard_prompt"] = stored.record["settings"]["init_text"]
    elif stored.settings.method == "prompt-tuning":
        loaded = load(adapter, model=model)
        facts["nearest_tokens"] = [
            [(loaded.tokenizer.convert_ids_to_tokens(token), round(similarity, 3)) for token, similarity in near]
            for near in loaded.method.nearest_tokens(len(loaded.tokenizer))
        ]
    return facts


def read_texts(source: str, text_column: str | None = None) -> Iterable[str]:
    """Texts to label: a column of a csv, tsv, jsonl or parquet file, or the lines of any other file but blank ones."""
    from capotune.data.columns import TEXT_NAMES

    content = _plain_content(source)
    if content is not None:
        return [line for line in content.split("\n") if line.strip()]
    return _column(source, text_column, TEXT_NAMES, "--text-column")


def read_prompts(source: str, prompt_column: str | None = None) -> list[str]:
    """Prompts to go on from: a column of a csv, tsv, jsonl or parquet file, or any other file as one prompt."""
    content = _plain_content(source)
    if content is not None:
        return [content.removesuffix("\n")]
    return _column(source, prompt_column, ("prompt", "question", "instruction", "input", "text"), "--prompt-column")


def _plain_content(source: str) -> str | None:
    """The text of a file that holds no rows, by its ending; None: it holds rows."""
    from capotune.data.readers import is_plain_text, read_text
    from capotune.data.wording import did_you_mean

    path = Path(source).expanduser()
    if not path.exists():
        near = did_you_mean(path.name, [one.name for one in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise DataError(f"{source}: no such file. {near}Give a file of texts.")
    return read_text(source) if is_plain_text(source) else None


def _column(source: str, given: str | None, names: Sequence[str], flag: str) -> list[str]:
    """A column's texts; without a name the first of ``names`` that is there, or the only one."""
    from capotune.data.readers import read_table
    from capotune.data.wording import bad_rows

    table = read_table(source)
    column = given or next((name for name in names if name in table.columns), None)
    if column is None and len(table.columns) == 1:
        column = table.columns[0]
    if column not in table.columns:
        why = f"'{column}' is no column" if column else "it is not clear which column holds the text"
        raise DataError(f"{source}: {why}. The columns are {', '.join(table.columns)}. Give {flag}.")
    texts: list[Any] = [row.get(column) for row in table.rows]
    bad = {
        line: f"the column {column!r} holds {text!r}"
        for line, text in zip(table.lines, texts, strict=True)
        if not isinstance(text, str) or not text.strip()
    }
    if bad:
        raise bad_rows(table.source, "rows without a text", bad, "Fill these in or delete the rows.")
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
