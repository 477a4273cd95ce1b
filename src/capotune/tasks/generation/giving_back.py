"""After training, weights may be interpolated between their start and their end, which costs less on other text.

On the straight line between the two, models do better on other data than at its end, and hardly worse on the trained
kind (Wortsman et al. 2022, arXiv 2109.01903, §4, for whole models). Held-out rows decide which point is taken.
"""

from __future__ import annotations

from typing import Final

from capotune.adapters.assemble import Assembled
from capotune.adapters.task_model import Score
from capotune.evaluation.forward import Examples, held_out_score
from capotune.events import Reporter, Stage, alive

_PARTS: Final = (0.6, 0.7, 0.8, 0.9)
"""Parts of the change to leave, the smallest first: the first that is good enough is taken."""
_ENOUGH: Final = 0.9
"""Share of the gain on the held-out rows that a part must have to be good enough."""


def give_back(assembled: Assembled, held: Examples, score: Score, report: Reporter) -> tuple[Score, float | None]:
    """Leave the smallest part of the trained weights' change that has ``_ENOUGH`` of the gain.

    Returns the held-out score there and the part, from 0 (the start) to 1. The part is None where the method does not
    interpolate (``Method.way_from_start``). ``score`` is that of the weights as they are.
    """
    go = assembled.method.way_from_start()
    if go is None:
        return score, None
    report(Stage(text="choosing how much of the change to leave"))

    def at(part: float) -> Score:
        go(part)
        return held_out_score(assembled, held, alive(report))

    (before,) = at(0.0)
    enough = before + _ENOUGH * (score[0] - before)
    for part in _PARTS:
        found = at(part)
        if found[0] >= enough:
            return found, part
    go(1.0)
    return score, 1.0
