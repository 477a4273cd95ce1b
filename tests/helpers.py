"""Shared by the contract tests: a base with a method on it, made-up examples, logits, and content hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from capotune.adapters.assemble import Assembled, assemble, attach
from capotune.data.batches import TokenRows
from capotune.engine import loop
from capotune.engine.loop import train
from capotune.engine.state import TrainingState
from capotune.evaluation.forward import Examples, held_out_score, outputs
from capotune.evaluation.resume import BoundaryStates
from capotune.methods.base import Start
from capotune.models.base import Base, find
from capotune.models.sentence_files import Pooling
from capotune.settings import Context, TrainingSettings
from capotune.tasks.classification import Classification

LABELS = ("late", "broken", "money")
CPU = torch.device("cpu")
TRAINED: dict[str, Any] = {"score": None, "held_out_score": 0.5, "test_rows": 0, "train_rows": 48, "adapter": "lora"}
"""What an adapter's record says of its training when nobody asks."""
WORDS = range(4, 28)
"""Ids of the real words of the small models' tokenizer."""


def on_base(
    base: Path,
    settings: TrainingSettings,
    *,
    seed: int = 0,
    attached: bool = True,
    pool: Pooling | None = None,
    tokens: list[int] | None = None,
) -> Assembled:
    """A fresh copy of ``base`` with the method on it and a head drawn from ``seed``."""
    settings = complete(settings, find(str(base)))
    task = Classification.on(find(str(base)), LABELS, None, settings.virtual_tokens, pool)
    assembled = assemble(task, settings, device=CPU)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in assembled.model.classifier.parameters():
            weight.normal_(0, 0.02, generator=generator)
    if attached:
        attach(assembled, Start(generator, tokens or [9, 10, 14, 15]))
    return assembled


def complete(settings: TrainingSettings, base: Base, *, has_head: bool = True) -> Any:
    """The settings with what was left out filled in, as a run does it."""
    return settings.completed(Context(base.hidden_size, has_head))


def accumulate(assembled: Assembled, given: Examples, chosen: np.ndarray, settings: TrainingSettings) -> float:
    """The loop's, with the base reading as it does there."""
    with assembled.reading():
        return float(loop.accumulate(assembled, given, chosen, settings))


def sequences(count: int, seed: int = 0, shortest: int = 3, longest: int = 14) -> list[list[int]]:
    """Random words between [CLS] and [SEP], of many lengths."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(shortest - 2, longest - 1, (count,), generator=generator).tolist()
    words = [torch.randint(WORDS.start, WORDS.stop, (size,), generator=generator).tolist() for size in sizes]
    return [[2, *body, 3] for body in words]


def examples(assembled: Assembled, count: int = 48, seed: int = 0) -> Examples:
    """Rows whose target a word decides: each row gets the word 4 + target, twice."""
    targets = torch.arange(count) % len(LABELS)
    bodies = sequences(count, seed)
    words = [[2, 4 + target, 4 + target, *row[1:]] for target, row in zip(targets.tolist(), bodies, strict=True)]
    return Examples(TokenRows(words, assembled.task.pad_id, assembled.method.virtual_token_ids), targets)


def fit(assembled: Assembled, *, seed: int = 0, **options: Any) -> tuple[TrainingState, list[float]]:
    """Train with the method's own settings on ``examples``; the state at the end and the loss of every step."""
    losses: list[float] = []
    also: Callable[..., bool] = options.pop("on_step", lambda *_: False)

    def on_step(state: TrainingState, total: int, loss: float) -> bool:
        losses.append(loss)
        return also(state, total, loss)

    given = options.pop("train_examples", None) or examples(assembled)
    held = options.pop("held_examples", None) or examples(assembled, 12, seed=1)
    settings = assembled.method.settings
    options.setdefault("evaluate", lambda: held_out_score(assembled, held))
    return train(assembled, given, settings, seed=seed, on_step=on_step, **options), losses


def shake(assembled: Assembled, seed: int = 7) -> None:
    """Move every trained weight from its start, so that nothing is tested at B = 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in assembled.trainable().values():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)


def logits(assembled: Assembled, rows: list[list[int]] | None = None) -> torch.Tensor:
    """Logits of rows (some random ones when left out) in padded batches."""
    prefix = assembled.method.virtual_token_ids if assembled.model.virtual_tokens else range(0)
    return predict_logits(assembled, TokenRows(rows or sequences(11, seed=3), assembled.task.pad_id, prefix))


def predict_logits(assembled: Assembled, rows: TokenRows, boundary: BoundaryStates | None = None) -> torch.Tensor:
    """A classifier's logits (rows, labels), in the order of the rows."""
    unknown = torch.zeros(len(rows.sequences), dtype=torch.long)
    return outputs(assembled, Examples(rows, unknown, boundary))


def weights(assembled: Assembled) -> dict[str, torch.Tensor]:
    """A copy of every trained weight."""
    return {key: weight.detach().clone() for key, weight in assembled.trainable().items()}


def trained_count(assembled: Assembled) -> int:
    """Weights that training changes: of those that the method trains, all but what it leaves as they are."""
    resting = sum(part.numel() for part in assembled.method.resting())
    return sum(weight.numel() for weight in assembled.trainable().values()) - resting


def contents(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every tensor of a module, packed codes included."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Equal names and equal bits."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different


def unsigned(adapter: Path) -> None:
    """Take the checksums out of an adapter's record, so that its weights may be others."""
    path = adapter / "capotune.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({name: value for name, value in record.items() if name != "sha256"}), encoding="utf-8")


def folder_digest(folder: Path) -> dict[str, str]:
    """sha256 of every file below ``folder``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
