"""A linear head on a backbone's hidden states: what tasks that predict names have in common."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from capotune import methods
from capotune.adapters.assemble import Assembled
from capotune.adapters.files import WEIGHTS
from capotune.adapters.store import StoredAdapter
from capotune.errors import AdapterError, ModelError, quoted
from capotune.events import OnProgress
from capotune.methods.base import Method
from capotune.models.architecture import FAILURES, joined, text_part
from capotune.models.base import first_line
from capotune.models.load import load_backbone
from capotune.tasks.base import Task
from capotune.text import words


class HeadedBackbone(nn.Module):
    """A backbone without its own head, and ``classifier``, a linear layer on features of its hidden states.

    The backbone stands under its family's usual name (``bert``, ``model``, …), so that adapter keys read as they would
    in Transformers' own classes. No dropout stands before the head: it is solved or trained on the states as they are.

    Args:
        backbone: a ``PreTrainedModel`` that returns hidden states (batch, tokens, hidden).
        num_labels: outputs of the head.
        feature_layers: hidden states that the head reads, as indices into embedding output + every block's output; they
            stand side by side: there are len(feature_layers)·hidden features.
    """

    def __init__(self, backbone: Any, num_labels: int, feature_layers: tuple[int, ...] = (-1,)) -> None:
        super().__init__()
        name: str = getattr(backbone, "base_model_prefix", "")
        self.backbone_name = "model" if not name or hasattr(HeadedBackbone, name) else name
        setattr(self, self.backbone_name, backbone)
        self.text_part = joined(self.backbone_name, text_part(backbone))
        """Path of what reads text: the backbone, or a part of it."""
        self.config = copy.copy(self.backbone.config)  # PEFT reads vocab_size and model_type from here
        self.feature_layers = feature_layers
        self._widths = _widths(self.backbone)
        self.classifier = nn.Linear(self.width_of(feature_layers), num_labels)

    @property
    def backbone(self) -> Any:
        """The pretrained transformer of text."""
        return self.get_submodule(self.text_part)

    def width_of(self, layers: tuple[int, ...]) -> int:
        """Features of these layers' states, side by side."""
        return sum(self._widths[layer] for layer in layers)

    def states(self, **inputs: Any) -> torch.Tensor:
        """What the head reads of every token, (rows, tokens, features), of padded ``inputs`` of the backbone."""
        if self.feature_layers == (-1,):
            last: torch.Tensor = self.backbone(**inputs).last_hidden_state
            return last
        every = self.backbone(output_hidden_states=True, **inputs).hidden_states
        return torch.cat([every[layer] for layer in self.feature_layers], dim=-1)

    def logits_of(self, states: torch.Tensor, mask: torch.Tensor, skip: int = 0) -> torch.Tensor:  # noqa: ARG002
        """The head on what ``states`` gave, of which ``mask`` (rows, tokens) says where a token is and ``skip`` are a
        soft prompt's: by default of every token."""
        found: torch.Tensor = self.classifier(states)
        return found

    @property
    def depth(self) -> int:
        """Hidden states beside the embeddings' output."""
        return len(self._widths) - 1

    @property
    def device(self) -> torch.device:
        """Where the head is; PEFT asks for it."""
        return self.classifier.weight.device


_TOKEN_STATES = 3  # dimensions: (batch, tokens, hidden)


def inner_states(backbone: Any) -> int:
    """Hidden states beside the embeddings' output that a head on ``backbone`` can read."""
    return len(_widths(backbone.get_submodule(text_part(backbone)))) - 1


@torch.no_grad()
def _widths(backbone: Any) -> list[int]:
    """Of each hidden state; a few families project the embeddings or the last states (OPT-350m).

    Raises ``ModelError`` for a model that asks for more than a text's tokens, or gives states of other positions.
    """
    name = type(backbone).__name__
    advice = "Give an encoder such as BERT, RoBERTa, DeBERTa or ModernBERT, or a causal language model."
    token = torch.zeros(1, 1, dtype=torch.long, device=backbone.device)
    try:
        output = backbone(input_ids=token, output_hidden_states=True)
    except FAILURES as error:  # it was a try
        problem = f"a {name} cannot read a single token by itself: {first_line(error).rstrip('.')}."
        raise ModelError(problem, advice=advice) from None
    states: Any = getattr(output, "hidden_states", None) or ()
    alike = bool(states) and output.last_hidden_state.shape == states[-1].shape
    if not alike or any(state.shape[:2] != token.shape for state in states):
        raise ModelError(f"a {name} gives no hidden state of each token after each block.", advice=advice)
    streams = any(state.dim() > _TOKEN_STATES for state in states)  # several for each token, the last but one (HC)
    return [state.shape[-1] for state in (states[-1:] if streams else states)]


def spread_layers(num_blocks: int, most: int) -> tuple[int, ...]:
    """Hidden states for a head that reads several: at most ``most``, evenly spread; the last is among them."""
    count = min(num_blocks + 1, most)
    if count <= 1:
        return (-1,)
    return tuple(round(number * num_blocks / (count - 1)) for number in range(count))


class LinearHeadTask(Task):
    """A task whose model is a ``HeadedBackbone``, and whose ``labels`` the head tells apart."""

    labels: tuple[str, ...]

    command: ClassVar[str] = "predict"
    default_models: ClassVar[tuple[str, ...]] = ("minilm",)
    base_label: ClassVar[str] = "base (frozen, nearest class mean)"
    has_head: ClassVar[bool] = True
    of_the_head: ClassVar[frozenset[str]] = frozenset({"labels"})
    """What of the record is told of a head's weights, which are averaged where adapters are combined."""
    of_the_answer: ClassVar[frozenset[str]] = frozenset({"max_length"})
    """What of it does not change what the head reads of a text."""
    data_settings: ClassVar[frozenset[str]] = frozenset({"text_column", "label_column"})

    @property
    def reads_pairs(self) -> bool:
        """Whether two texts are read together."""
        return False

    @property
    def reads_token_types(self) -> bool:
        """Whether its rows are ``TypedTokens``."""
        return self.reads_pairs and self.base.reads_token_types

    def load_base(self, method: Method, dtype: torch.dtype, progress: OnProgress | None) -> Any:
        """The backbone, without any head."""
        return load_backbone(self.base, dtype=dtype, quantization=method.quantization, progress=progress)

    @classmethod
    def check_tensors(cls, stored: StoredAdapter) -> None:
        """A row of the head for each label."""
        key, labels = methods.get(stored.settings.method).key_prefix + "classifier.weight", stored.record["labels"]
        weight = stored.tensors.get(key)
        if weight is not None and (weight.dim() != 2 or len(weight) != len(labels)):
            shape = tuple(weight.shape)
            raise AdapterError(
                f"classifier.weight is {shape}, expected ({len(labels)}, {shape[-1] if shape else 1}).",
                where=str(stored.folder / WEIGHTS),
            )
        if weight is None:
            raise AdapterError(f"the tensor '{key}' is missing.", where=str(stored.folder / WEIGHTS))

    @abstractmethod
    def logits_of_ids(self, assembled: Assembled, sequences: list[list[int]]) -> torch.Tensor:
        """What the head gives for token ids as ``predict`` reads them: (rows, labels), or where each token has a label
        (all tokens, labels)."""

    def write_merged_files(self, folder: Path) -> list[str]:  # noqa: ARG002 - the head is written as an adapter
        """Nothing beside the weights; says so where the base has a head of its own."""
        own = str((self.base.config_values.get("architectures") or [""])[0])
        if not own.endswith("Classification"):
            return []
        return [
            f"the base's own head ({own}) comes along as it was, for its own labels: programs that load the folder "
            "with it do not use what was trained. The trained head is the adapter inside."
        ]

    @classmethod
    def check_combines(cls, first: dict[str, Any], other: dict[str, Any]) -> list[str]:
        """Labels may stand in another order; what the heads read must be the same."""
        one, two = set(first["labels"]), set(other["labels"])
        if one != two:
            only = ", ".join(map(quoted, sorted(one ^ two)[:3]))
            raise AdapterError(
                f"its {len(two)} labels are others than the first adapter's {len(one)}: only one has {only}.",
                advice="A head tells its own labels apart: combine adapters of the same labels.",
            )
        differing = [name for name in super().check_combines(first, other) if name not in cls.of_the_head]
        read = [name for name in differing if name not in cls.of_the_answer]
        if read:
            raise AdapterError(
                f"its head reads the text otherwise than the first adapter's ({', '.join(map(words, read))}).",
                advice="Combine adapters that were trained alike.",
            )
        return differing

    def graph_facts(self) -> dict[str, Any]:
        """What tells other programs how to read the outputs, for the configuration beside a graph."""
        return {}

    def rows_of_labels(self, record: Mapping[str, Any]) -> list[int]:
        """Of the head of another adapter of the same labels, in the order of this one's."""
        return [record["labels"].index(label) for label in self.labels]

    def expected_head(self, model: Any) -> int:
        """(features + 1)·labels."""
        return (int(model.width_of(model.feature_layers)) + 1) * len(self.labels)

    def head_parameters(self, model: Any) -> dict[str, nn.Parameter]:
        """Weight (labels, features) and bias (labels,) of the linear head."""
        return {f"classifier.{name}": parameter for name, parameter in model.classifier.named_parameters()}
