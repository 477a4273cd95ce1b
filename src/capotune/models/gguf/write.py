"""A causal language model as a GGUF file that llama.cpp runs: F32, F16 or Q8_0 by the package gguf's own quantiser.

Tensors go from file to file one at a time: no more than a few copies of the largest one are in memory.

Matrices are stored so; vectors (norms, biases) and the rotary factors stay in fp32, as llama.cpp has them. Metadata
come from the model's config and tokenizer, or from the GGUF file that the base itself came from, word for word.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from capotune.errors import needs_extra
from capotune.events import OnProgress
from capotune.models.base import Base
from capotune.models.gguf.file import open_gguf
from capotune.models.gguf.metadata import architecture_in_gguf, head_of, rope_tensors
from capotune.models.gguf.rope import TENSORS as ROPE_TENSORS
from capotune.models.gguf.vocabulary import of_tokenizer
from capotune.models.stored_names import StoredNames
from capotune.models.stream import empty_model

Kind = Literal["F32", "F16", "Q8_0"]
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7}
"""``general.file_type``."""
_NOT_CARRIED = (
    "general.file_type",
    "general.quantization_version",
    "general.architecture",
    "tokenizer.chat_template",
    "GGUF.",
)
_BLOCK = 32
"""Values that share a scale in Q8_0."""


def write_model(
    path: Path,
    merged: Base,
    base: Base,
    kind: Kind,
    *,
    end_ids: Sequence[int],
    chat_template: str | None,
    progress: OnProgress,
) -> None:
    """Write the weights of ``merged`` with the metadata and the tokenizer of ``base``, one family, to ``path``.

    Raises ``ModelError`` for a family or a tokenizer that is not written, and for a weight that is not stored.
    """
    with needs_extra("gguf"):
        import gguf
    source = None if base.gguf is None else base.gguf.path
    name, architecture = architecture_in_gguf(base)
    weights = _Weights(merged)
    writer = gguf.GGUFWriter(path, name)
    if source is None:
        file = head_of(base)
        rows = weights.model.get_input_embeddings().weight.shape[0]
        entries = {**file.metadata, **of_tokenizer(base, rows, end_ids, chat_template)}
        for key, value in entries.items():
            if key != "general.architecture":
                add_entry(writer, key, value)
        more = rope_tensors(base.config)
    else:
        file = open_gguf(source)
        _copy_entries(writer, source)
        if chat_template is not None:
            writer.add_chat_template(chat_template)
        more = {one: file.read(one) for one in ROPE_TENSORS if one in file.tensors}
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    names = gguf_names(base, weights.model, name)
    kinds = {called: _kind_of(called, _stored_shape(weights.model, one), kind) for called, one in names.items()}
    for called, one in names.items():
        writer.add_tensor_info(called, *_info(_stored_shape(weights.model, one), kinds[called]))
    for called, values in more.items():
        writer.add_tensor_info(called, *_info(tuple(values.shape), "F32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, (called, one) in enumerate(names.items()):
        values = weights.read(one)
        stored = architecture.store(file, called, values) if architecture.changes(called) else values
        writer.write_tensor_data(_encoded(stored, kinds[called]))
        progress(done + 1, len(names))
    for values in more.values():
        writer.write_tensor_data(_encoded(values.float(), "F32"))
    writer.close()


class _Weights:
    """A causal language model's parameters, read from its files one at a time; ``model`` holds none of them."""

    def __init__(self, base: Base) -> None:
        from transformers import AutoModelForCausalLM

        self.model = empty_model(AutoModelForCausalLM, base.config)
        self.model.tie_weights()
        self._base, self._tensors = base, base.tensors
        names = StoredNames(self.model, [one.name for one in self._tensors])
        self._keys = {name: key for key, name in names.whole.items()}

    def read(self, name: str) -> Tensor:
        """In fp32, (out, in) where it is a matrix of a linear layer."""
        parameter = self.model.get_parameter(name)
        tied = [one for one, same in self.model.named_parameters(remove_duplicate=False) if same is parameter]
        key = next((self._keys[one] for one in (name, *tied) if one in self._keys), None)
        if key is None:
            raise self._base.error(f"the weight {name} is not stored as one tensor.")
        values = self._tensors.read(key).float()
        return values.t() if _is_transposed(self.model, name) else values


def gguf_names(base: Base, model: Any, architecture: str) -> dict[str, str]:
    """GGUF's name of each of the model's parameters, with Transformers'."""
    found = {}
    for name, _ in model.named_parameters():
        called = gguf_name(model, architecture, name)
        if called is None:
            raise base.error(f"Transformers' {name} has no name in GGUF's architecture {architecture}.")
        found[called] = name
    return found


def gguf_name(model: Any, architecture: str, name: str) -> str | None:
    """GGUF's name of one parameter, ``….weight`` or ``….bias``."""
    import gguf

    arch = next(key for key, one in gguf.MODEL_ARCH_NAMES.items() if one == architecture)
    known = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    forms = (name, name.removeprefix(f"{model.base_model_prefix}."))  # Bloom's tensors are known without
    return next((one for form in forms if (one := known.get_name(form, (".weight", ".bias"))) is not None), None)


def add_entry(writer: Any, key: str, value: Any) -> None:
    """A metadata entry by the value's own type."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _copy_entries(writer: Any, source: Path) -> None:
    """Metadata of another file, with their types."""
    import gguf

    for field in gguf.GGUFReader(source).fields.values():
        if not field.name.startswith(_NOT_CARRIED):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)


def _is_transposed(model: Any, name: str) -> bool:
    layer = model.get_submodule(name.rpartition(".")[0])
    return isinstance(layer, Conv1D) and name.endswith(".weight")


def _stored_shape(model: Any, name: str) -> tuple[int, ...]:
    shape = tuple(model.get_parameter(name).shape)
    return shape[::-1] if _is_transposed(model, name) else shape


def _kind_of(called: str, shape: tuple[int, ...], kind: Kind) -> Kind:
    """Vectors stay in fp32, and rows whose length is no multiple of Q8_0's block in half precision."""
    if len(shape) == 1 or called.startswith(("position_embd", "token_types")):
        return "F32"
    return "F16" if kind == "Q8_0" and shape[-1] % _BLOCK else kind


def _info(shape: tuple[int, ...], kind: Kind) -> tuple[Any, ...]:
    """Shape, dtype, bytes and raw type, as the package's writer takes them."""
    import gguf

    numbers = int(torch.Size(shape).numel())
    if kind == "Q8_0":
        packed = gguf.quant_shape_to_byte_shape(shape, gguf.GGMLQuantizationType.Q8_0)
        return packed, np.dtype(np.uint8), int(torch.Size(packed).numel()), gguf.GGMLQuantizationType.Q8_0
    dtype = np.dtype(np.float16 if kind == "F16" else np.float32)
    return shape, dtype, numbers * dtype.itemsize, None


def _encoded(values: Tensor, kind: Kind) -> Any:
    import gguf

    array = values.contiguous().numpy()
    if kind == "Q8_0":
        return gguf.quantize(array, gguf.GGMLQuantizationType.Q8_0)
    return array.astype(np.float16 if kind == "F16" else np.float32)
