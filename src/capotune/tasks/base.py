"""The contract of a task: it owns its whole story, from recognising data to the words on the page.

A task is one folder under ``tasks/`` (or anywhere: ``tasks.register`` makes it known). It fills in two classes:

    Task      the task on a base: tokens, head, objective, record, facade, score of given data, words
    TaskRun   its part of one run: the data read and split, and how that is fitted and tested

Nothing outside the folder asks which task it is, except to print its name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from capotune.adapters.assemble import Assembled
from capotune.adapters.store import StoredAdapter, StoredRecord
from capotune.adapters.task_model import CardWords, TaskModel
from capotune.data.batches import Encoded
from capotune.data.suspects import LabelCheck
from capotune.data.texts import read_texts
from capotune.data_blocks import Block, Finding, Findings
from capotune.engine.activation_cache import ActivationCache
from capotune.engine.recorded import Recording
from capotune.errors import AdapterError, SettingError
from capotune.evaluation import metrics
from capotune.evaluation.metrics import metric
from capotune.evaluation.pairs import RowCounts
from capotune.events import Reporter
from capotune.models.base import Base
from capotune.sections import Section
from capotune.settings import DataSettings, EvaluateSettings, TrainingSettings, TrainSettings
from capotune.tasks.facade import Facade
from capotune.text import value_text, words

_MOST_HELD_OUT = 500
"""Training rows that are held out at most, to choose the regularisation and when to stop."""
_ENOUGH_HELD_OUT = 16
"""Rows that tell when to stop, where nothing else is chosen by them. Each that is held out is missed in training."""


def held_out_fraction(given: float | None, rows: int) -> float:
    """The part of so many ``rows`` to hold out: as ``given``; None: a tenth, at most as many as are enough, or a
    hundredth where that is more."""
    if given is None:
        given = min(0.1, max(_ENOUGH_HELD_OUT / rows, 0.01))
    return min(given, _MOST_HELD_OUT / rows)


@dataclass(frozen=True)
class Scored:
    """How a model did on some rows: what a run's record holds and ``evaluate`` returns."""

    metric: str
    """The score that techniques are compared by."""
    scores: dict[str, float]
    """Every metric by name, the compared one among them; empty without rows."""
    intervals: dict[str, tuple[float, float]]
    """95 % interval of each metric that has one."""
    rows: int
    """Rows behind the compared score."""
    measured_on: dict[str, str] = field(default_factory=dict)
    """For each metric what it was measured on, in words: ``300 rows``."""
    predictions: list[dict[str, Any]] = field(default_factory=list)
    """One for each row, as predictions.jsonl holds them."""
    counts: RowCounts | None = None
    """What each row adds to the compared score; pairs of techniques are compared by it."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further facts about the rows, as plain JSON."""
    other_counts: tuple[RowCounts, ...] = ()
    """As ``counts``, of other scores that techniques may be compared by."""
    recorded: dict[str, Any] = field(default_factory=dict)
    """Further facts for a run's record: how it was decided by which score techniques are compared (``metric_why``, a
    sentence), what training cost elsewhere."""

    @property
    def score(self) -> float | None:
        """The compared score; None without rows."""
        return self.scores.get(self.metric)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the compared score."""
        return self.intervals.get(self.metric)

    def values(self) -> dict[str, Any]:
        """What ``evaluate`` returns, as plain JSON: every metric by name, and what belongs to them."""
        return {
            **self.scores,
            "metric": self.metric,
            "rows": self.rows,
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "measured_on": self.measured_on,
            **self.extra,
        }


@dataclass(frozen=True)
class Fitted:
    """What training reports about itself."""

    epochs: float
    best_epoch: int
    held_out_score: float | None
    """In the sense of the objective's metric."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What only this task has to say."""


class Task(TaskModel):
    """A task on its base. Subclasses are frozen dataclasses of all that an adapter's record must hold."""

    title: ClassVar[str]
    """What is read and predicted, in words: ``labelled text``."""
    gives: ClassVar[str]
    """What it gives and what not, as a verb with its object: ``gives labels and writes no text``."""
    command: ClassVar[str]
    """The command that uses its adapters: ``predict`` or ``generate``."""
    default_models: ClassVar[tuple[str, ...]]
    """The embedded bases where none is named: the first whose package is there, else the last."""
    base_label: ClassVar[str]
    """What the score of the base alone is called."""
    base_note: ClassVar[str]
    """How that score is obtained, a sentence."""
    sample: ClassVar[str] = "your text"
    """What stands for the user's own text in an example."""
    validation_fraction: ClassVar[float | None] = 0.1
    """Part of the training rows to hold out where no setting says it; None: by their number."""
    Record: ClassVar[type[StoredRecord]] = StoredRecord
    """What an adapter's record must hold; ``record`` gives it, ``restore`` reads it."""
    data_settings: ClassVar[frozenset[str]]
    """Names of ``DataSettings`` that it reads; others that are given are refused."""
    optional_data_settings: ClassVar[frozenset[str]] = frozenset(
        {
            "text_column",
            "label_column",
            "label_columns",
            "label_order",
            "pair_columns",
            "prompt_template",
            "completion_column",
            "general",
            "class_weights",
            "min_precision",
            "out_of_scope",
        }
    )
    """The settings that belong to some tasks only."""

    # ------------------------------------------------------------------------------------------------------ from data

    @classmethod
    @abstractmethod
    def recognises(cls, settings: DataSettings) -> bool:
        """Whether the data is of this kind, by its first record. Raises ``DataError`` when it cannot be read."""

    @classmethod
    @abstractmethod
    def prepare(cls, settings: TrainSettings, method: TrainingSettings, base: Base, report: Reporter) -> TaskRun:
        """Read and check the data, tokenise it for ``base``, hold rows out, and report what was found.

        ``method`` is complete. Raises ``CapotuneError`` subclasses.
        """

    @classmethod
    def inspect(cls, settings: TrainSettings, method: TrainingSettings, base: Base, report: Reporter) -> None:
        """Report what was found as ``prepare`` does, where nothing is trained after it. Raises the same."""
        cls.prepare(settings, method, base, report)

    @classmethod
    def find_wrong_labels(
        cls,
        settings: TrainSettings,  # noqa: ARG003
        base: Base,  # noqa: ARG003
        load: Callable[[Any], tuple[Assembled, ActivationCache]],  # noqa: ARG003
        report: Reporter,  # noqa: ARG003
    ) -> LabelCheck:
        """Look for wrong labels among all rows of ``settings.data``. ``load`` gives the frozen base with a task on it,
        and the cache of what it computes. Raises ``SettingError`` where a task does not, ``DataError``."""
        raise SettingError(f"does not apply to {cls.title}: labels of texts are checked.", setting="check_labels")

    @classmethod
    def read_texts(cls, source: str, text_column: str | None) -> list[Any]:
        """What a file holds to predict: a column's texts, or the lines of plain text. Raises ``DataError``."""
        return list(read_texts(source, text_column))

    @classmethod
    def check_settings(cls, given: Mapping[str, Any], source: str) -> None:
        """``SettingError`` for a setting of another task; ``source`` names the data or the adapter."""
        for name in sorted(cls.optional_data_settings - cls.data_settings):
            if given.get(name) is not None:
                raise SettingError(
                    f"does not apply to {cls.title}, which {source} is.",
                    setting=name,
                    given=given[name],
                    advice="Leave it out, or name the `task` that has it.",
                )

    # --------------------------------------------------------------------------------------------- to and from adapters

    def record(self, model: Any) -> dict[str, Any]:  # noqa: ARG002
        """What an adapter's record must hold to make this task again: by default its fields, which are plain JSON."""
        return {"task": self.name, **{name: getattr(self, name) for name in _own_fields(type(self))}}

    @classmethod
    def restore(cls, base: Base, record: dict[str, Any]) -> Task:
        """The task that an adapter was trained for; its record is as ``Record`` asks."""
        make: Any = cls
        restored: Task = make(base=base, **{name: record[name] for name in _own_fields(cls)})
        return restored

    @classmethod
    def check_tensors(cls, stored: StoredAdapter) -> None:
        """``AdapterError`` where the task's own weights do not fit the record, before memory is taken for them."""

    @classmethod
    def of_peft(cls, base: Base, stored: StoredAdapter) -> Task:  # noqa: ARG003
        """The task of an adapter that PEFT wrote, which has no record. ``AdapterError`` where none are read."""
        raise AdapterError(f"PEFT's adapters are not read for {cls.title}.", where=str(stored.folder))

    def write_merged_files(self, folder: Path) -> list[str]:  # noqa: ARG002 - where a head decides, it is an adapter
        """Write into a merged model's ``folder`` what beside weights makes it answer as the adapter on its base does.

        Returns what the user should know, a sentence each.
        """
        return []

    @classmethod
    def check_combines(cls, first: dict[str, Any], other: dict[str, Any]) -> list[str]:
        """Names of what the records of two adapters say differently of how the task is asked.

        Raises ``AdapterError`` where no one adapter can do what both do.
        """
        own = (cls.Record.model_fields.keys() - StoredRecord.model_fields.keys()) | {"max_length"}
        return sorted(name for name in own if first.get(name) != other.get(name))

    def compute_dtype(self, device: torch.device, quantized: bool) -> torch.dtype:  # noqa: ARG002
        """What the base computes in; fp32 unless the task says otherwise."""
        return torch.float32

    def rows_to_compare(self, data: Any, count: int) -> list[Encoded]:  # noqa: ARG002
        """The first ``count`` rows of ``data`` as the model reads them, to compare two models on; with the labels of
        tokens where the task's loss is over tokens. ``DataError`` for data that cannot be read."""
        raise SettingError(f"{self.title} is not compared on rows.", setting="data", advice="Leave it out.")

    @abstractmethod
    def facade(self, assembled: Assembled) -> Facade:
        """What ``capotune.load`` returns, ready to be asked: a ``Predictor`` where ``command`` is ``predict``."""

    def distributions(self, logits: torch.Tensor) -> torch.Tensor:
        """What the model's logits (rows, outputs) say as logits of distributions (…, choices): each row is one, unless
        the task reads its outputs apart."""
        return logits

    def golden_logits(self, assembled: Assembled, text: str) -> torch.Tensor:  # noqa: ARG002
        """(distributions, choices): what the adapter's answer to ``text`` is decided by; none where a task has no such.

        Raises ``CapotuneError`` for a text that it cannot read.
        """
        return torch.empty(0, 1)

    @abstractmethod
    def evaluate(self, assembled: Assembled, settings: EvaluateSettings, report: Reporter) -> Scored:
        """Score the rows of ``settings.data`` (those that a column ``split`` marks as test, else all) as a run does.

        The method may be detached afterwards.
        """

    # ---------------------------------------------------------------------------------------------------------- words

    @classmethod
    def describe_data(cls, report: Mapping[str, Any]) -> list[Block]:
        """The data report of ``DataInspected`` in words; by default a line for each value."""
        return [Findings([Finding(words(name).capitalize(), value_text(value)) for name, value in report.items()])]

    @classmethod
    def example(cls, record: Mapping[str, Any]) -> tuple[str, str]:  # noqa: ARG003
        """What stands for the user's own texts where an adapter with this record is used: on the command line, and in
        Python between the brackets of a list."""
        return f'"{cls.sample}"', f'"{cls.sample}"'

    @classmethod
    def card(cls, record: dict[str, Any]) -> CardWords:
        """What the adapter's README says, from its whole record."""
        shell, python = cls.example(record)
        trained = record["trained"]
        score = untested(trained, trained.get("held_out_metric", ""))
        if trained["test_rows"]:
            every = ((metric(name), value) for name, value in trained["scores"].items())
            named = ", ".join(f"{one.words} {one.text(value, 2)}" for one, value in every)
            score = f"On {trained['test_rows']:,} test rows: {named}"
        return CardWords(
            f"Trained on {cls.title}; it {cls.gives}.",
            score,
            f"capo {cls.command} ADAPTER {shell}",
            f"model = capotune.load(adapter)\nmodel.{cls.command}([{python}])",
        )

    @classmethod
    def facts(cls, record: dict[str, Any]) -> dict[str, Any]:
        """What ``capo info`` says of the task, from the adapter's record, as plain JSON; by default its fields."""
        return {name: record[name] for name in _own_fields(cls)}

    @classmethod
    def facts_in_words(cls, facts: dict[str, Any]) -> list[tuple[str, str]]:
        """The facts of ``capo info`` that are the task's own, as lines: name and text."""
        return [(words(name), value_text(value)) for name, value in facts.items()]

    @classmethod
    def decide(cls, results: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
        """The score that techniques are compared by and why, from each one's result; a run alone has decided for
        itself. By default they all have the same."""
        first = next(iter(results.values()))
        return first["metric"], first.get("metric_why", "")

    @classmethod
    def chance(cls, metric: str, predictions: Sequence[Mapping[str, Any]]) -> tuple[float, str]:  # noqa: ARG003
        """The score of having learned nothing on test rows with these predictions, and what it is, in words; NaN where
        it is not known."""
        return (0.0 if metrics.metric(metric).is_percentage else math.nan), ""

    @classmethod
    def further_columns(cls, metric: str, scores: Mapping[str, float]) -> tuple[str, ...]:  # noqa: ARG003
        """The further metrics that are worth a column in a small table of techniques."""
        return ()

    @classmethod
    def page_sections(
        cls,
        record: dict[str, Any],  # noqa: ARG003
        recommended: str,  # noqa: ARG003
        predictions: Mapping[str, Sequence[Mapping[str, Any]]],  # noqa: ARG003
        of_base: Sequence[Mapping[str, Any]],  # noqa: ARG003
    ) -> list[Section]:
        """What a comparison's page shows of the test rows; by default nothing.

        Args:
            record: that of the ``recommended`` technique's adapter.
            recommended: its name.
            predictions: each technique's, as ``predictions.jsonl`` holds them.
            of_base: the same of the base alone; empty where it made none.
        """
        return []


def untested(trained: Mapping[str, Any], name: str) -> str:
    """What a card says where there were no test rows, by the held-out rows' score of that ``name``."""
    if "combined" in trained:
        names = ", ".join(one["name"] for one in trained["combined"]["adapters"])
        return f"Combined of {names} by {trained['combined']['method']}, and not scored since"
    known = metric(name)
    return f"No test rows; {known.words} on the held-out part {known.text(trained['held_out_score'], 2)}"


def _own_fields(task: type[Task]) -> list[str]:
    """Names of the values that the task is made of beside its base."""
    made: Any = task
    return [one.name for one in fields(made) if one.name not in ("base", "objective")]


class TaskRun(ABC):
    """Data and task, ready to train, and the steps of a run that are the task's own."""

    task: Task
    train_rows: int
    """Rows of the data that are trained on, the held-out ones included."""
    data_sha256: str
    few_rows: bool = False
    """Whether a label has so few rows that the defaults are others (``settings.Context``)."""
    files_sha256: Mapping[str, str] = MappingProxyType({})
    """Hash of what was read beside the data, by the setting that names it."""

    def choose_prompt(self, assembled: Assembled, report: Reporter) -> Assembled:  # noqa: ARG002
        """Where the method has candidate prompts, settle on the best of them. The method is not attached yet."""
        return assembled

    @abstractmethod
    def start_tokens(self, method: TrainingSettings) -> list[int]:
        """Tokens whose embeddings a soft prompt starts from, as ``method.starts_from`` says."""

    @abstractmethod
    def score_base(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> Scored:
        """How the base does on the test rows before anything is trained."""

    def measure_base(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> None:  # noqa: B027
        """What every run measures of the base, outside the training time. The method is not attached yet."""

    def before_attach(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> None:  # noqa: B027
        """Work that is the same with the method and without."""

    @abstractmethod
    def fit(
        self,
        recording: Recording,
        assembled: Assembled,
        cache: ActivationCache,
        report: Reporter,
    ) -> Fitted:
        """Train the attached method, from where ``recording`` stands; the model holds the best weights afterwards."""

    def decide(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> Assembled:  # noqa: ARG002
        """After training: with a task that holds what was chosen on held-out rows, such as thresholds."""
        return assembled

    @abstractmethod
    def test(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> Scored:
        """Score the test rows."""
