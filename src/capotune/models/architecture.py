"""Where a transformer's blocks, linear layers and input embedding are, whatever its family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from capotune.errors import ModelError
from capotune.kernels.nf4 import Linear4bit

LINEAR_TYPES = (nn.Linear, Conv1D, Linear4bit)


@dataclass(frozen=True)
class Architecture:
    """Names of a model's parts, as paths from the model that holds the backbone (``bert.encoder.layer.0``)."""

    backbone: str
    """The pretrained transformer, without any head."""
    embedding: str
    """Its token embedding."""
    blocks: tuple[str, ...]
    """Its transformer blocks, in order."""
    norm: str | None
    """The norm above the last block, where the family has one (decoders do, BERT does not)."""
    linears: tuple[str, ...]
    """Every linear layer inside the backbone, in order of definition."""
    hidden_size: int
    vocab_size: int

    def block_of(self, path: str) -> int | None:
        """Number of the block that holds the module at ``path``; None outside the blocks."""
        for number, block in enumerate(self.blocks):
            if path.startswith(block + "."):
                return number
        return None


def describe(model: nn.Module, backbone: str) -> Architecture:
    """Find the parts of ``model``'s submodule ``backbone`` (a ``PreTrainedModel`` without head).

    Raises ``ModelError`` when the blocks cannot be told apart.
    """
    module: Any = model.get_submodule(backbone)
    config = module.config
    embedding = next(name for name, part in module.named_modules() if part is module.get_input_embeddings())
    blocks = _block_list(module, config.num_hidden_layers)
    return Architecture(
        backbone=backbone,
        embedding=f"{backbone}.{embedding}",
        blocks=tuple(f"{backbone}.{blocks}.{number}" for number in range(config.num_hidden_layers)),
        norm=_norm_above(module, backbone, blocks),
        linears=tuple(f"{backbone}.{name}" for name, part in module.named_modules() if isinstance(part, LINEAR_TYPES)),
        hidden_size=config.hidden_size,
        vocab_size=module.get_input_embeddings().num_embeddings,
    )


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer; Transformers' Conv1D keeps its weight as (in, out)."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[1], layer.weight.shape[0]
    assert isinstance(layer, nn.Linear | Linear4bit)
    return layer.out_features, layer.in_features


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen ``nn.Linear`` around a dense weight (out, in) and a bias (out,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def swap(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put ``new`` where the module at ``path`` was."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


@contextmanager
def with_forward(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, each module computes by the given function in place of its ``forward``."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, own in before.items():
            del module.forward  # the class has its own
            if own is not None:
                module.forward = own


def parameter_count(module: nn.Module) -> int:
    """Weights of ``module``; a 4-bit layer counts the weights it stands for, not the bytes that hold them."""
    quantized = sum(part.in_features * part.out_features for part in module.modules() if isinstance(part, Linear4bit))
    return quantized + sum(parameter.numel() for parameter in module.parameters())


def _norm_above(module: Any, backbone: str, blocks: str) -> str | None:
    """Path of the first module defined after the blocks, beside them, whose weights are vectors of the hidden size."""
    parent, _, name = blocks.rpartition(".")
    children = dict(module.get_submodule(parent).named_children())
    after = list(children)[list(children).index(name) + 1 :]
    for child in after:
        shapes = {tuple(parameter.shape) for parameter in children[child].parameters()}
        if shapes == {(module.config.hidden_size,)}:
            return ".".join(part for part in (backbone, parent, child) if part)
    return None


def _block_list(module: Any, count: int) -> str:
    """Path of the ``ModuleList`` that holds the ``count`` transformer blocks."""
    lists = [name for name, part in module.named_modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    outermost = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    if len(outermost) != 1:
        found = ", ".join(outermost) or "none"
        raise ModelError(
            f"cannot tell the transformer blocks of {type(module).__name__}: "
            f"lists of {count} modules found: {found}; exactly one is needed."
        )
    return str(outermost[0])
