"""GGUF files as Transformers folders in the cache, by content: each file is converted once."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from capotune.errors import ModelError, OutputError
from capotune.events import Reporter
from capotune.files import cache_folder, output_folder
from capotune.models.folder import is_pointer
from capotune.models.gguf.file import is_gguf, open_gguf, refused, split_number

_FORMAT = 1
"""Goes up when the same file is converted to something else than before."""
_ABANDONED_SECONDS = 2 * 24 * 3600


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


def converted(path: Path, sha256: str, report: Reporter) -> Path:
    """The folder that the GGUF file ``path`` is converted to, with config.json, tokenizer and safetensors.

    ``sha256`` is of the file. Raises ``ModelError`` for a file that is damaged or not read, and ``OutputError`` when
    there is no room.
    """
    if is_pointer(path):
        raise refused(path, "not the file itself but a pointer of Git LFS to it.", "Run: git lfs pull")
    folder = cache_folder() / "models" / f"{sha256[:32]}-{_FORMAT}"
    if folder.is_dir():
        return folder
    from capotune.models.gguf.convert import convert

    file = open_gguf(path)
    _remove_abandoned(folder.parent)
    try:
        with output_folder(folder) as new:
            convert(file, new, report)
    except OutputError:
        if not folder.is_dir():  # else another process was faster
            raise
    return folder


def _remove_abandoned(folder: Path) -> None:
    """What a killed process left half-written, days ago."""
    for left in folder.glob(".*.partial"):
        if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
