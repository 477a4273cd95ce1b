"""Data and task, ready to train: read, checked, tokenised, split, reported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from capotune.adapters.assemble import classification_task
from capotune.config import MethodSettings, PromptTuningSettings, TrainSettings
from capotune.data.batches import Rows
from capotune.data.labelled import LabelledData, hold_out, load_labelled, normalised
from capotune.data.report import inspect_data
from capotune.errors import SettingError
from capotune.models.load import Source, find, pooling
from capotune.tasks.classification import Classification
from capotune.training.loop import Examples

MOST_HELD_OUT = 500

Event = dict[str, Any]
"""``kind`` and its values: stage(text), data(report), start(trainable, total), step(step, total, loss),
epoch(epoch, loss, score), result(…)."""
Reporter = Callable[[Event], None]


@dataclass(frozen=True)
class Prepared:
    """Data and task, tokenised and split."""

    data: LabelledData
    source: Source
    task: Classification
    train: Examples
    test: Examples
    fit_rows: torch.Tensor
    """Training rows that weights are fitted to."""
    held_rows: torch.Tensor
    """Training rows held out to choose the regularisation and when to stop."""

    def subset(self, rows: torch.Tensor) -> Examples:
        """Some of the training rows."""
        tokens = self.train.rows
        chosen = Rows([tokens.sequences[row] for row in rows.tolist()], tokens.pad_id, tokens.prefix)
        return Examples(chosen, self.train.targets[rows])


def prepare(settings: TrainSettings, method: MethodSettings, report: Reporter) -> Prepared:
    """Read and check the data, tokenise it for the base, hold rows out, and report what was found."""
    data = load_labelled(
        settings.data,
        test=settings.test,
        text_column=settings.text_column,
        label_column=settings.label_column,
        test_fraction=settings.test_fraction,
        seed=settings.seed,
    )
    source = find(settings.model)
    virtual = method.num_virtual_tokens if isinstance(method, PromptTuningSettings) else 0
    task = classification_task(
        source, tuple(data.label_names), pooling(source), settings.max_length, virtual, settings.trust_remote_code
    )
    lengths = task.token_lengths(data.train.texts), task.token_lengths(data.test.texts)
    report({"kind": "data", "report": asdict(inspect_data(data, *lengths, task.max_length))})
    train_targets = task.targets(data.train.labels)
    fraction = min(settings.validation_fraction, MOST_HELD_OUT / len(train_targets))
    groups = [normalised(text) for text in data.train.texts]  # equal texts must not stand on both sides
    fit, held = hold_out(train_targets.tolist(), fraction, settings.seed, groups)
    return Prepared(
        data,
        source,
        task,
        Examples(Rows(task.encode(data.train.texts), task.pad_id), train_targets),
        Examples(Rows(task.encode(data.test.texts), task.pad_id), task.targets(data.test.labels)),
        torch.as_tensor(fit),
        torch.as_tensor(held),
    )


def start_tokens(method: MethodSettings, prepared: Prepared) -> list[int]:
    """Tokens whose embeddings a soft prompt starts from."""
    if not isinstance(method, PromptTuningSettings):
        return []
    if method.init == "vocabulary":
        return sorted({token for sequence in prepared.train.rows.sequences for token in sequence})
    text = method.init_text or ", ".join(label.replace("_", " ") for label in prepared.task.labels)
    tokens = prepared.task.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    if not tokens:
        raise SettingError(f"--init-text {text!r}: the tokenizer makes no token of it. Give words.")
    return list(tokens)


def data_hash(data: LabelledData) -> str:
    content = [data.train.texts, data.train.labels, data.test.texts, data.test.labels]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
