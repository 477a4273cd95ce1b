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


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences: ids and mask, both (rows, longest)."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device))


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


def collate(sequences: Sequence[Sequence[int]], rows: np.ndarray, pad_id: int, prefix: Sequence[int] = ()) -> Batch:
    """Pad the sequences of ``rows`` on the right; ``prefix`` ids (a soft prompt's) stand before each."""
    chosen = [[*prefix, *sequences[row]] for row in rows]
    longest = max(map(len, chosen))
    ids = torch.full((len(chosen), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(chosen), longest), dtype=torch.long)
    for number, sequence in enumerate(chosen):
        ids[number, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[number, : len(sequence)] = 1
    return Batch(ids, mask)


@dataclass(frozen=True)
class Rows:
    """Token sequences and what turns them into batches."""

    sequences: list[list[int]]
    pad_id: int
    prefix: range = range(0)
    """Virtual tokens before every sequence."""

    def batch(self, rows: np.ndarray) -> Batch:
        """The padded batch of these rows."""
        return collate(self.sequences, rows, self.pad_id, self.prefix)

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
