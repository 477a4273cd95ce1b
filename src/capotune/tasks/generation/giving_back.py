"""After training: a part of the change is given back, where the method has a way to its start and other text gains.

Weights on the straight line between start and end do better on other data than the end does, and hardly worse on the
trained kind (Wortsman et al. 2022, arXiv 2109.01903, §4, for whole models). How far to go back is decided by the
held-out rows.
"""

from __future__ import annotations

from typing import Final

from capotune.adapters.assemble import Assembled
from capotune.adapters.task_model import Score
from capotune.evaluation.forward import Examples, held_out_score
from capotune.events import Reporter, Stage, alive

_PARTS: Final = (0.6, 0.7, 0.8, 0.9)
"""Of the way, in the order in which they are tried."""
_ENOUGH: Final = 0.9
"""Of what training brought on the held-out rows."""


def give_back(assembled: Assembled, held: Examples, score: Score, report: Reporter) -> tuple[Score, float | None]:
    """Leave the trained weights at the smallest part of their way that has ``_ENOUGH`` of the gain; the held-out score
    there, and the part, None where the method has no way. ``score``: theirs as they are."""
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
