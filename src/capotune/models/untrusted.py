"""What the files of a base may not ask for: other files than its own, code that is fetched, memory without end.

Each raises ``ModelError``. What pickle wrote is never opened, and Python files are never imported.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from capotune.errors import ModelError, quoted
from capotune.files import human_bytes

_READ = {".json", ".jinja", ".txt", ".model"}
"""Endings of files whose content may show in what is written: a template, a label."""
_LARGEST_JSON = 64 * 2**20
_MOST_LAYERS = 1_000
_LARGEST_GROWTH = 1_000
_LONGEST_COMPOSED = 18
"""Characters that Unicode's compatibility forms make of one at most (U+FDFA)."""


def leads_out(folder: Path, path: Path) -> Path | None:
    """Where ``path`` leads outside ``folder``; None where it stays inside, or goes to the blobs of the hub's cache,
    which keeps files beside its folders of links, as did downloads into other folders (``--local-dir``, up to
    huggingface_hub 0.22). Raises ``OSError`` or ``RuntimeError`` for links in a circle."""
    target, home = path.resolve(), folder.resolve()
    snapshots = next((above for above in home.parents if above.name == "snapshots"), None)
    beside = snapshots is not None and (snapshots.parent / "blobs").resolve() in target.parents
    return None if home in target.parents or beside or _is_downloaded(target) else target


def _is_downloaded(path: Path) -> bool:
    """Whether it is a file, named by its hash, of a model in the user's own cache of the hub."""
    from huggingface_hub.constants import HF_HUB_CACHE

    above, repository = path.parent, path.parent.parent
    is_blob = above.name == "blobs" and repository.name.startswith("models--")
    return is_blob and repository.parent == Path(HF_HUB_CACHE).resolve()


def check_links(folder: Path) -> None:
    """Refuse a text file that is a link out of the folder. Weights may lie elsewhere: nothing of them is shown."""
    for path in (*folder.iterdir(), *folder.glob("*/*")):
        if path.suffix in _READ and path.is_file() and (target := leads_out(folder, path)) is not None:
            raise ModelError(
                f"{path} is a link that leaves the folder: it goes to {target}.",
                advice="Where that is the model's own file, put a copy in its place.",
            )


def check_name(name: str, where: Path) -> None:
    """Refuse a file's name, read in the file ``where``, that leaves the folder."""
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    if ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        raise ModelError(f"{where} names {quoted(name)}, which is outside the model's folder.")


def check_elsewhere(path: Path) -> None:
    """Refuse a tokenizer_config.json whose ``*_file`` lies outside the folder: older Transformers read it. A path
    of the machine where it was saved leads nowhere and is passed over."""
    try:
        values = read_json(path) if path.is_file() else {}
    except ModelError:
        return  # what reads it says what is wrong
    for name, value in values.items() if isinstance(values, dict) else ():
        if name.endswith("_file") and isinstance(value, str) and os.path.isfile(path.parent / value):  # noqa: PTH113
            check_name(value, path)


def check_code(config: dict[str, Any]) -> None:
    """Refuse a configuration that has compiled code fetched, as Transformers takes kernels from the hub by such names,
    or that trusts code itself, which Transformers before 5.5 believes (CVE-2026-5241)."""
    for name, value in _named(config):
        if name == "trust_remote_code" and value:
            raise ModelError(
                f"its config.json asks for trust ({name} is {value!r:.40}), which only you can give.",
                advice=f"Take {name} out of config.json; where you trust its code, give `trust_remote_code=True`.",
            )
        if name.endswith("_implementation") and any("/" in text for text in _texts(value)):
            asked = quoted(next(_texts(value)))
            raise ModelError(
                f"its config.json asks for code from the hub ({name} is {asked}), which is not run.",
                advice=f"Take {name} out of config.json; where you trust that code, give `trust_remote_code=True`.",
            )


def check_depth(config: dict[str, Any], tensors: int) -> None:
    """Refuse a configuration of so many layers that making them would not end; a model stores ``tensors``, and layers
    may share them."""
    for name, value in _named(config):
        if name.endswith(("layers", "n_layer")) and isinstance(value, int) and value > max(_MOST_LAYERS, tensors):
            raise ModelError(f"its config.json says {name} = {value:,}, and its weights are {tensors:,} tensors.")


def check_tokenizer(path: Path) -> None:
    """Refuse a tokenizer.json whose replacements make a text a thousand times as long and more."""
    try:
        file = path.stat()
    except OSError:
        return  # what reads it says what is wrong
    if _growth(path, (file.st_ino, file.st_size, file.st_mtime_ns)) > _LARGEST_GROWTH:
        raise ModelError(f"{path} replaces characters by so many others that a text would fill the memory.")


@lru_cache(maxsize=32)
def _growth(path: Path, _which: tuple[int, ...]) -> int:
    """How many times as long all replacements of a tokenizer.json may make a text; the same file is read once."""
    try:
        content = path.read_bytes() if path.is_file() else b""
        if not re.search(rb'"Replace"|"Precompiled"|\\u00[4-7]', content):  # or one of these with a letter escaped
            return 1
        normalizer = json.loads(content).get("normalizer")
    except (OSError, ValueError, AttributeError, RecursionError):
        return 1  # what reads it says what is wrong
    return prod(_growths(normalizer))


def _growths(normalizer: Any) -> Iterator[int]:
    """How many times as long each of its replacements may make a text."""
    waiting = [normalizer]
    while waiting:
        one = waiting.pop()
        if not isinstance(one, dict):
            continue
        inner = one.get("normalizers")
        waiting += inner if isinstance(inner, list) else []
        if one.get("type") == "Precompiled":
            yield _LONGEST_COMPOSED
        if one.get("type") == "Replace":
            replaced = one["pattern"].get("String") if isinstance(one.get("pattern"), dict) else None
            length = len(replaced) if isinstance(replaced, str) else 1
            yield max(1, -(-len(str(one.get("content", ""))) // max(1, length)))


def read_json(path: Path) -> Any:
    """What a JSON file holds. ``ModelError`` where it cannot be read, is too large or nested too deep."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ModelError(f"{path} is too large to be read as JSON: at most {human_bytes(_LARGEST_JSON)} are.")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        why = "nested too deep" if isinstance(error, RecursionError) else error
        raise ModelError(f"{path} is not readable JSON ({why}).") from None


def _named(values: Any) -> Iterator[tuple[str, Any]]:
    """Every name in objects and lists, with its value."""
    waiting = [values]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield from ((name, value) for name, value in one.items() if isinstance(name, str))
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (one for one in value.values() if isinstance(one, str))
