"""A frozen base, a method attached to it, and a head on top: the model that trains and the one that is loaded again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from capotune.config import MethodSettings
from capotune.errors import SettingError
from capotune.methods import Method, Start, make
from capotune.models.architecture import Architecture, describe, parameter_count
from capotune.models.load import Pooling, Source, load_backbone, load_config, load_tokenizer, max_length
from capotune.tasks.classification import Classification, SequenceClassifier

_MOST_FEATURES = 8192  # a head's features are held in memory for all rows at once


@dataclass(frozen=True)
class Assembled:
    """Everything that belongs together once a base is loaded."""

    source: Source
    model: SequenceClassifier
    architecture: Architecture
    task: Classification
    method: Method
    base_parameters: int
    """Weights of the backbone alone."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every trained weight by its key in the adapter file: the method's, then the head's."""
        head = self.task.head_parameters(self.model)
        return {**self.method.parameters(), **{self.method.key_prefix + path: weight for path, weight in head.items()}}

    def expected_trainable(self) -> int:
        """The trainable count by formula: the method's own, and (features + 1)·labels for the head."""
        features = len(self.model.feature_layers) * self.architecture.hidden_size
        return self.method.expected_parameters() + (features + 1) * len(self.task.labels)


def classification_task(
    source: Source, labels: tuple[str, ...], pooling: Pooling, longest: int | None, virtual: int, trust: bool = False
) -> Classification:
    """The task on this base; ``longest`` None is all that the base can take beside ``virtual`` prompt tokens."""
    tokenizer = load_tokenizer(source, trust)
    limit = max_length(tokenizer, load_config(source, trust))
    room = limit - virtual
    if virtual > limit // 2:
        raise SettingError(
            f"--num-virtual-tokens {virtual} leaves little room for text: the base takes {limit} tokens; "
            f"allowed are 1 to {limit // 2}."
        )
    least = tokenizer.num_special_tokens_to_add() + 1
    if longest is not None and not least <= longest <= limit:
        raise SettingError(
            f"--max-length {longest}: this base takes at most {limit} tokens, and {least - 1} of them mark start and "
            f"end of a text; allowed are {least} to {limit}."
        )
    return Classification(labels, tokenizer, min(longest or room, room), pooling)


def assemble(
    source: Source,
    settings: MethodSettings,
    task: Classification,
    *,
    device: torch.device,
    trust_remote_code: bool = False,
) -> Assembled:
    """Load the base as the method wants it and put the head on top. The method is not attached yet.

    Raises ``ModelError`` when the base cannot be loaded or its parts cannot be told apart.
    """
    method = make(settings)
    backbone = load_backbone(source, quantization=method.quantization, trust_remote_code=trust_remote_code)
    layers = method.feature_layers or readable_layers(backbone.config.num_hidden_layers, backbone.config.hidden_size)
    model = SequenceClassifier(backbone, task.pooling, len(task.labels), layers).to(device).eval()
    return Assembled(source, model, describe(model, model.backbone_name), task, method, parameter_count(backbone))


def attach(assembled: Assembled, start: Start) -> None:
    """Attach the method and count: the trainable weights must be as many as the formula says."""
    assembled.method.attach(assembled.model, assembled.architecture, start)
    assembled.model.virtual_tokens = len(assembled.method.virtual_token_ids)
    found = sum(weight.numel() for weight in assembled.trainable().values())
    assert found == assembled.expected_trainable(), (found, assembled.expected_trainable())


def readable_layers(num_blocks: int, hidden_size: int) -> tuple[int, ...]:
    """Hidden states for a head that reads several: all, or evenly spread ones when all are too wide; the last is in."""
    count = max(1, min(num_blocks + 1, _MOST_FEATURES // hidden_size))
    if count == 1:
        return (-1,)
    return tuple(round(number * num_blocks / (count - 1)) for number in range(count))


def peft_config(assembled: Assembled) -> dict[str, Any]:
    """The whole ``adapter_config.json``."""
    return {
        **assembled.method.peft_config(),
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": assembled.source.lasting_name,
        "inference_mode": True,
        **({"modules_to_save": ["classifier"]} if assembled.method.name in ("lora", "qlora") else {}),
    }
