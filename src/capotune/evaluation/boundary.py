"""What the frozen prefix of a model computes, once for all epochs, and whether the model can go on from there."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import torch

from capotune.adapters.assemble import Assembled
from capotune.data.batches import TokenRows
from capotune.evaluation.forward import Examples, batch_of, batches
from capotune.evaluation.resume import BoundaryReachedError, BoundaryStates, resume_from, stop_at
from capotune.events import OnProgress
from capotune.models.architecture import FAILURES
from capotune.models.sequence_packing import TOLERANCE, probe_sequences, relative_error

_OUTPUTS = (0, 1, 2)
"""Forms of a block's output that are tried (``BoundaryStates.outputs``)."""


@torch.no_grad()
def compute_boundary(
    assembled: Assembled, block: int, rows: TokenRows, progress: OnProgress | None = None
) -> torch.Tensor:
    """One forward pass up to ``block``: the states that enter it, (all tokens, hidden), without padding."""
    backbone, architecture = assembled.backbone, assembled.architecture
    starts = rows.starts
    values = torch.empty(int(starts[-1]), architecture.hidden_size, dtype=_dtype(assembled))
    unknown = Examples(rows, torch.zeros(len(rows.sequences), dtype=torch.long))
    with assembled.reading(), stop_at(assembled.model, architecture.blocks[block]) as caught:
        for chosen, batch in batches(assembled, unknown, progress):
            with suppress(BoundaryReachedError):
                backbone(**batch.inputs)
            states = batch.flat(caught.pop()).cpu()
            for row, of_row in zip(chosen, batch.split(states), strict=True):
                values[starts[row] : starts[row + 1]] = of_row
    return values


def boundary_bytes(assembled: Assembled, rows: TokenRows) -> int:
    """Size of what ``compute_boundary`` would compute."""
    return int(rows.starts[-1]) * assembled.architecture.hidden_size * _dtype(assembled).itemsize


def _dtype(assembled: Assembled) -> torch.dtype:
    """Of the states that a block passes on."""
    weight: torch.Tensor = next(assembled.backbone.parameters())
    return weight.dtype


@torch.no_grad()
def resumes_with(assembled: Assembled, block: int) -> int | None:
    """How the model can start at ``block``, as ``BoundaryStates.outputs``; None: it cannot.

    Some families read more than a block's input there: the embeddings once again, or what earlier blocks computed. So
    it is tried on a few short sequences: the whole model and what starts at ``block`` must compute the same.
    """
    probes = [ids.tolist() for ids in probe_sequences(assembled.backbone.config)]
    rows = TokenRows(probes, assembled.task.pad_id, assembled.method.virtual_token_ids)
    every = np.arange(len(probes))
    with assembled.reading():
        batch = batch_of(assembled, Examples(rows, torch.zeros(len(probes), dtype=torch.long)), every, None)
        expected = batch.flat(assembled.backbone(**batch.inputs).last_hidden_state).float()
        for outputs in _OUTPUTS:
            with suppress(*FAILURES):
                states = compute_boundary(assembled, block, rows)
                found = _resumed(assembled, block, BoundaryStates(states, rows.starts, outputs), rows)
                if relative_error(found.float(), expected) <= TOLERANCE.get(states.dtype, 1e-4):
                    return outputs
    return None


def _resumed(assembled: Assembled, block: int, boundary: BoundaryStates, rows: TokenRows) -> torch.Tensor:
    """Last hidden states (tokens, hidden), from ``block`` on."""
    every = np.arange(len(rows.sequences))
    examples = Examples(rows, torch.zeros(len(every), dtype=torch.long), boundary)
    with resume_from(assembled, block, boundary.outputs) as give:
        batch = batch_of(assembled, examples, every, give)
        states: torch.Tensor = assembled.backbone(**batch.inputs).last_hidden_state
    return batch.flat(states)
