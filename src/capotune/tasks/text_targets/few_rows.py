"""Training where a label has few rows: all are fitted to, by contrast, and the head is solved leaving each out in turn.

With some rows a label, a tenth of them decides nothing, and is missed. A head's cross-entropy is nearly nothing from
the start, so that it has little to say to the weights below; pairs of rows have (L. Tunstall et al. 2022, "Efficient
few-shot learning without prompts", arXiv 2209.11055). What was measured stands in docs/few-rows.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from capotune.adapters.assemble import Assembled
from capotune.data.batches import TokenRows
from capotune.data.wording import quoted
from capotune.engine.activation_cache import ActivationCache
from capotune.engine.recorded import Recording, how_it_went, train_recorded, with_boundary
from capotune.engine.ridge import solve_leaving_one_out
from capotune.engine.state import start
from capotune.evaluation.forward import Examples
from capotune.events import Reporter, Stage, counter
from capotune.tasks.base import Fitted
from capotune.tasks.solved_head import SolvedHead, set_head
from capotune.tasks.text_targets.contrast import RowContrast
from capotune.tasks.text_targets.features import all_features, compute_features
from capotune.tasks.text_targets.task import TextTargetTask

_MOST_A_LABEL, _MOST = 32, 2000


def are_few(rows: int, labels: int) -> bool:
    """Whether so many rows are trained on as is said here: at most 32 a label on average, and 2,000 in all."""
    return rows <= min(_MOST_A_LABEL * labels, _MOST)


def with_names(examples: Examples, task: TextTargetTask) -> Examples:
    """The rows, and after them the name of each label that is a word, as a row of that label; not where rows are pairs
    of texts, which a name is not."""
    if task.reads_pairs:
        return examples
    named = [at for at, label in enumerate(task.labels) if any(char.isalpha() for char in label)]
    names = task.encode([" ".join(task.labels[at].replace("_", " ").replace("-", " ").split()) for at in named])
    sequences = [*examples.rows.sequences, *names]
    assert isinstance(examples.targets, torch.Tensor)
    targets = torch.cat([examples.targets, torch.tensor(named, dtype=torch.long)])
    count = len(examples.rows.sequences)

    def where(at: int) -> str:
        return examples.where(at) if at < count else f"the name of the label {quoted(task.labels[named[at - count]])}"

    return Examples(replace(examples.rows, sequences=sequences), targets, where=where)


def fit_few(
    recording: Recording,
    assembled: Assembled,
    rows: Examples,
    *,
    cache: ActivationCache,
    seed: int,
    report: Reporter,
) -> tuple[Fitted, SolvedHead]:
    """Train the method by contrast where it has weights of its own, then solve the head on all rows.

    The head's held-out outputs are those for each row by a head that was solved without it. Where the method was
    trained on all, the row has had its part in that.
    """
    task, named = assembled.task, with_names(rows, assembled.task)
    assert isinstance(named.targets, torch.Tensor)
    state = None
    if assembled.method.parameters():
        first = replace(named.rows, sequences=named.rows.sequences[:1])
        _check(assembled, compute_features(assembled, assembled.model.feature_layers, first, None, reduced=True))
        by_contrast: Any = _ByContrast(task, RowContrast())
        contrasted = assembled.asking(by_contrast)
        (given,) = with_boundary([named], contrasted, cache, report)
        state = recording.state or start(contrasted, (-math.inf,), seed)
        state = train_recorded(recording, contrasted, given, None, seed=seed, state=state, report=report)
    features = _features(assembled, rows.rows, named.rows, cache, report)
    report(Stage(text="solving the head"))
    layers = len(assembled.model.feature_layers)
    found = solve_leaving_one_out(features, named.targets, len(task.labels), len(rows.rows.sequences), layers)
    set_head(assembled, found.head)
    score = task.objective.score(found.left_out, rows.targets)
    solved = SolvedHead(score, found.head.regularization, None, found.left_out)
    if state is None:
        return solved.fitted(task.objective), solved
    trained = Fitted(float(state.epoch), state.best_epoch, None, how_it_went(state))
    return solved.after(trained, task.objective), solved


@dataclass(frozen=True)
class _ByContrast:
    """The task with another objective."""

    task: TextTargetTask
    objective: RowContrast

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)


def _features(
    assembled: Assembled, rows: TokenRows, named: TokenRows, cache: ActivationCache, report: Reporter
) -> torch.Tensor:
    """Of all that ``named`` has, as the method now makes them; the base's own of the ``rows`` may be in the cache."""
    report(Stage(text="computing features"))
    layers = assembled.model.feature_layers
    if assembled.method.parameters():
        features = compute_features(assembled, layers, named, counter(report), reduced=True)
    else:
        names = replace(named, sequences=named.sequences[len(rows.sequences) :])
        own = all_features(assembled, rows, cache, counter(report), reduced=True)
        features = torch.cat([own, all_features(assembled, names, cache, None, reduced=True)])
    _check(assembled, features)
    return features


def _check(assembled: Assembled, features: torch.Tensor) -> None:
    if not features.isfinite().all():
        raise assembled.base.error("it computes infinite values or NaN. Are its weights whole?")
