"""Stored adapters and plain models, put on their bases."""

from __future__ import annotations

import torch

from capotune import tasks
from capotune.adapters.assemble import Assembled, assemble
from capotune.adapters.files import RECORD
from capotune.adapters.store import StoredAdapter, check_base, check_record, find_base, put_on
from capotune.errors import AdapterError, SettingError
from capotune.events import Reporter, Warned, ignore
from capotune.kernels.nf4 import Linear4bit
from capotune.models.architecture import plain_linear, swap
from capotune.models.base import Base
from capotune.tasks.base import Task
from capotune.tasks.generation.task import Generation


def task_class(stored: StoredAdapter) -> type[Task]:
    """The task that an adapter was trained for.

    Raises ``AdapterError`` for one that this version does not know, and for a record that lacks what the task needs.
    """
    try:
        task = tasks.get(stored.task)
    except SettingError:
        raise AdapterError(
            f"'task' is {stored.task!r}, and not as capotune writes it: {', '.join(tasks.names())}.",
            where=str(stored.folder / RECORD),
        ) from None
    if not stored.is_foreign:
        check_record(stored.folder, stored.record, task.Record)
        task.check_tensors(stored)
    return task


def task_on(stored: StoredAdapter, base: Base) -> Task:
    """The task of a stored adapter on ``base``. Raises as ``task_class``, also for a record that fits no such base."""
    task = task_class(stored)
    if stored.is_foreign:
        return task.of_peft(base, stored)
    try:
        return task.restore(base, stored.record)
    except SettingError as error:
        raise AdapterError(str(error), where=str(stored.folder / RECORD)) from None


def load_adapter(
    stored: StoredAdapter,
    *,
    model: str | None,
    device: torch.device,
    trust_remote_code: bool = False,
    report: Reporter = ignore,
) -> Assembled:
    """Put the adapter on its base (``model`` names another place of the same base).

    Raises ``AdapterError`` when the base is another one by content, or the weights do not fit.
    """
    assembled = _on_base(stored, model, device, trust_remote_code, report)
    put_on(stored, assembled)
    report_notices(stored, assembled, report)
    return assembled


def report_notices(stored: StoredAdapter, assembled: Assembled, report: Reporter) -> None:
    """Say what the user should know of how an adapter was read, and one of another program put on its base."""
    for notice in (*stored.notices, *(assembled.method.notices() if stored.is_foreign else ())):
        report(Warned(text=notice))


def load_plain(base: Base, *, device: torch.device, dtype: torch.dtype = torch.float32) -> Assembled:
    """A language model without an adapter."""
    return assemble(Generation.of_model(base), None, device=device, dtype=dtype)


def bare_base(stored: StoredAdapter, *, model: str | None = None, device: torch.device | None = None) -> Assembled:
    """The frozen base with a blank head, as the adapter expects it, for other programs such as PEFT.

    4-bit layers become plain ones of the same values: other programs do not know this package's.
    """
    assembled = _on_base(stored, model, device or torch.device("cpu"), False)
    assembled.task.prompt_attached(assembled.model, stored.settings.virtual_tokens)
    dequantize_layers(assembled)
    return assembled


def dequantize_layers(assembled: Assembled) -> None:
    """Put a plain layer of the same values in place of every one in 4 bits, in fp32."""
    for path in assembled.architecture.linears:
        layer = assembled.model.get_submodule(path)
        if isinstance(layer, Linear4bit):
            swap(assembled.model, path, plain_linear(layer.dense_weight(torch.float32), layer.bias))


def _on_base(
    stored: StoredAdapter,
    model: str | None,
    device: torch.device,
    trust_remote_code: bool,
    report: Reporter = ignore,
) -> Assembled:
    base = find_base(stored, model, trust_remote_code=trust_remote_code, report=report)
    check_base(stored, base, report)
    task = task_on(stored, base)
    return assemble(task, stored.settings, device=device, dtype=stored.dtype)
