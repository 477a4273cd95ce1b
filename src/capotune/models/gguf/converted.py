"""A GGUF base's weights in safetensors, in the cache: whole, or in 4 bits straight from the file.

Either is written tensor by tensor, once for all files of one content. F32, F16 and BF16 stay so; a quantised tensor
becomes fp32, the smallest dtype that holds its values exactly, and in 4 bits it is so one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers.pytorch_utils import Conv1D

from capotune.events import Stage, bytes_as_progress
from capotune.files import human_bytes
from capotune.models.base import Base, Quantization
from capotune.models.gguf.cache import GgufModel
from capotune.models.quantize import StoredLinear, copy_other_files, write_config, write_quantized
from capotune.models.shard_writer import ShardWriter, whole_plan
from capotune.models.stream import empty_model, quantizable


def converted(base: Base, quantization: Quantization | None) -> Base:
    """``base`` itself, or a GGUF file's as a folder with weights: whole, or with ``quantization`` in 4 bits.

    Peak memory is that of one tensor, and one more where it changes its order or is quantized. Raises ``ModelError``
    for a file that was cut short meanwhile or cannot be stored in 4 bits, and ``OutputError`` when there is no room.
    """
    file = base.gguf
    if file is None:
        return base
    if quantization is None:
        folder = file.once("", partial(_write, file, base), base.tensors.nbytes)
    else:
        make = partial(_quantize, file, base, quantization)
        folder = file.once(_kind(quantization), make, base.weight_bytes)  # few files are of fewer bits
    return replace(base, folder=folder, gguf=None)


def _write(file: GgufModel, base: Base, folder: Path) -> None:
    tensors, done = base.tensors, 0
    file.report(Stage(text=f"converting {file.path.name}, once: {human_bytes(tensors.nbytes)} in {folder.parent}"))
    progress = bytes_as_progress(file.report)

    def followed(parts: Iterator[memoryview]) -> Iterator[memoryview]:
        nonlocal done
        for part in parts:
            yield part
            done += part.nbytes
            progress(done, tensors.nbytes)

    with ShardWriter(folder, map(whole_plan, tensors)) as writer:
        for stored in tensors:
            writer.copy(stored.name, followed(tensors.chunks(stored.name)))
    copy_other_files(base, folder)
    write_config(folder, base, None)


def _quantize(file: GgufModel, base: Base, quantization: Quantization, folder: Path) -> None:
    file.report(Stage(text=f"quantizing {file.path.name}, once: {quantization}, in {folder.parent}"))
    write_quantized(base, folder, quantization, layers=_layers(base), progress=bytes_as_progress(file.report))


def _layers(base: Base) -> dict[str, StoredLinear]:
    """Every weight that a model from a folder gets in 4 bits as it is loaded; the file's names are the model's."""
    from transformers import AutoModelForCausalLM

    model = empty_model(AutoModelForCausalLM, base.config)
    return {
        name: StoredLinear(path, isinstance(model.get_submodule(path), Conv1D), None)
        for name, path in quantizable(model).items()
    }


def _kind(quantization: Quantization) -> str:
    double = "-double" if quantization.double_quant else ""
    return f"-{quantization.quant_type}-{quantization.block_size}{double}"
