"""Which files of a folder are the model; what a folder holds that is none, and what to do then.

People's folders hold more than one model: the same weights again under another name or in another format, an adapter
that was saved beside its base. What Transformers would load is decided here, once, for all that reads weights.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capotune.errors import ModelError
from capotune.models.untrusted import check_name, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_OTHER_FORMATS = {".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite", ".mlmodel"}
_PICKLED = {".bin", ".pt", ".pth", ".ckpt"}


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files that hold a model's weights."""

    entry: str
    """What is opened first: the one file, or the index of several."""
    paths: tuple[Path, ...]
    """The files, by name."""


def weight_files(folder: Path, config: dict[str, Any]) -> WeightFiles:
    """The files that the index names, else ``model.safetensors``; or what ``transformers_weights`` in config.json says.

    Raises ``ModelError`` when they are not there, with what the folder holds instead.
    """
    stated = config.get("transformers_weights")
    entry = stated or next((name for name in (INDEX, SINGLE) if (folder / name).is_file()), None)
    if entry is None:
        raise _no_weights(folder)
    check_name(str(entry), folder / "config.json")
    if not (folder / entry).is_file():
        raise ModelError(f"transformers_weights in {folder / 'config.json'} names {entry}, which is not there.")
    if not entry.endswith(".index.json"):
        return WeightFiles(entry, (folder / entry,))
    names = _indexed(folder / entry)
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise ModelError(
            f"{folder / entry} names {absent[0]}{more}, which {'are' if more else 'is'} not there.",
            advice="Download the missing files, or remove the index if it is of another copy of the weights.",
        )
    return WeightFiles(entry, tuple(folder / name for name in names))


def is_weights(path: Path) -> bool:
    """Whether a file holds a model's weights, in any format, or is their index."""
    formats = {".safetensors", *_OTHER_FORMATS}
    return not formats.isdisjoint(path.suffixes) or path.suffix == ".onnx_data" or path.name.endswith(".index.json")


def check_downloaded(folder: Path) -> None:
    """``ModelError`` for files of Git LFS that were not fetched, among weights, JSON files and tokenizers."""
    pointers = sorted(path.name for path in folder.iterdir() if _may_be_read(path) and is_pointer(path))
    if pointers:
        raise ModelError(
            f"{', '.join(pointers)} in {folder}: not the file itself but a pointer of Git LFS to it.",
            advice="Run `git lfs pull` in that folder, or download the model with `hf download`.",
        )


def not_a_model(folder: Path) -> ModelError:
    """The error for a folder without ``config.json``, by what it holds."""
    problem, advice = f"no config.json in {folder}.", "Give the folder of a Transformers model."
    names = sorted(path.name for path in folder.iterdir())
    inside = sorted(str(path.parent) for level in ("*", "*/*") for path in folder.glob(f"{level}/config.json"))
    if ADAPTER in names or "capotune.json" in names:
        problem, advice = _adapter(folder)
    elif "run.json" in names and "adapter" in names:
        problem = f"{folder} is a run of this program and no model."
        advice = f"Its adapter is {folder / 'adapter'}; give the base that run.json names to train anew."
    elif inside:
        advice = f"Did you mean {' or '.join(inside[:4])}?"
    elif not names:
        problem = f"{folder} is empty."
    elif (other := _other_format(names)) is not None:
        problem, advice = f"no config.json in {folder}. {other[0]}", other[1]
    return ModelError(problem, advice=advice)


def _indexed(index: Path) -> list[str]:
    """Names of the files that hold the tensors, sorted."""
    try:
        names = sorted({str(name) for name in read_json(index)["weight_map"].values()})
    except (ModelError, KeyError, TypeError, AttributeError):
        raise ModelError(
            f"{index} is not an index of weights: no weight_map in JSON.", advice="Download or save the model again."
        ) from None
    for name in names:
        check_name(name, index)
    return names


def _no_weights(folder: Path) -> ModelError:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    found = [name for name in names if name.endswith(".safetensors")]
    of_several = [name for name in found if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
    variants = [name for name in found if re.fullmatch(r"model\.\w+\.safetensors", name)]
    problem = f"no *.safetensors weights in {folder}."
    advice = "Save the model with save_pretrained(folder) in Transformers and give that folder."
    if found:
        problem = f"neither {SINGLE} nor {INDEX} in {folder}; it holds {', '.join(found[:3])}."
    if (folder / SINGLE).is_symlink():
        return ModelError(f"{folder / SINGLE} is a link to a file that is gone.", advice="Download the model again.")
    if of_several:
        advice = f"Download {INDEX} as well, which says where each tensor is."
    elif variants:
        advice = f"To use it, copy {variants[0]} to {SINGLE}."
    elif (other := _other_format(names)) is not None:
        problem, advice = f"{problem} {other[0]}", other[1]
    return ModelError(problem, advice=advice)


def _other_format(names: list[str]) -> tuple[str, str] | None:
    """What files of another format are, and what to do with them."""
    makers = [name for name in names if name.startswith("consolidated")]
    pickled = [name for name in names if Path(name).suffix in _PICKLED and name != "training_args.bin"]
    others = [name for name in names if Path(name).suffix in _OTHER_FORMATS]
    if makers:
        return (
            f"It holds {', '.join(makers[:2])}, the form of the model's makers.",
            "Download the model in Transformers' form, or convert it with Transformers' script for its family "
            "(transformers/models/FAMILY/convert_*_weights_to_hf.py).",
        )
    if pickled:
        return (
            f"It holds {', '.join(pickled[:3])}, which can run code and is not read.",
            "If you trust it, load it in Transformers with AutoModelForCausalLM.from_pretrained(folder), AutoModel for "
            "an encoder, and save_pretrained(folder) it there as safetensors.",
        )
    if others:
        return (
            f"It holds {', '.join(others[:3])}, which is not read here.",
            "Save the model with save_pretrained(folder) in Transformers and give that folder.",
        )
    return None


def _adapter(folder: Path) -> tuple[str, str]:
    base = None
    with suppress(OSError, ValueError, AttributeError, RecursionError):  # what it is for is not known then
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    of_base = f" of {base}" if base else ""
    problem = f"{folder} is an adapter{of_base} and no model: it holds changes of a base and not the base."
    if (folder / "capotune.json").is_file():
        return problem, f"Give the base as the model; `capo info {folder}` says how the adapter is used."
    return problem, "Give the base as the model. To train on what the adapter changed, merge it with PEFT first."


def _may_be_read(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return path.name.startswith("model")
    return path.suffix in (".json", ".txt", ".model", ".jinja")


def is_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS puts in the place of one that was not fetched."""
    if not path.is_file() or path.stat().st_size > 1024:
        return False
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER
