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
from capotune.models.shards import DTYPES, StoredTensor, Tensors

_NOT_NEEDED = (*ROPE_TENSORS, "token_types.weight")
_NOT_NEEDED_ENDS = (".attn_rot_embd.weight", ".attn_rot_embd", ".rope_freqs.weight")
"""Of old converters: positions that every program computes itself."""
_FUSED, _PARTS = "gate_up_proj", ("gate_proj", "up_proj")
"""Experts' two matrices, (experts, 2·inner, hidden), which files hold apart."""


@dataclass(frozen=True)
class Placed:
    """Tensors of the file and their place in the model."""

    sources: tuple[str, ...]
    """Their names in the file: one, or an MLP's two matrices that Transformers has in one."""
    name: str
    """In Transformers."""
    shape: tuple[int, ...]
    """In Transformers."""
    change: Callable[..., Tensor] | None
    """What makes the values of all sources the model's; None: they are, but for axes of 1 that files leave out."""


def place(file: GgufFile, architecture: Architecture, config: Any) -> list[Placed]:
    """Every weight of the causal language model of ``config``, in the order of the file.

    Raises ``ModelError`` when the file lacks one, has one of another shape, or one that the model has no place for.
    """
    model = _shapes(config)
    sources = _sources(file, model)
    names = {source: name for name, of_name in sources.items() for source in of_name}
    lacking = sorted(set(names) - set(file.tensors))
    if lacking:
        raise file.error(f"it lacks {_some(lacking)}.", advice="Download it again, or convert the model again.")
    left = [name for name in file.tensors if name not in names and not _is_not_needed(name)]
    if left and not (left == ["output.weight"] and config.tie_word_embeddings):
        raise file.error(
            f"it holds {_some(left)}, for which the architecture {file.architecture} has no place in Transformers.",
            advice="Give the Transformers folder of the model instead.",
        )
    in_order = dict.fromkeys(names[source] for source in file.tensors if source in names)
    return [_placed(file, architecture, model, name, sources[name]) for name in in_order]


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
        if one.change is None:
            return self._file.read(one.sources[0], buffer).view(one.shape)
        parts = [self._file.read(source, buffer if len(one.sources) == 1 else None) for source in one.sources]
        return one.change(*parts).to(DTYPES[self[name].dtype]).view(one.shape).contiguous()

    def chunks(self, name: str) -> Iterator[memoryview]:
        one = self._placed[name]
        if one.change is None:
            yield from map(_bytes, self._file.chunks(one.sources[0]))
        else:
            with self._changing:  # which takes the whole tensor twice: of those, threads hold one at a time
                yield _bytes(self.read(name).view(-1))


def _shapes(config: Any) -> Any:
    """The model, without storage for anything."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _sources(file: GgufFile, model: Any) -> dict[str, tuple[str, ...]]:
    """Of each of the model's parameters, the tensors of a file that make it."""
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == file.architecture)
    known = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)

    def called(name: str) -> str | None:
        forms = (name, name.removeprefix(f"{model.base_model_prefix}."))  # Bloom's tensors are known without
        found = next((one for form in forms if (one := known.get_name(form, (".weight", ".bias"))) is not None), None)
        return found if found is None or found in file.tensors or _has_end(found) else f"{found}.weight"

    sources = {}
    for name, _ in model.named_parameters():
        alone, is_fused = called(name), name.endswith(_FUSED)
        found = [alone] if alone or not is_fused else [called(name.replace(_FUSED, part)) for part in _PARTS]
        parts = tuple(part for part in found if part is not None)
        if len(parts) < len(found):
            raise file.error(f"Transformers' {name} has no name in GGUF's architecture {file.architecture}.")
        sources[name] = parts
    return sources


def _placed(file: GgufFile, architecture: Architecture, model: Any, name: str, sources: tuple[str, ...]) -> Placed:
    expected = tuple(model.get_parameter(name).shape)
    layer = model.get_submodule(name.rpartition(".")[0])
    transposed = isinstance(layer, Conv1D) and name.endswith(".weight")
    asked = (*expected[:1], expected[1] // len(sources), *expected[2:]) if len(sources) > 1 else expected
    for source in sources:
        stored = file.tensors[source].shape
        if _without_ones(stored) != _without_ones(asked[::-1] if transposed else asked):
            raise file.error(
                f"the tensor {source} is {stored}, where its metadata ask for {asked}.", advice="Download it again."
            )
    if len(sources) > 1:
        return Placed(sources, name, expected, lambda *parts: torch.cat(parts, dim=1))
    restores = architecture.changes(sources[0])

    def change(values: Tensor) -> Tensor:
        if restores:
            values = architecture.restore(file, sources[0], values)
        return values.t() if transposed else values

    return Placed(sources, name, expected, change if restores or transposed else None)


def _stored(file: GgufFile, one: Placed) -> StoredTensor:
    first = file.tensors[one.sources[0]]
    names = {file.tensors[source].dtype_name for source in one.sources}
    dtype = names.pop() if len(names) == 1 else "F32"
    nbytes = prod(one.shape) * DTYPES[dtype].itemsize
    return StoredTensor(one.name, file.path, dtype, one.shape, first.begin, nbytes)


def _bytes(values: Tensor) -> memoryview:
    return memoryview(values.view(torch.uint8).numpy().data)


def _is_not_needed(name: str) -> bool:
    return name in _NOT_NEEDED or name.endswith(_NOT_NEEDED_ENDS)


def _has_end(name: str) -> bool:
    return name.endswith((".weight", ".bias"))


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Converters leave axes of 1 out."""
    return tuple(size for size in shape if size != 1)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
