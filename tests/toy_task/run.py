"""A run that trains on numbers: the head by ridge regression in closed form, then what else the method trains."""

from __future__ import annotations

import hashlib
import json

import torch

from capotune.adapters.assemble import Assembled
from capotune.data.batches import TokenRows
from capotune.data.inspect.measures import lengths_of
from capotune.engine.activation_cache import ActivationCache
from capotune.engine.recorded import Recording, train_recorded, with_boundary
from capotune.engine.state import start
from capotune.evaluation.forward import Examples
from capotune.events import DataInspected, Reporter, Stage, counter
from capotune.settings import TrainingSettings, TrainSettings
from capotune.tasks.base import Fitted, Scored, TaskRun, held_out_fraction
from capotune.tasks.prompt_start import prompt_tokens
from capotune.tasks.text_targets.features import all_features
from toy_task.data import held_out, load
from toy_task.task import Regression, score, scored

_RIDGES = (1.0, 0.1, 0.01, 0.001)


class RegressionRun(TaskRun):
    """Texts with their numbers, tokenised and split."""

    task: Regression

    def __init__(self, task: Regression, settings: TrainSettings, report: Reporter) -> None:
        self.task, self.seed = task, settings.seed
        self.rows, self.test_rows, test_from = load(settings)
        sequences = task.encode(self.rows.texts)
        found = {
            "source": str(self.rows.source), "train_rows": len(self.rows), "test_rows": len(self.test_rows),
            "test_from": test_from, "train_tokens": vars(lengths_of([len(ids) for ids in sequences])),
            "lowest": min(self.rows.numbers), "highest": max(self.rows.numbers),
        }  # fmt: skip
        report(DataInspected(task=task.name, report=found))
        self.targets = torch.tensor(self.rows.numbers)
        self.train = Examples(TokenRows(sequences, task.pad_id), self.targets)
        fraction = held_out_fraction(settings.validation_fraction, len(self.rows))
        self.fit_rows, self.held_rows = map(torch.as_tensor, held_out(self.rows, fraction, settings.seed))
        self.train_rows = len(self.rows)
        content = [self.rows.texts, self.rows.numbers, self.test_rows.texts, self.test_rows.numbers]
        self.data_sha256 = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def start_tokens(self, method: TrainingSettings) -> list[int]:
        """What a soft prompt starts from."""
        return prompt_tokens(self.task.tokenizer, ["score"], method, self.train.rows.sequences)

    def score_base(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> Scored:  # noqa: ARG002
        """The mean of the training rows for everyone."""
        return scored(self.test_rows, self.targets.mean().expand(len(self.test_rows)))

    def fit(self, recording: Recording, assembled: Assembled, cache: ActivationCache, report: Reporter) -> Fitted:
        """Ridge regression on the features, then training in steps when the method has weights of its own."""
        self.train = self.train.after(assembled.method.virtual_token_ids)
        report(Stage(text="computing features"))
        features = all_features(assembled, self.train.rows, cache, counter(report), reduced=True)
        fit, held, objective = self.fit_rows, self.held_rows, self.task.objective
        heads = [_ridge(features[fit], self.targets[fit], ridge) for ridge in _RIDGES]
        scores = [
            objective.score((features[held] @ weight + bias)[:, None], self.targets[held]) for weight, bias in heads
        ]
        best = max(range(len(heads)), key=lambda number: scores[number])
        if not assembled.method.parameters():
            _set_head(assembled, _ridge(features, self.targets, _RIDGES[best]))
            return Fitted(1.0, 1, objective.shown(scores[best]))
        _set_head(assembled, heads[best])
        state = recording.state or start(assembled, scores[best], self.seed)
        examples = with_boundary([self.train.take(rows) for rows in (fit, held)], assembled, cache, report)
        state = train_recorded(recording, assembled, *examples, seed=self.seed, state=state, report=report)
        return Fitted(float(state.epoch), state.best_epoch, objective.shown(state.best_score))

    def test(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> Scored:
        """The mean absolute error."""
        return score(assembled, self.test_rows, cache, report)


def _ridge(features: torch.Tensor, targets: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (features,) and bias () that minimise mean squared error + ridge·‖weight‖²·variance."""
    mean, middle = features.mean(0), targets.mean()
    x, y = (features - mean).double(), (targets - middle).double()
    square = x.t() @ x / len(x)
    weight = torch.linalg.solve(square + ridge * square.diagonal().mean() * torch.eye(len(square)), x.t() @ y / len(x))
    return weight.float(), middle - weight.float() @ mean


@torch.no_grad()
def _set_head(assembled: Assembled, head: tuple[torch.Tensor, torch.Tensor]) -> None:
    assembled.model.classifier.weight.copy_(head[0][None])
    assembled.model.classifier.bias.copy_(head[1][None])
