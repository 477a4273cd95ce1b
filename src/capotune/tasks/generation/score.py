"""How well a language model writes: the same code for a run's test rows and for ``evaluate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import pydantic
import torch

from capotune.adapters.assemble import Assembled
from capotune.data.batches import TokenRows
from capotune.data.encoded_rows import EncodedRows
from capotune.data.samples import Samples, question_of
from capotune.evaluation.forward import Examples, outputs
from capotune.evaluation.metrics import mean_interval, metric, perplexity
from capotune.evaluation.pairs import RowCounts
from capotune.events import Reporter, Stage, Warned, counter
from capotune.settings import DecodingSettings
from capotune.tasks.base import Scored
from capotune.tasks.generation.answers import AnsweredRows, answer_rows
from capotune.tasks.generation.deciding import Compared
from capotune.tasks.generation.general import FEWEST


@dataclass(frozen=True)
class ScoredAs:
    """How test rows are scored; stored with the adapter, so that ``evaluate`` scores as the run did."""

    decoding: DecodingSettings = field(default=DecodingSettings())
    answers: int = 200
    """Rows that the model answers, at most."""
    metric: Compared = "perplexity"
    """The score to compare by (``deciding``)."""
    general: int = FEWEST
    """Positions of general text on which the model is compared with its base."""

    def to_json(self) -> dict[str, Any]:
        """As an adapter's record holds it, which has the metric with how it was trained."""
        return {"decoding": self.decoding.model_dump(mode="json"), "answers": self.answers, "general": self.general}

    @staticmethod
    def from_json(values: dict[str, Any]) -> ScoredAs:
        """What ``to_json`` gave, with the ``metric`` that stands beside it. Adapters written before say nothing of
        general text."""
        metric, general = values.get("metric", "perplexity"), values.get("general", FEWEST)
        return ScoredAs(DecodingSettings(**values["decoding"]), values["answers"], metric, general)


def _readable(values: dict[str, Any]) -> dict[str, Any]:
    """``ValueError`` for what ``ScoredAs.from_json`` cannot read."""
    counts = (values.get("answers"), values.get("general", FEWEST))
    if not isinstance(values.get("decoding"), dict) or any(type(count) is not int or count < 0 for count in counts):
        raise ValueError("decoding, the number of answers and of positions of general text are expected")
    DecodingSettings(**values["decoding"])
    return values


StoredScoredAs = Annotated[dict[str, Any], pydantic.AfterValidator(_readable)]
"""What ``ScoredAs.to_json`` gave, in a file."""


def score_samples(
    assembled: Assembled, encoded: EncodedRows, samples: Samples, scored_as: ScoredAs, report: Reporter
) -> Scored:
    """Loss and perplexity of every row that has a token in the loss; exact match and ROUGE-L of some answers.

    Args:
        assembled: the language model.
        encoded: of each row its sequences: one, or the windows of a long text. A single row's windows count as rows.
        samples: the rows; answers are compared with theirs, where they hold some.
        scored_as: how answers are decoded, how many, and which score is compared by.
        report: called with progress.
    """
    by_window = samples.is_one_text or not samples.samples  # none: the end of the one text that is trained on
    counts = _loss_counts(assembled, encoded, by_window, report)
    if not counts:
        return Scored(scored_as.metric, {}, {}, 0)
    nats, tokens = [row[0] for row in counts], [int(row[1]) for row in counts]
    loss = sum(nats) / max(sum(tokens), 1)
    scores, intervals = {"perplexity": perplexity(loss), "loss": loss}, {}
    if spread := mean_interval(nats, tokens):
        low, high = max(0.0, spread[0]), spread[1]  # of a few rows that differ it would reach below what a loss can be
        intervals = {"perplexity": (perplexity(low), perplexity(high)), "loss": (low, high)}
    measured_on = dict.fromkeys(scores, f"{sum(tokens):,} tokens of {len(counts):,} rows")
    by_loss = RowCounts.of(metric("perplexity"), counts)
    if not scored_as.answers or not samples.facts["answered"].any():
        extra = {"tokens": sum(tokens), "answered": 0}
        return Scored("perplexity", scores, intervals, len(counts), measured_on, [], by_loss, extra)
    report(Stage(text="answering test rows"))
    answered = answer_rows(assembled, samples, scored_as.answers, scored_as.decoding, counter(report))
    number = len(answered.rows)
    if answered.too_long:
        text = (
            f"{answered.too_long:,} of {number + answered.too_long:,} rows to answer are passed over: their question "
        )
        report(Warned(text=f"{text}fills all that the model takes."))
    where = (
        f"{number:,} rows" if number == len(samples) else f"{number:,} of {len(samples):,} rows, drawn by a fixed seed"
    )
    scores |= answered.scores
    intervals |= answered.intervals
    measured_on |= dict.fromkeys(answered.scores, where)
    name = scored_as.metric if scored_as.metric in scores else "perplexity"
    compared, other = answered.counts, by_loss
    if name != compared.metric:
        compared, other = other, compared
    extra = {"tokens": sum(tokens), "answered": number}
    rows, predictions = len(compared.counts), _predictions(samples, answered)
    return Scored(name, scores, intervals, rows, measured_on, predictions, compared, extra, (other,))


def _loss_counts(assembled: Assembled, encoded: EncodedRows, by_window: bool, report: Reporter) -> list[list[float]]:
    """Of each row, or each window, the sum of its losses in nats and the number of its tokens in the loss; those
    without any are left out."""
    chosen = encoded.with_loss
    if not len(chosen):
        return []
    rows = TokenRows(encoded.ids_of(chosen), assembled.task.pad_id, assembled.method.virtual_token_ids)
    found = outputs(assembled, Examples(rows, encoded.labels_of(chosen)), counter(report)).double()
    if by_window:
        return found.tolist()
    rows_of, place = np.unique(encoded.rows_of(chosen), return_inverse=True)
    sums = torch.zeros(len(rows_of), 2, dtype=torch.float64).index_add_(0, torch.from_numpy(place), found)
    return sums.tolist()


def _predictions(samples: Samples, answered: AnsweredRows) -> list[dict[str, Any]]:
    return [
        {
            "prompt": question_of(samples.samples[row]),
            "expected": expected,
            "written": written,
            "line": samples.lines[row],
        }
        for row, expected, written in zip(answered.rows, answered.expected, answered.written, strict=True)
    ]
