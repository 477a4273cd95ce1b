"""A task that predicts something of each text by a linear head on a pooled vector of the backbone.

What it predicts is the kind's own: how a label is read, what the head's outputs are trained for, how they are scored.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import pydantic
import torch

from capotune.adapters.assemble import Assembled
from capotune.adapters.store import StoredRecord
from capotune.data.batches import Encoded, TokenLists, TokenRows, TypedLists, without_loss
from capotune.data.inspect.measures import Counted
from capotune.data.inspect.texts import TextReport, lost_texts
from capotune.data.labelled import LabelledData, LabelledText, LabelReading
from capotune.data.text_columns import Text
from capotune.data.token_types import TypedTokens
from capotune.data.wording import quoted, shorten
from capotune.engine.activation_cache import ActivationCache
from capotune.errors import DataError, SettingError
from capotune.events import OnProgress, Reporter, Warned, counter
from capotune.methods.base import Method
from capotune.models.base import Base
from capotune.models.sentence_files import Pooling
from capotune.models.tokenizer_files import tokens_of
from capotune.settings import EvaluateSettings, TrainingSettings, TrainSettings, nearest
from capotune.tasks.base import Scored, TaskRun
from capotune.tasks.linear_head import LinearHeadTask, inner_states
from capotune.tasks.room import text_length
from capotune.tasks.solved_head import HeadSolver
from capotune.tasks.text_targets.model import SequenceClassifier, readable_layers
from capotune.tasks.text_targets.score import logits_of, score_texts

_AT_ONCE = 5000  # texts given to the tokenizer together
AnyTarget = TypeVar("AnyTarget", bound="TextTargetTask")


class TextTargetRecord(StoredRecord):
    """What is stored of every kind."""

    labels: list[str] = pydantic.Field(min_length=1)
    pooling: Pooling
    feature_layers: list[int]
    pairs: bool = False


@dataclass(frozen=True)
class TrainedRows:
    """The training rows, of which some were held out."""

    held_outputs: Callable[[], torch.Tensor]
    """(held-out rows, outputs) by weights that were not fitted to them."""
    features: Callable[[torch.Tensor], torch.Tensor]
    """What the head reads of the rows at these positions, (rows, features)."""
    targets: torch.Tensor
    """(rows, …)."""
    fit: torch.Tensor
    """Positions of the rows that weights were fitted to."""
    held: torch.Tensor
    """Positions of those held out."""


@dataclass(frozen=True)
class TextTargetTask(LinearHeadTask):
    """The task: its outputs and lengths.

    A *label* is what a row of the data has (a class, several, numbers); a *target* is what the objective compares
    outputs with, one row of a tensor.
    """

    base: Base
    labels: tuple[str, ...]
    """Names of the head's outputs."""
    max_length: int
    """Longest text in tokens; longer ones are cut."""
    pooling: Pooling
    pairs: bool | None = field(default=False, kw_only=True)
    """Whether it reads pairs of texts; None: single texts and pairs, whichever come."""

    data_settings: ClassVar[frozenset[str]] = LinearHeadTask.data_settings | {"pair_columns"}
    peft_task_type: ClassVar[str] = "SEQ_CLS"
    Record: ClassVar[type[StoredRecord]] = TextTargetRecord
    reading: ClassVar[LabelReading[Any]]
    """How a label is read."""
    problem_type: ClassVar[str] = "single_label_classification"
    """What Transformers calls the kind, by which its classes and PEFT's choose a loss."""

    # ------------------------------------------------------------------------------------------- what each kind says

    @classmethod
    @abstractmethod
    def of_data(
        cls: type[AnyTarget], base: Base, data: LabelledData[Any], max_length: int | None, virtual_tokens: int
    ) -> AnyTarget:
        """The task for such training rows; the other arguments as ``on`` has them."""

    @classmethod
    @abstractmethod
    def inspected(
        cls,
        data: LabelledData[Any],
        lengths: tuple[Sequence[int], Sequence[int]],
        limits: tuple[int, int],
        counted: Sequence[Counted | None],
    ) -> TextReport:
        """The data report. ``lengths`` in tokens of training and test texts, ``limits`` of a text and of the base;
        ``counted`` as ``text_facts`` has it."""

    @abstractmethod
    def targets(self, labels: Sequence[Any]) -> torch.Tensor:
        """(rows, …), what the objective needs of each label."""

    def has_few(self, rows: int) -> bool:  # noqa: ARG002 - a kind that has no way for few
        """Whether so many training rows are trained on as ``few_rows`` says; by default never."""
        return False

    @property
    @abstractmethod
    def solver(self) -> HeadSolver:
        """How the head is solved on features."""

    @abstractmethod
    def untrained(self, train: torch.Tensor, targets: torch.Tensor, test: torch.Tensor) -> torch.Tensor:
        """Outputs (test rows, outputs) that one gets from frozen features without training, as ``base_note`` says.

        Shapes: train (rows, features), targets (rows, …), test (test rows, features).
        """

    @abstractmethod
    def scored(self, rows: LabelledText[Any], outputs: torch.Tensor) -> Scored:
        """The score of outputs (rows, outputs) for rows, of which there may be none."""

    def asked(self: AnyTarget, data: LabelledData[Any], settings: TrainSettings) -> AnyTarget:  # noqa: ARG002
        """The task with what the settings ask of it for these training rows; by default nothing. ``SettingError``."""
        return self

    def undecided(self) -> str:
        """What of ``settled`` did not come about as it was asked for, a sentence; empty where nothing."""
        return ""

    def settled(self: AnyTarget, model: Any, rows: TrainedRows) -> AnyTarget:  # noqa: ARG002
        """The task with what is chosen after training, such as thresholds, on rows that weights were not fitted to; and
        the trained ``model``'s head with what belongs there, such as the numbers' own unit. By default nothing is."""
        return self

    def check_held_out(self, targets: torch.Tensor) -> None:
        """``SettingError`` where rows with these targets are too few to choose by what the settings ask for."""

    @property
    def own_columns(self) -> tuple[str, ...]:
        """The columns to score that are known by the adapter; none where they are found as in training."""
        return ()

    @property
    def label_form(self) -> str | None:
        """How labels are written (``LabelReading.form``); None: as the rows to score show."""
        return None

    def with_own_labels(self, rows: LabelledText[Any]) -> LabelledText[Any]:
        """The rows to score, with each label as the task spells it; one that it does not know stays as it is."""
        return rows

    # ------------------------------------------------------------------------------------------------------ from data

    @classmethod
    def on(
        cls: type[AnyTarget],
        base: Base,
        labels: Sequence[str],
        max_length: int | None,
        virtual_tokens: int,
        pooling: Pooling | None = None,
        **own: Any,
    ) -> AnyTarget:
        """The task on a base; ``max_length`` None is all that the base takes beside ``virtual_tokens``; ``own`` are the
        kind's further fields."""
        marks = base.tokenizer.num_special_tokens_to_add()
        length = text_length(base, max_length, virtual_tokens, marks)
        return cls(base, tuple(labels), length, pooling or base.pooling, **own)

    @property
    def reads_pairs(self) -> bool:
        """As ``pairs`` says."""
        return bool(self.pairs)

    def of_pairs(self: AnyTarget) -> AnyTarget:
        """The same for pairs of texts. ``SettingError`` where ``max_length`` has no room for a token of each."""
        marks = self.tokenizer.num_special_tokens_to_add(pair=True)
        if self.max_length < marks + 2:
            raise SettingError(
                f"{marks} tokens mark start and end of two texts.",
                setting="max_length",
                given=self.max_length,
                allowed=f"at least {marks + 2}",
            )
        return replace(self, pairs=True)

    @classmethod
    def prepare(cls, settings: TrainSettings, method: TrainingSettings, base: Base, report: Reporter) -> TaskRun:
        """Labelled rows, tokenised and split."""
        from capotune.tasks.text_targets.run import TextTargetRun

        return TextTargetRun(cls, settings, method, base, report)

    @classmethod
    def inspect(cls, settings: TrainSettings, method: TrainingSettings, base: Base, report: Reporter) -> None:
        """Labelled rows, of which enough are tokenised to say how long they are."""
        from capotune.tasks.text_targets.run import inspect_rows

        inspect_rows(cls, settings, method, base, report)

    def token_lengths(self, texts: Sequence[Text]) -> list[int]:
        """Length of each text, or of each pair, in tokens before cutting."""
        return [len(ids) for ids in self._ids(texts, truncation=False)]

    def encode(self, texts: Sequence[Text], where: Callable[[int], str] | None = None) -> list[list[int]]:
        """Token ids of each text, cut at ``max_length``; of a pair the longer text is cut first.

        Two texts are put together as the base's tokenizer does it; where that puts nothing between them, the second
        begins with a line break. On a base that reads token types they are ``TypedTokens``.

        ``where`` gives the place of a text by its position, for messages (``LabelledText.where``). Raises ``DataError``
        for a text of which no token comes, and for one with a token that the base has no embedding for.
        """
        found = list(self._ids(texts, truncation=True, max_length=self.max_length))
        self.check(found, texts, where)
        return found

    def encode_many(self, texts: Sequence[Text]) -> tuple[TokenLists | TypedLists, list[int]]:
        """The same of any number of texts, unchecked, and their lengths before cutting; each is tokenised once, but
        those that are cut."""
        lengths: list[int] = []

        def cut() -> Iterator[Any]:
            for text, ids in zip(texts, self._ids(texts, truncation=False), strict=True):
                lengths.append(len(ids))
                too_long = len(ids) > self.max_length
                yield next(self._ids([text], truncation=True, max_length=self.max_length)) if too_long else ids

        return (TypedLists if self.reads_token_types else TokenLists).of(cut()), lengths

    def check(
        self, found: Sequence[list[int]], texts: Sequence[Text], where: Callable[[int], str] | None = None
    ) -> None:
        """Raise the ``DataError``s of ``encode`` for the ids ``found`` of ``texts``."""

        def place(at: int) -> str:
            return where(at) if where else f"text {at + 1} of {len(texts)}"

        for at, ids in enumerate(found):
            if not ids:
                raise DataError(
                    f"the base's tokenizer makes no token of the text {quoted(texts[at])}.",
                    where=place(at),
                    advice="Remove it.",
                )
        for at, ids in enumerate(found):
            self.base.check_tokens(ids, place(at))

    def _ids(self, texts: Sequence[Text], **options: Any) -> Iterator[list[int]]:
        """Of each text or pair, some thousand at a time."""
        for start in range(0, len(texts), _AT_ONCE):
            some = texts[start : start + _AT_ONCE]
            first = [text if isinstance(text, str) else text[0] for text in some]
            second = [self._second(text[1]) for text in some if not isinstance(text, str)]
            typed = bool(second) and self.base.reads_token_types
            lean = {"verbose": False, "return_attention_mask": False, "return_token_type_ids": typed}
            found = tokens_of(self.tokenizer, first, text_pair=second or None, **lean, **options)
            if typed:
                yield from map(TypedTokens, found["input_ids"], found["token_type_ids"])
            else:
                yield from map(list, found["input_ids"])

    def _second(self, text: str) -> str:
        return text if self.base.parts_pairs else f"\n{text}"

    # --------------------------------------------------------------------------------------------------------- the head

    def put_head(self, loaded: Any, method: Method) -> tuple[Any, str]:
        """A ``SequenceClassifier``."""
        layers = method.feature_layers or readable_layers(inner_states(loaded), self.base.hidden_size)
        model = SequenceClassifier(loaded, self.pooling, len(self.labels), layers, self.problem_type)
        return model, model.text_part

    def prompt_attached(self, model: Any, virtual_tokens: int) -> None:
        """Pooling leaves a soft prompt's positions out."""
        model.virtual_tokens = virtual_tokens

    def logits(
        self,
        assembled: Assembled,
        rows: TokenRows,
        cache: ActivationCache | None = None,
        progress: OnProgress | None = None,
    ) -> torch.Tensor:
        """Outputs (rows, outputs) on the CPU, in the order of the rows; ``cache`` may hold the head's features."""
        return logits_of(assembled, rows, cache, progress)

    # --------------------------------------------------------------------------------------------- to and from adapters

    def record(self, model: Any) -> dict[str, Any]:
        """Labels, pooling, layers and length, as stored beside an adapter, and the kind's further fields."""
        return {
            "task": self.name,
            "labels": list(self.labels),
            "pooling": self.pooling,
            "max_length": self.max_length,
            "feature_layers": list(model.feature_layers),
            "pairs": bool(self.pairs),
            **self.own(),
        }

    def graph_facts(self) -> dict[str, Any]:
        """The kind of target, by Transformers' name, and the kind's further fields."""
        return {"problem_type": self.problem_type, **self.own()}

    def own(self) -> dict[str, Any]:
        """The kind's further fields, for the record."""
        return {}

    @classmethod
    def restore(cls: type[AnyTarget], base: Base, record: dict[str, Any]) -> AnyTarget:
        """The task of a stored adapter."""
        task = cls.on(base, record["labels"], record["max_length"], 0, record["pooling"], **cls.own_of(record))
        return task.of_pairs() if record.get("pairs") else task

    @classmethod
    def own_of(cls, record: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG003
        """The kind's further fields, from the record."""
        return {}

    def rows_to_compare(self, data: Any, count: int) -> list[Encoded]:
        """Texts; their labels are not looked at."""
        rows = self.reading.read_to_score(data)
        self.check_form(rows)
        return without_loss(self.encode(rows.texts[:count]))

    def golden_logits(self, assembled: Assembled, text: str) -> torch.Tensor:
        """(distributions, choices), of the one text; of pairs those of the text beside itself."""
        ids = self.encode([(text, text) if self.pairs else text])
        return self.distributions(self.logits_of_ids(assembled, ids))

    def logits_of_ids(self, assembled: Assembled, sequences: list[list[int]]) -> torch.Tensor:
        """(rows, outputs)."""
        return self.logits(assembled, TokenRows(sequences, self.pad_id, assembled.method.virtual_token_ids))

    def evaluate(self, assembled: Assembled, settings: EvaluateSettings, report: Reporter) -> Scored:
        """The scores of a run. ``DataError`` for a label that the adapter does not know."""
        rows = self._rows_to_score(settings)
        self.check_form(rows)
        rows = self.with_own_labels(rows)
        self._check_known(rows)
        for text in lost_texts(rows, self.token_lengths(rows.texts), self.max_length):
            report(Warned(text=text))
        return score_texts(assembled, rows, progress=counter(report))

    def _rows_to_score(self, settings: EvaluateSettings) -> LabelledText[Any]:
        return self.reading.read_to_score(
            settings.data,
            text_column=settings.text_column,
            label_column=settings.label_column,
            label_columns=settings.label_columns or (None if settings.label_column else self.own_columns),
            pair_columns=settings.pair_columns,
            form=self.label_form,
        )

    def _check_known(self, rows: LabelledText[Any]) -> None:
        """``DataError`` for the first label that is not one of the task's."""
        for row, label in enumerate(rows.labels):
            new = next((name for name in self.reading.names(label) if name not in self.labels), None)
            if new is not None:
                raise DataError(
                    f"the label {quoted(new)} is not one the adapter knows.{nearest(new, self.labels)}",
                    advice=f"It knows: {shorten(self.labels)}.",
                    where=rows.where(row),
                )

    def check_form(self, rows: LabelledText[Any]) -> None:
        """``DataError`` for pairs where single texts were trained on, and the reverse."""
        if self.pairs is None or self.pairs == (rows.second_column is not None):
            return
        if self.pairs:
            problem = f"one text a row ({quoted(rows.text_column)}), and the adapter reads pairs of texts."
            advice = "Name the two columns with `pair_columns`."
        else:
            problem = f"pairs of texts ({shorten(rows.pair_columns or ())}), and the adapter reads one text."
            advice = "Name the one to read with `text_column`."
        raise DataError(problem, where=rows.where(0), advice=advice)

    # ------------------------------------------------------------------------------------------------------------ words

    @classmethod
    def example(cls, record: Mapping[str, Any]) -> tuple[str, str]:
        """Of pairs both texts."""
        if record.get("pairs"):
            return '"first text" "second text"', '("first text", "second text")'
        return super().example(record)

    @classmethod
    def facts(cls, record: dict[str, Any]) -> dict[str, Any]:
        """Labels, pooling and length."""
        return {name: record[name] for name in ("labels", "pooling", "max_length")} | {
            "pairs": record.get("pairs", False)
        }

    @classmethod
    def facts_in_words(cls, facts: dict[str, Any]) -> list[tuple[str, str]]:
        """The first labels, and what is read of a text."""
        labels = facts["labels"]
        return [
            ("labels", f"{len(labels)}: {', '.join(labels[:12])}{', …' if len(labels) > 12 else ''}"),
            (
                "pairs of texts" if facts["pairs"] else "text",
                f"up to {facts['max_length']} tokens, {facts['pooling']} pooling",
            ),
        ]


def as_choices(outputs: torch.Tensor) -> torch.Tensor:
    """Logits of a no and a yes for each output by itself: (rows, outputs) → (rows·outputs, 2)."""
    return torch.stack([torch.zeros_like(outputs), outputs], -1).flatten(0, 1)


def first_labels(record: Mapping[str, Any], most: int = 20) -> str:
    """The names of the outputs, for a card."""
    labels = record["labels"]
    more = f" and {len(labels) - most} more" if len(labels) > most else ""
    return f"{', '.join(labels[:most])}{more}"
