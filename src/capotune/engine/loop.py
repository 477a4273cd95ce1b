"""One loop for every method: a plain function over explicit state.

All that is needed to go on exactly is in ``TrainingState`` and the arguments: the order of the rows is a function of
seed and epoch, the learning rate of step and settings. A run that was stopped anywhere and one that never was reach the
same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from capotune.adapters.assemble import Assembled
from capotune.data.batches import Batch, Targets, TokenRows, epoch_order, parts_of, sorted_order, tokens_at_once
from capotune.device import reusing_memory
from capotune.engine.activation_cache import BoundaryStates, Progress, resume_from
from capotune.engine.optimizer import FlatAdamW, learning_rate_factor, set_learning_rate
from capotune.kernels import policy
from capotune.kernels.linear import reduced_precision
from capotune.kernels.memory import lending
from capotune.kernels.saved_activations import quantized_saved_activations
from capotune.models.architecture import with_forward
from capotune.settings import TrainingSettings
from capotune.tasks.base import Score


@dataclass(frozen=True)
class Examples:
    """Rows with their targets and, when what is below the lowest trainable block is cached, what enters it."""

    rows: TokenRows
    targets: Targets
    boundary: BoundaryStates | None = None

    def take(self, rows: torch.Tensor) -> Examples:
        """Some of the rows, without what was cached of them."""
        chosen = rows.tolist()
        tokens = TokenRows([self.rows.sequences[row] for row in chosen], self.rows.pad_id, self.rows.prefix)
        targets = (
            self.targets[rows] if isinstance(self.targets, torch.Tensor) else [self.targets[row] for row in chosen]
        )
        return Examples(tokens, targets)

    def after(self, prefix: Sequence[int]) -> Examples:
        """The same rows with other tokens before each."""
        return Examples(TokenRows(self.rows.sequences, self.rows.pad_id, prefix), self.targets)


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
    """State of the random numbers that dropout draws, on the device where it draws them."""
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

    ``on_epoch`` is called with (state, mean training loss, held-out score as people read it). While ``on_step`` and
    ``on_epoch`` run, the base reads batches of ``assembled.packing``'s kind only.
    """
    assert settings.epochs is not None
    weights = assembled.trainable()
    rates = dict.fromkeys(weights, float(settings.head_learning_rate)) | assembled.method.learning_rates()
    state = state or start(assembled, held_out_score(assembled, held_examples), seed)
    per_epoch = math.ceil(len(train_examples.rows.sequences) / settings.batch_size)
    total = settings.epochs * per_epoch
    device = assembled.model.device
    on_gpu = [device] if device.type == "cuda" else []
    checkpointed = assembled.blocks if settings.gradient_checkpointing else []
    with (
        torch.random.fork_rng(devices=on_gpu),
        reusing_memory(sparing=settings.gradient_checkpointing),
        nullcontext() if settings.gradient_checkpointing else lending(),
        assembled.reading(),
        checkpointing(checkpointed),
        FlatAdamW(weights, rates, settings.weight_decay) as optimizer,
    ):
        _restore(state, weights, optimizer)
        torch.cuda.set_rng_state(state.rng, device) if on_gpu else torch.set_rng_state(state.rng)
        while not finished(state, settings):
            order = epoch_order(train_examples.rows.lengths, settings.batch_size, seed, state.epoch)
            with _dropout(assembled), reduced_precision():
                for chosen in order[state.batch :]:
                    set_learning_rate(optimizer, learning_rate_factor(state.step, total, settings))
                    loss = _step(assembled, train_examples, chosen, optimizer, settings)
                    state.batch, state.step, state.loss_sum = state.batch + 1, state.step + 1, state.loss_sum + loss
                    if on_step and on_step(state, total, loss):
                        return _capture(state, weights, optimizer, device)
            score = held_out_score(assembled, held_examples)
            mean_loss = state.loss_sum / per_epoch
            state.epoch, state.batch, state.loss_sum = state.epoch + 1, 0, 0.0
            state.waited = 0 if score > state.trained_score else state.waited + 1
            state.trained_score = max(score, state.trained_score)
            if score > state.best_score:
                _keep(state, weights, score, epoch=state.epoch)
            if on_epoch:
                on_epoch(_capture(state, weights, optimizer, device), mean_loss, assembled.task.shown(score))
    with torch.no_grad():
        for key, weight in weights.items():
            weight.copy_(state.best_weights[key])
    return state


def start(assembled: Assembled, score: Score, seed: int) -> TrainingState:
    """The state before the first step, with the model as it is now, of this held-out ``score``, as the best so far."""
    state = TrainingState(rng=torch.Generator(assembled.model.device).manual_seed(seed).get_state())
    _keep(state, assembled.trainable(), score, epoch=0)
    return state


def finished(state: TrainingState, settings: TrainingSettings) -> bool:
    """Whether the epochs or the patience are used up."""
    assert settings.epochs is not None
    return state.epoch >= settings.epochs or state.waited >= settings.patience


def predict_logits(assembled: Assembled, rows: TokenRows, boundary: BoundaryStates | None = None) -> torch.Tensor:
    """A classifier's logits (rows, labels) on the CPU, in the order of the rows."""
    unknown = torch.zeros(len(rows.sequences), dtype=torch.long)
    return outputs(assembled, Examples(rows, unknown, boundary))


@torch.no_grad()
def outputs(assembled: Assembled, examples: Examples, progress: Progress | None = None) -> torch.Tensor:
    """What the task keeps of each row, (rows, numbers) fp32 on the CPU, in the order of the rows."""
    order = sorted_order(examples.rows.lengths, tokens_at_once(assembled.model.device))
    found = []
    with assembled.reading(), _starting_at(assembled, examples.boundary) as give:
        for done, chosen in enumerate(order):
            batch = _batch(assembled, examples, chosen, give)
            found.append(assembled.task.outputs(assembled.model, batch).float().cpu())
            if progress:
                progress(done + 1, len(order))
    at = torch.as_tensor(np.concatenate(order))
    return torch.cat(found)[at.argsort()]


def held_out_score(assembled: Assembled, examples: Examples) -> Score:
    """The task's score: higher is better, later numbers decide between equal earlier ones. What is no number is worse
    than any."""
    score = assembled.task.score(outputs(assembled, examples), examples.targets)
    return tuple(-math.inf if math.isnan(one) else one for one in score)


@contextmanager
def _dropout(assembled: Assembled) -> Iterator[None]:
    """Inside, the base's own hidden dropout and the method's are on. Dropout of attention weights stays off: with it
    PyTorch would leave its fast attention for one that keeps the (tokens, tokens) weights of every head. So does
    dropout below the lowest trainable block: what is computed once is the same with and without being kept."""
    lowest = assembled.method.first_trainable_block()
    blocks = ((module, assembled.architecture.block_of(path)) for path, module in assembled.model.named_modules())
    dropouts = [
        module
        for module, block in blocks
        if isinstance(module, nn.Dropout) and (lowest == 0 or (block is not None and block >= lowest))
    ]

    def switch(on: bool) -> None:
        for module in dropouts:
            module.train(on)
        assembled.method.train_mode(on)

    switch(True)
    try:
        yield
    finally:
        switch(False)


def _step(
    assembled: Assembled,
    examples: Examples,
    chosen: np.ndarray,
    optimizer: FlatAdamW,
    settings: TrainingSettings,
) -> float:
    """Forward and backward on the rows of one step, part by part, then clip and update; the step's loss, for which a
    GPU is waited for once, when it has been given all there is to do."""
    total = accumulate(assembled, examples, chosen, settings)
    optimizer.step(settings.max_grad_norm)
    return float(total)


def accumulate(
    assembled: Assembled, examples: Examples, chosen: np.ndarray, settings: TrainingSettings
) -> torch.Tensor:
    """Add the gradient of the mean loss of all that the ``chosen`` rows learn; returns that loss, a number in fp64.

    Every part's sum is divided by the units of the whole step, not by its own: the gradient is the one that a single
    pass over all rows gives, however the rows are shared out. To be called inside ``assembled.reading()``.
    """
    task, total = assembled.task, torch.zeros((), dtype=torch.float64, device=assembled.model.device)
    units = task.units(examples.targets, chosen.tolist())
    with _starting_at(assembled, examples.boundary) as give:
        for part in parts_of(chosen, examples.rows.lengths, settings.micro_batch_tokens):
            batch = _batch(assembled, examples, part, give)
            with _keeping_less(examples.rows.lengths, part):
                loss = task.loss(assembled.model, batch, settings.label_smoothing) / units
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
    return total


def _keeping_less(lengths: Sequence[int], part: np.ndarray) -> AbstractContextManager[None]:
    """With many tokens at a time, what is kept of each on a CPU is what counts in memory."""
    many = sum(lengths[row] for row in part) >= policy.QUANTIZE_SAVED_FROM_TOKENS
    return quantized_saved_activations() if many else nullcontext()


def _batch(
    assembled: Assembled, examples: Examples, chosen: np.ndarray, give: Callable[[torch.Tensor], None] | None
) -> Batch:
    """The rows on the model's device; with cached states, those are handed to the model too."""
    device = assembled.model.device
    batch = examples.rows.batch(chosen, examples.targets, assembled.packing.first_position)
    if examples.boundary is not None and give is not None:
        give(batch.laid_out(examples.boundary.flat(chosen)).to(device))
    return batch.to(device)


@contextmanager
def checkpointing(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, each block keeps only what enters it, and computes the rest again on the way back (Chen et al. 2016)."""
    recomputed = {block: partial(checkpoint, block.forward, use_reentrant=False) for block in blocks}
    with with_forward(recomputed):
        yield


def _starting_at(
    assembled: Assembled, boundary: BoundaryStates | None
) -> AbstractContextManager[Callable[[torch.Tensor], None] | None]:
    """The model as it is, or starting above its frozen prefix when the states that enter there are at hand."""
    if boundary is None:
        return nullcontext()
    return resume_from(assembled, assembled.method.first_trainable_block())


def _keep(state: TrainingState, weights: dict[str, nn.Parameter], score: Score, epoch: int) -> None:
    """As the best so far."""
    state.best_score, state.best_epoch = score, epoch
    state.best_weights = {key: weight.detach().clone() for key, weight in weights.items()}


def _capture(
    state: TrainingState, weights: dict[str, nn.Parameter], optimizer: FlatAdamW, device: torch.device
) -> TrainingState:
    """Copy what lives in model, optimizer and generator into the state."""
    state.weights = {key: weight.detach().clone() for key, weight in weights.items()}
    state.optimizer = optimizer.moments()
    state.rng = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return state


def _restore(state: TrainingState, weights: dict[str, nn.Parameter], optimizer: FlatAdamW) -> None:
    if not state.weights:
        return
    with torch.no_grad():
        for key, weight in weights.items():
            weight.copy_(state.weights[key])
    optimizer.set_moments(state.optimizer)
