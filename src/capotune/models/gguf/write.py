"""A causal language model as a GGUF file that llama.cpp runs: F32, F16 or Q8_0 by the package gguf's own quantiser.

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
from capotune.models.gguf.architectures import Architecture
from capotune.models.gguf.file import GgufFile, open_gguf
from capotune.models.gguf.metadata import architecture_in_gguf, head_of, rope_tensors
from capotune.models.gguf.rope import TENSORS as ROPE_TENSORS
from capotune.models.gguf.vocabulary import of_tokenizer

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
    model: Any,
    base: Base,
    kind: Kind,
    *,
    end_ids: Sequence[int],
    chat_template: str | None,
    progress: OnProgress,
) -> None:
    """Write ``model``, of the family of ``base`` and with its tokenizer, to ``path``.

    Raises ``ModelError`` for a family or a tokenizer that is not written.
    """
    with needs_extra("gguf"):
        import gguf
    source = None if base.gguf is None else base.gguf.path
    name, architecture = architecture_in_gguf(base)
    writer = gguf.GGUFWriter(path, name)
    if source is None:
        file = head_of(base)
        rows = model.get_input_embeddings().weight.shape[0]
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
    names = gguf_names(base, model, name)
    parameters = dict(model.named_parameters())
    for called, one in names.items():
        writer.add_tensor_info(called, *_info(_stored_shape(model, one), _kind_of(called, parameters[one], kind)))
    for called, values in more.items():
        writer.add_tensor_info(called, *_info(tuple(values.shape), "F32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, (called, one) in enumerate(names.items()):
        values = stored_values(file, architecture, model, called, one)
        writer.write_tensor_data(_encoded(values, _kind_of(called, parameters[one], kind)))
        progress(done + 1, len(names))
    for values in more.values():
        writer.write_tensor_data(_encoded(values.float(), "F32"))
    writer.close()


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


def stored_values(file: GgufFile, architecture: Architecture, model: Any, called: str, name: str) -> Tensor:
    """A parameter's values as a file holds them, fp32."""
    values = model.get_parameter(name).detach().float().cpu()
    if _is_transposed(model, name):
        values = values.t()
    return architecture.store(file, called, values) if architecture.changes(called) else values


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


def _kind_of(called: str, values: Tensor, kind: Kind) -> Kind:
    """Vectors stay in fp32, and rows that Q8_0's blocks do not fit in half precision."""
    if values.dim() == 1 or called.startswith(("position_embd", "token_types")):
        return "F32"
    return "F16" if kind == "Q8_0" and (values.shape[-1] % _BLOCK or values.shape[0] % _BLOCK) else kind


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
