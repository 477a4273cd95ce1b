"""An adapter's files, read without believing them: reading a folder ends in its content or in one message.

JSON is bounded in size and depth and may name a thing once. Tensors are checked by the file's header before any memory
is taken, and must be finite. A link may not leave the folder. What pickle wrote is not opened, nothing is executed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from capotune.errors import AdapterError, quoted
from capotune.models.untrusted import leads_out

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
RECORD = "capotune.json"
_LARGEST_JSON, _DEEPEST = 16 * 2**20, 64
"""Bytes, also of a safetensors header; and objects and lists inside each other."""
_LARGEST_TEXT = 2**20


def inside(folder: Path, name: str) -> Path:
    """The file of that name. ``AdapterError`` for a link that leaves the folder, but to the hub's cache, which keeps
    files beside its folders of links; and for what is no file, such as a pipe."""
    path = folder / name
    try:
        target = leads_out(folder, path)
    except (OSError, RuntimeError):  # links in a circle
        raise AdapterError("a link that leads nowhere.", where=str(path)) from None
    if target is not None:
        raise AdapterError(f"a link that leaves the folder: it goes to {target}.", where=str(path))
    if path.exists() and not path.is_file():
        raise AdapterError("no file.", where=str(path))
    return path


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file. ``AdapterError`` for one that is too large or deep or names a thing twice."""
    path = inside(folder, name)
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise AdapterError("too large to be a configuration.")
        return _parse(path.read_bytes())
    except FileNotFoundError:
        raise AdapterError(f"{name} is missing; the adapter is incomplete.", where=str(folder)) from None
    except AdapterError as error:
        raise AdapterError(error.problem, where=str(path)) from None
    except OSError as error:
        raise AdapterError(f"not readable JSON ({error}).", where=str(path)) from None


def read_text(folder: Path, name: str) -> str | None:
    """The first MiB of a text file, of which what is no UTF-8 is replaced; None where there is none."""
    path = inside(folder, name)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return file.read(_LARGEST_TEXT).decode("utf-8", errors="replace")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The trained weights, in memory of their own. ``AdapterError`` for a file that is damaged, contradicts itself, or
    holds other than finite floating-point values."""
    if not (folder / WEIGHTS).is_file() and (folder / PICKLED).is_file():
        raise _pickled(folder)
    path = inside(folder, WEIGHTS)
    if not path.is_file():
        raise AdapterError(f"{WEIGHTS} is missing; the adapter is incomplete.", where=str(folder))
    try:
        _check_header(path)
        tensors = load_file(path)
        for key, tensor in tensors.items():
            _check_values(key, tensor)
    except AdapterError as error:
        raise AdapterError(error.problem, where=str(path)) from None
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError, ArithmeticError) as error:
        raise AdapterError(
            f"damaged or incomplete ({error}).", where=str(path), advice="Train or copy it again."
        ) from None
    return tensors


def _parse(content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content, object_pairs_hook=_once)
        if _depth(values) > _DEEPEST:
            raise RecursionError
        json.dumps(values, ensure_ascii=False).encode()  # which half of a surrogate pair cannot be
    except RecursionError:
        raise AdapterError("not readable JSON (nested too deep).") from None
    except AdapterError:
        raise
    except ValueError as error:
        raise AdapterError(f"not readable JSON ({error}).") from None
    if not isinstance(values, dict):
        raise AdapterError(f"expected an object, found a {type(values).__name__}.")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise AdapterError(f"{quoted(name)} stands in it twice.")
        found[name] = value
    return found


def _depth(values: Any) -> int:
    """Objects and lists inside each other."""
    depth, level = 0, [values]
    while level and depth <= _DEEPEST:
        inner = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
        depth, level = depth + bool(inner), [value for part in inner for value in part]
    return depth


def _check_header(path: Path) -> None:
    """What the library that reads the file does not ask: a header of an adapter's size that names each tensor once."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError("its header is longer than the file")
        if length > _LARGEST_JSON:
            raise AdapterError("its header is too large for an adapter's.")
        _parse(file.read(length))


def _check_values(key: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise AdapterError(f"{quoted(key)} holds {str(tensor.dtype).removeprefix('torch.')}.")
    if not bool(torch.isfinite(tensor.float()).all()):
        raise AdapterError(f"{quoted(key)} holds values that are NaN or infinite.")


def _pickled(folder: Path) -> AdapterError:
    return AdapterError(
        f"its weights are in {PICKLED}, which pickle wrote; such a file can run code and is not opened.",
        where=str(folder),
        advice="Where you trust who made it, convert it in its folder, with PyTorch 2.10 or later (before, "
        'weights_only did not keep it from running code): python -c "import torch, safetensors.torch as s; '
        f"s.save_file({{k: v.contiguous().clone() for k, v in torch.load('{PICKLED}', weights_only=True, "
        f"map_location='cpu').items()}}, '{WEIGHTS}')\"",
    )
