"""How the next token is chosen from the model's scores: Transformers' own processors, and a draw.

Their order is Transformers': the repetition penalty, then the temperature, top-k, top-p and min-p.

Drawing (a temperature above 0) takes the largest of log p + Gumbel noise, which is a draw from p (Gumbel 1954). The
noise comes from a generator of its own for each prompt: neither the batch a prompt stands in nor the caller's random
numbers play a part, nor are they disturbed.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence

import torch
from transformers.generation import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from capotune.errors import SettingError
from capotune.evaluation.leaving import ByRow
from capotune.settings import DecodingSettings


def check_choosing(decoding: DecodingSettings) -> None:
    """Raises ``SettingError`` for settings that exclude each other."""
    if decoding.num_beams > 1 and decoding.temperature > 0:
        raise SettingError(
            f"`num_beams={decoding.num_beams}` and `temperature={decoding.temperature:g}` exclude each other: beam "
            "search draws nothing.",
            advice="Leave one of them out.",
        )
    narrows = {"top_k": decoding.top_k > 0, "top_p": decoding.top_p < 1, "min_p": decoding.min_p > 0}
    given = next((name for name, is_given in narrows.items() if is_given), None)
    if given is not None and decoding.temperature == 0:
        raise SettingError(
            "needs a `temperature` above 0: without one nothing is drawn.",
            setting=given,
            given=f"{getattr(decoding, given):g}",
            advice="Give both, or none.",
        )


def processors(decoding: DecodingSettings, rows: Sequence[int], starts: Sequence[int]) -> list[LogitsProcessor]:
    """What the scores of a batch go through before the largest is taken.

    Args:
        decoding: the settings.
        rows: the number of each row's prompt, which decides its draws.
        starts: where each row's own tokens begin, behind padding and virtual tokens.
    """
    found: list[LogitsProcessor] = []
    if decoding.repetition_penalty != 1:
        found.append(_Repetition(decoding.repetition_penalty, starts, decoding.num_beams))
    if decoding.temperature > 0:
        found.append(TemperatureLogitsWarper(decoding.temperature))
        if decoding.top_k > 0:
            found.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p < 1:
            found.append(TopPLogitsWarper(decoding.top_p))
        if decoding.min_p > 0:
            found.append(MinPLogitsWarper(decoding.min_p))
        found.append(_Draw(decoding.seed, rows))
    return found


class _Repetition(LogitsProcessor, ByRow):  # type: ignore[misc]
    """Transformers' repetition penalty (Keskar et al. 2019, arXiv 1909.05858, §4.1) for the tokens of a row's own
    prompt and answer: not for padding, which depends on the batch, nor for virtual tokens, which have no score."""

    def __init__(self, penalty: float, starts: Sequence[int], beams: int) -> None:
        self.penalty = RepetitionPenaltyLogitsProcessor(float(penalty))
        self.starts = torch.tensor(starts).repeat_interleave(beams)[:, None]

    def of(self, rows: Sequence[int]) -> _Repetition:
        """The same for these rows."""
        fewer = copy.copy(self)
        fewer.starts = self.starts[list(rows)]
        return fewer

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """ids (rows, tokens so far), scores (rows, vocabulary) → scores of the same shape."""
        nobody = scores.shape[1]  # the id of one more token, which takes what is not to be penalised
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        ids = input_ids.masked_fill(positions < self.starts.to(input_ids.device), nobody)
        penalised: torch.Tensor = self.penalty(ids, torch.nn.functional.pad(scores, (0, 1)))
        return penalised[:, :nobody]


class _Draw(LogitsProcessor, ByRow):  # type: ignore[misc]
    """Adds Gumbel noise, so that the largest score is a draw; each row from a generator of its own."""

    def __init__(self, seed: int, rows: Sequence[int]) -> None:
        seeds = [random.Random(f"{seed} {row}").getrandbits(63) for row in rows]
        self.generators = [torch.Generator().manual_seed(own) for own in seeds]

    def of(self, rows: Sequence[int]) -> _Draw:
        """The same for these rows, whose generators go on."""
        fewer = copy.copy(self)
        fewer.generators = [self.generators[row] for row in rows]
        return fewer

    def __call__(self, _input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores (rows, vocabulary) → scores of the same shape."""
        noise = torch.empty(scores.shape)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)  # −log of it has the Gumbel distribution
        return scores.float() - noise.log().to(scores.device)
