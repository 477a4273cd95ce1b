"""Regression as a task: one output on the pooled states, squared error, scored by the mean absolute error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from capotune import tasks
from capotune.adapters.assemble import Assembled
from capotune.adapters.task_model import Objective, Score
from capotune.data.batches import Batch, Targets, TokenRows
from capotune.engine.activation_cache import ActivationCache
from capotune.evaluation.metrics import Metric, mean_interval, register
from capotune.evaluation.pairs import RowCounts
from capotune.events import OnProgress, Reporter, counter
from capotune.methods.base import Method
from capotune.models.base import Base
from capotune.models.load import load_backbone
from capotune.settings import DataSettings, EvaluateSettings, TrainingSettings, TrainSettings
from capotune.tasks.base import Scored, Task, TaskRun
from capotune.tasks.facade import Predictor
from capotune.tasks.room import text_length
from capotune.tasks.text_targets.features import all_features, head_features
from capotune.tasks.text_targets.model import SequenceClassifier, readable_layers
from toy_task.data import NumberedText, is_numbered, read_to_score

MAE = register(
    Metric(
        "mae", "mean absolute error", "how far off a number is on average", higher_is_better=False,
        columns=("error", "rows"), from_sums=lambda sums: sums[..., 0] / sums[..., 1].clip(1),
    )
)  # fmt: skip


class SquaredError(Objective):
    """Squared error of a row's number; held-out rows are scored by the mean absolute error."""

    metric: ClassVar[str] = "mae"

    def loss(self, model: Any, batch: Batch, label_smoothing: float) -> torch.Tensor:  # noqa: ARG002
        """Sum of the rows' squared errors."""
        assert batch.targets is not None
        return (self.outputs(model, batch)[:, 0] - batch.targets).square().sum()

    def units(self, targets: Targets, rows: list[int]) -> int:  # noqa: ARG002
        """The rows."""
        return len(rows)

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """Numbers (rows, 1)."""
        numbers: torch.Tensor = model.logits(batch)
        return numbers

    def score(self, outputs: torch.Tensor, targets: Targets) -> Score:
        """(−mean absolute error,)."""
        assert isinstance(targets, torch.Tensor)
        return (-float((outputs[:, 0] - targets).abs().mean()),)

    def shown(self, score: Score) -> float:
        """The mean absolute error."""
        return -score[0]


@tasks.register
@dataclass(frozen=True)
class Regression(Task):
    """The task: how much of a text is read."""

    base: Base
    max_length: int

    name: ClassVar[str] = "toy-numbers"
    title: ClassVar[str] = "texts with a number"
    gives: ClassVar[str] = "gives numbers"
    command: ClassVar[str] = "predict"
    default_models: ClassVar[tuple[str, ...]] = ("minilm",)
    base_label: ClassVar[str] = "the mean of the training rows"
    base_note: ClassVar[str] = "Every test row gets the mean number of the training rows."
    has_head: ClassVar[bool] = True
    peft_task_type: ClassVar[str] = "SEQ_CLS"
    data_settings: ClassVar[frozenset[str]] = frozenset({"text_column"})
    objective = SquaredError()

    @classmethod
    def recognises(cls, settings: DataSettings) -> bool:
        """A number under ``score`` in the first record."""
        return is_numbered(settings)

    @classmethod
    def prepare(cls, settings: TrainSettings, method: TrainingSettings, base: Base, report: Reporter) -> TaskRun:
        """Texts with their numbers, tokenised and split."""
        from toy_task.run import RegressionRun

        longest = text_length(base, settings.max_length, method.virtual_tokens, 2)
        return RegressionRun(cls(base, longest), settings, report)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, cut at ``max_length``."""
        options = {"truncation": True, "max_length": self.max_length, "verbose": False}
        return [list(ids) for ids in self.tokenizer(list(texts), **options)["input_ids"]] if texts else []

    def load_base(self, method: Method, dtype: torch.dtype, progress: OnProgress | None) -> Any:
        """The backbone."""
        return load_backbone(self.base, dtype=dtype, quantization=method.quantization, progress=progress)

    def put_head(self, loaded: Any, method: Method) -> tuple[Any, str]:
        """The classifier of one "label", whose logit is the number."""
        layers = method.feature_layers or readable_layers(loaded.config.num_hidden_layers, self.base.hidden_size)
        model = SequenceClassifier(loaded, self.base.pooling, 1, layers)
        return model, model.backbone_name

    def prompt_attached(self, model: Any, virtual_tokens: int) -> None:
        """Pooling leaves a soft prompt's positions out."""
        model.virtual_tokens = virtual_tokens

    def head_parameters(self, model: Any) -> dict[str, nn.Parameter]:
        """Weight (1, features) and bias (1,)."""
        return {f"classifier.{name}": parameter for name, parameter in model.classifier.named_parameters()}

    def expected_head(self, model: Any) -> int:
        """Features + 1."""
        return int(model.width_of(model.feature_layers)) + 1

    def facade(self, assembled: Assembled) -> Regressor:
        """A ``Regressor``."""
        return Regressor(assembled)

    def evaluate(self, assembled: Assembled, settings: EvaluateSettings, report: Reporter) -> Scored:
        """The mean absolute error."""
        return score(assembled, read_to_score(settings), None, report)


@dataclass(frozen=True)
class Number:
    """One text's number."""

    text: str
    number: float

    def as_line(self) -> str:
        """Number and text, parted by a tab."""
        return f"{self.number:.3f}\t{self.text}"

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"text": self.text, "number": self.number}


class Regressor(Predictor):
    """A base with an adapter on it, ready to give numbers."""

    def answer(self, texts: Sequence[str]) -> list[Number]:
        """The number of each text."""
        numbers = numbers_of(self._assembled, texts).tolist()
        return [Number(text, number) for text, number in zip(texts, numbers, strict=True)]


def numbers_of(
    assembled: Assembled, texts: Sequence[str], cache: ActivationCache | None = None, report: Reporter | None = None
) -> torch.Tensor:
    """(texts,); a head on frozen features needs no forward pass when ``cache`` holds them."""
    progress = counter(report) if report else None
    rows = TokenRows(assembled.task.encode(texts), assembled.task.pad_id, assembled.method.virtual_token_ids)
    if cache is not None and not assembled.method.parameters():
        features = all_features(assembled, rows, cache, progress)
    else:
        features = head_features(assembled, rows, progress)
    with torch.no_grad():
        numbers: torch.Tensor = assembled.model.classifier(features.to(assembled.model.device))[:, 0].cpu()
    return numbers


def score(assembled: Assembled, rows: NumberedText, cache: ActivationCache | None, report: Reporter) -> Scored:
    """The mean absolute error with its interval, and each text's number."""
    return scored(rows, numbers_of(assembled, rows.texts, cache, report)) if len(rows) else Scored("mae", {}, {}, 0)


def scored(rows: NumberedText, numbers: torch.Tensor) -> Scored:
    """Of numbers (rows,)."""
    errors = (numbers.double() - torch.tensor(rows.numbers, dtype=torch.float64)).abs().tolist()
    interval = mean_interval(errors, [1] * len(errors))
    predictions = [
        {"text": text, "score": wanted, "predicted": found, "line": line}
        for text, wanted, found, line in zip(rows.texts, rows.numbers, numbers.tolist(), rows.lines, strict=True)
    ]
    return Scored(
        "mae", {"mae": sum(errors) / len(errors)}, {"mae": interval} if interval else {}, len(rows),
        {"mae": f"{len(rows):,} rows"}, predictions, RowCounts.of(MAE, [[error, 1] for error in errors]),
    )  # fmt: skip
