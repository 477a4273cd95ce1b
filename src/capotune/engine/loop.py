"""One loop for every method: a plain function over explicit state.

All that is needed to go on exactly is in ``TrainingState`` and the arguments: the order of the rows is a function of
seed and epoch, the learning rate of step and settings. A run that was stopped anywhere and one that never was reach the
same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from capotune.adapters.assemble import Assembled
from capotune.adapters.task_model import Score
from capotune.data.batches import Group, epoch_order, like_length, parts_of
from capotune.device import is_out_of_memory
from capotune.engine import state as states
from capotune.engine.optimizer import FlatAdamW, learning_rate_factor, set_learning_rate
from capotune.engine.state import TrainingState, capture, restore, restore_best, start
from capotune.evaluation.forward import Examples, batch_of
from capotune.evaluation.resume import starting_at
from capotune.interrupts import uninterrupted
from capotune.kernels import policy
from capotune.kernels.execution import reduced_precision, training_memory
from capotune.kernels.saved_activations import quantized_saved_activations
from capotune.models.architecture import with_forward
from capotune.settings import TrainingSettings

OnEpoch = Callable[[TrainingState, float, float], None]
"""Called with (state, mean training loss, held-out score as people read it)."""
OnStep = Callable[[TrainingState, int, float], bool]
"""Called after each step with (state, total steps, loss), also one that was skipped (``state.skipped_in_a_row``); True:
stop here and return, state complete."""


class Saver(Protocol):
    """Saves the state in the middle of an epoch. What it is given is complete, and not written to afterwards."""

    def due(self, state: TrainingState) -> bool:
        """Whether to save now; asked after each step."""

    def save(self, state: TrainingState) -> None:
        """Called when it is."""

    def save_now(self, state: TrainingState) -> None:
        """Called with the state after the last step when training ends by ``KeyboardInterrupt``."""


def train(
    assembled: Assembled,
    examples: Examples,
    settings: TrainingSettings,
    *,
    seed: int,
    evaluate: Callable[[], Score],
    batches: Callable[[int], Sequence[np.ndarray]] | None = None,
    state: TrainingState | None = None,
    on_step: OnStep | None = None,
    on_epoch: OnEpoch | None = None,
    saver: Saver | None = None,
) -> TrainingState:
    """Train until the epochs or the patience are used up, then leave the best weights in the model.

    Args:
        assembled: the model with the method attached.
        examples: the rows to train on.
        settings: complete settings of the method.
        seed: decides the order of the rows and what dropout draws.
        evaluate: scores the weights as they are, on held-out rows; called after every epoch.
        batches: from the number of an epoch to its batches, each the positions of some rows; the same epoch must give
            the same batches. By default ``epoch_order``.
        state: goes on where it stands; one that ``start`` made has no weights yet and begins with the model's.
        on_step: called after each optimizer step.
        on_epoch: called after each evaluation. While these two run, the base reads batches of ``assembled.packing``'s
            kind only, and signals wait.
        saver: saves the state between two steps.
    """
    assert settings.epochs is not None
    assert settings.batch_size is not None
    weights, device = assembled.trainable(), assembled.model.device
    state = state or start(assembled, evaluate(), seed)
    mixed = state.mixed_lengths
    batches = batches or partial(epoch_order, examples.rows.lengths, settings.batch_size, seed, mixed=mixed)
    total = settings.epochs * math.ceil(len(examples.rows.lengths) / settings.batch_size)
    with _optimizing(assembled, settings, state) as optimizer:
        try:
            while not finished(state, settings):
                with _dropout(assembled), reduced_precision():
                    for chosen in batches(state.epoch)[state.batch :]:
                        set_learning_rate(optimizer, learning_rate_factor(state.step, total, settings))
                        summed = _accumulate_in_memory(assembled, examples, chosen, settings, state)
                        with uninterrupted():
                            loss, taken = _update(assembled, optimizer, settings, summed)
                            states.count_step(state, loss, taken, device)
                            if on_step and on_step(state, total, loss):
                                return capture(state, weights, optimizer)
                        if saver and saver.due(state):
                            saver.save(capture(state, weights, optimizer))
                score, loss = evaluate(), states.mean_loss(state)
                with uninterrupted():
                    states.end_epoch(state, weights, score)
                    if on_epoch:
                        on_epoch(capture(state, weights, optimizer), loss, assembled.task.objective.shown(score))
        except KeyboardInterrupt:  # in the middle of a step the weights still are what the last one made of them
            if saver:
                saver.save_now(capture(state, weights, optimizer))
            raise
    restore_best(state, weights)
    return state


@contextmanager
def _optimizing(assembled: Assembled, settings: TrainingSettings, state: TrainingState) -> Iterator[FlatAdamW]:
    """Inside, the model computes as in training, and weights, optimizer and random numbers stand where ``state`` has
    them; the random numbers of before come back at the end."""
    weights = assembled.trainable()
    rates = dict.fromkeys(weights, float(settings.head_learning_rate)) | assembled.method.learning_rates()
    device = assembled.model.device
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        training_memory(sparing=settings.gradient_checkpointing),
        assembled.reading(),
        checkpointing(assembled.blocks if settings.gradient_checkpointing else []),
        FlatAdamW(weights, rates, settings.weight_decay) as optimizer,
    ):
        restore(state, weights, optimizer)
        states.set_random_state(state.rng, device)
        yield optimizer


def finished(state: TrainingState, settings: TrainingSettings) -> bool:
    """Whether the epochs or the patience are used up."""
    assert settings.epochs is not None
    return state.epoch >= settings.epochs or state.waited >= settings.patience


@contextmanager
def _dropout(assembled: Assembled) -> Iterator[None]:
    """Inside, the base's own hidden dropout and the method's are on. Dropout of attention weights stays off: with it
    PyTorch would leave its fast attention for one that saves the (tokens, tokens) weights of every head. So does
    dropout below the lowest trainable block: what is computed once is the same with and without a cache."""
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


def _update(
    assembled: Assembled, optimizer: FlatAdamW, settings: TrainingSettings, total: torch.Tensor
) -> tuple[float, bool]:
    """Clip and update, all but what the method leaves as it is.

    Returns the step's loss and whether the weights were updated: not where loss or gradient is not finite. A GPU is
    waited for once, when it has been given all there is to do."""
    resting = [(part, part.clone()) for part in assembled.method.resting()]
    taken = optimizer.step(settings.max_grad_norm, total)
    for part, before in resting:  # AdamW's decay draws at them too
        part.copy_(before)
    loss, was_taken = torch.stack([total, taken.double()]).tolist()
    return loss, bool(was_taken)


def _accumulate_in_memory(
    assembled: Assembled, examples: Examples, chosen: np.ndarray, settings: TrainingSettings, state: TrainingState
) -> torch.Tensor:
    """``accumulate``. Where memory runs out and ``auto_micro_batch`` allows it, ``state.micro_batch_tokens`` becomes
    half of the largest part, and the step is begun anew with the same random numbers."""
    if not settings.auto_micro_batch:
        return accumulate(assembled, examples, chosen, settings)
    device = assembled.model.device
    drawn = states.random_state(device)
    while True:
        now = settings.model_copy(
            update={"micro_batch_tokens": state.micro_batch_tokens or settings.micro_batch_tokens}
        )
        try:
            return accumulate(assembled, examples, chosen, now)
        except (RuntimeError, MemoryError) as error:
            smaller = _half_of_largest(assembled, examples, chosen, now)
            if smaller is None or not is_out_of_memory(error):
                raise
        # not in the handler: while the error is at hand, so are the activations
        state.micro_batch_tokens = smaller
        for weight in assembled.trainable().values():
            weight.grad = None
        if device.type == "cuda":
            torch.cuda.empty_cache()
        states.set_random_state(drawn, device)


def _half_of_largest(
    assembled: Assembled, examples: Examples, chosen: np.ndarray, settings: TrainingSettings
) -> int | None:
    """Half the padded tokens of the step's largest part; None when each is one row."""
    lengths = examples.rows.lengths
    parts = _parts(assembled, examples, chosen, settings)
    sizes = [len(part) * max(lengths[row] for row in part) for part in parts if len(part) > 1]
    return max(sizes) // 2 if sizes else None


def accumulate(
    assembled: Assembled, examples: Examples, chosen: np.ndarray, settings: TrainingSettings
) -> torch.Tensor:
    """Add the gradient of the mean loss over the ``chosen`` rows; returns that loss, a scalar in fp64.

    Every part's sum is divided by the units of the whole step, not by its own: the gradient is the one that a single
    pass over all rows gives, however the rows are shared out. To be called inside ``assembled.reading()``.
    """
    objective, total = assembled.task.objective, torch.zeros((), dtype=torch.float64, device=assembled.model.device)
    units = objective.units(examples.targets, chosen.tolist())
    with starting_at(assembled, examples.boundary) as give:
        for part in _parts(assembled, examples, chosen, settings):
            batch = batch_of(assembled, examples, part, give)
            with _saving_less(examples.rows.lengths, part):
                loss = objective.loss(assembled.model, batch, settings.label_smoothing) / units
            loss.backward()
            total += loss.detach()
    return total


def _parts(
    assembled: Assembled, examples: Examples, chosen: np.ndarray, settings: TrainingSettings
) -> list[np.ndarray]:
    """The rows of a step as they go through the model together."""
    packing = assembled.packing
    mixed_and_padded = packing.first_position is None and assembled.task.objective.mixes_lengths
    group: Group = (lambda length: (packing.group(length), like_length(length))) if mixed_and_padded else packing.group
    return parts_of(chosen, examples.rows.lengths, settings.micro_batch_tokens, group)


def _saving_less(lengths: Sequence[int], part: np.ndarray) -> AbstractContextManager[None]:
    """With many tokens at a time, activations saved for backward are what fills a CPU's memory."""
    many = sum(lengths[row] for row in part) >= policy.QUANTIZE_SAVED_FROM_TOKENS
    return quantized_saved_activations() if many else nullcontext()


@contextmanager
def checkpointing(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, each block saves only its input and recomputes the rest in the backward pass (Chen et al. 2016)."""
    recomputed = {block: partial(checkpoint, block.forward, use_reentrant=False) for block in blocks}
    with with_forward(recomputed):
        yield
