"""Batches of token sequences: packed without padding, or padded on the right.

Where each row counts alike, rows of like length go together, so padding is a few percent instead of half where a model
needs it, and attention meets few different lengths where it doesn't. Where a row counts by its tokens, each batch has
rows of all lengths. The order is a function of seed and epoch alone: an interrupted run finds its place again.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from capotune.data.token_types import TypedTokens
from capotune.kernels import policy
from capotune.kernels.attention import Sequences

_POOL = 50  # batches whose rows are sorted by length together: near-uniform lengths, yet a new mix every epoch
_HASHED_AT_ONCE = 1000  # sequences

IGNORE_INDEX = -100
"""Label of a token that is read and not in the loss, as PyTorch's losses name it."""

Targets = torch.Tensor | Sequence[list[int]]
"""What rows should give: a class each, (rows,) int64; or a label for every token of every row."""


@dataclass(frozen=True)
class Encoded:
    """One sequence to train on: ``labels[i]`` is ``ids[i]`` where the token is in the loss, else ``IGNORE_INDEX``.

    The first token is never in the loss: nothing stands before it that could predict it.
    """

    ids: list[int]
    labels: list[int]
    tokens: int
    """Length before it was cut."""
    answer_cut: bool = False
    """Tokens in the loss other than the end of the text were cut off."""
    end_cut: bool = False
    """The end of the text, which is in the loss, was cut off."""
    straddles: bool = False
    """A token in the loss begins in what is only read, so that asked, it ends in other tokens."""

    @property
    def tokens_in_loss(self) -> int:
        """Number of tokens in the loss."""
        return sum(label != IGNORE_INDEX for label in self.labels)


def without_loss(sequences: Sequence[list[int]]) -> list[Encoded]:
    """Sequences of which no token is in a loss."""
    return [Encoded(ids, [IGNORE_INDEX] * len(ids), len(ids)) for ids in sequences]


@dataclass(frozen=True)
class Batch:
    """Sequences as a model reads them: padded on the right, or packed, which is one row of all tokens.

    What is *flat* has no padding and no rows: (tokens, …), sequence after sequence.
    """

    input_ids: torch.Tensor
    """(rows, longest), or packed (1, tokens)."""
    sequences: Sequences
    """The rows' lengths."""
    attention_mask: torch.Tensor | None = None
    """(rows, longest), 1 where a token is; None: packed."""
    position_ids: torch.Tensor | None = None
    """Packed: (1, tokens)."""
    targets: torch.Tensor | None = None
    """(rows,) classes, or flat labels (tokens,) with ``IGNORE_INDEX`` where a token is not in the loss."""
    in_loss: torch.Tensor | None = None
    """Flat positions in the loss (n,), where targets are labels: found here, since to look for them on a GPU is to wait
    for it."""
    token_type_ids: torch.Tensor | None = None
    """As ``input_ids``, where rows are pairs of texts and the base reads which of them a token is of."""

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model is called with."""
        types = {} if self.token_type_ids is None else {"token_type_ids": self.token_type_ids}
        if self.attention_mask is not None:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, **types}
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "sequences": self.sequences, **types}

    @cached_property
    def starts(self) -> torch.Tensor:
        """Where each row starts among the flat tokens, and where the last ends: (rows + 1,) int64."""
        return self.sequences.starts.to(self.input_ids.device)

    def flat(self, values: torch.Tensor) -> torch.Tensor:
        """(rows, longest, …) or packed (1, tokens, …) → (tokens, …)."""
        return values[0] if self.attention_mask is None else values[self.attention_mask.bool()]

    def states(self, backbone: Any, wanted: torch.Tensor | None) -> torch.Tensor:
        """What ``backbone`` makes of the flat positions ``wanted`` (n,), rising, or of all: (n, hidden)."""
        inputs = self.inputs
        if wanted is None or self.attention_mask is not None:
            states = self.flat(backbone(**inputs).last_hidden_state)
            return states if wanted is None else states[wanted]
        states = self.flat(backbone(**inputs, wanted=wanted).last_hidden_state)
        # a backbone whose last block can leave the other positions out has done so
        return states if len(states) == len(wanted) else states[wanted]

    def laid_out(self, values: torch.Tensor) -> torch.Tensor:
        """(tokens, …) → (rows, longest, …), zeros where padded, or packed (1, tokens, …)."""
        if self.attention_mask is None:
            return values[None]
        return nn.utils.rnn.pad_sequence(list(self.split(values)), batch_first=True)

    def split(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(tokens, …) → a tensor for each row."""
        return torch.split(values, list(self.sequences.lengths))

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in values.items() if torch.is_tensor(value)}
        return replace(self, **moved)


def epoch_order(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, *, mixed: bool = False
) -> list[np.ndarray]:
    """Row numbers of each batch of one epoch, at random: rows of like length together, or ``mixed``."""
    generator = np.random.default_rng([seed, epoch])
    order = _mixed if mixed else _of_like_length
    return order(np.asarray(lengths), generator.permutation(len(lengths)), batch_size, generator)


def _of_like_length(
    size: np.ndarray, rows: np.ndarray, batch_size: int, generator: np.random.Generator
) -> list[np.ndarray]:
    """Sorted by length inside pools, batches shuffled again."""
    batches: list[np.ndarray] = []
    for start in range(0, len(rows), batch_size * _POOL):
        pool = rows[start : start + batch_size * _POOL]
        pool = pool[np.argsort(size[pool], kind="stable")]
        batches += [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
    generator.shuffle(batches)
    return batches


def _mixed(size: np.ndarray, rows: np.ndarray, batch_size: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Rows by length are dealt out, one to each batch and again: each has nearly as many tokens as the others.

    A step's loss is a mean over its tokens. With short rows in one step and long ones in another, each token of the
    short ones would move the weights more.
    """
    rows = rows[np.argsort(size[rows], kind="stable")]
    count = -(-len(rows) // batch_size)
    batches: list[list[int]] = [[] for _ in range(count)]
    for start in range(0, len(rows), count):
        dealt = rows[start : start + count]
        for batch, row in zip(generator.permutation(count), dealt, strict=False):
            batches[batch].append(int(row))
    return [np.array(batch) for batch in batches]


def tokens_at_once(device: torch.device) -> int:
    """How many are read at a time where nothing is trained: what some hundred of them leave is still in a CPU's caches
    when it is read again, and a GPU likes more."""
    return policy.INFERENCE_TOKENS_AT_ONCE if device.type == "cpu" else policy.INFERENCE_TOKENS_AT_ONCE_ON_GPU


Group = Callable[[int], Hashable]
"""A value for each length; only rows of one value may stand in one batch."""


def like_length(length: int) -> int:
    """A number for lengths that are less than a quarter apart."""
    return int(math.log(max(1, length), 1.25))


def one_group(_length: int) -> int:
    """Rows of all lengths may stand in one batch."""
    return 0


def sorted_order(lengths: Sequence[int], token_budget: int, group: Group = one_group) -> list[np.ndarray]:
    """Row numbers of batches for inference: by length, as many rows as fit ``token_budget`` padded tokens."""
    return parts_of(np.arange(len(lengths)), lengths, token_budget, group)


def parts_of(rows: np.ndarray, lengths: Sequence[int], token_budget: int, group: Group = one_group) -> list[np.ndarray]:
    """``rows`` by length, shared out over parts of at most ``token_budget`` padded tokens (one row at least) and of one
    ``group`` each."""
    size = np.asarray(lengths)[rows]
    parts: list[list[int]] = []
    for row in rows[np.argsort(size, kind="stable")]:
        # rows come in rising length, so the newest is the longest of its part
        full = not parts or lengths[row] * (len(parts[-1]) + 1) > token_budget
        if full or group(lengths[row]) != group(lengths[parts[-1][-1]]):
            parts.append([])
        parts[-1].append(int(row))
    return [np.array(part) for part in parts]


def collate(
    sequences: Sequence[Sequence[int]],
    rows: np.ndarray,
    pad_id: int,
    prefix: Sequence[int] = (),
    targets: Targets | None = None,
    *,
    first_position: int | None = None,
    placeholders: bool = False,
) -> Batch:
    """The sequences of ``rows``, each after the ``prefix`` ids (a soft prompt's): packed, the first token of each at
    position ``first_position``; padded with ``pad_id`` where that is None. Packed, ``placeholders`` are left out: the
    positions after them stay as they are."""
    left_out = len(prefix) if placeholders and first_position is not None else 0
    prefix = prefix[left_out:]
    found = [sequences[row] for row in rows]
    chosen = [[*prefix, *sequence] for sequence in found]
    types = [bytes(len(prefix)) + one.types for one in found if isinstance(one, TypedTokens)]
    lengths = Sequences(tuple(map(len, chosen)), left_out)
    wanted: torch.Tensor | None = None
    in_loss: torch.Tensor | None = None
    if targets is not None and not isinstance(targets, torch.Tensor):
        outside = [IGNORE_INDEX] * len(prefix)
        wanted = torch.tensor([label for row in rows for label in (*outside, *targets[row])])
        in_loss = (wanted != IGNORE_INDEX).nonzero()[:, 0]
    elif targets is not None:
        wanted = targets[torch.as_tensor(rows)]
    if first_position is not None:
        ids = torch.tensor([[token for sequence in chosen for token in sequence]])
        positions = lengths.positions(first_position)[None]
        packed = torch.tensor([list(b"".join(types))]) if types else None
        return Batch(ids, lengths, position_ids=positions, targets=wanted, in_loss=in_loss, token_type_ids=packed)
    longest = max(lengths.lengths)
    ids = torch.tensor([sequence + [pad_id] * (longest - len(sequence)) for sequence in chosen])
    mask = (torch.arange(longest) < torch.tensor(lengths.lengths)[:, None]).long()
    padded = torch.tensor([list(one.ljust(longest, b"\0")) for one in types]) if types else None
    return Batch(ids, lengths, mask, targets=wanted, in_loss=in_loss, token_type_ids=padded)


class TokenLists(Sequence[list[int]]):
    """Many sequences in one array: 4 bytes a token, where a list of Python's integers takes 36. ``chosen``: the numbers
    of those that are meant, else all."""

    def __init__(
        self, values: NDArray[np.int32], starts: NDArray[np.int64], chosen: NDArray[np.int64] | None = None
    ) -> None:
        self._values, self._starts = values, starts
        self._chosen = np.arange(len(starts) - 1) if chosen is None else chosen

    @classmethod
    def of(cls, sequences: Iterable[Sequence[int]]) -> TokenLists:
        """Those of ``sequences``, which are not held."""
        values, lengths = array("i"), array("q", [0])
        for sequence in sequences:
            values.extend(sequence)
            lengths.append(len(sequence))
        return cls(np.frombuffer(values, dtype=np.int32), np.cumsum(lengths))

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, row: int) -> list[int]: ...

    @overload
    def __getitem__(self, row: slice) -> list[list[int]]: ...

    def __getitem__(self, row: int | slice) -> list[int] | list[list[int]]:
        if isinstance(row, slice):
            return [self[at] for at in range(*row.indices(len(self)))]
        found: list[int] = self.array(row).tolist()
        return found

    def array(self, row: int) -> NDArray[np.int32]:
        """One sequence, without a copy."""
        return self._values[self._place(row)]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each."""
        return self._starts[self._chosen + 1] - self._starts[self._chosen]

    def take(self, rows: NDArray[np.int64]) -> TokenLists:
        """Those at these positions; the tokens are not copied."""
        found = copy(self)
        found._chosen = self._chosen[rows]
        return found

    def _place(self, row: int) -> slice:
        number = self._chosen[row]
        return slice(self._starts[number], self._starts[number + 1])


class LabelLists(TokenLists):
    """Of the same sequences the labels: the token where it is in the loss, else ``IGNORE_INDEX``."""

    def __init__(
        self,
        values: NDArray[np.int32],
        starts: NDArray[np.int64],
        chosen: NDArray[np.int64],
        in_loss: NDArray[np.bool_],
    ) -> None:
        super().__init__(values, starts, chosen)
        self._in_loss = in_loss

    def array(self, row: int) -> NDArray[np.int32]:
        """One sequence's."""
        place = self._place(row)
        return np.where(self._in_loss[place], self._values[place], np.int32(IGNORE_INDEX))


class TypedLists(Sequence[list[int]]):
    """Many sequences of ``TypedTokens``: a byte a token more than ``TokenLists``."""

    def __init__(self, ids: Sequence[list[int]], types: Sequence[bytes]) -> None:
        self.ids, self.types = ids, types

    @classmethod
    def of(cls, sequences: Iterable[TypedTokens]) -> TypedLists:
        """Those of ``sequences``, which are not held."""
        types: list[bytes] = []

        def noted() -> Iterator[list[int]]:
            for one in sequences:
                types.append(one.types)
                yield one

        return cls(TokenLists.of(noted()), types)

    def __len__(self) -> int:
        return len(self.types)

    @overload
    def __getitem__(self, row: int) -> list[int]: ...

    @overload
    def __getitem__(self, row: slice) -> list[list[int]]: ...

    def __getitem__(self, row: int | slice) -> list[int] | list[list[int]]:
        if isinstance(row, slice):
            return [self[at] for at in range(*row.indices(len(self)))]
        return TypedTokens(self.ids[row], self.types[row])


def taken(sequences: Sequence[list[int]], rows: Sequence[int]) -> Sequence[list[int]]:
    """The sequences of these rows, held as the others are."""
    if isinstance(sequences, TypedLists):
        return TypedLists(taken(sequences.ids, rows), [sequences.types[row] for row in rows])
    if isinstance(sequences, TokenLists):
        return sequences.take(np.asarray(rows, dtype=np.int64))
    return [sequences[row] for row in rows]


@dataclass(frozen=True)
class TokenRows:
    """Token sequences and what turns them into batches."""

    sequences: Sequence[list[int]]
    pad_id: int
    prefix: Sequence[int] = range(0)
    """Tokens before every sequence: a soft prompt's virtual ones, or a hard prompt's."""

    def batch(
        self,
        rows: np.ndarray,
        targets: Targets | None = None,
        first_position: int | None = None,
        *,
        placeholders: bool = False,
    ) -> Batch:
        """The batch of these rows, packed from ``first_position`` on or, where that is None, padded; ``placeholders``:
        the prefix is such."""
        how: dict[str, Any] = {"first_position": first_position, "placeholders": placeholders}
        return collate(self.sequences, rows, self.pad_id, self.prefix, targets, **how)

    @cached_property
    def lengths(self) -> Sequence[int]:
        """Tokens of each row, virtual ones included."""
        bare = self.sequences.lengths if isinstance(self.sequences, TokenLists) else list(map(len, self.sequences))
        return array("q", (np.asarray(bare, dtype=np.int64) + len(self.prefix)).tobytes())

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each row starts among the tokens of all, and where the last ends: (rows + 1,)."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def digest(self) -> str:
        """Hash of the tokens and their types."""
        total = hashlib.sha256(repr((self.pad_id, self.prefix)).encode())
        for start in range(0, len(self.sequences), _HASHED_AT_ONCE):
            some = [self._array(row) for row in range(start, min(start + _HASHED_AT_ONCE, len(self.sequences)))]
            lengths = [len(sequence) for sequence in some]
            # each sequence after its length
            total.update(np.insert(np.concatenate(some), np.cumsum([0, *lengths[:-1]]), lengths).tobytes())
        for sequence in self.sequences:
            if not isinstance(sequence, TypedTokens):
                break
            total.update(sequence.types)
        return total.hexdigest()

    def _array(self, row: int) -> NDArray[np.int64]:
        found = self.sequences.array(row) if isinstance(self.sequences, TokenLists) else self.sequences[row]
        return np.asarray(found, dtype=np.int64)
