"""Folders in the cache that are made once by content, and in a temporary place where the cache cannot take them."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from capotune import cache
from capotune.errors import OutputError
from capotune.events import Reporter, Warned, ignore
from capotune.files import output_folder

_elsewhere: dict[Path, Path] = {}
"""Where this process has what it could not write into the cache."""


@dataclass(frozen=True)
class MadeOnce:
    """A folder that is complete or absent."""

    folder: Path
    what: str
    """What is in it, at the start of a sentence: "what x.gguf was converted to"."""
    again: str
    """What happens where it is damaged: "is made again"."""
    report: Reporter = ignore
    """Told of a damaged folder, and of one that is made elsewhere."""

    def is_ready(self) -> bool:
        """Whether the folder is there as it was written. One that is not leaves, and it is said."""
        if not cache.hold(self.folder):
            return False
        if cache.is_whole(self.folder):
            return True
        self.report(Warned(text=f"{self.what} in {self.folder} is damaged on the disk, and {self.again}."))
        cache.discard(self.folder)
        return False

    def made(self, make: Callable[[Path], None], *, elsewhere: bool, **facts: str) -> Path:
        """The folder, which ``make`` fills; ``facts`` are those of the entry.

        ``elsewhere``: where it cannot be written, it is made in a temporary folder, for this process alone. Raises
        ``OutputError`` when there is no room there either.
        """
        try:
            with output_folder(self.folder) as new:
                make(new)
                cache.sign(new, **facts)
        except OutputError as error:
            if not cache.hold(self.folder):  # else another process was faster
                if not elsewhere:
                    raise
                return self.for_this_process(make, error.problem)
        cache.hold(self.folder)
        return self.folder

    def for_this_process(self, make: Callable[[Path], None], why: str) -> Path:
        """It, in a temporary folder that leaves with the process."""
        if self.folder not in _elsewhere:
            room = Path(tempfile.mkdtemp(prefix="capotune-"))
            atexit.register(shutil.rmtree, room, ignore_errors=True)
            self.report(Warned(text=f"{why} The cache is done without, {room} is taken instead."))
            with output_folder(room / self.folder.name) as new:
                make(new)
            _elsewhere[self.folder] = room / self.folder.name
        return _elsewhere[self.folder]
