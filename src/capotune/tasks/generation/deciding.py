"""Which score techniques are compared by: exact match where it can tell them apart, else perplexity.

It is decided on training rows, never on test rows, in two steps:

    by the data     before anything is trained, so equal for every technique: answers are short, and few questions have
                    several different answers
    by the model    after training: it answers some of the held-out rows to the letter

The techniques of one comparison take the second step together (``decide_together``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from capotune.adapters.assemble import Assembled
from capotune.data.samples import Samples
from capotune.evaluation.forward import Examples, outputs
from capotune.events import OnProgress
from capotune.tasks.generation.objective import GreedyMatch

Compared = Literal["exact_match", "perplexity"]

SHORT_ANSWER: Final = 48
"""Tokens; answers that are mostly at most this long may be compared to the letter."""
SEVERAL_ANSWERS: Final = 0.1
"""Share of the rows whose question has other answers too; above it no answer is the right one."""
ENOUGH_MATCHES: Final = 0.05
"""Share of the held-out rows that some technique must answer to the letter."""
_MOST_ROWS: Final = 200  # held-out rows that are looked at


def decide_by_data(samples: Samples, lengths: Sequence[int] | NDArray[np.int64]) -> tuple[Compared, str]:
    """The score that the training rows allow, and what speaks against exact match; ``lengths``: the tokens in the loss
    of each sequence."""
    if np.median(lengths) > SHORT_ANSWER:
        why = f"half of the answers have more than {SHORT_ANSWER} tokens"
    elif (share := _share_with_several_answers(samples)) > SEVERAL_ANSWERS:
        why = f"{share:.0%} of the training rows have a question with several answers, so that no one is the right one"
    else:
        return "exact_match", ""
    return "perplexity", f"Perplexity decides, not exact match: {why}."


def decide_together(shares: Mapping[str, float], rows: int) -> tuple[Compared, str]:
    """The score for techniques that answer these ``shares`` of ``rows`` held-out rows to the letter, and why."""
    best = max(shares, key=lambda method: shares[method])
    share = f"{shares[best]:.0%} of {rows:,} held-out rows to the letter"
    if shares[best] >= ENOUGH_MATCHES:
        return "exact_match", f"Exact match decides: {best} answers {share}."
    who = f"{best} answers" if len(shares) == 1 else "no technique answers more than"
    return "perplexity", f"Perplexity decides, as exact match cannot tell techniques apart here: {who} {share}."


def matched_share(assembled: Assembled, held_out: Examples, progress: OnProgress | None = None) -> tuple[float, int]:
    """The share of the first held-out rows whose last answer greedy decoding would write to the letter, and how many
    rows these are. One forward pass: nothing is written."""
    rows = torch.arange(min(_MOST_ROWS, len(held_out.rows.sequences)))
    known = assembled.task.objective
    objective = GreedyMatch(known.backbone, known.plain_head)
    return float(outputs(assembled, held_out.take(rows), progress, objective).mean()), len(rows)


def _share_with_several_answers(samples: Samples) -> float:
    """Rows whose question stands in another row with another answer, as a share of all."""
    questions, answers = samples.facts["question"], samples.facts["answer"]
    order = np.lexsort((answers, questions))
    asked, answered = questions[order], answers[order]
    others = asked[1:][(asked[1:] == asked[:-1]) & (answered[1:] != answered[:-1])]
    return float(np.isin(questions, others).sum()) / max(1, len(questions))
