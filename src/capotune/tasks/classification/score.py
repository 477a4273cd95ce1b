"""How well a classifier labels texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from capotune.data.labelled import LabelledText
from capotune.evaluation.abstaining import answered
from capotune.evaluation.calibration import confidence_bins, expected_calibration_error
from capotune.evaluation.metrics import Metric, classification_scores, label_scores, metric, register, wilson_interval
from capotune.evaluation.pairs import RowCounts, score_interval
from capotune.tasks.base import Scored

if TYPE_CHECKING:
    from capotune.tasks.classification.task import Classification

for _metric in (
    Metric(
        "calibration_error", "calibration error", "how far the probability of the predicted label is from the share of "
        "right ones: the mean over 15 parts of the rows, by rising probability (Guo et al. 2017)",
        higher_is_better=False, kind="percentage",
    ),
    Metric(
        "in_scope_accuracy", "in-scope accuracy", "the share of test rows of the other labels whose label is the right "
        "one (Larson et al. 2019)", kind="percentage",
    ),
    Metric(
        "out_of_scope_recall", "out-of-scope recall", "the share of the test rows out of scope that are found to be so "
        "(Larson et al. 2019)", kind="percentage",
    ),
    Metric("coverage", "coverage", "the share of test rows that get a label", kind="percentage"),
    Metric(
        "answered_precision", "precision of labels", "the share of the labels given that are right", kind="percentage"
    ),
):  # fmt: skip
    register(_metric)


def scored(task: Classification, texts: LabelledText[str], logits: torch.Tensor) -> Scored:
    """Accuracy and macro F1 with their intervals, cross-entropy in nats, calibration, each label's scores, and each
    text's prediction; of a task that abstains, coverage and precision. ``logits`` (rows, labels)."""
    targets = task.targets(texts.labels)
    probabilities = logits.softmax(1)
    sure, predicted = probabilities.max(1)
    found, rows = classification_scores(logits, targets), len(targets)
    calibration = _calibration(task.temperature, logits, targets)
    scores = {
        "accuracy": found.accuracy, "macro_f1": found.macro_f1, "loss": found.loss,
        "calibration_error": calibration["error"],
    }  # fmt: skip
    by_label = _by_label(predicted, targets)
    intervals = {"accuracy": wilson_interval(found.accuracy, rows), "macro_f1": score_interval(by_label) or (0.0, 1.0)}
    measured_on = dict.fromkeys(scores, f"{rows:,} rows")
    if task.min_precision is not None:
        given = answered(sure, predicted == targets, task.threshold or 0.0)
        answers = round(given.coverage * rows)
        scores |= {"coverage": given.coverage, "answered_precision": given.precision}
        intervals |= {"coverage": wilson_interval(given.coverage, rows)}
        intervals |= {"answered_precision": wilson_interval(given.precision, answers)} if answers else {}
        measured_on |= {"coverage": f"{rows:,} rows", "answered_precision": f"{answers:,} labelled rows"}
    if task.out_of_scope is not None:
        for name, value, count in _scope(predicted, targets, task.labels.index(task.out_of_scope)):
            scores[name], measured_on[name] = value, f"{count:,} rows"
            intervals[name] = wilson_interval(value, count)
    facts = {"calibration": calibration, "label_scores": label_scores(predicted, targets, task.labels)}
    counts = {"accuracy": right_or_wrong(predicted, targets), "macro_f1": by_label}
    compared = counts.pop(task.metric)
    return Scored(
        task.metric,
        scores,
        intervals,
        rows,
        measured_on,
        _predictions(task, texts, sure, predicted),
        compared,
        extra=facts,
        other_counts=tuple(counts.values()),
        recorded=facts | ({"metric_why": task.metric_why} if task.metric_why else {}),
    )


def _scope(predicted: torch.Tensor, targets: torch.Tensor, outside: int) -> Iterator[tuple[str, float, int]]:
    """The share of right labels in scope, and of what is out of scope that of texts found to be so; where there are
    such rows. With how many they are."""
    is_out = targets == outside
    for name, rows in (("in_scope_accuracy", ~is_out), ("out_of_scope_recall", is_out)):
        if rows.any():
            yield name, float((predicted == targets)[rows].double().mean()), int(rows.sum())


def right_or_wrong(predicted: torch.Tensor, targets: torch.Tensor) -> RowCounts:
    """What each row adds to the accuracy; both (rows,)."""
    right = (predicted == targets).long()
    return RowCounts.of(metric("accuracy"), torch.stack([right, torch.ones_like(right)], 1).numpy())


def _by_label(predicted: torch.Tensor, targets: torch.Tensor) -> RowCounts:
    return RowCounts.of(metric("macro_f1"), torch.stack([targets, predicted], 1).numpy())


def _calibration(temperature: float, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
    """How far off probabilities are, and were before they were calibrated; the bins are those of now."""
    before, now = (confidence_bins((logits * factor).softmax(1), targets) for factor in (temperature, 1))
    errors = [expected_calibration_error(bins) for bins in (before, now)]
    return {
        "temperature": temperature, "error_before": errors[0], "error": errors[1], "bins": [asdict(one) for one in now],
    }  # fmt: skip


def _predictions(
    task: Classification, texts: LabelledText[str], sure: torch.Tensor, predicted: torch.Tensor
) -> list[dict[str, Any]]:
    """One for each row; ``abstains`` where no label is given."""
    rows = zip(texts.texts, texts.labels, texts.lines, predicted.tolist(), sure.tolist(), strict=True)
    found: list[dict[str, Any]] = [
        {"text": text, "label": label, "predicted": task.labels[number], "probability": round(p, 6), "line": line}
        for text, label, line, number, p in rows
    ]
    for row, is_sure in zip(found, sure >= (task.threshold or 0.0), strict=True):
        if not is_sure:
            row["abstains"] = True
    return found
