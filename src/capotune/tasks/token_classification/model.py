"""A tag for each word: the state of its first sub-word in the frozen or adapted backbone, and a linear head on it."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers.modeling_outputs import TokenClassifierOutput

from capotune.data.batches import Batch
from capotune.tasks.linear_head import HeadedBackbone


class TokenClassifier(HeadedBackbone):
    """A backbone, and a linear head on the states of words: features are (words, len(feature_layers)·hidden)."""

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
        past_key_values: Any = None,
        **unused: Any,  # noqa: ARG002 - PEFT passes output_attentions, return_dict and the like
    ) -> TokenClassifierOutput:
        """Logits of every token (batch, tokens, labels), as other programs ask for them; ``past_key_values`` are a deep
        prompt's, which the mask counts too.

        The mean cross-entropy too when ``labels`` (batch, tokens) are given; -100 counts nothing.
        """
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        inputs["past_key_values"] = past_key_values
        given = {name: value for name, value in inputs.items() if value is not None}
        logits = self.classifier(self.states(**given))
        loss = None if labels is None else functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return TokenClassifierOutput(loss=loss, logits=logits)
