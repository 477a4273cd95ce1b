"""When memory runs out in a run: what to lower, what helps most first, with the settings as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from capotune.adapters.assemble import Assembled
from capotune.device import is_out_of_memory, peak_memory_bytes
from capotune.errors import CapotuneError, OutOfMemoryError
from capotune.files import human_bytes
from capotune.methods import make
from capotune.models.base import Base
from capotune.settings import TrainingSettings

_RECOMPUTED = 0.7
"""Part of the activations that gradient checkpointing does not save: all but each block's input."""


@contextmanager
def telling_what_to_lower(
    method: TrainingSettings, base: Base, doing: str, training: Assembled | None = None
) -> Iterator[None]:
    """Inside, running out of memory is an ``OutOfMemoryError``. ``training``: the model, where it is being trained."""
    try:
        yield
    except CapotuneError:
        raise
    except (MemoryError, RuntimeError, OSError, SafetensorError) as error:
        if not is_out_of_memory(error):
            raise
        peak = peak_memory_bytes()
        raise OutOfMemoryError(
            f"memory ran out {doing} ({human_bytes(peak)} were in use at most).",
            advice=f"What helps most comes first: {'; '.join(_what_to_lower(method, base, training, peak))}.",
        ) from None


def _what_to_lower(method: TrainingSettings, base: Base, training: Assembled | None, peak: int) -> list[str]:
    """Sentences without their full stop, by the bytes that each saves."""
    saves: list[tuple[float, str]] = []
    weights = sum(weight.nbytes for weight in training.model.parameters()) if training else peak
    if make(method).quantization is None and base.quantization is None:
        saves.append((0.75 * weights, "qlora, which reads the base in 4 bits"))
    if training is not None:
        saves += _of_activations(method, training, max(0, peak - weights))
    saves.append((0.0, "a smaller `model`"))
    return [text for _, text in sorted(saves, key=lambda one: -one[0])]


def _of_activations(method: TrainingSettings, training: Assembled, size: int) -> list[tuple[float, str]]:
    """What makes less of the ``size`` bytes that a step takes beside the base."""
    longest, tokens = training.task.record(training.model)["max_length"], method.micro_batch_tokens
    halves = f"`max_length={longest // 2}` (now {longest:,}), which cuts longer texts"
    if tokens > longest:
        by_itself = "" if method.auto_micro_batch else ", or `auto_micro_batch=True` to find it"
        halves = f"`micro_batch_tokens={max(longest, tokens // 2)}` (now {tokens:,}){by_itself}: the same gradient"
    saves = [(size / 2, halves)]
    if not method.gradient_checkpointing:
        saves.append((_RECOMPUTED * size, "`gradient_checkpointing=True`: the same gradient, a third more work"))
    return saves
