"""Which rows are held out: for the test, and in training to see when to stop. Every task splits its rows here."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from capotune.data.table import Origin
from capotune.data.text_columns import Text
from capotune.errors import DataError, SettingError
from capotune.memory_table import MemoryTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["folds", "hold_out", "normalised", "refuse_same_source", "rows_to_score", "split_as_marked", "text_numbers"]


class TakesRows(Protocol):
    """Rows of one source, of which some can be taken."""

    @property
    def source(self) -> Origin:
        """Where they are from."""

    def take(self: AnyRows, indices: Sequence[int] | NDArray[np.int64]) -> AnyRows:
        """The rows at ``indices``, in that order."""


AnyRows = TypeVar("AnyRows", bound=TakesRows)


def split_as_marked(
    rows: AnyRows, parts: Sequence[str], test: tuple[AnyRows, Sequence[str]] | None
) -> tuple[AnyRows, AnyRows, str] | None:
    """Training rows, test rows and where the latter are from, as the data tells them apart; None where it does not.

    Args:
        rows: all rows of the data.
        parts: for each of them ``train`` or ``test`` as a column ``split`` says; empty without that column.
        test: rows and parts of a second source to test on.

    Raises:
        DataError: a column ``split`` marks no row as that part.
    """
    if test is not None:
        test_rows, test_parts = test
        return _part(rows, parts, "train"), _part(test_rows, test_parts, "test"), str(test_rows.source)
    if "test" in parts:
        return _part(rows, parts, "train"), _part(rows, parts, "test"), "the column 'split'"
    return None


def rows_to_score(rows: AnyRows, parts: Sequence[str]) -> AnyRows:
    """The rows that ``parts`` mark as test; where none are, all."""
    return _part(rows, parts, "test") if "test" in parts else rows


def _part(rows: AnyRows, parts: Sequence[str], wanted: str) -> AnyRows:
    if not parts:
        return rows
    chosen = [index for index, part in enumerate(parts) if part == wanted]
    if not chosen:
        advice = "Mark some, or remove the column."
        raise DataError(f"the column 'split' marks no row as {wanted}.", where=str(rows.source), advice=advice)
    return rows.take(chosen)


def refuse_same_source(data: object, test: object) -> None:
    """Raise a ``DataError`` when both are one file, under whatever name, or the same rows in memory."""
    if _is_same(data, test):
        raise DataError(
            "is given as test data (`test`) and as training data (`data`), so the score would mean nothing.",
            where=str(test) if isinstance(test, str | MemoryTable) else None,
            advice="Give other rows, or leave `test` out: a part of the data is then held out.",
        )


def _is_same(data: object, test: object) -> bool:
    if isinstance(data, MemoryTable) and isinstance(test, MemoryTable):
        return data.sha256 == test.sha256
    if not isinstance(data, str | os.PathLike) or not isinstance(test, str | os.PathLike):
        return data is test
    paths = os.path.expanduser(data), os.path.expanduser(test)  # noqa: PTH111
    return data == test or (all(map(os.path.exists, paths)) and os.path.samefile(*paths))  # noqa: PTH121


def hold_out(
    labels: Sequence[int] | NDArray[np.int64],
    fraction: float,
    seed: int,
    groups: Iterable[Hashable] | NDArray[Any] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose rows to hold out, of each label the same part as near as whole rows allow.

    Each label keeps at least one row to train on, so a label with a single row is never held out. Rows of one group
    (say, equal texts) stay together; a group whose rows differ in label is trained on, as no answer to it is right.

    Args:
        labels: a number for each row.
        fraction: the part to hold out, between 0 and 1.
        seed: the same labels, groups and seed give the same rows.
        groups: for each row the group it belongs to; without it each row is its own.

    Returns:
        The row numbers to train on and those held out, both ascending.

    Raises:
        DataError: no label has two groups, so nothing can be held out.
        SettingError: ``fraction`` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        allowed = "more than 0 and less than 1, such as 0.2"
        raise SettingError(f"The fraction to hold out is {fraction}.", allowed=allowed)
    number = _numbered(range(len(labels)) if groups is None else groups)
    label, (_, first) = np.asarray(labels), np.unique(number, return_index=True)
    label_of = label[first]
    is_mixed = np.zeros(len(first), dtype=bool)
    is_mixed[number[label != label_of[number]]] = True
    units = _by_label(np.flatnonzero(~is_mixed), label_of)
    if all(len(of_label) < 2 for of_label in units):
        raise DataError("nothing can be held out, as no label has two different texts.", advice="Add rows.")
    rng = np.random.default_rng(seed)
    quotas = _quotas([len(of_label) for of_label in units], fraction, rng)
    held = [of_label[rng.permutation(len(of_label))[:quota]] for of_label, quota in zip(units, quotas, strict=True)]
    is_held = np.isin(number, np.concatenate(held))
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def folds(labels: Sequence[int], count: int, seed: int, groups: Iterable[Hashable] | None = None) -> NDArray[np.int64]:
    """For each row the fold, of 0 to ``count`` - 1, that it is in when each is held out in turn.

    Folds are of like size and hold like parts of each label; rows of one group stay together. Arguments as for
    ``hold_out``.
    """
    number = _numbered(range(len(labels)) if groups is None else groups)
    _, first = np.unique(number, return_index=True)
    order = np.random.default_rng(seed).permutation(len(first))
    order = order[np.argsort(np.asarray(labels)[first][order], kind="stable")]
    fold = np.empty(len(first), dtype=np.int64)
    fold[order] = np.arange(len(first)) % count  # dealt out label by label
    return fold[number]


def _by_label(groups: NDArray[np.int64], label_of: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The groups of each label in their order; the labels in that in which they come first."""
    label = label_of[groups]
    order = np.argsort(label, kind="stable")
    _, starts = np.unique(label[order], return_index=True)
    return sorted(np.split(groups[order], starts[1:]), key=lambda of_label: int(of_label[0])) if len(groups) else []


def text_numbers(texts: Iterable[Text]) -> NDArray[np.int64]:
    """A number for each text, in the order in which they come first; equal texts have the same (``normalised``), and so
    have equal pairs of texts in the same order.

    What is remembered of a text is a hash of 128 bits.
    """
    as_one = (normalised(text if isinstance(text, str) else " \0 ".join(text)) for text in texts)
    return _numbered(blake2b(text.encode(), digest_size=16).digest() for text in as_one)


def _numbered(groups: Iterable[Hashable] | NDArray[Any]) -> NDArray[np.int64]:
    """A number for each group, in the order in which they come first."""
    if isinstance(groups, np.ndarray):
        _, first, number = np.unique(groups, return_index=True, return_inverse=True)
        return np.argsort(np.argsort(first))[number]
    known: dict[Hashable, int] = {}
    return np.fromiter((known.setdefault(group, len(known)) for group in groups), dtype=np.int64)


def _quotas(sizes: Sequence[int], fraction: float, rng: np.random.Generator) -> list[int]:
    """How many of each size to take: rounded down, then one more where most was lost, until the sum is right."""
    exact = [size * fraction for size in sizes]
    quotas = [int(share) for share in exact]
    missing = max(1, round(sum(exact))) - sum(quotas)
    lost = rng.permutation(len(sizes)).tolist()
    lost.sort(key=lambda index: quotas[index] - exact[index])
    for index in [index for index in lost if quotas[index] + 1 < sizes[index]][: max(0, missing)]:
        quotas[index] += 1
    return quotas


def normalised(text: str) -> str:
    """``text`` as it is compared: without regard to case and to the amount of space."""
    return " ".join(text.casefold().split())
