"""GGUF files and what is made of them once, by content, in the cache: their description and their weights converted."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capotune.errors import ModelError, OutputError
from capotune.events import Reporter
from capotune.files import cache_folder, output_folder
from capotune.models.folder import is_pointer
from capotune.models.gguf.file import is_gguf, open_gguf, refused, split_number
from capotune.models.shards import Shards, Tensors

_FORMAT = 1
"""Goes up when the same file is converted to something else than before."""
_ABANDONED_SECONDS = 2 * 24 * 3600


@dataclass(frozen=True)
class GgufModel:
    """A language model in a GGUF file."""

    path: Path
    whole: Path
    """The Transformers folder that it is converted to, with all weights; it need not be there. What else is made of the
    file stands beside it."""
    report: Reporter
    """Told of what is made, when it is."""

    def described(self) -> Path:
        """The folder with everything of the Transformers model but its weights.

        Raises ``ModelError`` for a file that is damaged or not read.
        """
        from capotune.models.gguf.describe import describe

        if is_pointer(self.path):
            raise refused(self.path, "not the file itself but a pointer of Git LFS to it.", "Run: git lfs pull")
        return self.once("-described", lambda new: describe(open_gguf(self.path), new, self.report))

    def tensors(self, config: Any) -> Tensors:
        """The weights of the model of ``config``: those in ``whole`` where that is there, else those in the file."""
        if self.whole.is_dir():
            return Shards(sorted(self.whole.glob("*.safetensors")))
        from capotune.models.gguf.architectures import architecture_of
        from capotune.models.gguf.weights import GgufTensors, place

        file = open_gguf(self.path)
        return GgufTensors(file, place(file, architecture_of(file), config))

    def once(self, kind: str, make: Callable[[Path], None]) -> Path:
        """The folder by the name of ``whole`` with ``kind`` after it, which ``make`` fills where it is not there yet.

        Raises ``OutputError`` when there is no room.
        """
        folder = self.whole.with_name(self.whole.name + kind)
        if folder.is_dir():
            return folder
        _remove_abandoned(folder.parent)
        try:
            with output_folder(folder) as new:
                make(new)
        except OutputError:
            if not folder.is_dir():  # else another process was faster
                raise
        return folder


def in_cache(path: Path, sha256: str, report: Reporter) -> GgufModel:
    """The model in the file ``path`` of that content: what is made of it is in the cache, once for all such files."""
    return GgufModel(path, cache_folder() / "models" / f"{sha256[:32]}-{_FORMAT}", report)


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that ``path`` means: itself, or the one in a folder without safetensors; None for anything else.

    ``ModelError`` for a folder with several.
    """
    if path.is_file():
        return path if path.suffix.lower() == ".gguf" or is_gguf(path) else None
    found = sorted(one for one in path.glob("*.gguf") if "mmproj" not in one.name) if path.is_dir() else []
    if not found or any(path.glob("*.safetensors")):
        return None
    if len(found) > 1 and split_number(found[0]) is None:
        raise ModelError(
            f"{path} holds several GGUF files: {', '.join(one.name for one in found)}.", advice="Give one of them."
        )
    return found[0]


def _remove_abandoned(folder: Path) -> None:
    """What a killed process left half-written, days ago."""
    for left in folder.glob(".*.partial"):
        with suppress(FileNotFoundError):  # another process was faster
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
