"""Every setting, declared once.

From these models come the command-line flags and their help, the YAML file, the validation and the saved record.
A field's docstring is its help text; its default is the one that ``docs/defaults.md`` gives evidence for.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from capotune.errors import SettingError
from capotune.memory_table import DataSource

MethodName = Literal["feature-extraction", "lora", "qlora", "prompt-tuning"]
TaskName = Literal["classification", "generation"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
AnyTraining = TypeVar("AnyTraining", bound="TrainingSettings")


class Settings(BaseModel):
    """Immutable, and an unknown name is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            raise SettingError("\n".join(_explain(type(self), problem) for problem in error.errors())) from None


class DataSettings(Settings):
    """Which data, and how to read it."""

    data: DataSource
    """Labelled text, or text to write (conversations, prompts and completions, plain text): a csv, tsv, jsonl, parquet
    or text file, or a dataset id on the hub."""
    task: Literal["auto", "classification", "generation"] = "auto"
    """Whether a label is learned or text; auto: as the first record shows."""
    test: DataSource | None = None
    """A second file to test on. Without it: rows whose `split` column says test, else a stratified part of the data."""
    text_column: str | None = None
    """Column that holds the text. Found by name when left out."""
    label_column: str | None = None
    """Column that holds the label. Found by name when left out."""
    prompt_template: str | None = None
    """Generation: the prompt made from other columns, as in `Question: {question} Answer:`."""
    completion_column: str | None = None
    """Generation: with a prompt template, the column that holds the text to write. Found by name when left out."""
    learn: Literal["all", "last"] = "all"
    """Generation: the assistant's turns that are learned in a conversation, all or the last."""
    test_fraction: float = Field(default=0.2, ge=0, lt=1)
    """Part of the rows kept for the test when no test rows are given. 0: train on all rows, without a test."""
    max_length: Count | None = None
    """Longest text in tokens; longer ones are cut. The base's own limit when left out."""


class RunSettings(DataSettings):
    """What every run needs, whatever the method."""

    model: str | None = None
    """Base model: `minilm` or `capo-tiny` (embedded), a folder, or a model id on the hub. Left out: minilm for labels,
    capo-tiny for text."""
    seed: int = Field(default=0, ge=0)
    """Decides the split, the order of the rows, and every random number."""
    validation_fraction: Fraction = 0.1
    """Part of the training rows held out to choose the regularisation and when to stop (500 rows at most)."""
    cache: bool = True
    """Keep what the frozen layers compute on disk, so that a second run on the same data does no forward pass."""
    answers: int = Field(default=200, ge=0)
    """Generation: test rows that the model answers, for exact match and ROUGE-L (0: none)."""
    trust_remote_code: bool = False
    """Allow a hub model to run its own Python code on this machine."""


class TrainingSettings(Settings):
    """How weights are fitted. Each method has its own defaults; where None, ``completed`` chooses by task and model."""

    learning_rate: Positive | None = None
    """Peak learning rate of the method's weights (AdamW). Left out: 1e-3 for labels; for text by the model's width,
    5e-4·(2000/hidden)^0.775."""
    head_learning_rate: Positive = 1e-3
    """Peak learning rate of the classification head."""
    epochs: Count | None = None
    """Most passes over the training rows; training stops earlier when the held-out score no longer rises. Left out: 4
    for labels, 3 for text."""
    patience: Count = 2
    """Passes without a better held-out score after which training stops."""
    batch_size: Count = 32
    """Rows in one optimiser step."""
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
    gradient_checkpointing: bool = False
    """Keep only what enters each block and compute the rest again on the way back: less memory, a third more work."""

    def completed(self: AnyTraining, task: TaskName, hidden_size: int) -> AnyTraining:
        """These settings with what was left out chosen for the task and the model's width."""
        chosen = self._chosen(task, hidden_size)
        left_out = {name: value for name, value in chosen.items() if getattr(self, name) is None}
        return self.model_copy(update=left_out)

    def _chosen(self, task: TaskName, hidden_size: int) -> dict[str, Any]:
        if task == "classification":
            return {"learning_rate": 1e-3, "epochs": 4}
        return {"learning_rate": round(5e-4 * (2000 / hidden_size) ** 0.775, 6), "epochs": 3}


class FeatureExtractionSettings(TrainingSettings):
    """Frozen layers, computed once; a head, or the last blocks and a head, adapt."""

    method: ClassVar[MethodName] = "feature-extraction"
    trainable_layers: int | None = Field(default=None, ge=0)
    """Last blocks that train, with the norm above them. Left out: 0 for labels (the head alone, which is solved to
    convergence, not trained in steps), 2 for text."""
    learning_rate: Positive | None = None
    """Peak learning rate of the last blocks. Left out: 1e-4 for labels; for text by the model's width, as LoRA's."""

    def _chosen(self, task: TaskName, hidden_size: int) -> dict[str, Any]:
        chosen = super()._chosen(task, hidden_size)
        if task == "classification":
            return {**chosen, "learning_rate": 1e-4, "trainable_layers": 0}
        return {**chosen, "trainable_layers": 2}


class LoraSettings(TrainingSettings):
    """LoRA (Hu et al. 2021): W stays frozen, y = xWᵀ + scale·(xAᵀ)Bᵀ."""

    method: ClassVar[MethodName] = "lora"
    rank: Count = 16
    """Rows of A, columns of B: how large a change can be learned."""
    alpha: Positive = 32.0
    """Scale of the change: alpha/rank, or alpha/√rank with rslora."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of A."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Linear layers to adapt: `all-linear`, names or endings of names (`query value`), or one regular expression."""
    layers: tuple[int, ...] | None = None
    """Only the blocks with these numbers (from 0)."""
    rslora: bool = False
    """Scale by alpha/√rank (Kalajdzievski 2023), which keeps large ranks trainable."""
    dora: bool = False
    """Learn a magnitude for each output beside the direction (DoRA, Liu et al. 2024)."""
    lora_plus_ratio: Positive = 1.0
    """Learning rate of B over that of A (LoRA+, Hayou et al. 2024)."""

    @property
    def scale(self) -> float:
        """Factor of the low-rank product: alpha/rank, or alpha/√rank with rslora."""
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))


class QloraSettings(LoraSettings):
    """QLoRA (Dettmers et al. 2023): LoRA over a base held in 4 bits."""

    method: ClassVar[MethodName] = "qlora"
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit code book of the frozen weights."""
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights that share one scale."""
    double_quant: bool = True
    """Quantise the scales as well, to 8 bits."""


class PromptTuningSettings(TrainingSettings):
    """Prompt tuning (Lester et al. 2021): trained vectors before the input embeddings; no weight changes."""

    method: ClassVar[MethodName] = "prompt-tuning"
    num_virtual_tokens: Count | None = None
    """Vectors put before every text. Left out: 20, or with `candidates` or `hard` as many as the words have tokens."""
    init: Literal["labels", "text", "vocabulary"] | None = None
    """Where the vectors start: the embeddings of the label names, of `init_text`, or of sampled words. Left out: the
    label names, or for text sampled words."""
    init_text: str | None = None
    """Words whose embeddings start the prompt (with init text)."""
    candidates: str | None = None
    """Generation: a file with one prompt a line, written by people. Each is tried on held-out rows; the vectors start
    from the best."""
    hard: bool = False
    """Keep the best of the `candidates` (or `init_text`) as it is and train nothing."""
    learning_rate: Positive | None = None
    """Peak learning rate of the prompt vectors. Left out: 1e-2 for labels; for text the standard deviation of the
    base's token embeddings, since that is the scale on which vectors differ."""
    head_learning_rate: Positive = 1e-2
    """Peak learning rate of the classification head; with so few other weights the head must do more itself."""
    epochs: Count | None = None
    """Most passes over the training rows; training stops earlier when the held-out score no longer rises. Left out: 3.
    """

    @pydantic.model_validator(mode="after")
    def _what_belongs_together_is_given_together(self) -> PromptTuningSettings:
        if (self.init == "text") != (self.init_text is not None):
            raise ValueError(
                "settings 'init' and 'init_text': init text needs init_text, and init_text needs init text."
            )
        if self.hard and self.candidates is None and self.init_text is None:
            raise ValueError(
                "setting 'hard': it keeps the best of some candidates; give candidates, a file with one prompt a line."
            )
        if self.candidates is not None and (self.init is not None or self.num_virtual_tokens is not None):
            raise ValueError(
                "setting 'candidates': the best of them decides where the vectors start and how many there are; leave "
                "init and num_virtual_tokens out."
            )
        return self

    def _chosen(self, task: TaskName, hidden_size: int) -> dict[str, Any]:
        chosen = {**super()._chosen(task, hidden_size), "epochs": 3}
        if task == "classification":
            chosen["learning_rate"] = 1e-2
        else:
            del chosen["learning_rate"]  # the method takes it from the base's embeddings
        if self.candidates is not None or self.hard:  # the words themselves give the number once they are known
            return chosen
        return {**chosen, "num_virtual_tokens": 20, "init": "labels" if task == "classification" else "vocabulary"}


class MergeSettings(Settings):
    """An adapter's change in its base's weights."""

    adapter: Path
    """Adapter folder, of lora or qlora."""
    out: Path
    """Folder for the merged model. Must not exist."""
    model: str | None = None
    """Where the base is, when not where it was trained."""
    requantize: bool = False
    """qlora: add the change to what the 4 bits stand for, and pack the sum again, instead of adding it to the base in
    full precision."""
    text: str | None = None
    """A text file of your own, on which the merged model's answers are compared with the adapter's. Left out: a few
    lines of ours."""
    trust_remote_code: bool = False
    """Allow a hub model to run its own Python code on this machine."""


class QuantizeSettings(Settings):
    """A model in 4 bits."""

    model: str
    """Model to pack: `minilm` (embedded), a folder, or a model id on the hub."""
    out: Path
    """Folder for the packed model. Must not exist."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit code book."""
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights that share one scale."""
    double_quant: bool = True
    """Quantise the scales as well, to 8 bits."""
    report: bool = False
    """Show the worst layers and write report.json: each layer's error, and with --text how the answers change."""
    text: str | None = None
    """A text file of your own: the model's answers on it are compared with those at full precision, which needs memory
    for the whole model."""
    trust_remote_code: bool = False
    """Allow a hub model to run its own Python code on this machine."""


MethodSettings = FeatureExtractionSettings | LoraSettings | QloraSettings | PromptTuningSettings

METHODS: dict[str, type[MethodSettings]] = {
    settings.method: settings
    for settings in (FeatureExtractionSettings, LoraSettings, QloraSettings, PromptTuningSettings)
}


class TrainSettings(RunSettings):
    """One method on one file of labelled text."""

    out: Path = Path("capo-train")
    """Folder for the run: the adapter, the record of every setting, and the log. Must not exist."""


class CompareSettings(RunSettings):
    """Several methods on the same data, side by side."""

    methods: tuple[str, ...] = ("feature-extraction", "lora", "qlora", "prompt-tuning")
    """Methods to run, in this order."""
    out: Path = Path("capo-compare")
    """Folder for the table, the picture, the page and the adapters. Must not exist."""
    tolerance: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Points that a cheaper technique may score worse than the best and still be recommended, though it is shown to be
    worse: percentage points for accuracy and the like, else the score's own unit."""
    feature_extraction: FeatureExtractionSettings = FeatureExtractionSettings()
    """Settings of feature extraction."""
    lora: LoraSettings = LoraSettings()
    """Settings of LoRA."""
    qlora: QloraSettings = QloraSettings()
    """Settings of QLoRA."""
    prompt_tuning: PromptTuningSettings = PromptTuningSettings()
    """Settings of prompt tuning."""

    @pydantic.field_validator("methods")
    @classmethod
    def _each_method_is_known_and_named_once(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        for name in methods:
            method_class(name)
        if not methods or len(set(methods)) < len(methods):
            given = ", ".join(methods) or "none"
            allowed = ", ".join(METHODS)
            raise SettingError(f"name at least one method, and each once; given: {given}. Allowed: {allowed}.")
        return methods

    def for_method(self, method: str) -> MethodSettings:
        """The settings of one method by its name on the command line."""
        settings: MethodSettings = getattr(self, method.replace("-", "_"))
        return settings


class DecodingSettings(Settings):
    """How text is written."""

    max_tokens: Count = 256
    """Most tokens to write."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """0: always the most probable token. Above: draw, the more freely the higher."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw among the fewest tokens that hold this much probability (with a temperature above 0)."""
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


def method_class(name: str) -> type[MethodSettings]:
    """Settings class of a method; an unknown name is a ``SettingError`` with the nearest one."""
    if name not in METHODS:
        raise SettingError(f"unknown method '{name}'. Allowed: {', '.join(METHODS)}.{nearest(name, METHODS)}")
    return METHODS[name]


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
        raise SettingError(f"--config {path}: cannot be read ({error}). Give a YAML file.") from None
    except yaml.YAMLError as error:
        raise SettingError(f"--config {path}: not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingError(
            f"--config {path}: expected settings as 'name: value' lines, found a {type(values).__name__}."
        )
    return _underscored(values)


def _underscored(values: dict[Any, Any]) -> dict[str, Any]:
    """``num-virtual-tokens`` is as good as ``num_virtual_tokens``, at every depth."""
    return {
        str(name).replace("-", "_"): _underscored(value) if isinstance(value, dict) else value
        for name, value in values.items()
    }


def _explain(cls: type[BaseModel], problem: Any) -> str:
    """One line for one pydantic problem: the setting, what was given, what is allowed."""
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown setting '{name}'.{nearest(name, cls.model_fields)}"
    if problem["type"] == "missing":
        return f"setting '{name}' is missing."
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(
        problem.get("ctx", {}).get("error"), ValueError
    ):  # said by our own check, or by settings inside these
        return f"{name}: {message}" if name else message
    return f"setting '{name}': {message[0].lower() + message[1:]}, but {problem['input']!r} was given."
