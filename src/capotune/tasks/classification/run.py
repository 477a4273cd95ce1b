"""A run that trains on labels: solve the head on what the start model computes, then train in steps the rest."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

import torch

from capotune.adapters.assemble import Assembled
from capotune.data.batches import TokenRows
from capotune.data.inspect.labels import inspect_data
from capotune.data.labelled import LabelledData, load_labelled
from capotune.data.split import hold_out, normalised
from capotune.engine.activation_cache import ActivationCache
from capotune.engine.recorded import Recording
from capotune.evaluation.forward import Examples
from capotune.evaluation.metrics import nearest_mean_logits, wilson_interval
from capotune.events import DataInspected, Reporter, Stage, Warned, counter
from capotune.models.base import Base
from capotune.settings import TrainingSettings, TrainSettings
from capotune.tasks.base import Fitted, Scored, TaskRun, held_out_fraction
from capotune.tasks.classification.features import all_features
from capotune.tasks.classification.score import right_or_wrong, score_texts
from capotune.tasks.classification.task import Classification
from capotune.tasks.prompt_start import prompt_tokens
from capotune.tasks.solved_head import Units, solve_head, train_from


class ClassificationRun(TaskRun):
    """Labelled text, tokenised and split."""

    task: Classification

    def __init__(self, settings: TrainSettings, method: TrainingSettings, base: Base, report: Reporter) -> None:
        self.seed = settings.seed
        self.data = data = load_labelled(
            settings.data,
            test=settings.test,
            text_column=settings.text_column,
            label_column=settings.label_column,
            test_fraction=settings.test_fraction,
            seed=settings.seed,
        )
        self.task = task = Classification.on(base, data.label_names, settings.max_length, method.virtual_tokens)
        lengths = task.token_lengths(data.train.texts), task.token_lengths(data.test.texts)
        found = inspect_data(data, *lengths, task.max_length, base.max_length)
        report(DataInspected(task=task.name, report=asdict(found)))
        for notice in _notices(task, lengths[0]):
            report(Warned(text=notice))
        self.targets = task.targets(data.train.labels)
        fraction = held_out_fraction(settings.validation_fraction, len(self.targets))
        groups = [normalised(text) for text in data.train.texts]  # equal texts must not stand on both sides
        fit, held = hold_out(self.targets.tolist(), fraction, settings.seed, groups)
        self.fit_rows, self.held_rows = torch.as_tensor(fit), torch.as_tensor(held)
        rows = TokenRows(task.encode(data.train.texts, data.train.where), task.pad_id)
        self.train = Examples(rows, self.targets, where=data.train.where)
        self.train_rows = len(data.train)
        self.data_sha256 = _data_hash(data)
        self._features: torch.Tensor | None = None

    def start_tokens(self, method: TrainingSettings) -> list[int]:
        """The label names' tokens, those of a text, or all that occur."""
        return prompt_tokens(self.task.tokenizer, self.task.labels, method, self.train.rows.sequences)

    def score_base(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> Scored:
        """Nearest class mean on the last layer's features."""
        task, test = self.task, self.data.test
        if not len(test):
            return Scored("accuracy", {}, {}, 0)
        hidden, targets = assembled.model.width_of((-1,)), task.targets(test.labels)
        rows = TokenRows(task.encode(test.texts, test.where), task.pad_id)
        train_features = all_features(assembled, self.train.rows, cache, counter(report), reduced=True)[:, -hidden:]
        test_features = all_features(assembled, rows, cache, counter(report))[:, -hidden:]
        logits = nearest_mean_logits(train_features, self.targets, test_features, len(task.labels))
        accuracy = float((logits.argmax(1) == targets).float().mean())
        interval = wilson_interval(accuracy, len(targets))
        counts = right_or_wrong(logits, targets)
        return Scored("accuracy", {"accuracy": accuracy}, {"accuracy": interval}, len(targets), counts=counts)

    def before_attach(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> None:
        """The features, when the method leaves them equal: to the bit, whoever filled the cache."""
        if assembled.method.identity_at_start:
            self._features = self._start_features(assembled, cache, report)

    def fit(
        self,
        recording: Recording,
        assembled: Assembled,
        cache: ActivationCache,
        report: Reporter,
    ) -> Fitted:
        """Solve the head on what the start model computes; train in steps when the method has weights of its own."""
        self.train = self.train.after(assembled.method.virtual_token_ids)
        features = self._features if self._features is not None else self._start_features(assembled, cache, report)
        self._features = None
        fit, held, targets = self.fit_rows, self.held_rows, self.targets
        units = Units(features, targets, fit, held, len(self.task.labels))
        objective = self.task.objective
        solved = solve_head(assembled, units, lambda logits: objective.score(logits, targets[held]), report)
        del features, units
        if solved.unfinished is None:
            return solved.fitted()
        rows = self.train.take(fit), self.train.take(held)
        return train_from(solved, recording, assembled, rows, cache=cache, seed=self.seed, report=report)

    def test(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> Scored:
        """Accuracy, macro F1 and loss."""
        return score_texts(assembled, self.data.test, cache, counter(report))

    def _start_features(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> torch.Tensor:
        """The training rows' features, for solving the head."""
        report(Stage(text="computing features"))
        features = all_features(assembled, self.train.rows, cache, counter(report), reduced=True)
        if not features.isfinite().all():
            raise self.task.base.error("it computes infinite values or NaN. Are its weights whole?")
        return features


def _notices(task: Classification, lengths: list[int]) -> list[str]:
    """Where sentence-transformers would make other vectors of the training texts."""
    files = task.base.sentence_files
    longest = files.longest
    longer = sum(length > longest for length in lengths) if longest is not None and longest < task.max_length else 0
    if not longer:
        return files.notices
    return [
        *files.notices,
        f"{longer} of {len(lengths)} training texts are longer than the {longest} tokens that sentence-transformers "
        f"reads (sentence_bert_config.json); here up to {task.max_length} are read.",
    ]


def _data_hash(data: LabelledData) -> str:
    content = [data.train.texts, data.train.labels, data.test.texts, data.test.labels]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
