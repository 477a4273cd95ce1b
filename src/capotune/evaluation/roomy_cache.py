"""Keys and values of the tokens so far, with room for those to come.

Transformers' ``DynamicCache`` copies all of them for every token that is added, which for many rows takes as long as
attention does. Here they stand in memory with room behind them, and are copied when that is full.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 32
"""Tokens that room is made for at a time."""


class RoomyCache(DynamicCache):  # type: ignore[misc]
    """A ``DynamicCache`` whose layers all grow without a copy; none has a window."""

    def __init__(self) -> None:
        Cache.__init__(self, layer_class_to_replicate=_RoomyLayer)


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """``keys`` and ``values`` (rows, heads, tokens, head_dim) are the beginning of memory with more tokens."""

    _rooms: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Add (rows, heads, new tokens, head_dim); returns all keys and all values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self.get_seq_length():
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        before, added = self.get_seq_length(), key_states.shape[-2]
        if self._rooms is None or not self._fits(before + added):
            self._rooms = (_with_room(self.keys, added), _with_room(self.values, added))
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[..., before : before + added, :] = new
        self.keys, self.values = (room[..., : before + added, :] for room in self._rooms)
        return self.keys, self.values

    def _fits(self, tokens: int) -> bool:
        """Whether ``keys`` still stand in the memory with room, and ``tokens`` do: rows may have left since."""
        assert self._rooms is not None
        room = self._rooms[0]
        return tokens <= room.shape[-2] and room.data_ptr() == self.keys.data_ptr() and len(room) == len(self.keys)


def _with_room(stored: torch.Tensor, added: int) -> torch.Tensor:
    """A copy of (rows, heads, tokens, head_dim) in memory for ``added`` tokens and ``ROOM`` more."""
    tokens = stored.shape[-2]
    room = stored.new_empty(*stored.shape[:-2], tokens + added + ROOM, stored.shape[-1])
    room[..., :tokens, :] = stored
    return room
