"""Steps that were not taken because their loss or gradient is not finite: when there are too many, and whose fault."""

from __future__ import annotations

import numpy as np

from capotune.adapters.assemble import Assembled
from capotune.data.batches import epoch_order
from capotune.engine.loop import accumulate
from capotune.engine.state import TrainingState
from capotune.errors import CapotuneError, DataError, SettingError
from capotune.evaluation.forward import Examples
from capotune.kernels.execution import reduced_precision

MOST_IN_A_ROW = 5
"""Steps skipped in a row at which training stops. A row at fault comes up once an epoch, and a number too large for its
format leaves with its batch; weights that have diverged stay so, and every further step would be lost."""
_SHOWN_ROWS = 5


def are_too_many(state: TrainingState, is_over: bool = False) -> bool:
    """Whether training stops at the steps that were skipped; ``is_over``: or is not counted as done, since it ended
    with them and they are most of its steps."""
    at_the_end = is_over and state.skipped_in_a_row > 0 and 2 * state.skipped > state.step
    return state.skipped_in_a_row >= MOST_IN_A_ROW or at_the_end


def stopped(
    assembled: Assembled, examples: Examples, state: TrainingState, seed: int, loss: float, is_over: bool
) -> CapotuneError:
    """Why training stops at ``state``, whose last step's loss is ``loss``: a ``DataError`` that names the rows at
    fault, or where every row has such a loss or gradient now, a ``SettingError``."""
    size = assembled.method.settings.batch_size or 1
    rows = np.concatenate(_last_batches(examples, size, seed, state))
    at_fault = [int(row) for row in rows if not _is_finite(assembled, examples, row)]
    number = f"{state.skipped_in_a_row} steps in a row were skipped, the last is step {state.step}"
    if 0 < len(at_fault) < len(rows):
        return DataError(
            f"the loss or gradient of {_named(examples, at_fault)} is not finite: {number}.",
            advice=f"Mend these rows and start anew{'' if is_over else ', or go on after them with `resume`'}.",
        )
    what = f"the loss is {loss:.4g}" if not np.isfinite(loss) else "the gradient is not finite"
    return SettingError(
        f"{what}, and training diverged: {number}. Their rows: {_named(examples, rows.tolist())}.",
        advice="Lower `learning_rate`.",
    )


def _last_batches(examples: Examples, size: int, seed: int, state: TrainingState) -> list[np.ndarray]:
    """The rows of each of the steps in a row up to ``state``."""
    found: list[np.ndarray] = []
    for epoch in range(state.epoch, -1, -1):
        batches = epoch_order(examples.rows.lengths, size, seed, epoch, mixed=state.mixed_lengths)
        found = [*(batches[: state.batch] if epoch == state.epoch else batches), *found]
        if len(found) >= state.skipped_in_a_row:
            break
    return found[-state.skipped_in_a_row :]


def _is_finite(assembled: Assembled, examples: Examples, row: int) -> bool:
    """Whether loss and gradient of this row alone are; the weights' gradients are forgotten."""
    weights = assembled.trainable().values()
    with assembled.reading(), reduced_precision():
        loss = accumulate(assembled, examples, np.array([row]), assembled.method.settings)
    finite = [loss.isfinite(), *(one.grad.isfinite().all() for one in weights if one.grad is not None)]
    for weight in weights:
        weight.grad = None
    return all(map(bool, finite))


def _named(examples: Examples, rows: list[int]) -> str:
    more = f" and {len(rows) - _SHOWN_ROWS} more rows" if len(rows) > _SHOWN_ROWS else ""
    return ", ".join(map(examples.where, rows[:_SHOWN_ROWS])) + more
