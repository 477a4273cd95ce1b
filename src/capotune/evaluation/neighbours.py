"""What frozen features give without training, where targets are numbers: the mean of the nearest neighbours'."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NEIGHBOURS = 10
_AT_ONCE = 1024  # rows whose similarities to all training rows are in memory together


def neighbours_mean(train: torch.Tensor, targets: torch.Tensor, test: torch.Tensor) -> torch.Tensor:
    """(test rows, values): of each test row the mean target of the ``NEIGHBOURS`` training rows that are most similar
    to it by the cosine, of fewer where there are fewer.

    Shapes: train (rows, features), targets (rows, values), test (test rows, features).
    """
    import torch
    from torch.nn import functional

    train = functional.normalize(train, dim=1)
    count = min(NEIGHBOURS, len(train))
    parts = torch.split(functional.normalize(test, dim=1), _AT_ONCE)
    return torch.cat([targets[(part @ train.t()).topk(count).indices].mean(1) for part in parts])
