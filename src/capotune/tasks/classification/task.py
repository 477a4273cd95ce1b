"""Classification as a task: one label for one text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pydantic
import torch

from capotune import methods
from capotune.adapters.assemble import Assembled
from capotune.adapters.files import WEIGHTS
from capotune.adapters.store import StoredAdapter
from capotune.adapters.task_model import CardWords
from capotune.data.labelled import LabelledData, LabelledText
from capotune.data.suspects import LabelCheck
from capotune.engine.activation_cache import ActivationCache
from capotune.errors import AdapterError
from capotune.evaluation.abstaining import sure_enough
from capotune.evaluation.calibration import fit_temperature
from capotune.evaluation.metrics import metric, nearest_mean_logits
from capotune.events import Reporter
from capotune.methods.base import Method
from capotune.models.base import Base
from capotune.sections import Section
from capotune.settings import DataSettings, TrainSettings
from capotune.tasks.base import Scored, untested
from capotune.tasks.classification import page
from capotune.tasks.classification.asked import (
    check_enough_held_out,
    check_enough_out_of_scope,
    check_scope,
    label_weights,
    why_macro_f1,
)
from capotune.tasks.classification.facade import Classifier
from capotune.tasks.classification.objective import SkewedCrossEntropy
from capotune.tasks.classification.scope import ScopedHead, scoped
from capotune.tasks.classification.score import scored
from capotune.tasks.solved_head import ClassSolver
from capotune.tasks.text_targets.classes import ClassesTask
from capotune.tasks.text_targets.few_rows import are_few
from capotune.tasks.text_targets.objective import RowCrossEntropy
from capotune.tasks.text_targets.task import TextTargetRecord, TrainedRows, first_labels

_CHOSEN = ("metric", "temperature", "min_precision", "threshold", "out_of_scope", "known")


class _Record(TextTargetRecord):
    metric: str = "accuracy"
    temperature: float = pydantic.Field(default=1.0, gt=0, allow_inf_nan=False)
    min_precision: float | None = None
    threshold: float | None = None
    out_of_scope: str | None = None
    known: pydantic.NonNegativeInt = 0

    @pydantic.model_validator(mode="after")
    def _scope_is_a_label(self) -> _Record:
        if self.out_of_scope is None and self.known:
            raise ValueError("out_of_scope is missing, and the head knows what is out of scope")
        if self.out_of_scope is not None and self.out_of_scope not in self.labels:
            raise ValueError("out_of_scope is none of the labels")
        return self


@dataclass(frozen=True)
class Classification(ClassesTask):
    """The task: its labels and lengths. A target is a position in ``labels``."""

    metric: str = "accuracy"
    """The score that techniques are compared by."""
    metric_why: str = ""
    """Why, a sentence, where it is another one than accuracy."""
    weights: tuple[float, ...] = ()
    """Of each label's training rows; empty: 1 for each."""
    min_precision: float | None = None
    """The share of given labels that must be right; None: every text gets a label."""
    temperature: float = 1.0
    """What logits were divided by, so that probabilities are calibrated; the head's weights hold it already."""
    threshold: float | None = None
    """The probability from which on a label is given; None: every text gets one."""
    out_of_scope: str | None = None
    """The label of texts that belong to no other."""
    known: int = 0
    """How many vectors the head knows, by which it tells them; 0 before training."""

    name: ClassVar[str] = "classification"
    title: ClassVar[str] = "labelled text"
    gives: ClassVar[str] = "gives labels and writes no text"
    base_note: ClassVar[str] = (
        "Each test row gets the label whose training rows have the nearest mean, in the frozen base's features; "
        "nothing is trained."
    )
    data_settings: ClassVar[frozenset[str]] = ClassesTask.data_settings | {
        "class_weights",
        "min_precision",
        "out_of_scope",
    }
    of_the_head: ClassVar[frozenset[str]] = ClassesTask.of_the_head | {"metric", "temperature"}
    of_the_answer: ClassVar[frozenset[str]] = ClassesTask.of_the_answer | {
        "min_precision",
        "threshold",
        "out_of_scope",
        "known",
    }
    validation_fraction: ClassVar[float | None] = None
    Record = _Record

    @property
    def objective(self) -> RowCrossEntropy:  # type: ignore[override]
        """Cross-entropy of a row's label."""
        return (SkewedCrossEntropy if self.metric == "macro_f1" else RowCrossEntropy)(self.weights)

    # ------------------------------------------------------------------------------------------------------ from data

    @classmethod
    def recognises(cls, settings: DataSettings) -> bool:  # noqa: ARG003
        """What no other task takes."""
        return True

    def asked(self, data: LabelledData[str], settings: TrainSettings) -> Classification:
        """With the score to compare by, weights, and the precision that labels are to have."""
        rows, why = data.train.labels, why_macro_f1(data.train.labels)
        if settings.out_of_scope is not None:
            check_scope(settings.out_of_scope, self.labels, str(data.train.source))
        return replace(
            self,
            metric="accuracy" if why is None else "macro_f1",
            metric_why=why or "",
            weights=tuple(label_weights(settings.class_weights, self.labels, rows)),
            min_precision=settings.min_precision,
            out_of_scope=settings.out_of_scope,
        )

    def check_held_out(self, targets: torch.Tensor) -> None:
        """Enough to show a precision, and enough that are out of scope."""
        if self.min_precision is not None:
            check_enough_held_out(self.min_precision, len(targets))
        if self.out_of_scope is not None:
            check_enough_out_of_scope(self.out_of_scope, int((targets == self.labels.index(self.out_of_scope)).sum()))

    @classmethod
    def find_wrong_labels(
        cls,
        settings: TrainSettings,
        base: Base,
        load: Callable[[Any], tuple[Assembled, ActivationCache]],
        report: Reporter,
    ) -> LabelCheck:
        """By heads on frozen features that have not seen the label."""
        from capotune.tasks.classification.label_check import check_labels

        return check_labels(settings, base, load, report)

    # --------------------------------------------------------------------------------------------- the head, and asking

    def has_few(self, rows: int) -> bool:
        """Whether a label has few, and nothing is asked for that is chosen on held-out rows or weighs them."""
        asked = self.weights or self.min_precision is not None or self.out_of_scope is not None
        return not asked and are_few(rows, len(self.labels))

    @property
    def solver(self) -> ClassSolver:
        """Multinomial logistic regression."""
        return ClassSolver(len(self.labels), self.weights)

    def untrained(self, train: torch.Tensor, targets: torch.Tensor, test: torch.Tensor) -> torch.Tensor:
        """Similarity to each label's mean."""
        return nearest_mean_logits(train, targets, test, len(self.labels))

    def scored(self, rows: LabelledText[str], outputs: torch.Tensor) -> Scored:
        """Accuracy, macro F1, loss and calibration; of a task that abstains how often, and how often it is right."""
        return scored(self, rows, outputs)

    def settled(self, model: Any, rows: TrainedRows) -> Classification:
        """The temperature is divided out of the head: whoever reads it, in whatever program, has calibrated
        probabilities. Then the head learns what is out of scope, and from which probability on a label is given."""
        logits, targets = rows.held_outputs(), rows.targets[rows.held]
        temperature = fit_temperature(logits, targets)
        logits = logits / temperature
        with torch.no_grad():
            for weight in model.classifier.parameters():
                weight /= temperature
        known, threshold = 0, None
        if self.out_of_scope is not None:
            outside = self.labels.index(self.out_of_scope)
            model.classifier, logits = scoped(model.classifier, outside, model.width_of((-1,)), rows, logits)
            known = len(model.classifier.known)
        if self.min_precision is not None:
            probability, predicted = logits.softmax(1).max(1)
            threshold = sure_enough(probability, predicted == targets, self.min_precision)
        return replace(self, temperature=temperature, threshold=threshold, known=known)

    def undecided(self) -> str:
        """That no threshold is precise enough."""
        if self.min_precision is None or self.threshold is not None:
            return ""
        return (
            f"of the held-out rows, however sure the adapter is of them, fewer than {self.min_precision:.4g} are "
            "labelled rightly: every text gets a label. Ask for less `min_precision`, or train longer."
        )

    def put_head(self, loaded: Any, method: Method) -> tuple[Any, str]:
        """A ``SequenceClassifier``; where it was settled what is out of scope, with a ``ScopedHead``."""
        model, path = super().put_head(loaded, method)
        if self.known and self.out_of_scope is not None:
            outside = self.labels.index(self.out_of_scope)
            model.classifier = ScopedHead(model.classifier, outside, self.known, model.width_of((-1,)))
        return model, path

    def expected_head(self, model: Any) -> int:
        """(features + 1)·labels; of a ``ScopedHead`` also the vectors that it knows, and 3."""
        scope = self.known * int(model.width_of((-1,))) + 3 if self.known else 0
        return super().expected_head(model) + scope

    @classmethod
    def check_tensors(cls, stored: StoredAdapter) -> None:
        """A row of the head for each label, and as many known vectors as the record says."""
        super().check_tensors(stored)
        known = stored.record.get("known", 0)
        found = stored.tensors.get(methods.get(stored.settings.method).key_prefix + "classifier.known")
        if known != (0 if found is None else len(found)):
            raise AdapterError(
                f"the record says that the head knows {known} vectors, and {0 if found is None else len(found)} are "
                "stored.",
                where=str(stored.folder / WEIGHTS),
            )

    @classmethod
    def check_combines(cls, first: dict[str, Any], other: dict[str, Any]) -> list[str]:
        """Heads that know vectors of their own have no mean."""
        if first.get("known") or other.get("known"):
            raise AdapterError(
                "a head that tells what is out of scope knows texts of its own, and cannot be averaged with another.",
                advice="Train one adapter on the rows of both, or hold them side by side: `capotune.load_adapters`.",
            )
        return super().check_combines(first, other)

    def own(self) -> dict[str, Any]:
        """What was chosen."""
        return {name: getattr(self, name) for name in _CHOSEN}

    @classmethod
    def own_of(cls, record: dict[str, Any]) -> dict[str, Any]:
        """The same; an older adapter has none."""
        return {name: record[name] for name in _CHOSEN if name in record}

    @classmethod
    def of_peft(cls, base: Base, stored: StoredAdapter) -> Classification:
        """The task on the family's own classifier."""
        from capotune.tasks.classification.peft import PeftClassification

        return PeftClassification.of_peft(base, stored)

    def facade(self, assembled: Assembled) -> Classifier:
        """A ``Classifier``."""
        return Classifier(assembled)

    # ------------------------------------------------------------------------------------------------------------ words

    @classmethod
    def card(cls, record: dict[str, Any]) -> CardWords:
        """Labels, accuracy and how to predict."""
        trained = record["trained"]
        score, compared = untested(trained, "accuracy"), metric(trained.get("metric") or "accuracy")
        if trained["test_rows"]:
            score = f"Test {compared.words} {trained['score']:.2%} on {trained['test_rows']:,} rows"
        threshold = record.get("threshold")
        abstains = "" if threshold is None else f" {_abstains(record['min_precision'], threshold)}"
        shell, python = cls.example(record)
        what = "two texts that are read together" if record.get("pairs") else "a text"
        return CardWords(
            f"Classifies {what} into {len(record['labels'])} labels: {first_labels(record)}.{abstains}",
            score,
            f"capo predict ADAPTER {shell}",
            f"classifier = capotune.load(adapter)\nclassifier.predict([{python}])",
        )

    @classmethod
    def facts(cls, record: dict[str, Any]) -> dict[str, Any]:
        """Labels, pooling and length, and what was chosen on held-out rows."""
        return super().facts(record) | cls.own_of(record)

    @classmethod
    def facts_in_words(cls, facts: dict[str, Any]) -> list[tuple[str, str]]:
        """The first labels, what is read of a text, how probabilities were calibrated, and when no label is given."""
        lines = super().facts_in_words(facts)
        if "temperature" in facts:
            lines.append(("calibrated", f"by a temperature of {facts['temperature']:.3f}, which the head holds"))
        if facts.get("threshold") is not None:
            lines.append(("abstains", _abstains(facts["min_precision"], facts["threshold"])))
        return lines

    @classmethod
    def further_columns(cls, metric: str, scores: Mapping[str, float]) -> tuple[str, ...]:
        """What is in scope and what is not, apart; coverage and precision of a task that abstains; accuracy where it is
        not the score."""
        wanted = ("accuracy", "in_scope_accuracy", "out_of_scope_recall", "coverage", "answered_precision")
        return tuple(name for name in wanted if name in scores and name != metric)

    @classmethod
    def chance(cls, metric: str, predictions: Sequence[Mapping[str, Any]]) -> tuple[float, str]:
        """What the most frequent label would score for every row."""
        counts = Counter(row["label"] for row in predictions)
        most, rows = max(counts.values(), default=0), max(1, len(predictions))
        if metric == "macro_f1":
            return 2 * most / (rows + most) / max(1, len(counts)), "the most frequent label for every row"
        return most / rows, "the share of the most frequent label"

    @classmethod
    def page_sections(
        cls,
        record: dict[str, Any],
        recommended: str,
        predictions: Mapping[str, Sequence[Mapping[str, Any]]],
        of_base: Sequence[Mapping[str, Any]],  # noqa: ARG003
    ) -> list[Section]:
        """The recommended technique's confusions, surest mistakes, and probabilities."""
        return page.sections(record, recommended, predictions[recommended])


def _abstains(precision: float, threshold: float) -> str:
    return (
        f"A text gets a label where its probability is {threshold:.3f} at least, so that {precision:.4g} of the labels "
        "are right."
    )
