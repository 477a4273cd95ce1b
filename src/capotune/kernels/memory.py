"""fp32 buffers that are lent again and again, the last returned first, which is the likeliest to be in a cache.

Tensors of some MB that PyTorch frees on a CPU go back to the system, and that one hands them out again page by page,
zeroed.
"""

from __future__ import annotations

from collections import defaultdict

import torch

__all__ = ["Memory"]


class Memory:
    """What several functions, one after the other, share of such buffers."""

    def __init__(self) -> None:
        self._free: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._largest: dict[str, int] = defaultdict(int)

    def lend(self, use: str, elements: int) -> torch.Tensor:
        """(elements or more,), of any content."""
        self._largest[use] = max(self._largest[use], elements)
        while self._free[use]:
            found = self._free[use].pop()
            if len(found) >= elements:
                return found
        return torch.empty(self._largest[use], dtype=torch.float32)

    def take_back(self, use: str, lent: torch.Tensor) -> None:
        """Nobody reads or writes it any more. What never comes back is freed as any other tensor."""
        self._free[use].append(lent)
