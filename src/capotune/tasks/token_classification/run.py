"""A run that trains a tagger: solve the head on the words' states, then train in steps what else there is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace

import torch

from capotune.adapters.assemble import Assembled
from capotune.data.split import hold_out
from capotune.engine.activation_cache import ActivationCache
from capotune.engine.recorded import Recording
from capotune.evaluation.metrics import nearest_mean_logits
from capotune.events import DataInspected, Reporter, Stage, counter
from capotune.models.base import Base
from capotune.settings import TrainingSettings, TrainSettings
from capotune.tasks.base import Fitted, Scored, TaskRun, held_out_fraction
from capotune.tasks.prompt_start import prompt_tokens
from capotune.tasks.solved_head import ClassSolver, SolvedHead, Units, solve_head, train_from
from capotune.tasks.token_classification.data import TaggedData, load_tagged, rarest_types, sentence_groups
from capotune.tasks.token_classification.features import all_features, compute_features, targets_in, words_in
from capotune.tasks.token_classification.inspect import inspect_tags
from capotune.tasks.token_classification.objective import WordCrossEntropy
from capotune.tasks.token_classification.score import of_predictions, score_rows, tags_of
from capotune.tasks.token_classification.task import TokenClassification


class TokenClassificationRun(TaskRun):
    """Tagged sentences, tokenised and split."""

    task: TokenClassification

    def __init__(self, settings: TrainSettings, method: TrainingSettings, base: Base, report: Reporter) -> None:
        self.seed = settings.seed
        self.data = data = load_tagged(
            settings.data,
            test=settings.test,
            word_column=settings.text_column,
            tag_column=settings.label_column,
            test_fraction=settings.test_fraction,
            seed=settings.seed,
        )
        words = sum(map(len, data.train.words))
        self.task = task = TokenClassification.on(base, data.types, settings.max_length, method.virtual_tokens, words)
        train, self.test_aligned = task.align_rows(data.train), task.align_rows(data.test)
        found = inspect_tags(data, train, self.test_aligned, task.max_length, base.max_length)
        report(DataInspected(task=task.name, report=asdict(found)))
        self.train = task.examples(train, data.train.tags)
        self.targets = targets_in(self.train)
        fraction = held_out_fraction(settings.validation_fraction, len(data.train))
        fit, held = hold_out(rarest_types(data.train), fraction, settings.seed, sentence_groups(data.train))
        self.fit_rows, self.held_rows = torch.as_tensor(fit), torch.as_tensor(held)
        self.train_rows = len(data.train)
        self.data_sha256 = _data_hash(data)
        self._features: torch.Tensor | None = None

    def start_tokens(self, method: TrainingSettings) -> list[int]:
        """The types' tokens, those of a text, or all that occur."""
        return prompt_tokens(self.task.tokenizer, self.task.types, method, self.train.rows.sequences)

    def score_base(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> Scored:
        """Nearest class mean of each word's last state."""
        if not len(self.data.test):
            return Scored("f1", {}, {}, 0)
        test = self.task.examples(self.test_aligned, self.data.test.tags)
        hidden = assembled.model.width_of((-1,))
        train_features = all_features(assembled, self.train, cache, counter(report), reduced=True)[:, -hidden:]
        test_features = all_features(assembled, test, cache, counter(report))[:, -hidden:]
        logits = nearest_mean_logits(train_features, self.targets, test_features, len(self.task.labels))
        scored = of_predictions(self.data.test, tags_of(self.task.labels, self.test_aligned, logits), {})
        return replace(scored, predictions=[])

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
        words = torch.tensor(words_in(self.train))
        fit, held = (_words_of(rows, words) for rows in (self.fit_rows, self.held_rows))
        objective = WordCrossEntropy(self.task.labels)

        def held_score(logits: torch.Tensor) -> tuple[float, ...]:
            outputs = objective.of_logits(logits, self.targets[held], words[self.held_rows].tolist())
            return objective.score(outputs, self.train.targets)

        def solve(features: torch.Tensor, *, last: bool) -> SolvedHead:
            units, solver = Units(features, self.targets, fit, held), ClassSolver(len(self.task.labels))
            return solve_head(assembled, units, solver, held_score, report, last=last)

        solved = solve(features, last=not assembled.method.parameters())
        del features
        if solved.unfinished is None:
            return solved.fitted(objective)
        rows = self.train.take(self.fit_rows), self.train.take(self.held_rows)
        fitted = train_from(solved, recording, assembled, rows, cache=cache, seed=self.seed, report=report)
        if not assembled.method.settings.solves_head_again:
            return fitted
        report(Stage(text="computing features"))
        layers = assembled.model.feature_layers
        trained = compute_features(assembled, layers, self.train, counter(report), reduced=True)
        return solve(trained, last=True).after(fitted, objective)

    def test(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> Scored:
        """F1, precision, recall and loss."""
        return score_rows(assembled, self.data.test, cache, counter(report))

    def _start_features(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> torch.Tensor:
        """The training words' features, for solving the head."""
        report(Stage(text="computing features"))
        features = all_features(assembled, self.train, cache, counter(report), reduced=True)
        if not features.isfinite().all():
            raise self.task.base.error("it computes infinite values or NaN. Are its weights whole?")
        return features


def _words_of(rows: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Positions among all words of those of ``rows``, rising as the rows do; ``words`` counts those of every row."""
    row_of_word = torch.repeat_interleave(torch.arange(len(words)), words)
    chosen = torch.zeros(len(words), dtype=torch.bool)
    chosen[rows] = True
    return chosen[row_of_word].nonzero()[:, 0]


def _data_hash(data: TaggedData) -> str:
    content = [data.train.words, data.train.tags, data.test.words, data.test.tags]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
