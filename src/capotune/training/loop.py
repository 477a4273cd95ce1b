"""One loop for every method: a plain function over explicit state.

All that is needed to go on exactly is in ``TrainingState`` and the arguments: the order of the rows is a function of
seed and epoch, the learning rate of step and settings. A run that was stopped anywhere and one that never was reach the
same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from capotune.adapters.assemble import Assembled
from capotune.config import TrainingSettings
from capotune.data.batches import Rows, epoch_order, sorted_order
from capotune.training.activation_cache import BoundaryStates, resume_from
from capotune.training.optimizer import learning_rate_factor, make_optimizer, set_learning_rate


@dataclass(frozen=True)
class Examples:
    """Rows with targets (rows,) and, when what is below the lowest trainable block is cached, what enters it."""

    rows: Rows
    targets: torch.Tensor
    boundary: BoundaryStates | None = None


@dataclass
class TrainingState:
    """Where training stands."""

    epoch: int = 0
    """Epochs completed."""
    batch: int = 0
    """Batches of the current epoch completed."""
    step: int = 0
    """Optimiser steps taken."""
    rng: torch.Tensor = field(default_factory=torch.get_rng_state)
    """State of the random numbers that dropout draws."""
    optimizer: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """AdamW's moments by weight."""
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """The trained weights as they are now."""
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    best_score: tuple[float, float] = (-math.inf, -math.inf)
    """Held-out (accuracy, −loss) of the best weights."""
    best_epoch: int = 0
    trained_score: tuple[float, float] = (-math.inf, -math.inf)
    """The best held-out score of an epoch, the solved start left out: the first epochs often stand below it."""
    waited: int = 0
    """Epochs in a row that did not raise ``trained_score``."""
    loss_sum: float = 0.0
    """Of the current epoch's batches, for its mean."""


OnStep = Callable[[TrainingState, int, float], bool]
"""Called after each step with (state, total steps, loss); True: stop here and return, state complete."""


def train(
    assembled: Assembled,
    train_examples: Examples,
    held_examples: Examples,
    settings: TrainingSettings,
    *,
    seed: int,
    state: TrainingState | None = None,
    on_step: OnStep | None = None,
    on_epoch: Callable[[TrainingState, float, float], None] | None = None,
) -> TrainingState:
    """Train until the epochs or the patience are used up, then leave the best weights in the model.

    A given ``state`` goes on where it stands; one that ``start`` made has no weights yet and begins with the model's.

    ``on_epoch`` is called with (state, mean training loss, held-out score).
    """
    weights = assembled.trainable()
    rates = dict.fromkeys(weights, float(settings.head_learning_rate)) | assembled.method.learning_rates()
    optimizer = make_optimizer(weights, rates, settings.weight_decay)
    state = state or start(assembled, held_examples, seed)
    _restore(state, weights, optimizer)
    per_epoch = math.ceil(len(train_examples.targets) / settings.batch_size)
    total = settings.epochs * per_epoch
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(state.rng)
        while not finished(state, settings):
            order = epoch_order(train_examples.rows.lengths, settings.batch_size, seed, state.epoch)
            _set_dropout(assembled, True)
            for chosen in order[state.batch :]:
                set_learning_rate(optimizer, learning_rate_factor(state.step, total, settings))
                loss = _step(assembled, train_examples, chosen, weights, optimizer, settings)
                state.batch, state.step, state.loss_sum = state.batch + 1, state.step + 1, state.loss_sum + loss
                if on_step and on_step(state, total, loss):
                    return _capture(state, weights, optimizer)
            _set_dropout(assembled, False)
            score = held_out_score(assembled, held_examples)
            mean_loss = state.loss_sum / per_epoch
            state.epoch, state.batch, state.loss_sum = state.epoch + 1, 0, 0.0
            state.waited = 0 if score > state.trained_score else state.waited + 1
            state.trained_score = max(score, state.trained_score)
            _keep_if_better(state, weights, score, epoch=state.epoch)
            if on_epoch:
                on_epoch(_capture(state, weights, optimizer), mean_loss, score[0])
    with torch.no_grad():
        for key, weight in weights.items():
            weight.copy_(state.best_weights[key])
    return state


def start(assembled: Assembled, held_examples: Examples, seed: int) -> TrainingState:
    """The state before the first step, with the model as it is now as the best so far."""
    state = TrainingState(rng=torch.Generator().manual_seed(seed).get_state())
    _keep_if_better(state, assembled.trainable(), held_out_score(assembled, held_examples), epoch=0)
    return state


def finished(state: TrainingState, settings: TrainingSettings) -> bool:
    """Whether the epochs or the patience are used up."""
    return state.epoch >= settings.epochs or state.waited >= settings.patience


@torch.no_grad()
def predict_logits(assembled: Assembled, rows: Rows, boundary: BoundaryStates | None = None) -> torch.Tensor:
    """Logits (rows, labels) on the CPU, in the order of the rows."""
    logits = torch.empty(len(rows.sequences), assembled.model.classifier.out_features)
    with _starting_at(assembled, boundary) as give:
        for chosen in sorted_order(rows.lengths):
            logits[torch.as_tensor(chosen)] = _forward(assembled, rows, boundary, chosen, give).float().cpu()
    return logits


def held_out_score(assembled: Assembled, examples: Examples) -> tuple[float, float]:
    """(accuracy, −cross-entropy): higher is better, the loss decides between equal accuracies."""
    logits = predict_logits(assembled, examples.rows, examples.boundary)
    accuracy = float((logits.argmax(1) == examples.targets).float().mean())
    return accuracy, -float(functional.cross_entropy(logits, examples.targets))


def _set_dropout(assembled: Assembled, on: bool) -> None:
    """The base's own hidden dropout and the method's. Dropout of attention weights stays off: with it PyTorch would
    leave its fast attention for one that keeps the (tokens, tokens) weights of every head. So does dropout below the
    lowest trainable block: what is computed once is the same with and without being kept."""
    lowest = assembled.method.first_trainable_block()
    for path, module in assembled.model.named_modules():
        block = assembled.architecture.block_of(path)
        if isinstance(module, nn.Dropout) and (lowest == 0 or (block is not None and block >= lowest)):
            module.train(on)
    assembled.method.train_mode(on)


def _step(
    assembled: Assembled,
    examples: Examples,
    chosen: np.ndarray,
    weights: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    settings: TrainingSettings,
) -> float:
    """Forward, backward, clip, update on one batch of rows; its loss."""
    with _starting_at(assembled, examples.boundary) as give:
        logits = _forward(assembled, examples.rows, examples.boundary, chosen, give)
    targets = examples.targets[torch.as_tensor(chosen)].to(logits.device)
    loss = assembled.task.loss(logits, targets, settings.label_smoothing)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(weights.values(), settings.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def _forward(
    assembled: Assembled,
    rows: Rows,
    boundary: BoundaryStates | None,
    chosen: np.ndarray,
    give: Callable[[torch.Tensor], None] | None,
) -> torch.Tensor:
    device = assembled.model.classifier.weight.device
    batch = rows.batch(chosen).to(device)
    if boundary is not None and give is not None:
        give(boundary.batch(chosen).to(device))
    logits: torch.Tensor = assembled.model(batch.input_ids, batch.attention_mask).logits
    return logits


def _starting_at(
    assembled: Assembled, boundary: BoundaryStates | None
) -> AbstractContextManager[Callable[[torch.Tensor], None] | None]:
    """The model as it is, or starting above its frozen prefix when the states that enter there are at hand."""
    if boundary is None:
        return nullcontext()
    return resume_from(assembled.model, assembled.architecture, assembled.method.first_trainable_block())


def _keep_if_better(
    state: TrainingState, weights: dict[str, nn.Parameter], score: tuple[float, float], epoch: int
) -> None:
    if score > state.best_score:
        state.best_score, state.best_epoch = score, epoch
        state.best_weights = {key: weight.detach().clone() for key, weight in weights.items()}


def _capture(state: TrainingState, weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> TrainingState:
    """Copy what lives in model, optimizer and generator into the state."""
    state.weights = {key: weight.detach().clone() for key, weight in weights.items()}
    state.optimizer = {
        key: {name: torch.as_tensor(value).clone() for name, value in optimizer.state[weight].items()}
        for key, weight in weights.items()
    }
    state.rng = torch.get_rng_state()
    return state


def _restore(state: TrainingState, weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    if not state.weights:
        return
    with torch.no_grad():
        for key, weight in weights.items():
            weight.copy_(state.weights[key])
            if state.optimizer.get(key):
                optimizer.state[weight] = {name: value.clone() for name, value in state.optimizer[key].items()}
