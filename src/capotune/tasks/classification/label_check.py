"""Which labels of a data set are likely to be wrong, by what heads say that have not seen them.

A linear head is solved on the frozen base's features of four fifths of the rows and labels the last fifth; so every row
is labelled by a head that its own label had no part in. A row is suspect where that head prefers another label, the
more the less probable its own is (self-confidence). How many labels are wrong is estimated by confident learning: those
rows count that are predicted to have another label at least as confidently as rows of that label are on average (C. G.
Northcutt, L. Jiang, I. L. Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels", JAIR 70 (2021),
sections 3.1 and 4; by the library cleanlab).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from capotune.adapters.assemble import Assembled
from capotune.data.batches import TokenRows
from capotune.data.classes import CLASSES, class_names
from capotune.data.labelled import LabelledText
from capotune.data.split import folds, text_numbers
from capotune.data.suspects import LabelCheck, Suspect
from capotune.engine.activation_cache import ActivationCache
from capotune.engine.linear_head import choose_regularization, solve
from capotune.errors import DataError, needs_extra
from capotune.events import Reporter, Stage, alive, counter
from capotune.models.base import Base
from capotune.settings import TrainSettings
from capotune.tasks.classification.task import Classification
from capotune.tasks.text_targets.features import all_features

_FOLDS = 5
_TOLERANCE = 2e-3  # of the heads' loss: which label is suspect hangs on much larger differences
_EASY = 3.0  # times the best λ: such a head follows wrong labels less


def check_labels(
    settings: TrainSettings,
    base: Base,
    load: Callable[[Classification], tuple[Assembled, ActivationCache]],
    report: Reporter,
) -> LabelCheck:
    """Look for wrong labels among all rows of ``settings.data``, those too that a column ``split`` marks as test.

    Raises:
        DataError: as ``LabelReading.load``; or no two labels have two different texts each.
        MissingLibraryError: cleanlab is not installed.
    """
    _import_cleanlab()
    rows = CLASSES.read(
        settings.data,
        text_column=settings.text_column,
        label_column=settings.label_column,
        pair_columns=settings.pair_columns,
    )
    rows, _, _ = CLASSES.settled(rows, None)
    CLASSES.check_train(rows)
    task = Classification.on(base, class_names(rows.labels), settings.max_length, 0)
    task = task if rows.second_column is None else task.of_pairs()
    tokens = TokenRows(task.encode(rows.texts, rows.where), task.pad_id)
    assembled, cache = load(task)
    report(Stage(text="computing features"))
    features = all_features(assembled, tokens, cache, counter(report), reduced=True)
    found = find_suspects(features, task.targets(rows.labels), text_numbers(rows.texts), settings.seed, report)
    if not len(found.checked):
        raise DataError(
            "its labels cannot be checked: fewer than two of them have two different texts.",
            where=str(rows.source),
            advice="Add rows.",
        )
    known = {task.labels[number] for number in found.labels.tolist()}
    return LabelCheck(
        str(rows.source),
        rows.source.unit,
        len(found.checked),
        [_suspect(rows, task.labels, found, at) for at in found.ranked.tolist()],
        found.estimated,
        [label for label in task.labels if label not in known],
    )


@dataclass(frozen=True)
class Found:
    """What cross-validation says of labels."""

    checked: NDArray[np.int64]
    """Rows whose label was checked, rising."""
    labels: NDArray[np.int64]
    """Labels that they have, rising: the columns of ``probabilities``."""
    probabilities: NDArray[np.float64]
    """(checked rows, labels) of each by a head that has not seen it."""
    given: NDArray[np.int64]
    """(checked rows,) the column of each one's own label."""
    ranked: NDArray[np.int64]
    """Positions in ``checked`` of the suspects, the likeliest first."""
    estimated: int
    """How many labels are taken to be wrong."""


def find_suspects(
    features: torch.Tensor, targets: torch.Tensor, groups: NDArray[np.int64], seed: int, report: Reporter
) -> Found:
    """Find the rows of ``features`` (rows, features) fp32 whose label in ``targets`` (rows,) int64 is suspect.

    Rows of a group (``groups`` (rows,), a number for each text) are held out together; ``seed`` decides with which
    others. Labels with one group alone are not checked; nothing is where fewer than two have more.
    """
    find_label_issues = _import_cleanlab()
    number = targets.numpy()
    fold = folds(number.tolist(), _FOLDS, seed, groups.tolist())
    labels = np.flatnonzero(np.bincount(np.unique(number * _FOLDS + fold) // _FOLDS) > 1)
    if len(labels) < 2:
        nothing = np.empty(0, dtype=np.int64)
        return Found(nothing, nothing, np.empty((0, 0)), nothing, nothing, 0)
    checked = np.flatnonzero(np.isin(number, labels))
    given = np.searchsorted(labels, number[checked])
    some = features if len(checked) == len(features) else features[torch.as_tensor(checked)]
    probabilities = _held_out_probabilities(some, torch.as_tensor(given), fold[checked], len(labels), report)
    ranked, confident = (
        find_label_issues(given, probabilities, filter_by=by, return_indices_ranked_by="self_confidence", n_jobs=1)
        for by in ("predicted_neq_given", "confident_learning")
    )
    return Found(checked, labels, probabilities, given, ranked, len(confident))


def _import_cleanlab() -> Any:
    """cleanlab's function that ranks rows. Raises ``MissingLibraryError`` where it is not installed."""
    with needs_extra("labels"):
        from cleanlab.filter import find_label_issues
    return find_label_issues


def _held_out_probabilities(
    features: torch.Tensor, targets: torch.Tensor, fold: NDArray[np.int64], labels: int, report: Reporter
) -> NDArray[np.float64]:
    """(rows, labels): of each row by the head that was solved without the row's fold. λ is chosen on the first."""
    logits = torch.empty(len(targets), labels)
    regularization = None
    for number in np.unique(fold).tolist():
        report(Stage(text=f"solving head {number + 1} of {_FOLDS}"))
        held = torch.as_tensor(fold == number)
        fit, fit_targets = features[~held], targets[~held]
        if regularization is None:
            _, best = choose_regularization(
                fit, fit_targets, features[held], targets[held], labels, on_iteration=alive(report)
            )
            regularization = _EASY * best
        head = solve(fit, fit_targets, labels, regularization, _TOLERANCE, on_iteration=alive(report))
        logits[held] = head.logits(features[held])
    probabilities: NDArray[np.float64] = logits.double().softmax(1).numpy()
    return probabilities


def _suspect(rows: LabelledText[str], labels: tuple[str, ...], found: Found, at: int) -> Suspect:
    row, own = int(found.checked[at]), found.probabilities[at]
    best = int(own.argmax())
    return Suspect(
        row,
        rows.lines[row],
        rows.texts[row],
        rows.labels[row],
        labels[found.labels[best]],
        float(own[best]),
        float(own[found.given[at]]),
    )
