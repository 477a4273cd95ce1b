"""Ask a model what the data asks, and compare what it writes with the answers that stand there."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from capotune.adapters.assemble import Assembled
from capotune.data.samples import Samples, answer_of
from capotune.evaluation.generate import generate, tokens_left
from capotune.evaluation.metrics import exact_match, mean_interval, metric, rouge_l, wilson_interval
from capotune.evaluation.pairs import RowCounts
from capotune.settings import DecodingSettings


@dataclass(frozen=True)
class AnsweredRows:
    """What a model wrote for some rows that have an expected answer."""

    rows: list[int]
    """Their positions in the samples, rising."""
    expected: list[str]
    written: list[str]
    too_long: int = 0
    """Rows that were drawn and passed over, as their question leaves no token for an answer."""

    @property
    def scores(self) -> dict[str, float]:
        """Share of exact matches and mean ROUGE-L F1; nothing when no row was answered."""
        if not self.rows:
            return {}
        return {"exact_match": sum(self.exact) / len(self.rows), "rouge_l": sum(self._rouge) / len(self.rows)}

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95 % interval of each score that has one."""
        if not self.rows:
            return {}
        found = {"exact_match": wilson_interval(self.scores["exact_match"], len(self.rows))}
        if mean := mean_interval(self._rouge, [1] * len(self.rows)):
            found["rouge_l"] = max(0.0, mean[0]), min(1.0, mean[1])
        return found

    @property
    def counts(self) -> RowCounts:
        """What each answered row adds to the exact matches."""
        return RowCounts.of(metric("exact_match"), [[exact, 1] for exact in self.exact], self.rows)

    @property
    def exact(self) -> list[bool]:
        """For each row whether the answer is the expected one."""
        return [exact_match(*pair) for pair in self._compared]

    @property
    def _rouge(self) -> list[float]:
        return [rouge_l(*pair) for pair in self._compared]

    @property
    def _compared(self) -> list[tuple[str, str]]:
        """What was written and what was expected, both without the thinking before it: templates of models that think
        write some, if only empty, before every answer."""
        pairs = zip(self.written, self.expected, strict=True)
        return [(_behind_thinking(written), _behind_thinking(expected)) for written, expected in pairs]


def answer_rows(
    assembled: Assembled,
    samples: Samples,
    most: int,
    decoding: DecodingSettings,
    progress: Callable[[int, int], None] | None = None,
) -> AnsweredRows:
    """Let a language model answer at most ``most`` of the rows that have an answer, drawn by ``decoding.seed``.

    Rows whose question fills the whole context are passed over: there the model has nothing to say.
    """
    known = np.flatnonzero(samples.facts["answered"]).tolist()
    drawn = sorted(random.Random(decoding.seed).sample(known, min(most, len(known))))
    questions = {row: assembled.task.encode_question(samples.samples[row]) for row in drawn}
    rows = [row for row in drawn if tokens_left(assembled, questions[row]) > 0]
    expected = [answer_of(samples.samples[row]) or "" for row in rows]
    if samples.are_conversations:
        decoding = assembled.task.chat_decoding(decoding)
    written = generate(assembled, [questions[row] for row in rows], decoding, progress)
    return AnsweredRows(rows, expected, written, len(drawn) - len(rows))


def _behind_thinking(text: str) -> str:
    return text.rpartition("</think>")[2]
