"""Batches of token sequences with little padding.

Rows of like length go together, so padding is a few percent instead of half. The order is a function of seed and
epoch alone: an interrupted run finds its place again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

_POOL = 50  # batches whose rows are sorted by length together: near-uniform lengths, yet a new mix every epoch


NOT_LEARNED = -100
"""Label of a token that is read and not learned."""

Targets = torch.Tensor | list[list[int]]
"""What rows should give: a class each, (rows,) int64; or a label for every token of every row."""


@dataclass(frozen=True)
class Encoded:
    """One sequence to learn from: ``labels[i]`` is ``ids[i]`` where the token is learned, else ``NOT_LEARNED``.

    The first token is never learned: nothing stands before it that could predict it.
    """

    ids: list[int]
    labels: list[int]
    tokens: int
    """Length before it was cut."""
    answer_cut: bool = False
    """Learned tokens other than the end of the text were cut off."""
    end_cut: bool = False
    """The learned end of the text was cut off."""

    @property
    def learned(self) -> int:
        """Number of learned tokens."""
        return sum(label != NOT_LEARNED for label in self.labels)


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences: ids and mask, both (rows, longest).

    ``targets`` are (rows,) classes, or (rows, longest) labels with ``NOT_LEARNED`` where nothing is learned.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    targets: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        targets = None if self.targets is None else self.targets.to(device)
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), targets)


def epoch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Row numbers of each batch of one epoch: shuffled, then sorted by length inside pools, batches shuffled again."""
    generator = np.random.default_rng([seed, epoch])
    rows = generator.permutation(len(lengths))
    size = np.asarray(lengths)
    batches: list[np.ndarray] = []
    for start in range(0, len(rows), batch_size * _POOL):
        pool = rows[start : start + batch_size * _POOL]
        pool = pool[np.argsort(size[pool], kind="stable")]
        batches += [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
    generator.shuffle(batches)
    return batches


def sorted_order(lengths: Sequence[int], token_budget: int = 4096) -> list[np.ndarray]:
    """Row numbers of batches for inference: by length, as many rows as fit ``token_budget`` padded tokens."""
    batches: list[list[int]] = []
    for row in np.argsort(np.asarray(lengths), kind="stable"):
        # rows come in rising length, so the newest is the longest of its batch
        if not batches or lengths[row] * (len(batches[-1]) + 1) > token_budget:
            batches.append([])
        batches[-1].append(int(row))
    return [np.array(batch) for batch in batches]


def parts_of(rows: np.ndarray, lengths: Sequence[int], token_budget: int) -> list[np.ndarray]:
    """``rows`` shared out, in their order, over parts of at most ``token_budget`` padded tokens (one row at least)."""
    parts: list[list[int]] = []
    longest = 0
    for row in rows:
        longest = max(longest, lengths[row])
        if not parts or longest * (len(parts[-1]) + 1) > token_budget:
            parts.append([])
            longest = lengths[row]
        parts[-1].append(int(row))
    return [np.array(part) for part in parts]


def collate(
    sequences: Sequence[Sequence[int]],
    rows: np.ndarray,
    pad_id: int,
    prefix: Sequence[int] = (),
    targets: Targets | None = None,
) -> Batch:
    """Pad the sequences of ``rows`` on the right; ``prefix`` ids (a soft prompt's) stand before each."""
    ids = _padded([[*prefix, *sequences[row]] for row in rows], pad_id)
    lengths = torch.tensor([len(prefix) + len(sequences[row]) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    if isinstance(targets, list):
        unlearned = [NOT_LEARNED] * len(prefix)
        return Batch(ids, mask, _padded([[*unlearned, *targets[row]] for row in rows], NOT_LEARNED))
    return Batch(ids, mask, None if targets is None else targets[torch.as_tensor(rows)])


def _padded(sequences: list[list[int]], filler: int) -> torch.Tensor:
    """(rows, longest) int64, ``filler`` on the right."""
    longest = max(map(len, sequences))
    return torch.tensor([sequence + [filler] * (longest - len(sequence)) for sequence in sequences])


@dataclass(frozen=True)
class Rows:
    """Token sequences and what turns them into batches."""

    sequences: list[list[int]]
    pad_id: int
    prefix: Sequence[int] = range(0)
    """Tokens before every sequence: a soft prompt's virtual ones, or a hard prompt's."""

    def batch(self, rows: np.ndarray, targets: Targets | None = None) -> Batch:
        """The padded batch of these rows."""
        return collate(self.sequences, rows, self.pad_id, self.prefix, targets)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, virtual ones included."""
        return [len(self.prefix) + len(sequence) for sequence in self.sequences]

    def digest(self) -> str:
        """Hash of the tokens."""
        total = hashlib.sha256(repr((self.pad_id, self.prefix)).encode())
        for sequence in self.sequences:
            total.update(np.asarray([len(sequence), *sequence], dtype=np.int64).tobytes())
        return total.hexdigest()
