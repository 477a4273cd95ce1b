"""GGUF files and what is made of them once, by content, in the cache: their description and their weights converted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capotune import cache
from capotune.errors import ModelError
from capotune.events import Reporter, Warned
from capotune.files import cache_folder, human_bytes
from capotune.made_once import MadeOnce
from capotune.models.folder import is_pointer
from capotune.models.gguf.file import is_gguf, open_gguf, refused, split_number
from capotune.models.shards import Shards, Tensors

_FORMAT = 1
"""Goes up when the same file is converted to something else than before."""


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
        if self._entry(self.whole).is_ready():
            return Shards(sorted(self.whole.glob("*.safetensors")))
        from capotune.models.gguf.architectures import architecture_of
        from capotune.models.gguf.weights import GgufTensors, place

        file = open_gguf(self.path)
        return GgufTensors(file, place(file, architecture_of(file), config))

    def once(self, kind: str, make: Callable[[Path], None], nbytes: int = 0) -> Path:
        """The folder by the name of ``whole`` with ``kind`` after it, which ``make`` fills with about ``nbytes`` where
        it is not there yet.

        Where the cache cannot be written it is made in a temporary folder, for this process alone. Raises
        ``OutputError`` when there is no room there either.
        """
        entry = self._entry(self.whole.with_name(self.whole.name + kind))
        if entry.is_ready():
            return entry.folder
        in_cache = entry.folder.parent == _models()
        if in_cache:
            self._make_room(nbytes)
        made = entry.made(make, elsewhere=in_cache, base=self.path.name)
        if made == entry.folder and in_cache:
            cache.make_room(0, {made})  # it may be larger than was thought
        return made

    def _entry(self, folder: Path) -> MadeOnce:
        return MadeOnce(folder, f"what {self.path.name} was converted to", "is made again", self.report)

    def _make_room(self, nbytes: int) -> None:
        """What has to be there to go on is written however large it is."""
        cache.tidy(_models())
        if not cache.make_room(nbytes):
            sizes = f"{human_bytes(nbytes)}, and the cache may hold {human_bytes(cache.limit())}"
            advice = f"set {cache.LIMIT_VARIABLE} for more, `capo cache` shows what is there"
            self.report(Warned(text=f"{self.path.name} takes about {sizes}: it is converted all the same; {advice}."))


def _models() -> Path:
    return cache_folder() / "models"


def in_cache(path: Path, sha256: str, report: Reporter) -> GgufModel:
    """The model in the file ``path`` of that content: what is made of it is in the cache, once for all such files."""
    return GgufModel(path, _models() / f"{sha256[:32]}-{_FORMAT}", report)


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
