"""Classification as a task: one label for one text, by a linear head on a pooled vector of the backbone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pydantic
import torch
from torch.nn import functional

from capotune.adapters.assemble import Assembled
from capotune.adapters.store import StoredAdapter, StoredRecord
from capotune.adapters.task_model import CardWords, Objective, Score
from capotune.data.batches import Batch, Encoded, Targets, TokenLists, TokenRows, without_loss
from capotune.data.inspect.labels import LabelReport, describe_labels, lost_texts
from capotune.data.labelled import LabelledText, read_to_score, with_known_labels
from capotune.data.wording import quoted, shorten
from capotune.data_blocks import Block
from capotune.engine.activation_cache import ActivationCache
from capotune.errors import DataError
from capotune.events import OnProgress, Reporter, Warned, counter
from capotune.methods.base import Method
from capotune.models.base import Base
from capotune.models.sentence_files import Pooling
from capotune.models.tokenizer_files import tokens_of
from capotune.sections import Section
from capotune.settings import DataSettings, EvaluateSettings, TrainingSettings, TrainSettings, nearest
from capotune.tasks.base import Scored, TaskRun, untested
from capotune.tasks.classification import page
from capotune.tasks.classification.facade import Classifier
from capotune.tasks.classification.model import SequenceClassifier, readable_layers
from capotune.tasks.classification.score import logits_of, score_texts
from capotune.tasks.linear_head import LinearHeadTask, inner_states
from capotune.tasks.room import text_length

_SHOWN_LABELS = 20
_AT_ONCE = 5000  # texts given to the tokenizer together


class RowCrossEntropy(Objective):
    """Cross-entropy of a row's label; held-out rows are scored by accuracy, then by loss."""

    metric: ClassVar[str] = "accuracy"

    def loss(self, model: Any, batch: Batch, label_smoothing: float) -> torch.Tensor:
        """Sum of the rows' cross-entropies in nats."""
        assert batch.targets is not None
        logits = self.outputs(model, batch)
        return functional.cross_entropy(logits, batch.targets, reduction="sum", label_smoothing=label_smoothing)

    def units(self, targets: Targets, rows: list[int]) -> int:  # noqa: ARG002 - a row is a unit, whatever its label
        """The rows."""
        return len(rows)

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """Logits (rows, labels)."""
        logits: torch.Tensor = model.logits(batch)
        return logits

    def score(self, outputs: torch.Tensor, targets: Targets) -> Score:
        """(accuracy, −cross-entropy)."""
        assert isinstance(targets, torch.Tensor)
        accuracy = float((outputs.argmax(1) == targets).float().mean())
        return accuracy, -float(functional.cross_entropy(outputs, targets))

    def shown(self, score: Score) -> float:
        """The accuracy."""
        return score[0]


class _Record(StoredRecord):
    labels: list[str] = pydantic.Field(min_length=1)
    pooling: Pooling
    feature_layers: list[int]


@dataclass(frozen=True)
class Classification(LinearHeadTask):
    """The task: its labels and lengths."""

    base: Base
    labels: tuple[str, ...]
    """Label names; a target is a position in this tuple."""
    max_length: int
    """Longest text in tokens; longer ones are cut."""
    pooling: Pooling

    name: ClassVar[str] = "classification"
    title: ClassVar[str] = "labelled text"
    gives: ClassVar[str] = "gives labels and writes no text"
    base_note: ClassVar[str] = (
        "Each test row gets the label whose training rows have the nearest mean, in the frozen base's features; "
        "nothing is trained."
    )
    peft_task_type: ClassVar[str] = "SEQ_CLS"
    Record = _Record
    objective = RowCrossEntropy()

    @classmethod
    def on(
        cls,
        base: Base,
        labels: Sequence[str],
        max_length: int | None,
        virtual_tokens: int,
        pooling: Pooling | None = None,
    ) -> Classification:
        """The task on a base; ``max_length`` None is all that the base takes beside ``virtual_tokens``."""
        marks = base.tokenizer.num_special_tokens_to_add()
        length = text_length(base, max_length, virtual_tokens, marks)
        return cls(base, tuple(labels), length, pooling or base.pooling)

    # ------------------------------------------------------------------------------------------------------ from data

    @classmethod
    def recognises(cls, settings: DataSettings) -> bool:  # noqa: ARG003
        """What no other task takes."""
        return True

    @classmethod
    def prepare(cls, settings: TrainSettings, method: TrainingSettings, base: Base, report: Reporter) -> TaskRun:
        """Labelled rows, tokenised and split."""
        from capotune.tasks.classification.run import ClassificationRun

        return ClassificationRun(settings, method, base, report)

    @classmethod
    def inspect(cls, settings: TrainSettings, method: TrainingSettings, base: Base, report: Reporter) -> None:
        """Labelled rows, of which enough are tokenised to say how long they are."""
        from capotune.tasks.classification.run import inspect_rows

        inspect_rows(settings, method, base, report)

    def token_lengths(self, texts: Sequence[str]) -> list[int]:
        """Length of each text in tokens before cutting."""
        return [len(ids) for ids in self._ids(texts, truncation=False)]

    def encode(self, texts: Sequence[str], where: Callable[[int], str] | None = None) -> list[list[int]]:
        """Token ids of each text, cut at ``max_length``.

        ``where`` gives the place of a text by its position, for messages (``LabelledText.where``). Raises ``DataError``
        for a text of which no token comes, and for one with a token that the base has no embedding for.
        """
        found = list(self._ids(texts, truncation=True, max_length=self.max_length))
        self.check(found, texts, where)
        return found

    def encode_many(self, texts: Sequence[str]) -> tuple[TokenLists, list[int]]:
        """The same of any number of texts, unchecked, and their lengths before cutting; each is tokenised once, but
        those that are cut."""
        lengths: list[int] = []

        def cut() -> Iterator[list[int]]:
            for text, ids in zip(texts, self._ids(texts, truncation=False), strict=True):
                lengths.append(len(ids))
                too_long = len(ids) > self.max_length
                yield next(self._ids([text], truncation=True, max_length=self.max_length)) if too_long else ids

        return TokenLists.of(cut()), lengths

    def check(
        self, found: Sequence[list[int]], texts: Sequence[str], where: Callable[[int], str] | None = None
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

    def _ids(self, texts: Sequence[str], **options: Any) -> Iterator[list[int]]:
        """Of each text, some thousand at a time."""
        for start in range(0, len(texts), _AT_ONCE):
            some = list(texts[start : start + _AT_ONCE])
            lean = {"verbose": False, "return_attention_mask": False, "return_token_type_ids": False}
            found = tokens_of(self.tokenizer, some, **lean, **options)["input_ids"]
            yield from map(list, found)

    def logits(
        self,
        assembled: Assembled,
        rows: TokenRows,
        cache: ActivationCache | None = None,
        progress: OnProgress | None = None,
    ) -> torch.Tensor:
        """Logits (rows, labels) on the CPU, in the order of the rows; ``cache`` may hold the head's features."""
        return logits_of(assembled, rows, cache, progress)

    def targets(self, labels: Sequence[str]) -> torch.Tensor:
        """(rows,) int64 positions of label names."""
        number = {label: at for at, label in enumerate(self.labels)}
        return torch.tensor([number[label] for label in labels], dtype=torch.long)

    # --------------------------------------------------------------------------------------------------------- the head

    def put_head(self, loaded: Any, method: Method) -> tuple[Any, str]:
        """A ``SequenceClassifier``."""
        layers = method.feature_layers or readable_layers(inner_states(loaded), self.base.hidden_size)
        model = SequenceClassifier(loaded, self.pooling, len(self.labels), layers)
        return model, model.text_part

    def prompt_attached(self, model: Any, virtual_tokens: int) -> None:
        """Pooling leaves a soft prompt's positions out."""
        model.virtual_tokens = virtual_tokens

    # --------------------------------------------------------------------------------------------- to and from adapters

    def record(self, model: Any) -> dict[str, Any]:
        """Labels, pooling, layers and length, as stored beside an adapter."""
        return {
            "task": self.name,
            "labels": list(self.labels),
            "pooling": self.pooling,
            "max_length": self.max_length,
            "feature_layers": list(model.feature_layers),
        }

    @classmethod
    def restore(cls, base: Base, record: dict[str, Any]) -> Classification:
        """The task of a stored adapter."""
        return cls.on(base, record["labels"], record["max_length"], 0, record["pooling"])

    def rows_to_compare(self, data: Any, count: int) -> list[Encoded]:
        """Texts; their labels are not looked at."""
        return without_loss(self.encode(read_to_score(data).texts[:count]))

    @classmethod
    def of_peft(cls, base: Base, stored: StoredAdapter) -> Classification:
        """The task on the family's own classifier."""
        from capotune.tasks.classification.peft import PeftClassification

        return PeftClassification.of_peft(base, stored)

    def facade(self, assembled: Assembled) -> Classifier:
        """A ``Classifier``."""
        return Classifier(assembled)

    def golden_logits(self, assembled: Assembled, text: str) -> torch.Tensor:
        """(1, labels)."""
        return self.logits_of_ids(assembled, self.encode([text]))

    def logits_of_ids(self, assembled: Assembled, sequences: list[list[int]]) -> torch.Tensor:
        """(rows, labels)."""
        return self.logits(assembled, TokenRows(sequences, self.pad_id, assembled.method.virtual_token_ids))

    def evaluate(self, assembled: Assembled, settings: EvaluateSettings, report: Reporter) -> Scored:
        """Accuracy, macro F1 and loss. ``DataError`` for a label that the adapter does not know."""
        rows = read_to_score(settings.data, text_column=settings.text_column, label_column=settings.label_column)
        rows = self.with_own_labels(rows)
        self.check_labels(rows)
        for text in lost_texts(rows, self.token_lengths(rows.texts), self.max_length):
            report(Warned(text=text))
        return score_texts(assembled, rows, progress=counter(report))

    def with_own_labels(self, rows: LabelledText) -> LabelledText:
        """The rows with each label as the task spells it; one that it does not know stays as it is."""
        return with_known_labels(rows, self.labels)

    def check_labels(self, rows: LabelledText) -> None:
        """``DataError`` for the first label that is not one of the task's."""
        for row, label in enumerate(rows.labels):
            if label not in self.labels:
                raise DataError(
                    f"the label {quoted(label)} is not one the adapter knows.{nearest(label, self.labels)}",
                    advice=f"It knows: {shorten(self.labels)}.",
                    where=rows.where(row),
                )

    # ------------------------------------------------------------------------------------------------------------ words

    @classmethod
    def describe_data(cls, report: Mapping[str, Any]) -> list[Block]:
        """The report in words, and every label's rows."""
        return describe_labels(pydantic.TypeAdapter(LabelReport).validate_python(report))

    @classmethod
    def card(cls, record: dict[str, Any]) -> CardWords:
        """Labels, accuracy and how to predict."""
        trained, labels = record["trained"], record["labels"]
        shown = ", ".join(labels[:_SHOWN_LABELS])
        more = f" and {len(labels) - _SHOWN_LABELS} more" if len(labels) > _SHOWN_LABELS else ""
        score = untested(trained, "accuracy")
        if trained["test_rows"]:
            score = f"Test accuracy {trained['score']:.2%} on {trained['test_rows']:,} rows"
        return CardWords(
            f"Classifies a text into {len(labels)} labels: {shown}{more}.",
            score,
            'capo predict ADAPTER "your text"',
            'classifier = capotune.load(adapter)\nclassifier.predict(["your text"])',
        )

    @classmethod
    def facts(cls, record: dict[str, Any]) -> dict[str, Any]:
        """Labels, pooling and length."""
        return {name: record[name] for name in ("labels", "pooling", "max_length")}

    @classmethod
    def facts_in_words(cls, facts: dict[str, Any]) -> list[tuple[str, str]]:
        """The first labels, and what is read of a text."""
        labels = facts["labels"]
        return [
            ("labels", f"{len(labels)}: {', '.join(labels[:12])}{', …' if len(labels) > 12 else ''}"),
            ("text", f"up to {facts['max_length']} tokens, {facts['pooling']} pooling"),
        ]

    @classmethod
    def chance(cls, metric: str, predictions: Sequence[Mapping[str, Any]]) -> tuple[float, str]:  # noqa: ARG003
        """The share of the most frequent label."""
        most = max(Counter(row["label"] for row in predictions).values(), default=0)
        return most / max(1, len(predictions)), "the share of the most frequent label"

    @classmethod
    def page_sections(
        cls,
        record: dict[str, Any],
        recommended: str,
        predictions: Mapping[str, Sequence[Mapping[str, Any]]],
        of_base: Sequence[Mapping[str, Any]],  # noqa: ARG003
    ) -> list[Section]:
        """The recommended technique's confusions and surest mistakes."""
        return page.sections(record["labels"], recommended, predictions[recommended])
