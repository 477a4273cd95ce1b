"""Every setting, declared once.

From these models come the command-line flags and their help, the YAML file, the validation and the saved record.
A field's docstring is its help text; its default is the one that ``docs/defaults.md`` gives evidence for.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from capotune.errors import SHOWN, SettingError, cut
from capotune.interval import IntervalText
from capotune.memory_table import DataSource

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
AnyTraining = TypeVar("AnyTraining", bound="TrainingSettings")
_MOST_VALUES, _MOST_LEVELS = 100_000, 20  # of a file of settings


class Settings(BaseModel):
    """Immutable, and an unknown name is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            raise SettingError("\n".join(_explain(type(self), problem) for problem in error.errors())) from None


@dataclass(frozen=True)
class Context:
    """What the defaults of a method depend on."""

    hidden_size: int
    """Width of the base's hidden states."""
    has_head: bool
    """Whether the task puts a head of its own on the base (labels), or trains the base's own output (text)."""
    train_rows: int | None = None
    """Rows to train on; None where the data has not been read."""
    few_rows: bool = False
    """Whether a label has so few rows that none is held out and the method trains by contrast."""


def _label(name: Any) -> Any:
    """A label as the data has it, where YAML reads a number or a truth value."""
    return str(name).lower() if isinstance(name, bool) else str(name) if isinstance(name, int) else name


ClassWeights: TypeAlias = Literal["balanced"] | dict[Annotated[str, pydantic.BeforeValidator(_label)], Positive]
TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
"""A program that ``api.trackers`` knows."""


class DataSettings(Settings):
    """Which data, and how to read it."""

    data: DataSource
    """Labelled text, tagged words (lists of words and tags, CoNLL text), or text to write (conversations, prompts and
    completions, plain text): a csv, tsv, jsonl, parquet or text file, or a dataset id on the hub."""
    task: str = "auto"
    """What is predicted: `classification` (a label a text), `multi-label` (any number of labels), `regression`
    (numbers), `ordinal` (a label of an order), `token-classification` (a tag a word), `generation` (text). auto: as the
    data shows, but for ordinal."""
    test: DataSource | None = None
    """A second file to test on. Without it: rows whose `split` column says test, else a stratified part of the data."""
    text_column: str | None = None
    """Column that holds the text, or the list of words. Found by name when left out."""
    label_column: str | None = None
    """Column that holds the label, the labels or the number, or the list of tags. Found by name when left out."""
    label_columns: tuple[str, ...] | None = None
    """Several labels or numbers: columns that hold one each. Left out: `label_column`, or those that hold 0 and 1."""
    label_order: tuple[str, ...] | None = None
    """Ordinal: the labels from the lowest to the highest. Left out: by number."""
    pair_columns: tuple[str, str] | None = None
    """Labels of texts: two columns of texts that are read together, the first and the second. Left out: found by names
    such as premise and hypothesis, sentence1 and sentence2, question and answer; else one text is read."""
    prompt_template: str | None = None
    """Generation: the prompt made from other columns, as in `Question: {question} Answer:`."""
    completion_column: str | None = None
    """Generation: with a prompt template, the column that holds the text to write. Found by name when left out."""
    learn: Literal["all", "last"] = "all"
    """Generation: the assistant's turns that are trained on in a conversation, all or the last."""
    test_fraction: float = Field(default=0.2, ge=0, lt=1)
    """Part of the rows held out for the test when no test rows are given. 0: train on all rows, without a test."""
    max_length: Count | None = None
    """Longest text in tokens; longer ones are cut, plain text is read in windows. Left out: the base's own limit, at
    most 4,096."""


class EvaluateSettings(DataSettings):
    """Rows to score an adapter on, and what else is measured."""

    answers: int | None = Field(default=None, ge=0)
    """Generation: rows that the model answers, at most (0: none). Left out: as many as in the run."""
    general: str | None = None
    """Generation: a file of general text, as for a run. Left out: passages of ours, as many as in the run."""


class RunSettings(DataSettings):
    """What every run needs, whatever the method."""

    model: str | None = None
    """Base model: `minilm` or `smollm2` by name, a folder, a GGUF file, or a model id on the hub. Left out: minilm for
    labels, smollm2 for text (capo-tiny where its package is not installed)."""
    seed: int = Field(default=0, ge=0)
    """Decides the split, the order of the rows, and every random number."""
    validation_fraction: Fraction | None = None
    """Part of the training rows held out to choose the regularisation and when to stop (500 rows at most). Left out: a
    tenth; with at most 32 rows a label none, each is left out in turn; for text at most 16 rows, or a hundredth where
    that is more."""
    cache: bool = True
    """Store what the frozen layers compute on disk, so that a second run on the same data need not compute it."""
    save_every: IntervalText = "5min"
    """Steps (`500`) or time (`30s`, `10min`, `2h`) between checkpoints, from which a stopped run goes on. One is also
    made at the end of every epoch."""
    class_weights: ClassWeights | None = None
    """Labels: how much each label's rows count in training. balanced: in inverse proportion to their number, so that
    every label counts alike; or a weight by label, such as `spam 5`, where labels left out count 1."""
    min_precision: Fraction | None = None
    """Labels: give a text no label where that would be right less often than this, as in 0.95: from which probability
    on labels are given is chosen on the held-out rows. Left out: every text gets a label."""
    out_of_scope: str | None = None
    """Labels: the label of rows that belong to none of the others. What it is told by is chosen on the held-out rows,
    and in-scope accuracy and out-of-scope recall are reported apart."""
    answers: int = Field(default=200, ge=0)
    """Generation: test rows that the model answers, for exact match and ROUGE-L (0: none)."""
    general: str | None = None
    """Generation: a text file of your own, or a file with a column of texts, on which the adapted model is compared
    with the base: what training costs elsewhere. A run reads its start, more of it the more rows it
    trains on. Left out: a few passages of ours."""
    report_to: tuple[TrackerName, ...] = ()
    """Programs that also get the losses and scores, each of which must be installed: `tensorboard` (files beside the
    run's folder), `wandb`, `mlflow`, `trackio`."""
    trust_remote_code: bool = False
    """Allow a hub model to run its own Python code on this machine."""


class TrainingSettings(Settings):
    """How weights are fitted. Each method has its own defaults; where None, ``completed`` chooses by task and model."""

    method: ClassVar[str]
    """The method's name on the command line."""

    learning_rate: Positive | None = None
    """Peak learning rate of the method's weights (AdamW). Left out: 1e-3 for labels (3e-3 where they have few
    rows); for text by the model's width, 5e-4·(2000/hidden)^0.775."""
    head_learning_rate: Positive = 1e-3
    """Peak learning rate of the classification head."""
    epochs: Count | None = None
    """Most passes over the training rows; training stops earlier when the held-out score no longer rises. Left out: 4
    for labels (3 where they have few rows), 3 for text."""
    patience: Count = 2
    """Passes without a better held-out score after which training stops."""
    batch_size: Count | None = None
    """Rows in one optimiser step. Left out: 32 for labels (64 where they have few rows); for text a 64th of the rows,
    at least 4 and at most 32, so that few rows still make enough steps."""
    warmup: float = Field(default=0.06, ge=0, lt=1)
    """Part of all steps in which the learning rate rises from zero."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decoupled weight decay."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Part of the target's probability spread over all labels."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
    micro_batch_tokens: Count = 4096
    """Tokens that go through the model at a time. A step's rows are shared out over as many passes as that takes: less
    memory, the same gradient."""
    auto_micro_batch: bool = False
    """Where memory runs out in a step, halve `micro_batch_tokens` and take the step again, instead of stopping."""
    gradient_checkpointing: bool = False
    """Save only each block's input and recompute the rest in the backward pass: less memory, a third more work."""

    def completed(self: AnyTraining, context: Context) -> AnyTraining:
        """These settings with what was left out chosen for the task and the base. Raises ``SettingError``."""
        chosen = self._defaults(context)
        left_out = {name: value for name, value in chosen.items() if getattr(self, name) is None}
        return self.model_copy(update=left_out)

    def _defaults(self, context: Context) -> dict[str, Any]:
        """A value for each field that may be left out."""
        if context.few_rows:
            return {"learning_rate": 3e-3, "epochs": 3, "batch_size": 64}
        if context.has_head:
            return {"learning_rate": 1e-3, "epochs": 4, "batch_size": 32}
        return {
            "learning_rate": round(5e-4 * (2000 / context.hidden_size) ** 0.775, 6),
            "epochs": 3,
            "batch_size": 32 if context.train_rows is None else min(32, max(4, context.train_rows // 64)),
        }

    @classmethod
    def of_record(cls: type[AnyTraining], values: dict[str, Any]) -> AnyTraining:
        """From an adapter's record, in which an older version's lacks what was no setting then. ``SettingError``."""
        return build(cls, values)

    # What a task may ask of any method's settings. Only methods that put something before the text say more.

    @property
    def virtual_tokens(self) -> int:
        """Positions before every text that the method takes; 0 when not yet known."""
        return 0

    @property
    def starts_from(self) -> Literal["labels", "text", "vocabulary"] | None:
        """Whose token embeddings the method's vectors start from; None: it needs none."""
        return None

    @property
    def start_text(self) -> str | None:
        """The words, where it starts from a text."""
        return None

    @property
    def trains(self) -> bool:
        """Whether any weight is trained."""
        return True

    @property
    def solves_head_again(self) -> bool:
        """Whether the head is solved once more after training, on what the trained model computes of all rows."""
        return False

    @property
    def over_full_precision(self) -> TrainingSettings:
        """The same over a base in full precision, where these are for one in 4 bits."""
        return self

    def candidate_prompts(self) -> list[str]:
        """Prompts written by people, the best of which is to be found before training; none for most methods."""
        return []

    def with_prompt(self: AnyTraining, text: str, tokens: int) -> AnyTraining:
        """These settings, starting from the candidate ``text`` of so many ``tokens``."""
        raise NotImplementedError("only methods with candidates are asked")


class BaseSettings(Settings):
    """Which base an adapter is put on."""

    model: str | None = None
    """Where an adapter's base is, when not where it was trained."""
    allow_different_base: bool = False
    """Put an adapter on weights that it was not trained on, of the same shapes, and say so. What it was scored at does
    not hold there."""


class TrainSettings(RunSettings):
    """One method on one file of labelled text."""

    out: Path = Path("capo-train")
    """Folder for the run: the adapter, the record of every setting, and the log. Must not exist."""


class CompareSettings(RunSettings):
    """Several methods on the same data, side by side. ``capotune.methods.compare_settings`` adds a field a method."""

    methods: tuple[str, ...] = ("feature-extraction", "lora", "qlora", "prompt-tuning")
    """Methods to run, in this order."""
    out: Path = Path("capo-compare")
    """Folder for the table, the picture, the page and the adapters. Must not exist."""
    tolerance: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Points that a cheaper technique may score worse than the best and still be recommended, though it is shown to be
    worse: percentage points for accuracy and the like, else the score's own unit."""

    @pydantic.field_validator("methods")
    @classmethod
    def _each_method_is_known_and_named_once(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        own = (name for name, field in cls.model_fields.items() if isinstance(field.default, TrainingSettings))
        known = [name.replace("_", "-") for name in own]
        unknown = next((name for name in methods if name not in known), None)
        if unknown is not None:
            raise SettingError(
                f"unknown method '{unknown}'.{nearest(unknown, known)}", setting="methods", allowed=", ".join(known)
            )
        if not methods or len(set(methods)) < len(methods):
            raise SettingError(
                "name at least one method, and each once.",
                setting="methods",
                given=", ".join(methods) or "none",
                allowed=", ".join(known),
            )
        return methods

    def for_method(self, method: str) -> TrainingSettings:
        """The settings of one method by its name."""
        settings: TrainingSettings = getattr(self, method.replace("-", "_"))
        return settings


class DecodingSettings(Settings):
    """How text is written."""

    max_tokens: Count = 256
    """Most tokens to write."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """0: always the most probable token. Above: draw, the more freely the higher."""
    top_k: int = Field(default=0, ge=0)
    """Draw among this many of the most probable tokens (with a temperature above 0). 0: among all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw among the fewest tokens that hold this much probability (with a temperature above 0)."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Draw among the tokens that have at least this part of the most probable one's probability (with a temperature
    above 0)."""
    repetition_penalty: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Above 1: tokens that stand in the prompt or the answer are less likely to come again. Below: more likely."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are left out of it."""
    num_beams: Count = 1
    """Answers followed side by side, the best of which is kept. 1: no beam search."""
    seed: int = Field(default=0, ge=0)
    """Decides what is drawn."""


AnySettings = TypeVar("AnySettings", bound=Settings)


def build(cls: type[AnySettings], values: dict[str, Any], where: str = "") -> AnySettings:
    """Validated settings from plain values, or one ``SettingError`` that lists everything wrong with them.

    ``where`` names the source of the values (a YAML file) for the message.
    """
    try:
        return cls(**values)
    except SettingError as error:
        lines = [f"{where}: {line}" if where else line for line in str(error).splitlines()]
        raise SettingError("\n".join(lines)) from None


def nearest(name: str, known: Any) -> str:
    """' Did you mean …?' for a mistyped name, or nothing when none is near."""
    close = difflib.get_close_matches(str(name), [str(one) for one in known], n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a dictionary of settings; ``SettingError`` names file and line when it is none."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(
            f"cannot be read ({error}).", setting="config", given=path, advice="Give a YAML file."
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date of no calendar is a ValueError
        raise SettingError(f"not valid YAML: {error}", setting="config", given=path) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingError(
            f"expected settings as 'name: value' lines, found a {type(values).__name__}.", setting="config", given=path
        )
    if why := _why_no_settings(values):
        raise SettingError(why, setting="config", given=path)
    return _underscored(values)


def _why_no_settings(values: dict[Any, Any]) -> str | None:
    """What no settings have. YAML's references may make a short file endless, and its escapes half a character."""
    waiting: list[tuple[Any, int]] = [(values, 0)]
    for _ in range(_MOST_VALUES):
        if not waiting:
            return None
        value, depth = waiting.pop()
        if isinstance(value, dict | list | tuple | set):
            inner = [*value, *value.values()] if isinstance(value, dict) else value
            waiting += [(one, depth + 1) for one in inner]
        if depth > _MOST_LEVELS:
            return f"values are more than {_MOST_LEVELS} levels deep, which no setting is."
        if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
            return f"{value.encode(errors='replace').decode()!r} has half of a two-part character."
    return f"there are more than {_MOST_VALUES:,} values, references counted each time."


def _underscored(values: dict[Any, Any]) -> dict[str, Any]:
    """``num-virtual-tokens`` is as good as ``num_virtual_tokens``, at every depth; labels stay as they are."""
    found = {str(name).replace("-", "_"): value for name, value in values.items()}
    return {
        name: _underscored(value) if isinstance(value, dict) and name != "class_weights" else value
        for name, value in found.items()
    }


def _explain(cls: type[BaseModel], problem: Any) -> str:
    """One line for one pydantic problem: the setting, what was given, what is allowed."""
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown setting '{cut(name, SHOWN)}'.{nearest(name, cls.model_fields)}"
    if problem["type"] == "missing":
        return f"the setting `{name}` is missing."
    own = problem.get("ctx", {}).get("error")
    if isinstance(own, SettingError) and own.setting == name:
        return str(own)
    if isinstance(own, ValueError):  # said by our own check, or by settings inside these
        return f"{name}: {own}" if name else str(own)
    message = problem["msg"]
    return f"`{name}={cut(str(problem['input']), SHOWN)}`: {message[0].lower() + message[1:]}."
