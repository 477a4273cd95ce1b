"""A tag for each word: the state of its first sub-word in the frozen or adapted backbone, and a linear head on it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_outputs import TokenClassifierOutput

from capotune.data.batches import Batch


class TokenClassifier(nn.Module):
    """A backbone without head, and ``classifier``, a linear layer on the states of words.

    The backbone stands under its family's usual name (``bert``, ``model``, …), so that adapter keys read as they would
    in Transformers' own classes. No dropout stands before the head: it is solved or trained on the states as they are.

    Args:
        backbone: a ``PreTrainedModel`` that returns hidden states (batch, tokens, hidden).
        num_labels: outputs of the head.
        feature_layers: hidden states that the head reads, as indices into embedding output + every block's output;
            they stand side by side: features are (words, len(feature_layers)·hidden).
    """

    def __init__(self, backbone: Any, num_labels: int, feature_layers: tuple[int, ...] = (-1,)) -> None:
        super().__init__()
        self.backbone_name: str = getattr(backbone, "base_model_prefix", "") or "model"
        setattr(self, self.backbone_name, backbone)
        self.config = copy.copy(backbone.config)  # PEFT reads vocab_size and model_type from here
        self.feature_layers = feature_layers
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

    def features(self, batch: Batch, layers: tuple[int, ...] | None = None) -> torch.Tensor:
        """States of the batch's words, (words, len(layers)·hidden), row after row; ``layers`` are the head's own when
        left out. A word stands where the batch has a target (``Batch.in_loss``)."""
        layers = layers or self.feature_layers
        if layers == (-1,):
            return batch.states(self.backbone, batch.in_loss)
        states = self.backbone(output_hidden_states=True, **batch.inputs).hidden_states
        return torch.cat([batch.flat(states[layer])[batch.in_loss] for layer in layers], dim=1)

    def logits(self, batch: Batch) -> torch.Tensor:
        """(words, labels)."""
        found: torch.Tensor = self.classifier(self.features(batch))
        return found

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **unused: Any,  # noqa: ARG002 - PEFT passes output_attentions, return_dict and the like
    ) -> TokenClassifierOutput:
        """Logits of every token (batch, tokens, labels), as other programs ask for them.

        The mean cross-entropy too when ``labels`` (batch, tokens) are given; -100 counts nothing.
        """
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        given = {name: value for name, value in inputs.items() if value is not None}
        if self.feature_layers == (-1,):
            states = self.backbone(**given).last_hidden_state
        else:
            every = self.backbone(output_hidden_states=True, **given).hidden_states
            states = torch.cat([every[layer] for layer in self.feature_layers], dim=-1)
        logits = self.classifier(states)
        loss = None if labels is None else functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return TokenClassifierOutput(loss=loss, logits=logits)


def spread_layers(num_blocks: int, most: int) -> tuple[int, ...]:
    """Hidden states for a head that reads several: at most ``most``, evenly spread; the last is among them."""
    count = min(num_blocks + 1, most)
    if count <= 1:
        return (-1,)
    return tuple(round(number * num_blocks / (count - 1)) for number in range(count))
