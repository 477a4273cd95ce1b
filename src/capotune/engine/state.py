"""Where training stands: a plain record, taken from and put back into model, optimizer and random numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from capotune.adapters.assemble import Assembled
from capotune.adapters.task_model import Score
from capotune.engine.optimizer import FlatAdamW


@dataclass
class TrainingState:
    """Where training stands: with the arguments of ``train``, all that is needed to go on to the same bits."""

    epoch: int = 0
    """Epochs completed."""
    batch: int = 0
    """Batches of the current epoch completed."""
    step: int = 0
    """Optimizer steps taken."""
    rng: torch.Tensor = field(default_factory=torch.get_rng_state)
    """State after the last step of the random numbers that dropout draws, on the device where it draws them."""
    optimizer: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """AdamW's moments by weight."""
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """The trained weights as they are now."""
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    best_score: Score = (-math.inf,)
    """The task's held-out score of the best weights."""
    best_epoch: int = 0
    trained_score: Score = (-math.inf,)
    """The best held-out score of an epoch, the solved start left out: the first epochs often stand below it."""
    waited: int = 0
    """Epochs in a row that did not raise ``trained_score``."""
    loss_sum: float = 0.0
    """Of the current epoch's steps that were taken, for its mean."""
    skipped: int = 0
    """Steps that were not taken, since their loss or gradient was not finite; ``step`` counts them too."""
    skipped_in_epoch: int = 0
    """Of the current epoch."""
    skipped_in_a_row: int = 0
    """Up to the last step."""
    micro_batch_tokens: int | None = None
    """What the setting of that name was lowered to where memory ran out."""
    stored_states: bool | None = None
    """Whether steps begin above the frozen layers, at states computed once; None: not known, of an earlier version."""
    mixed_lengths: bool = False
    """Whether each batch has rows of all lengths; an earlier version's has rows of like length."""
    seconds: float = 0.0
    """What the run has taken so far, what was computed before the first step included."""


def start(assembled: Assembled, score: Score, seed: int) -> TrainingState:
    """The state before the first step, with the model as it is now, of this held-out ``score``, as the best so far."""
    drawn = torch.Generator(assembled.model.device).manual_seed(seed).get_state()
    state = TrainingState(rng=drawn, mixed_lengths=assembled.task.objective.mixes_lengths)
    _set_best(state, assembled.trainable(), score)
    return state


def count_step(state: TrainingState, loss: float, taken: bool, device: torch.device) -> None:
    """Count a batch of this ``loss`` and whether its step was taken; the next one draws where the generator stands."""
    state.rng = random_state(device)
    state.batch, state.step = state.batch + 1, state.step + 1
    if taken:
        state.loss_sum, state.skipped_in_a_row = state.loss_sum + loss, 0
    else:
        state.skipped, state.skipped_in_epoch = state.skipped + 1, state.skipped_in_epoch + 1
        state.skipped_in_a_row += 1


def mean_loss(state: TrainingState) -> float:
    """Of the current epoch's steps that were taken; NaN when none was."""
    taken = state.batch - state.skipped_in_epoch
    return state.loss_sum / taken if taken else math.nan


def end_epoch(state: TrainingState, weights: dict[str, nn.Parameter], score: Score) -> None:
    """Count an epoch whose weights have this held-out score; copy them when it is the best so far."""
    state.epoch, state.batch, state.loss_sum, state.skipped_in_epoch = state.epoch + 1, 0, 0.0, 0
    state.waited = 0 if score > state.trained_score else state.waited + 1
    state.trained_score = max(score, state.trained_score)
    if score > state.best_score:
        _set_best(state, weights, score)


def _set_best(state: TrainingState, weights: dict[str, nn.Parameter], score: Score) -> None:
    state.best_score, state.best_epoch = score, state.epoch
    state.best_weights = {key: weight.detach().clone() for key, weight in weights.items()}


def random_state(device: torch.device) -> torch.Tensor:
    """State of the device's generator, a copy."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(state: torch.Tensor, device: torch.device) -> None:
    """Put the generator where ``random_state`` found it."""
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)


def draws_on(state: TrainingState, device: torch.device) -> bool:
    """Whether the state's random numbers go on on this kind of device: each has a generator of its own."""
    return state.rng.shape == random_state(device).shape


def capture(state: TrainingState, weights: dict[str, nn.Parameter], optimizer: FlatAdamW) -> TrainingState:
    """Copy what lives in model and optimizer into the state. Its tensors are never written to afterwards."""
    state.weights = {key: weight.detach().clone() for key, weight in weights.items()}
    state.optimizer = optimizer.moments()
    return state


def restore(state: TrainingState, weights: dict[str, nn.Parameter], optimizer: FlatAdamW) -> None:
    """Put captured weights and moments back; a state that ``start`` made holds none, and changes nothing."""
    if not state.weights:
        return
    _copy(state.weights, weights)
    optimizer.set_moments(state.optimizer)


def restore_best(state: TrainingState, weights: dict[str, nn.Parameter]) -> None:
    """Put the best weights into the model."""
    _copy(state.best_weights, weights)


@torch.no_grad()
def _copy(values: dict[str, torch.Tensor], weights: dict[str, nn.Parameter]) -> None:
    for key, weight in weights.items():
        weight.copy_(values[key])
