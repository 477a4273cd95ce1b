"""One label for one text: a pooled vector of the frozen or adapted backbone, and a linear head on it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_outputs import SequenceClassifierOutput

from capotune.data.batches import Batch, Targets
from capotune.errors import DataError
from capotune.models.load import Pooling
from capotune.settings import TaskName
from capotune.tasks.base import Score, Task


class SequenceClassifier(nn.Module):
    """A backbone without head, pooling over the text's own tokens, and ``classifier``, a linear layer.

    The backbone stands under its family's usual name (``bert``, ``model``, …), so that adapter keys read as they would
    in Transformers' own classes.

    Args:
        backbone: a ``PreTrainedModel`` that returns hidden states (batch, tokens, hidden).
        pooling: how hidden states become one vector.
        num_labels: outputs of the head.
        feature_layers: hidden states that the head reads, as indices into embedding output + every block's output;
            their pooled vectors stand side by side: features are (batch, len(feature_layers)·hidden).
    """

    virtual_tokens: int
    """Leading positions that are a soft prompt; attended to, but left out of the pooling."""

    def __init__(
        self, backbone: Any, pooling: Pooling, num_labels: int, feature_layers: tuple[int, ...] = (-1,)
    ) -> None:
        super().__init__()
        self.backbone_name: str = getattr(backbone, "base_model_prefix", "") or "model"
        setattr(self, self.backbone_name, backbone)
        self.config = copy.copy(backbone.config)  # PEFT reads vocab_size and model_type from here
        self.pooling = pooling
        self.feature_layers = feature_layers
        self.virtual_tokens = 0
        self.hidden_size: int = backbone.config.hidden_size
        self.classifier = nn.Linear(self.hidden_size * len(feature_layers), num_labels)

    @property
    def backbone(self) -> nn.Module:
        """The pretrained transformer."""
        return self.get_submodule(self.backbone_name)

    @property
    def device(self) -> torch.device:
        """Where the head is; PEFT asks for it."""
        return self.classifier.weight.device

    def features(
        self, batch: Batch, layers: tuple[int, ...] | None = None, inputs: dict[str, Any] | None = None
    ) -> torch.Tensor:
        """Pooled vectors (batch, len(layers)·hidden); ``layers`` are the head's own when left out.

        ``inputs`` stand in place of the batch's own, laid out the same: ``inputs_embeds`` instead of ``input_ids``.
        """
        layers = layers or self.feature_layers
        inputs = inputs or batch.inputs
        pooled = pooled_positions(batch.sequences.starts, self.pooling, self.virtual_tokens)
        if pooled is not None:
            pooled = pooled.to(batch.input_ids.device)
        if layers == (-1,):
            states = [batch.states(self.backbone, pooled, inputs)]
        else:
            all_states = self.backbone(output_hidden_states=True, **inputs).hidden_states
            flat = [batch.flat(all_states[layer]) for layer in layers]
            states = flat if pooled is None else [state[pooled] for state in flat]
        return torch.cat([pool(state, batch.starts, self.pooling, self.virtual_tokens) for state in states], dim=1)

    def logits(self, batch: Batch) -> torch.Tensor:
        """(batch, labels)."""
        found: torch.Tensor = self.classifier(self.features(batch))
        return found

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **unused: Any,  # noqa: ARG002 - PEFT passes output_attentions, return_dict and the like
    ) -> SequenceClassifierOutput:
        """Logits (batch, labels) as other programs ask for them, of right-padded ids (batch, tokens) or embeddings.

        The mean cross-entropy too when ``labels`` (batch,) are given.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        mask = given.new_ones(given.shape[:2], dtype=torch.long) if attention_mask is None else attention_mask
        name = "input_ids" if input_ids is not None else "inputs_embeds"
        inputs = {name: given, "attention_mask": mask}
        logits = self.classifier(self.features(Batch.of_padded(given, mask), inputs=inputs))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def pooled_positions(starts: torch.Tensor, pooling: Pooling, skip: int) -> torch.Tensor | None:
    """Which flat positions count, rising; None: all. Row r is tokens starts[r] to starts[r + 1], of which the first
    ``skip`` (a soft prompt) do not."""
    if pooling == "cls":
        return starts[:-1] + skip
    if pooling == "last":
        return starts[1:] - 1
    if not skip:
        return None
    position = torch.arange(int(starts[-1]), device=starts.device)
    row = torch.searchsorted(starts, position, right=True) - 1
    return position[position >= starts[row] + skip]


def pool(states: torch.Tensor, starts: torch.Tensor, pooling: Pooling, skip: int) -> torch.Tensor:
    """One vector per row, (rows, hidden), of the states at ``pooled_positions``, (positions, hidden)."""
    if pooling in ("cls", "last"):
        return states
    starts = starts - skip * torch.arange(len(starts), device=starts.device)
    every = torch.arange(len(states), device=states.device)
    # not segment_reduce: on a CPU it takes eight times as long
    return functional.embedding_bag(every, states, starts, mode=pooling, include_last_offset=True)


@dataclass(frozen=True)
class Classification(Task):
    """The task: its labels, tokenizer and lengths."""

    labels: tuple[str, ...]
    """Label names; a target is a position in this list."""
    tokenizer: Any
    max_length: int
    pooling: Pooling

    name: ClassVar[TaskName] = "classification"
    metric: ClassVar[str] = "accuracy"

    def token_lengths(self, texts: list[str]) -> list[int]:
        """Length of each text in tokens before cutting."""
        return [len(ids) for ids in self._ids(texts, truncation=False)]

    def encode(self, texts: list[str], where: Callable[[int], str] | None = None) -> list[list[int]]:
        """Token ids of each text, cut at ``max_length``.

        ``where`` gives the place of a text by its position, for messages (``LabelledText.where``). Raises ``DataError``
        for a text of which no token comes.
        """
        found = self._ids(texts, truncation=True, max_length=self.max_length)
        empty = next((at for at, ids in enumerate(found) if not ids), None)
        if empty is not None:
            raise DataError(
                f"the base's tokenizer makes no token of the text {texts[empty]!r}.",
                where=where(empty) if where else f"text {empty + 1} of {len(texts)}",
                advice="Remove it.",
            )
        return found

    def _ids(self, texts: list[str], **options: Any) -> list[list[int]]:
        if not texts:  # the tokenizer takes no empty list
            return []
        return [list(ids) for ids in self.tokenizer(texts, verbose=False, **options)["input_ids"]]

    def targets(self, labels: list[str]) -> torch.Tensor:
        """(rows,) int64 positions of label names."""
        number = {label: at for at, label in enumerate(self.labels)}
        return torch.tensor([number[label] for label in labels], dtype=torch.long)

    def loss(self, model: Any, batch: Batch, label_smoothing: float) -> torch.Tensor:
        """Sum of the rows' cross-entropies."""
        assert batch.targets is not None
        logits = self.outputs(model, batch)
        return functional.cross_entropy(logits, batch.targets, reduction="sum", label_smoothing=label_smoothing)

    def units(self, targets: Targets, rows: list[int]) -> int:  # noqa: ARG002 - a row is a unit, whatever its label
        """The rows."""
        return len(rows)

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """Logits (rows, labels)."""
        logits: torch.Tensor = model.logits(batch)
        return logits

    def score(self, outputs: torch.Tensor, targets: Targets) -> Score:
        """(accuracy, −cross-entropy)."""
        assert isinstance(targets, torch.Tensor)
        accuracy = float((outputs.argmax(1) == targets).float().mean())
        return accuracy, -float(functional.cross_entropy(outputs, targets))

    def shown(self, score: Score) -> float:
        """The accuracy."""
        return score[0]

    def expected_head(self, model: Any) -> int:
        """(features + 1)·labels."""
        return (len(model.feature_layers) * int(model.hidden_size) + 1) * len(self.labels)

    def head_parameters(self, model: Any) -> dict[str, nn.Parameter]:
        """Weight (labels, features) and bias (labels,) of the linear head."""
        return {f"classifier.{name}": parameter for name, parameter in model.classifier.named_parameters()}

    def record(self, model: Any) -> dict[str, Any]:
        """Labels, pooling, layers and length, as stored beside an adapter."""
        return {
            "task": self.name,
            "labels": list(self.labels),
            "pooling": self.pooling,
            "max_length": self.max_length,
            "feature_layers": list(model.feature_layers),
        }
