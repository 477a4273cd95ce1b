"""How far a predicted number may be off: split-conformal intervals from held-out rows.

Half of the interval's width is that distance from the true number which all but a tenth of the held-out rows stay
within. Of new rows drawn as these were, at least nine in ten are in their interval (V. Vovk, A. Gammerman and G.
Shafer, Algorithmic Learning in a Random World, 2005, §4.1; J. Lei et al., "Distribution-free predictive inference for
regression", JASA 113 (2018), §2.2). The held-out rows also choose when training stops, which favours them a little:
runs report the share of test rows that are in theirs.
"""

from __future__ import annotations

import math

import torch

LEVEL = 0.9
"""Share of the rows that the intervals are to hold."""


def choose_margins(outputs: torch.Tensor, targets: torch.Tensor) -> list[float] | None:
    """Half the width of each number's interval; None where there are too few rows (below 9) to say.

    Shapes: outputs and targets (held-out rows, numbers).
    """
    rows = len(targets)
    rank = math.ceil((rows + 1) * LEVEL)
    if rank > rows:
        return None
    errors = (outputs - targets).abs().sort(0).values
    return [float(margin) for margin in errors[rank - 1]]
