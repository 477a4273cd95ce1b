"""A run that learns labels: solve the head on what the start model computes, then train in steps what else there is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict

import torch

from capotune.adapters.assemble import Assembled, classification_task, readable_layers
from capotune.data.batches import TokenRows
from capotune.data.inspect.labels import inspect_data
from capotune.data.labelled import LabelledData, load_labelled
from capotune.data.split import hold_out, normalised
from capotune.engine.activation_cache import ActivationCache
from capotune.engine.linear_head import LinearHead, choose_regularization, solve
from capotune.engine.loop import Examples, TrainingState, predict_logits, start
from capotune.errors import ModelError, SettingError
from capotune.evaluation.metrics import classification_scores, metric, nearest_mean_logits, wilson_interval
from capotune.evaluation.pairs import RowCounts
from capotune.models.load import find, pooling
from capotune.runs.task_run import (
    MOST_HELD_OUT,
    Fitted,
    Reporter,
    TaskRun,
    Tested,
    counter,
    train_in_steps,
    with_boundary,
)
from capotune.settings import MethodSettings, PromptTuningSettings, TrainSettings
from capotune.tasks.classification import Classification

_EASY_START = 30.0  # times the best λ: a head that knows the rows by heart leaves the method nothing to learn


class ClassificationRun(TaskRun):
    """Labelled text, tokenised and split."""

    task: Classification

    def __init__(self, settings: TrainSettings, method: MethodSettings, report: Reporter) -> None:
        """Read and check the data, tokenise it for the base, hold rows out, and report what was found."""
        self._refuse_what_is_for_text(settings, method)
        self.data = data = load_labelled(
            settings.data,
            test=settings.test,
            text_column=settings.text_column,
            label_column=settings.label_column,
            test_fraction=settings.test_fraction,
            seed=settings.seed,
        )
        assert settings.model is not None
        self.source = source = find(settings.model)
        virtual = (method.num_virtual_tokens or 0) if isinstance(method, PromptTuningSettings) else 0
        labels, longest, trust = tuple(data.label_names), settings.max_length, settings.trust_remote_code
        self.task = task = classification_task(source, labels, pooling(source), longest, virtual, trust)
        lengths = task.token_lengths(data.train.texts), task.token_lengths(data.test.texts)
        found = inspect_data(data, *lengths, task.max_length)
        report({"kind": "data", "task": task.name, "report": asdict(found)})
        targets = task.targets(data.train.labels)
        fraction = min(settings.validation_fraction, MOST_HELD_OUT / len(targets))
        groups = [normalised(text) for text in data.train.texts]  # equal texts must not stand on both sides
        fit, held = hold_out(targets.tolist(), fraction, settings.seed, groups)
        self.fit_rows, self.held_rows = torch.as_tensor(fit), torch.as_tensor(held)
        self.train = Examples(TokenRows(task.encode(data.train.texts, data.train.where), task.pad_id), targets)
        test_rows = TokenRows(task.encode(data.test.texts, data.test.where), task.pad_id)
        self._test = Examples(test_rows, task.targets(data.test.labels))
        self.train_rows = len(data.train)
        self.data_sha256 = _data_hash(data)
        self._features: torch.Tensor | None = None

    @staticmethod
    def _refuse_what_is_for_text(settings: TrainSettings, method: MethodSettings) -> None:
        for name in ("prompt_template", "completion_column"):
            if getattr(settings, name) is not None:
                flag = name.replace("_", "-")
                raise SettingError(f"--{flag} is for text that a model writes; this data has labels. Leave it out.")
        if isinstance(method, PromptTuningSettings) and (method.candidates is not None or method.hard):
            raise SettingError("--candidates and --hard are for text that a model writes; this data has labels.")

    def start_tokens(self, method: MethodSettings) -> list[int]:
        """The label names' tokens, those of ``init_text``, or all that occur."""
        if not isinstance(method, PromptTuningSettings):
            return []
        if method.init == "vocabulary":
            return sorted({token for sequence in self.train.rows.sequences for token in sequence})
        text = method.init_text or ", ".join(label.replace("_", " ") for label in self.task.labels)
        tokens = self.task.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        if not tokens:
            raise SettingError(f"--init-text {text!r}: the tokenizer makes no token of it. Give words.")
        return list(tokens)

    def score_base(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> Tested:  # noqa: ARG002
        """Nearest class mean on the last layer's features."""
        hidden, targets = assembled.architecture.hidden_size, self._test.targets
        assert isinstance(targets, torch.Tensor)
        train_features = _pooled(assembled, self.train.rows, cache)[:, -hidden:]
        test_features = _pooled(assembled, self._test.rows, cache)[:, -hidden:]
        logits = nearest_mean_logits(train_features, self._train_targets, test_features, len(self.task.labels))
        accuracy = float((logits.argmax(1) == targets).float().mean())
        intervals = {"accuracy": wilson_interval(accuracy, len(targets))}
        counts = _right_or_wrong(logits, targets)
        return Tested("accuracy", accuracy, {"accuracy": accuracy}, intervals, len(targets), [], counts)

    def before_attach(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> None:
        """The features, when the method leaves them equal: to the bit, whoever filled the cache."""
        if assembled.method.identity_at_start:
            self._features = self._start_features(assembled, cache, report)

    def fit(
        self,
        settings: TrainSettings,
        assembled: Assembled,
        cache: ActivationCache,
        report: Reporter,
        state: TrainingState | None,
    ) -> Fitted:
        """Solve the head on what the start model computes; train in steps when the method has weights of its own."""
        self._put_prompt_before_rows(assembled)
        features = self._features if self._features is not None else self._start_features(assembled, cache, report)
        self._features = None
        report({"kind": "stage", "text": "solving the head"})
        fit, held, targets = self.fit_rows, self.held_rows, self._train_targets
        labels = len(self.task.labels)
        head, regularization = choose_regularization(features[fit], targets[fit], features[held], targets[held], labels)
        also = {"regularization": regularization}
        if not assembled.method.parameters():
            held_score = float((head.logits(features[held]).argmax(1) == targets[held]).float().mean())
            _set_head(assembled, solve(features, targets, labels, regularization, near=head))
            return Fitted(1.0, 1, held_score, also)
        _set_head(assembled, head)
        unfinished = solve(features[fit], targets[fit], labels, _EASY_START * regularization)
        if state is None:
            # the solved head, in the model now, is the best so far
            state = start(assembled, self.task.score(head.logits(features[held]), targets[held]), settings.seed)
            _set_head(assembled, unfinished)
        del features
        fit_examples, held_examples = (
            with_boundary(self.train.take(rows), assembled, cache, report) for rows in (fit, held)
        )
        state = train_in_steps(
            settings.out, assembled, fit_examples, held_examples, seed=settings.seed, state=state, report=report
        )
        return Fitted(float(state.epoch), state.best_epoch, state.best_score[0], also)

    def test(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> Tested:  # noqa: ARG002
        """Accuracy, macro F1 and loss."""
        targets = self._test.targets
        assert isinstance(targets, torch.Tensor)
        if not len(targets):
            return Tested("accuracy", None, {}, {}, 0, [])
        logits = self._test_logits(assembled, cache)
        scores = classification_scores(logits, targets)
        return Tested(
            "accuracy",
            scores.accuracy,
            {"accuracy": scores.accuracy, "macro_f1": scores.macro_f1, "loss": scores.loss},
            {"accuracy": wilson_interval(scores.accuracy, scores.rows)},
            scores.rows,
            self._predictions(logits),
            _right_or_wrong(logits, targets),
        )

    def _start_features(self, assembled: Assembled, cache: ActivationCache, report: Reporter) -> torch.Tensor:
        """The training rows' features, for solving the head."""
        report({"kind": "stage", "text": "computing features"})
        features = _pooled(assembled, self.train.rows, cache, counter(report))
        if not features.isfinite().all():
            raise ModelError(f"--model {self.source.name}: it computes infinite values or NaN. Are its weights whole?")
        return features

    def _put_prompt_before_rows(self, assembled: Assembled) -> None:
        """A soft prompt's virtual tokens stand before every row from now on."""
        virtual = assembled.method.virtual_token_ids
        self.train, self._test = self.train.after(virtual), self._test.after(virtual)

    @property
    def _train_targets(self) -> torch.Tensor:
        assert isinstance(self.train.targets, torch.Tensor)
        return self.train.targets

    def _test_logits(self, assembled: Assembled, cache: ActivationCache) -> torch.Tensor:
        """(rows, labels); a head on frozen features needs no forward pass when the features are kept."""
        if assembled.method.parameters():
            return predict_logits(assembled, self._test.rows)
        with torch.no_grad():
            features = _pooled(assembled, self._test.rows, cache).to(assembled.model.device)
            logits: torch.Tensor = assembled.model.classifier(features).cpu()
        return logits

    def _predictions(self, logits: torch.Tensor) -> list[dict[str, object]]:
        probabilities, predicted = logits.softmax(1).max(1)
        labels, test = self.task.labels, self.data.test
        rows = zip(test.lines, test.texts, test.labels, predicted.tolist(), probabilities.tolist(), strict=True)
        return [
            {"line": line, "text": text, "label": label, "predicted": labels[number], "probability": round(p, 6)}
            for line, text, label, number, p in rows
        ]


def _pooled(
    assembled: Assembled,
    rows: TokenRows,
    cache: ActivationCache,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """The head's features. Every readable layer is computed and kept, so that all methods share one cache entry."""
    hidden = assembled.architecture.hidden_size
    layers = readable_layers(len(assembled.architecture.blocks), hidden)
    features = cache.pooled(assembled, layers, rows, progress)
    if len(assembled.model.feature_layers) == len(layers):
        return features
    return features[:, -hidden:].clone()  # a copy, so that the other layers' memory is free again


def _right_or_wrong(logits: torch.Tensor, targets: torch.Tensor) -> RowCounts:
    """What each row adds to the accuracy."""
    right = (logits.argmax(1) == targets).long()
    return RowCounts.of(metric("accuracy"), torch.stack([right, torch.ones_like(right)], 1).numpy())


def _set_head(assembled: Assembled, head: LinearHead) -> None:
    with torch.no_grad():
        assembled.model.classifier.weight.copy_(head.weight)
        assembled.model.classifier.bias.copy_(head.bias)


def _data_hash(data: LabelledData) -> str:
    content = [data.train.texts, data.train.labels, data.test.texts, data.test.labels]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
