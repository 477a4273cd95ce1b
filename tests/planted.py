"""What a stranger may plant in a folder: pickles that leave a marker where they are opened."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

MARKER = "PWNED"
"""A file in the current folder."""
Plant = Callable[[Path], object]
"""Changes a folder."""


class Exploit:
    """Unpickled, it makes the marker."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path(MARKER).touch, ()


def pickled(*names: str) -> Plant:
    """By ``pickle``, as ``torch.save`` and joblib write it, and as an array of objects."""

    def change(folder: Path) -> None:
        for name in names:
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            if name.endswith(".npy"):
                np.save(path, np.array([Exploit()], dtype=object))
            elif name.endswith((".pkl", ".joblib")):
                path.write_bytes(pickle.dumps(Exploit()))
            else:
                torch.save({"weight": Exploit()}, path)

    return change
