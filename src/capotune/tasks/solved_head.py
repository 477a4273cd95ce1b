"""A linear head is solved to convergence on what the start model computes; then the method trains on from it.

A random head's gradients would distort what the base knows (linear probing, then fine-tuning: Kumar et al. 2022, arXiv
2202.10054). What the head labels, its *units*, are rows in one task and words in another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from capotune.adapters.assemble import Assembled
from capotune.adapters.task_model import Objective, Score
from capotune.engine.activation_cache import ActivationCache
from capotune.engine.linear_head import LinearHead, choose_regularization, solve
from capotune.engine.recorded import Recording, how_it_went, train_recorded, with_boundary
from capotune.engine.state import TrainingState, start
from capotune.evaluation.forward import Examples
from capotune.events import Reporter, Stage, alive
from capotune.tasks.base import Fitted

_EASY_START = 30.0  # times the best λ: a head that knows the rows by heart leaves the method nothing to gain


@dataclass(frozen=True)
class Units:
    """What a head is solved on."""

    features: torch.Tensor
    """(units, features) fp32."""
    targets: torch.Tensor
    """(units, …), as the solver wants them."""
    fit: torch.Tensor
    """Positions of those that weights are fitted to."""
    held: torch.Tensor
    """Positions of those held out."""


class HeadSolver(ABC):
    """How a head is found that has one best solution for each regularization λ."""

    @abstractmethod
    def choose(
        self,
        features: torch.Tensor,
        targets: torch.Tensor,
        held_features: torch.Tensor,
        held_targets: torch.Tensor,
        on_iteration: Callable[[], object],
    ) -> tuple[LinearHead, float]:
        """The head of the units that does best on those held out, and its λ. ``on_iteration`` is called before every
        step."""

    @abstractmethod
    def solve(
        self,
        features: torch.Tensor,
        targets: torch.Tensor,
        regularization: float,
        near: LinearHead | None,
        on_iteration: Callable[[], object],
    ) -> LinearHead:
        """The best head for one λ; ``near``: one to start from, such as that of most of these units."""


@dataclass(frozen=True)
class ClassSolver(HeadSolver):
    """Multinomial logistic regression; targets (units,) int64, of which there are ``labels`` kinds."""

    labels: int
    weights: Sequence[float] = ()
    """Of each label's units; empty: 1 for each."""

    @property
    def _weights(self) -> torch.Tensor | None:
        return torch.tensor(self.weights) if self.weights else None

    def choose(
        self,
        features: torch.Tensor,
        targets: torch.Tensor,
        held_features: torch.Tensor,
        held_targets: torch.Tensor,
        on_iteration: Callable[[], object],
    ) -> tuple[LinearHead, float]:
        """The lowest held-out cross-entropy."""
        return choose_regularization(
            features,
            targets,
            held_features,
            held_targets,
            self.labels,
            label_weights=self._weights,
            on_iteration=on_iteration,
        )

    def solve(
        self,
        features: torch.Tensor,
        targets: torch.Tensor,
        regularization: float,
        near: LinearHead | None,
        on_iteration: Callable[[], object],
    ) -> LinearHead:
        """To convergence."""
        return solve(
            features,
            targets,
            self.labels,
            regularization,
            near=near,
            label_weights=self._weights,
            on_iteration=on_iteration,
        )


@dataclass(frozen=True)
class SolvedHead:
    """The head that is now in the model."""

    score: Score
    """The objective's, on the held-out rows."""
    regularization: float
    """The λ that was best on them."""
    unfinished: LinearHead | None
    """A more regularised head, which leaves the method something to gain; None: nothing is trained after it."""
    held_logits: torch.Tensor
    """(units, outputs) of the held-out units, by the head that was fitted to the others alone."""

    def after(self, fitted: Fitted, objective: Objective) -> Fitted:
        """The record of the training that ended with this head."""
        extra = fitted.extra | {"regularization": self.regularization}
        return replace(fitted, held_out_score=objective.shown(self.score), extra=extra)

    def fitted(self, objective: Objective, state: TrainingState | None = None) -> Fitted:
        """For the run's record: how training ended, or where that is None, that nothing but the head was fitted."""
        extra = {"regularization": self.regularization}
        if state is None:
            return Fitted(1.0, 1, objective.shown(self.score), extra)
        score = objective.shown(state.best_score)
        return Fitted(float(state.epoch), state.best_epoch, score, extra | how_it_went(state))


def solve_head(
    assembled: Assembled,
    units: Units,
    solver: HeadSolver,
    held_score: Callable[[torch.Tensor], Score],
    report: Reporter,
    *,
    last: bool,
) -> SolvedHead:
    """Solve the model's ``classifier``: on all units when nothing is trained after it (``last``), else on those to fit.

    ``held_score``: the objective's score from the logits (units, outputs) of the held-out units.
    """
    report(Stage(text="solving the head"))
    features, targets, fit, held, tick = units.features, units.targets, units.fit, units.held, alive(report)
    head, regularization = solver.choose(features[fit], targets[fit], features[held], targets[held], tick)
    logits = head.logits(features[held])
    score = held_score(logits)
    if last:
        set_head(assembled, solver.solve(features, targets, regularization, head, tick))
        return SolvedHead(score, regularization, None, logits)
    set_head(assembled, head)
    unfinished = solver.solve(features[fit], targets[fit], _EASY_START * regularization, None, tick)
    return SolvedHead(score, regularization, unfinished, logits)


def train_from(
    solved: SolvedHead,
    recording: Recording,
    assembled: Assembled,
    rows: tuple[Examples, Examples],
    *,
    cache: ActivationCache,
    seed: int,
    report: Reporter,
) -> Fitted:
    """Train head and method in steps on ``rows``, those to fit and those held out. The solved head is the best so far;
    the other arguments are those of ``TaskRun.fit``."""
    state = recording.state
    if state is None:
        assert solved.unfinished is not None
        state = start(assembled, solved.score, seed)
        set_head(assembled, solved.unfinished)
    fit, held = with_boundary(rows, assembled, cache, report)
    state = train_recorded(recording, assembled, fit, held, seed=seed, state=state, report=report)
    return solved.fitted(assembled.task.objective, state)


def set_head(assembled: Assembled, head: LinearHead) -> None:
    """Put the head into the model's ``classifier``."""
    with torch.no_grad():
        assembled.model.classifier.weight.copy_(head.weight)
        assembled.model.classifier.bias.copy_(head.bias)
