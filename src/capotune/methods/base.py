"""The contract between a method and everything above it.

A method swaps parts of a frozen model from outside and says what is trainable. It knows no task: the head on top is the
task's. A method is one file: its settings, a ``TrainingSettings``, and this class filled in; ``methods.register`` makes
it known. (The built-in ones are folders of two files, so that help is shown without loading PyTorch.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from capotune.models.architecture import Architecture
from capotune.models.base import Quantization
from capotune.settings import TrainingSettings


@dataclass(frozen=True)
class Start:
    """What a method may begin from."""

    generator: torch.Generator
    """Source of every random number in the initial weights."""
    token_ids: list[int] = field(default_factory=list)
    """Tokens whose embeddings a soft prompt can start from."""


@dataclass(frozen=True)
class LowRank:
    """The LoRA delta of one layer, scale·BA; with DoRA each row of W + scale·BA is rescaled to its magnitude."""

    a: torch.Tensor
    """(rank, in), fp32."""
    b: torch.Tensor
    """(out, rank), fp32."""
    scale: float
    magnitude: torch.Tensor | None = None
    """(out,), fp32; None without DoRA."""

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that it belongs to."""
        return int(self.b.shape[0]), int(self.a.shape[1])

    @property
    def is_zero(self) -> bool:
        """Whether it leaves every weight as it is."""
        return self.magnitude is None and not bool(self.b.any())

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """weight (out, in) + scale·BA, with DoRA each row rescaled to its magnitude."""
        changed = torch.addmm(weight, self.b, self.a, alpha=self.scale)
        if self.magnitude is not None:
            changed = changed * (self.magnitude / torch.linalg.norm(changed, dim=1))[:, None]
        return changed


class Method(ABC):
    """One way to adapt a frozen model. Call ``attach`` once; the other members need it, ``quantization`` does not."""

    Settings: ClassVar[type[TrainingSettings]]
    """The class of its settings; ``Settings.method`` is its name."""
    identity_at_start: ClassVar[bool] = True
    """Whether the model computes the same before and right after ``attach``."""
    key_prefix: ClassVar[str] = "base_model.model."
    """What PEFT puts before a module's path in an adapter's keys."""

    known_to_peft: ClassVar[bool] = True
    """Whether PEFT loads its adapters."""
    saves_head_whole: ClassVar[bool] = False
    """Whether PEFT stores a task's head beside this method's weights as ``modules_to_save``."""
    settings: Any
    """Complete: nothing is left out (``TrainingSettings.completed``) but what ``resolve`` fills in."""

    def __init__(self, settings: TrainingSettings | None) -> None:
        self.settings = settings

    @property
    def name(self) -> str:
        """The method's name on the command line."""
        return str(self.settings.method)

    @property
    def quantization(self) -> Quantization | None:
        """How the base must be quantized when it is loaded; None for full precision."""
        return None

    @property
    def virtual_token_ids(self) -> range:
        """Ids that must stand before every text; beyond the vocabulary, so no text holds them."""
        return range(0)

    @property
    def virtual_tokens_are_placeholders(self) -> bool:
        """Whether nothing that is computed of them is read, but what attention has in their place."""
        return False

    @property
    def feature_layers(self) -> tuple[int, ...] | None:
        """Hidden states that a head on this method should read; None: every one of them."""
        return (-1,)

    def resolve(  # noqa: B027 - most have nothing to do
        self, model: nn.Module, architecture: Architecture, *, has_head: bool
    ) -> None:
        """Fill in what the settings leave out and only the loaded base can tell. Called once before ``attach``;
        ``has_head``: as in ``Context``."""

    @abstractmethod
    def attach(self, model: nn.Module, architecture: Architecture, start: Start) -> None:
        """Swap the method's parts into ``model``; all else stays frozen. ``SettingError`` when they don't fit."""

    @abstractmethod
    def detach(self) -> None:
        """Put back what ``attach`` swapped out: the base is bitwise what it was."""

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """Trained weights by key; most methods store them under it (``stored``)."""

    @abstractmethod
    def expected_parameters(self) -> int:
        """The trainable count by the method's formula, computed from shapes and settings alone."""

    @abstractmethod
    def first_trainable_block(self) -> int:
        """Number of the lowest block that training changes; 0 when something below the blocks changes."""

    @abstractmethod
    def peft_config(self) -> dict[str, Any]:
        """What ``adapter_config.json`` says of the method."""

    def notices(self) -> list[str]:
        """What the user should know of how the method is attached, each in one sentence."""
        return []

    def learning_rates(self) -> dict[str, float]:
        """Peak learning rate of each trained weight, by key."""
        return dict.fromkeys(self.parameters(), float(self.settings.learning_rate))

    def train_mode(self, on: bool) -> None:  # noqa: B027 - most methods have nothing that differs
        """Switch the method's own dropout."""

    def resting(self) -> list[torch.Tensor]:
        """Parts of the trained weights, without gradients, that each step must leave as they are."""
        return []

    def way_from_start(self) -> Callable[[float], None] | None:
        """Called after training, where a part of the change is better given back: a function that puts the trained
        weights at a part of their way, from 0 (the start) to 1. None: all of it is wanted."""
        return None

    def merge(self) -> bool:
        """Write the change into plain layers in memory; False when the method has nothing that can be merged."""
        return False

    def adapted_layers(self) -> dict[str, Any] | None:
        """The layers with a LoRA delta by path, where these are all that it changes; None otherwise."""
        return None

    def unmerge(self) -> None:  # noqa: B027 - most methods merge nothing
        """Undo ``merge``: the model computes the bits that it did before."""

    @classmethod
    def weight_changes(
        cls,
        settings: Any,  # noqa: ARG003 - most methods have no change of weights
        tensors: Mapping[str, torch.Tensor],  # noqa: ARG003
    ) -> dict[str, Callable[[torch.Tensor], torch.Tensor]] | None:
        """From stored ``tensors``, for each changed layer's path a function from its weight W (out, in), fp32, to the
        merged one; None for methods that change no weight. Raises ``AdapterError`` for damaged tensors."""
        return None

    @classmethod
    def low_rank(
        cls,
        settings: Any,  # noqa: ARG003 - most methods have none
        tensors: Mapping[str, torch.Tensor],  # noqa: ARG003
    ) -> dict[str, LowRank] | None:
        """From stored ``tensors`` each layer's LoRA delta by the layer's path; None for methods that have none.

        Raises ``AdapterError`` for damaged tensors."""
        return None

    @classmethod
    def replaced_weights(
        cls,
        settings: Any,  # noqa: ARG003 - most methods replace none
        tensors: Mapping[str, torch.Tensor],  # noqa: ARG003
    ) -> dict[str, torch.Tensor]:
        """Of stored ``tensors`` those that stand in place of weights of the base, by the weight's path in the model
        that holds backbone and head; a head's weights may be among them. Empty for most methods."""
        return {}

    @classmethod
    def trained_count(cls, settings: Any, tensors: Mapping[str, torch.Tensor]) -> int:  # noqa: ARG003
        """How many weights training changed, of those in stored ``tensors``; with most methods all of them."""
        return sum(tensor.numel() for tensor in tensors.values())

    @classmethod
    def stored_facts(cls, settings: Any) -> dict[str, Any] | None:  # noqa: ARG003
        """What ``capo info`` says by an adapter's settings alone; None: only the loaded model tells (``facts``)."""
        return {}

    def facts(self, tokenizer: Any) -> dict[str, Any]:  # noqa: ARG002
        """What ``capo info`` says of the attached method."""
        return {}

    def stored(self) -> dict[str, torch.Tensor]:
        """The trained weights as an adapter file holds them, by key, on the CPU; by default as they are."""
        return {key: weight.detach().cpu().contiguous() for key, weight in self.parameters().items()}

    @classmethod
    def trained(
        cls,
        settings: Any,  # noqa: ARG003 - most methods store what they train
        tensors: dict[str, torch.Tensor],
        config: Mapping[str, Any],  # noqa: ARG003
    ) -> dict[str, torch.Tensor]:
        """The weights as ``settings`` trained them, from those that ``stored`` gave and ``peft_config`` describes."""
        return tensors

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put stored weights in place of the initial ones. ``KeyError`` or ``ValueError`` when they don't fit."""
        with torch.no_grad():
            for key, parameter in self.parameters().items():
                if tensors[key].shape != parameter.shape:
                    raise ValueError(f"{key} is {tuple(tensors[key].shape)}, expected {tuple(parameter.shape)}")
                parameter.copy_(tensors[key])


class Untouched(Method):
    """The base as it is: nothing is swapped, nothing trains."""

    def __init__(self, quantization: Quantization | None = None) -> None:
        super().__init__(None)
        self._quantization = quantization

    @property
    def name(self) -> str:
        """What stands where a method's name would."""
        return "base"

    @property
    def quantization(self) -> Quantization | None:
        """How the base is quantized; None for full precision."""
        return self._quantization

    def attach(self, model: nn.Module, architecture: Architecture, start: Start) -> None:
        """Nothing to do."""

    def detach(self) -> None:
        """Nothing to do."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """None."""
        return {}

    def expected_parameters(self) -> int:
        """0."""
        return 0

    def first_trainable_block(self) -> int:
        """No block trains."""
        raise NotImplementedError("the base alone does not train")

    def peft_config(self) -> dict[str, Any]:
        """There is none."""
        raise NotImplementedError("the base alone is no adapter")
