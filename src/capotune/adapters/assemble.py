"""A frozen base, a method attached to it, and a head on top: the model that trains and the one that is loaded again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from capotune.adapters.task_model import TaskModel
from capotune.events import OnProgress
from capotune.methods import make
from capotune.methods.base import Method, Start, Untouched
from capotune.models.architecture import Architecture, describe, parameter_count
from capotune.models.base import Base
from capotune.models.fusion import Fusing, fused, try_fusing, why_not_fused
from capotune.models.hub import peft_base
from capotune.models.sequence_packing import Packing, packed, try_packing
from capotune.settings import TrainingSettings


@dataclass(frozen=True)
class Assembled:
    """Everything that belongs together once a base is loaded."""

    model: Any
    """The base with the task's head, or Transformers' own causal language model."""
    loaded: Any
    """The base as it was loaded, which the models of other adapters may share."""
    architecture: Architecture
    task: Any
    """A ``TaskModel``; typed so that a task's own code finds its own fields."""
    method: Method
    base_parameters: int
    """Weights of the base as it was loaded, without the task's head."""

    @property
    def base(self) -> Base:
        """The base's files."""
        base: Base = self.task.base
        return base

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every trained weight by its key in the adapter file: the method's, then the head's."""
        return {**self.method.parameters(), **self._head()}

    def stored(self) -> dict[str, torch.Tensor]:
        """The same as the adapter file holds it (``Method.stored``), on the CPU."""
        head = {key: weight.detach().cpu().contiguous() for key, weight in self._head().items()}
        return {**self.method.stored(), **head}

    def _head(self) -> dict[str, nn.Parameter]:
        head = self.task.head_parameters(self.model)
        return {self.method.key_prefix + path: weight for path, weight in head.items()}

    def expected_trainable(self) -> int:
        """The trainable count by formula: the method's own and the task's head."""
        return int(self.method.expected_parameters() + self.task.expected_head(self.model))

    @property
    def backbone(self) -> Any:
        """The pretrained transformer, without any head."""
        return self.model.get_submodule(self.architecture.backbone)

    @cached_property
    def packing(self) -> Packing:
        """How the base reads several sequences at once; found out when it first does."""
        if not self.task.reads_packed:
            return Packing(None, "the head is the model's own", equal_lengths=True)
        return try_packing(self.backbone)

    @cached_property
    def fusing(self) -> Fusing:
        """Which of its blocks the kernels compute; found out when it first reads."""
        return try_fusing(self.backbone, self.blocks, self.packing)

    def asking(self, task: TaskModel) -> Assembled:
        """The same for another task on the same model, such as one with thresholds."""
        other = replace(self, task=task)
        vars(other).update({name: vars(self)[name] for name in ("packing", "fusing") if name in vars(self)})
        return other

    def bare(self) -> Assembled:
        """The base alone, for as long as the method is not attached. How it reads is found out once for both."""
        alone = replace(self, method=Untouched(self.method.quantization))
        vars(alone).update(packing=self.packing, fusing=self.fusing)
        return alone

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, as they are now."""
        return [self.model.get_submodule(path) for path in self.architecture.blocks]

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, the base reads batches of ``packing``'s kind, and only such, as fast as it can."""
        if vars(self).get("is_reading"):  # by who began it
            yield
            return
        vars(self)["is_reading"] = True
        try:
            with packed(self.backbone, self.packing), fused(self.blocks, self.fusing):
                yield
        finally:
            del vars(self)["is_reading"]

    def how_it_reads(self) -> dict[str, str]:
        """For the record of a run: how sequences are put together and what computes the blocks."""
        blocks = self.blocks
        reasons = why_not_fused(blocks, self.fusing)
        how = "fused" if len(reasons) < len(blocks) else "plain"
        if reasons:
            how += f": {reasons[0]}" if how == "plain" else f", {len(reasons)} of {len(blocks)} plain: {reasons[0]}"
        return {"sequences": self.packing.described, "blocks": how}


def assemble(
    task: TaskModel,
    settings: TrainingSettings | None,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    progress: OnProgress | None = None,
) -> Assembled:
    """Load the task's base as the method wants it, with the head on top. The method is not attached yet.

    Args:
        task: the task on its base.
        settings: complete settings of the method; None: the base stays as it is.
        device: where the model is put.
        dtype: what a language model computes in.
        progress: called with (bytes read, all bytes) where weights are quantized or stored in 4 bits.

    Raises ``ModelError`` when the base cannot be loaded or its parts cannot be told apart.
    """
    method = Untouched() if settings is None else make(settings)
    loaded = task.load_base(method, dtype, progress).to(device)
    return with_head(task, loaded, method)


def with_head(task: TaskModel, loaded: Any, method: Method) -> Assembled:
    """The task's head on its base, ``loaded``, to which others may belong too. The method is not attached yet."""
    model, backbone = task.put_head(loaded, method)
    model = model.to(loaded.device).eval()
    whole = model.get_submodule(backbone) if task.has_head else model
    return Assembled(model, loaded, describe(model, backbone), task.with_model(model), method, parameter_count(whole))


def attach(assembled: Assembled, start: Start) -> None:
    """Attach the method and count: the trainable weights must be as many as the formula says."""
    method = assembled.method
    method.resolve(assembled.model, assembled.architecture, has_head=assembled.task.has_head)
    method.attach(assembled.model, assembled.architecture, start)
    assembled.task.prompt_attached(assembled.model, len(method.virtual_token_ids))
    found = sum(weight.numel() for weight in assembled.trainable().values())
    found -= sum(part.numel() for part in method.resting())
    assert found == assembled.expected_trainable(), (found, assembled.expected_trainable())


def peft_config(assembled: Assembled, base_name: str) -> dict[str, Any]:
    """The whole ``adapter_config.json``; ``base_name`` is how it names the base."""
    task, method = assembled.task, assembled.method
    whole_head = sorted({path.partition(".")[0] for path in task.head_parameters(assembled.model)})
    return {
        **method.peft_config(),
        "task_type": task.peft_task_type,
        **peft_base(base_name),
        "inference_mode": True,
        **({"modules_to_save": whole_head} if whole_head and method.saves_head_whole else {}),
    }
