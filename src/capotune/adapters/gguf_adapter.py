"""LoRA deltas as a GGUF adapter, the file that llama.cpp and Ollama take beside a base in GGUF.

    general.type          adapter
    general.architecture  the base's
    adapter.type          lora
    adapter.lora.alpha    alpha; llama.cpp divides it by the rank
    NAME.weight.lora_a    A (rank, in), fp32
    NAME.weight.lora_b    B (out, rank), fp32, its rows in the order that llama.cpp has for the weight

The format is that of llama.cpp's convert_lora_to_gguf.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from capotune.adapters.portable import Portable
from capotune.errors import AdapterError, needs_extra
from capotune.models.base import Base
from capotune.models.gguf.file import open_gguf
from capotune.models.gguf.metadata import architecture_in_gguf, head_of
from capotune.models.gguf.write import gguf_name

_A, _B = ".lora_a", ".lora_b"


def write_gguf_adapter(path: Path, adapter: Portable, base: Base, model: Any) -> None:
    """Write it to ``path``; ``model`` is the base's causal language model. ``ModelError`` for a family that is not
    written."""
    with needs_extra("gguf"):
        import gguf
    name, architecture = architecture_in_gguf(base)
    file = head_of(base)
    writer = gguf.GGUFWriter(path, name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.alpha))
    for layer, called in _names(adapter, base, model, name).items():
        a, b = adapter.layers[layer]
        stored = architecture.store(file, called, b) if architecture.changes(called) else b
        writer.add_tensor(f"{called}{_A}", a.contiguous().numpy())
        writer.add_tensor(f"{called}{_B}", stored.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf_adapter(path: Path, written: Portable, base: Base, model: Any) -> Portable:
    """What stands in the file, in Transformers' names and order. ``AdapterError`` where a tensor has no place."""
    name, architecture = architecture_in_gguf(base)
    file, head = open_gguf(path, "adapter"), head_of(base)
    layers = {}
    for layer, called in _names(written, base, model, name).items():
        if f"{called}{_A}" not in file.tensors or f"{called}{_B}" not in file.tensors:
            raise AdapterError(f"{called} was not written.", where=str(path))
        a, b = file.read(f"{called}{_A}"), file.read(f"{called}{_B}")
        layers[layer] = a, architecture.restore(head, called, b) if architecture.changes(called) else b
    if len(file.tensors) != 2 * len(layers):
        raise AdapterError("it holds tensors that belong to no layer.", where=str(path))
    return Portable(layers, written.rank, int(file.metadata["adapter.lora.alpha"]))


def _names(adapter: Portable, base: Base, model: Any, architecture: str) -> dict[str, str]:
    """GGUF's name of each adapted weight, by the layer's path."""
    found = {path: gguf_name(model, architecture, f"{path}.weight") for path in adapter.layers}
    lost = sorted(path for path, called in found.items() if called is None)
    if lost:
        raise base.error(f"{', '.join(lost[:3])} has no name in GGUF's architecture {architecture}.")
    return {path: called for path, called in found.items() if called is not None}
