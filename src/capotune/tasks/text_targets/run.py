"""A run that trains on labelled text: solve the head on what the start model computes, then train in steps the rest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from capotune.adapters.assemble import Assembled
from capotune.data.batches import TokenLists, TokenRows, TypedLists
from capotune.data.inspect.measures import Counted, rows_to_count
from capotune.data.labelled import LabelledData, LabelledText
from capotune.data.split import hold_out, text_numbers
from capotune.engine.activation_cache import ActivationCache
from capotune.engine.recorded import Recording
from capotune.evaluation.forward import Examples
from capotune.events import DataInspected, Reporter, Stage, Warned, counter
from capotune.models.base import Base
from capotune.settings import TrainingSettings, TrainSettings
from capotune.tasks.base import Fitted, Scored, TaskRun, held_out_fraction
from capotune.tasks.prompt_start import prompt_tokens
from capotune.tasks.solved_head import SolvedHead, Units, solve_head, train_from
from capotune.tasks.text_targets.features import all_features, compute_features, head_features
from capotune.tasks.text_targets.few_rows import fit_few
from capotune.tasks.text_targets.score import score_texts
from capotune.tasks.text_targets.task import TextTargetTask, TrainedRows

_HASHED_AT_ONCE = 10_000
_TENTH = 0.1  # of the rows is held out where no setting says it
AnyTask = type[TextTargetTask]


def inspect_rows(
    kind: AnyTask, settings: TrainSettings, method: TrainingSettings, base: Base, report: Reporter
) -> None:
    """Do what a run does before its base is loaded, but of many rows tokenise some."""
    data, task = _read(kind, settings, method, base)
    counted = [rows_to_count(rows.texts, settings.seed) for rows in (data.train, data.test)]
    train, test = (
        rows if some is None else rows.take(some.rows)
        for rows, some in zip((data.train, data.test), counted, strict=True)
    )
    sequences = _tokenised(data, task, train, test, report, counted)
    _, held = _held_out(data, settings, kind)
    task.check_held_out(task.targets(data.train.labels)[held])
    task.check(sequences, train.texts, train.where)


def _read(
    kind: AnyTask, settings: TrainSettings, method: TrainingSettings, base: Base
) -> tuple[LabelledData[Any], TextTargetTask]:
    data = kind.reading.load(
        settings.data,
        test=settings.test,
        text_column=settings.text_column,
        label_column=settings.label_column,
        label_columns=settings.label_columns,
        pair_columns=settings.pair_columns,
        test_fraction=settings.test_fraction,
        seed=settings.seed,
    )
    task = kind.of_data(base, data, settings.max_length, method.virtual_tokens).asked(data, settings)
    return data, task if data.train.second_column is None else task.of_pairs()


def _tokenised(
    data: LabelledData[Any],
    task: TextTargetTask,
    train: LabelledText[Any],
    test: LabelledText[Any],
    report: Reporter,
    counted: Sequence[Counted | None] = (None, None),
) -> TokenLists | TypedLists:
    """Tokenise the training rows, unchecked, and say what the data is; ``counted``: where ``train`` and ``test`` are
    not all of it, which rows they are."""
    sequences, lengths = task.encode_many(train.texts)
    limits = task.max_length, task.base.max_length
    found = task.inspected(data, (lengths, task.token_lengths(test.texts)), limits, counted)
    report(DataInspected(task=task.name, report=asdict(found)))
    for notice in _notices(task, lengths):
        report(Warned(text=notice))
    return sequences


def _held_out(data: LabelledData[Any], settings: TrainSettings, kind: AnyTask) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows to fit and those held out. Equal texts do not stand on both sides."""
    fraction = held_out_fraction(settings.validation_fraction or _TENTH, len(data.train))
    groups = text_numbers(data.train.texts).tolist()
    fit, held = hold_out(kind.reading.strata(data.train.labels), fraction, settings.seed, groups)
    return torch.as_tensor(fit), torch.as_tensor(held)


def _all_in_turn(train: LabelledText[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows are fitted to, and each is held out in turn."""
    every = torch.arange(len(train))
    return every, every


class TextTargetRun(TaskRun):
    """Labelled text, tokenised and split."""

    task: TextTargetTask

    def __init__(
        self, kind: AnyTask, settings: TrainSettings, method: TrainingSettings, base: Base, report: Reporter
    ) -> None:
        self.seed = settings.seed
        self.data, self.task = data, task = _read(kind, settings, method, base)
        train = data.train
        sequences = _tokenised(data, task, train, data.test, report)
        self.targets = task.targets(train.labels)
        self.few_rows = settings.validation_fraction is None and task.has_few(len(train))
        self.fit_rows, self.held_rows = _all_in_turn(train) if self.few_rows else _held_out(data, settings, kind)
        task.check_held_out(self.targets[self.held_rows])
        task.check(sequences, train.texts, train.where)
        self.train = Examples(TokenRows(sequences, task.pad_id), self.targets, where=train.where)
        self.train_rows = len(train)
        self.data_sha256 = _data_hash(data)
        if self.few_rows:
            report(Warned(text=_few_rows_notice(len(train), len(task.labels), method.trains)))
        self._features: torch.Tensor | None = None
        self._held_outputs: torch.Tensor | None = None

    def start_tokens(self, method: TrainingSettings) -> list[int]:
        """The label names' tokens, those of a text, or all that occur."""
        return prompt_tokens(self.task.tokenizer, self.task.labels, method, self.train.rows.sequences)

    def score_base(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> Scored:
        """What the last layer's features give without training; of its scores the compared one."""
        task, test = self.task, self.data.test
        if not len(test):
            return Scored(task.objective.metric, {}, {}, 0)
        hidden = assembled.model.width_of((-1,))
        rows = TokenRows(task.encode(test.texts, test.where), task.pad_id)
        train_features = all_features(assembled, self.train.rows, cache, counter(report), reduced=True)[:, -hidden:]
        test_features = all_features(assembled, rows, cache, counter(report))[:, -hidden:]
        found = task.scored(test, task.untrained(train_features, self.targets, test_features))
        return replace(found, scores={found.metric: found.scores[found.metric]}, predictions=[])

    def before_attach(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> None:
        """The features, when the method leaves them equal: to the bit, whoever filled the cache."""
        if assembled.method.identity_at_start and not self.few_rows:
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
        if self.few_rows:
            fitted, solved = fit_few(recording, assembled, self.train, cache=cache, seed=self.seed, report=report)
            self._held_outputs = solved.held_logits
            return fitted
        features = self._features if self._features is not None else self._start_features(assembled, cache, report)
        self._features = None
        fit, held, objective = self.fit_rows, self.held_rows, self.task.objective
        solved = self._solve_head(assembled, features, report, last=not assembled.method.parameters())
        del features
        if solved.unfinished is None:
            self._held_outputs = solved.held_logits
            return solved.fitted(objective)
        rows = self.train.take(fit), self.train.take(held)
        fitted = train_from(solved, recording, assembled, rows, cache=cache, seed=self.seed, report=report)
        if not assembled.method.settings.solves_head_again:
            return fitted
        report(Stage(text="computing features"))
        trained = compute_features(
            assembled, assembled.model.feature_layers, self.train.rows, counter(report), reduced=True
        )
        solved = self._solve_head(assembled, trained, report, last=True)
        self._held_outputs = solved.held_logits
        return solved.after(fitted, objective)

    def _solve_head(self, assembled: Assembled, features: torch.Tensor, report: Reporter, *, last: bool) -> SolvedHead:
        targets, held, objective = self.targets, self.held_rows, self.task.objective
        units = Units(features, targets, self.fit_rows, held)
        return solve_head(
            assembled,
            units,
            self.task.solver,
            lambda logits: objective.score(logits, targets[held]),
            report,
            last=last,
        )

    def decide(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> Assembled:
        """What the task chooses on the held-out rows' outputs, by weights that were not fitted to them."""

        def held() -> torch.Tensor:
            if self._held_outputs is not None:
                return self._held_outputs
            return self.task.logits(assembled, self.train.take(self.held_rows).rows, cache, counter(report))

        def features(rows: torch.Tensor) -> torch.Tensor:
            return head_features(assembled, self.train.take(rows).rows, counter(report))

        trained = TrainedRows(held, features, self.targets, self.fit_rows, self.held_rows)
        self.task = self.task.settled(assembled.model, trained)
        if text := self.task.undecided():
            report(Warned(text=text))
        return assembled.asking(self.task)

    def test(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> Scored:
        """The task's scores."""
        return score_texts(assembled, self.data.test, cache, counter(report))

    def _start_features(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> torch.Tensor:
        """The training rows' features, for solving the head."""
        report(Stage(text="computing features"))
        features = all_features(assembled, self.train.rows, cache, counter(report), reduced=True)
        if not features.isfinite().all():
            raise self.task.base.error("it computes infinite values or NaN. Are its weights whole?")
        return features


def _few_rows_notice(rows: int, labels: int, contrast: bool) -> str:
    how = "the method trains by contrast between the rows, and the head" if contrast else "the head"
    return (
        f"{rows} rows of {labels} labels are few: none is held out, {how} is solved leaving each row out in turn. "
        "With `validation_fraction` a part is held out as it is of many."
    )


def _notices(task: TextTargetTask, lengths: list[int]) -> list[str]:
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


def _data_hash(data: LabelledData[Any]) -> str:
    """Of all texts and labels, as one JSON list of four lists, which is never whole in memory."""
    total = hashlib.sha256()
    for number, part in enumerate((data.train.texts, data.train.labels, data.test.texts, data.test.labels)):
        total.update(b", [" if number else b"[[")
        for start in range(0, len(part), _HASHED_AT_ONCE):
            total.update((", " if start else "").encode())
            total.update(json.dumps(part[start : start + _HASHED_AT_ONCE])[1:-1].encode())
        total.update(b"]")
    total.update(b"]")
    return total.hexdigest()
