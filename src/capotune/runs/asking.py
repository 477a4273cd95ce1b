"""An adapter, its base and what became of it, asked the same rows: how merge and export know what they wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from capotune.adapters.assemble import Assembled
from capotune.data.batches import IGNORE_INDEX, Encoded, without_loss
from capotune.data.token_types import TypedTokens
from capotune.evaluation.agreement import ROWS, cut_to_fit
from capotune.evaluation.divergence import SHORT_TEXT, WINDOW, answers_of, text_windows
from capotune.events import Reporter, alive


def rows_to_ask(task: Any, data: Any) -> list[Encoded]:
    """The first rows of ``data``, read as ``task`` reads them in training; some lines of ours for None.

    Raises ``DataError`` where they cannot be read.
    """
    if data is not None:
        rows = task.rows_to_compare(data, ROWS)
    elif task.has_head and task.reads_pairs:
        rows = without_loss(task.encode(list(pairwise(SHORT_TEXT.splitlines()))))
    else:
        windows = text_windows(task.base, SHORT_TEXT, by_line=True)
        rows = without_loss([window[0].tolist() for window in windows])
        if not task.has_head:
            rows = [replace(one, labels=[IGNORE_INDEX, *one.ids[1:]]) for one in rows]
    return cut_to_fit(rows, min(WINDOW, task.base.max_length, task.max_length))


def ask(task: Any, model: Any, rows: Sequence[Encoded], report: Reporter) -> Tensor:
    """Logits (distributions, choices): of each token or row, or of each output of a row (``Task.distributions``)."""
    types = [torch.tensor([list(one.ids.types)]) for one in rows if isinstance(one.ids, TypedTokens)]
    logits = answers_of(model, [torch.tensor([one.ids]) for one in rows], alive(report), types or None)
    distributions: Tensor = task.distributions(logits)
    return distributions


def ask_with_and_without(assembled: Assembled, rows: Sequence[Encoded], report: Reporter) -> tuple[Tensor, Tensor]:
    """The adapter's answers, and its base's alone; the adapter is off afterwards."""
    adapter = ask(assembled.task, assembled.model, rows, report)
    assembled.method.detach()
    return adapter, ask(assembled.task, assembled.model, rows, report)
