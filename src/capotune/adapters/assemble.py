"""A frozen base, a method attached to it, and a head on top: the model that trains and the one that is loaded again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from capotune.errors import ModelError, SettingError
from capotune.kernels import policy
from capotune.methods import Method, Start, Untouched, make
from capotune.models.architecture import Architecture, describe, parameter_count
from capotune.models.fusion import Fusing, fused, try_fusing, why_not_fused
from capotune.models.load import (
    Pooling,
    Source,
    check_writes_text,
    end_tokens,
    load_backbone,
    load_causal_lm,
    load_config,
    load_tokenizer,
    max_length,
)
from capotune.models.sequence_packing import Packing, packed, try_packing
from capotune.models.stream import Progress
from capotune.settings import MethodSettings
from capotune.tasks.base import Task
from capotune.tasks.classification import Classification, SequenceClassifier
from capotune.tasks.generation import PLAIN_TEMPLATE, Generation


@dataclass(frozen=True)
class Assembled:
    """Everything that belongs together once a base is loaded."""

    source: Source
    model: Any
    """A ``SequenceClassifier``, or for text Transformers' own causal language model."""
    architecture: Architecture
    task: Task
    method: Method
    base_parameters: int
    """Weights of the backbone alone."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every trained weight by its key in the adapter file: the method's, then the head's."""
        head = self.task.head_parameters(self.model)
        return {**self.method.parameters(), **{self.method.key_prefix + path: weight for path, weight in head.items()}}

    def expected_trainable(self) -> int:
        """The trainable count by formula: the method's own and the task's head."""
        return self.method.expected_parameters() + self.task.expected_head(self.model)

    @property
    def backbone(self) -> Any:
        """The pretrained transformer, without any head."""
        return self.model.get_submodule(self.architecture.backbone)

    @cached_property
    def packing(self) -> Packing:
        """How the base reads several sequences at once; found out when it first does."""
        return try_packing(self.backbone)

    @cached_property
    def fusing(self) -> Fusing:
        """Which of its blocks the kernels compute; found out when it first reads."""
        return try_fusing(self.backbone, self.blocks, self.packing)

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

    @property
    def classification(self) -> Classification:
        """The task, where it is known to be classification."""
        assert isinstance(self.task, Classification)
        return self.task

    @property
    def generation(self) -> Generation:
        """The task, where it is known to be generation."""
        assert isinstance(self.task, Generation)
        return self.task


def classification_task(
    source: Source, labels: tuple[str, ...], pooling: Pooling, longest: int | None, virtual: int, trust: bool = False
) -> Classification:
    """The task on this base; ``longest`` None is all that the base can take beside ``virtual`` prompt tokens."""
    tokenizer = load_tokenizer(source, trust)
    least = tokenizer.num_special_tokens_to_add() + 1
    return Classification(labels, tokenizer, _room(source, tokenizer, longest, virtual, least, trust), pooling)


def generation_task(
    source: Source,
    longest: int | None,
    virtual: int,
    *,
    learn: Literal["all", "last"] = "all",
    separator: str = "",
    chat: bool = False,
    trust: bool = False,
) -> Generation:
    """The task on this base with the model's own chat template; where ``chat`` needs one and it has none, a plain form.

    Raises ``ModelError`` when it is no causal language model, or its tokenizer names no end-of-text token.
    """
    check_writes_text(source, trust)
    tokenizer = load_tokenizer(source, trust)
    ends = end_tokens(source, tokenizer)
    if not ends:
        raise ModelError(
            f"--model {source.name}: its tokenizer names no end-of-text token, so the model could never learn to stop. "
            f"Set 'eos_token' in {source.folder / 'tokenizer_config.json'}."
        )
    room = _room(source, tokenizer, longest, virtual, 2, trust)
    template, origin = tokenizer.chat_template, "the model's own chat template"
    if not isinstance(template, str):  # none, or several by name
        template = (template or {}).get("default")
    if template is None:
        origin = "no chat template, which plain text does without"
        if chat:
            template, origin = PLAIN_TEMPLATE, "a plain form 'User: … Assistant: …', as the model has no chat template"
    return Generation(tokenizer, room, ends, template, origin, learn, separator, chat)


def _room(source: Source, tokenizer: Any, longest: int | None, virtual: int, least: int, trust: bool) -> int:
    """Tokens for text: all that the base takes beside ``virtual`` prompt tokens, or ``longest``, which must fit."""
    limit = max_length(tokenizer, load_config(source, trust))
    if virtual > limit // 2:
        raise SettingError(
            f"--num-virtual-tokens {virtual} leaves little room for text: the base takes {limit} tokens; "
            f"allowed are 1 to {limit // 2}."
        )
    if longest is not None and not least <= longest <= limit:
        raise SettingError(
            f"--max-length {longest}: this base takes at most {limit} tokens, and {least - 1} of them mark start and "
            f"end of a text; allowed are {least} to {limit}."
        )
    return min(longest or limit - virtual, limit - virtual)


def assemble(
    source: Source,
    settings: MethodSettings | None,
    task: Task,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Assembled:
    """Load the base as the method wants it, with the task's head on top. The method is not attached yet.

    Without ``settings`` the base stays as it is. ``dtype`` is what a language model computes in. ``progress`` is told
    the bytes that were read, where weights are packed or stored packed.

    Raises ``ModelError`` when the base cannot be loaded or its parts cannot be told apart.
    """
    width = hidden_size(source, trust_remote_code)
    method = Untouched() if settings is None else make(settings.completed(task.name, width))
    how: Any = {"quantization": method.quantization, "trust_remote_code": trust_remote_code, "progress": progress}
    if isinstance(task, Classification):
        backbone = load_backbone(source, **how)
        layers = method.feature_layers or readable_layers(backbone.config.num_hidden_layers, width)
        model: Any = SequenceClassifier(backbone, task.pooling, len(task.labels), layers).to(device).eval()
        return Assembled(source, model, describe(model, model.backbone_name), task, method, parameter_count(backbone))
    assert isinstance(task, Generation)
    model = load_causal_lm(source, dtype=dtype, **how).to(device)
    architecture = describe(model, model.base_model_prefix)
    task = replace(task, plain_head=_head_is_plain(model))
    return Assembled(source, model, architecture, task, method, parameter_count(model))


def hidden_size(source: Source, trust_remote_code: bool = False) -> int:
    """Width of the base's hidden states."""
    return int(load_config(source, trust_remote_code).hidden_size)


@torch.no_grad()
def _head_is_plain(model: Any) -> bool:
    """Whether the logits of two tokens are the output layer's product with the backbone's last states, and no more.

    Some families scale or cap them (Gemma 2, Cohere, Granite); their loss is then taken from the model's own logits.
    """
    caught: list[Any] = []
    hook = model.base_model.register_forward_hook(lambda _module, _given, output: caught.append(output))
    logits = model(input_ids=torch.tensor([[0, 1]], device=model.device)).logits
    hook.remove()
    states = getattr(caught[0], "last_hidden_state", None) if caught else None
    return states is not None and torch.equal(model.get_output_embeddings()(states), logits)


def attach(assembled: Assembled, start: Start) -> None:
    """Attach the method and count: the trainable weights must be as many as the formula says."""
    assembled.method.attach(assembled.model, assembled.architecture, start)
    if isinstance(assembled.model, SequenceClassifier):
        assembled.model.virtual_tokens = len(assembled.method.virtual_token_ids)
    found = sum(weight.numel() for weight in assembled.trainable().values())
    assert found == assembled.expected_trainable(), (found, assembled.expected_trainable())


def readable_layers(num_blocks: int, hidden_size: int) -> tuple[int, ...]:
    """Hidden states for a head that reads several: all, or evenly spread ones when all are too wide; the last is in."""
    count = max(1, min(num_blocks + 1, policy.HEAD_FEATURES // hidden_size))
    if count == 1:
        return (-1,)
    return tuple(round(number * num_blocks / (count - 1)) for number in range(count))


def peft_config(assembled: Assembled) -> dict[str, Any]:
    """The whole ``adapter_config.json``."""
    classifies = isinstance(assembled.task, Classification)
    return {
        **assembled.method.peft_config(),
        "task_type": "SEQ_CLS" if classifies else "CAUSAL_LM",
        "base_model_name_or_path": assembled.source.lasting_name,
        "inference_mode": True,
        **({"modules_to_save": ["classifier"]} if classifies and assembled.method.name in ("lora", "qlora") else {}),
    }
