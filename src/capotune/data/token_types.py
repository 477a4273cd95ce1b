"""Tokens that know which of two texts they are of, for bases that read it: BERT's segments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import SupportsIndex, overload

__all__ = ["TypedTokens"]


class TypedTokens(list[int]):
    """Token ids of two texts that are read together, a list of ids wherever it goes; ``types`` has a byte for each: 0
    in the first text and 1 in the second, as the base's tokenizer says."""

    def __init__(self, ids: Iterable[int], types: Iterable[int]) -> None:
        super().__init__(ids)
        self.types = bytes(types)

    @overload
    def __getitem__(self, at: SupportsIndex) -> int: ...

    @overload
    def __getitem__(self, at: slice) -> TypedTokens: ...

    def __getitem__(self, at: SupportsIndex | slice) -> int | TypedTokens:
        return (
            TypedTokens(super().__getitem__(at), self.types[at]) if isinstance(at, slice) else super().__getitem__(at)
        )
