"""A GGUF file's tensors as those of a Transformers model: its names, its values, its order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from capotune.models.gguf.architectures import Architecture
from capotune.models.gguf.file import GgufFile
from capotune.models.gguf.rope import TENSORS as ROPE_TENSORS
from capotune.models.shards import StoredTensor, Tensors

_NOT_NEEDED = (*ROPE_TENSORS, "token_types.weight")
_NOT_NEEDED_ENDS = (".attn_rot_embd.weight", ".attn_rot_embd", ".rope_freqs.weight")
"""Of old converters: positions that every program computes itself."""


@dataclass(frozen=True)
class Placed:
    """A tensor of the file and its place in the model."""

    source: str
    """Its name in the file."""
    name: str
    """Its name in Transformers."""
    shape: tuple[int, ...]
    """In Transformers."""
    change: Callable[[Tensor], Tensor] | None
    """What makes the stored values the model's; None: they are."""


def place(file: GgufFile, architecture: Architecture, config: Any) -> list[Placed]:
    """Every weight of the causal language model of ``config``, in the order of the file.

    Raises ``ModelError`` when the file lacks one, has one of another shape, or one that the model has no place for.
    """
    model = _shapes(config)
    names = _gguf_names(file, model)
    lacking = sorted(set(names) - set(file.tensors))
    if lacking:
        raise file.error(f"it lacks {_some(lacking)}.", advice="Download it again, or convert the model again.")
    left = [name for name in file.tensors if name not in names and not _is_not_needed(name)]
    if left and not (left == ["output.weight"] and config.tie_word_embeddings):
        raise file.error(
            f"it holds {_some(left)}, for which the architecture {file.architecture} has no place in Transformers.",
            advice="Give the Transformers folder of the model instead.",
        )
    return [_placed(file, architecture, model, source, names[source]) for source in file.tensors if source in names]


class GgufTensors(Tensors):
    """A file's tensors as the model's, dequantised as they are read, in the order of the file."""

    def __init__(self, file: GgufFile, placed: Sequence[Placed]) -> None:
        super().__init__(_stored(file, one) for one in placed)
        self._file = file
        self._placed = {one.name: one for one in placed}
        self._changing = Lock()

    def read(self, name: str, buffer: Tensor | None = None) -> Tensor:
        """As ``Tensors`` says. A tensor that changes its order or values is in memory twice for a moment."""
        one = self._placed[name]
        values = self._file.read(one.source, buffer)
        return values if one.change is None else one.change(values).contiguous()

    def chunks(self, name: str) -> Iterator[memoryview]:
        one = self._placed[name]
        if one.change is None:
            yield from map(_bytes, self._file.chunks(one.source))
        else:
            with self._changing:  # which takes the whole tensor twice: of those, threads hold one at a time
                yield _bytes(self.read(name).view(-1))


def _shapes(config: Any) -> Any:
    """The model, without storage for anything."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _gguf_names(file: GgufFile, model: Any) -> dict[str, str]:
    """GGUF's name of each of the model's parameters, with Transformers'."""
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == file.architecture)
    known = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    found = {}
    for name, _ in model.named_parameters():
        forms = (name, name.removeprefix(f"{model.base_model_prefix}."))  # Bloom's tensors are known without
        called = next((one for form in forms if (one := known.get_name(form, (".weight", ".bias"))) is not None), None)
        if called is None:
            raise file.error(f"Transformers' {name} has no name in GGUF's architecture {file.architecture}.")
        found[called] = name
    return found


def _placed(file: GgufFile, architecture: Architecture, model: Any, source: str, name: str) -> Placed:
    expected = tuple(model.get_parameter(name).shape)
    layer = model.get_submodule(name.rpartition(".")[0])
    transposed = isinstance(layer, Conv1D) and name.endswith(".weight")
    stored = file.tensors[source].shape
    if stored != (expected[::-1] if transposed else expected):
        raise file.error(
            f"the tensor {source} is {stored}, where its metadata ask for {expected}.", advice="Download it again."
        )
    restores = architecture.changes(source)

    def change(values: Tensor) -> Tensor:
        if restores:
            values = architecture.restore(file, source, values)
        return values.t() if transposed else values

    return Placed(source, name, expected, change if restores or transposed else None)


def _stored(file: GgufFile, one: Placed) -> StoredTensor:
    source = file.tensors[one.source]
    nbytes = prod(one.shape) * source.dtype.itemsize
    return StoredTensor(one.name, file.path, source.dtype_name, one.shape, source.begin, nbytes)


def _bytes(values: Tensor) -> memoryview:
    return memoryview(values.view(torch.uint8).numpy().data)


def _is_not_needed(name: str) -> bool:
    return name in _NOT_NEEDED or name.endswith(_NOT_NEEDED_ENDS)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
