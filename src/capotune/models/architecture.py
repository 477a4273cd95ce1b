"""Where a transformer's blocks, linear layers and input embedding are, whatever its family."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from capotune.kernels.nf4 import Linear4bit

_LONGEST_WINDOW = 8
FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a model's code may raise when it is tried on what it was not written for."""
LINEAR_TYPES = (nn.Linear, Conv1D, Linear4bit)


@dataclass(frozen=True)
class Architecture:
    """Names of a model's parts, as paths from the model that holds the backbone (``bert.encoder.layer.0``)."""

    backbone: str
    """The pretrained transformer, without any head."""
    embedding: str
    """Its token embedding."""
    blocks: tuple[str, ...]
    """Its transformer blocks, in order; none where they cannot be told apart (``why_no_blocks``)."""
    norm: str | None
    """The norm above the last block, where the family has one (decoders do, BERT does not)."""
    linears: tuple[str, ...]
    """Every linear layer inside the backbone that is called, in order of definition."""
    bypassed: tuple[str, ...]
    """Linear layers whose weights the model's own code reads, so that nothing can stand in for them."""
    stacked: tuple[str, ...]
    """Every parameter that is a stack of matrices, (experts, out, in), and no linear layer's."""
    hidden_size: int
    embedding_size: int
    """Width of the token embedding; in a few families less than ``hidden_size``."""
    vocab_size: int
    why_no_blocks: str | None = None
    """In words, where there are none."""

    def block_of(self, path: str) -> int | None:
        """Number of the block that holds the module at ``path``; None outside the blocks."""
        for number, block in enumerate(self.blocks):
            if path.startswith(block + "."):
                return number
        return None

    def short_names(self, paths: Collection[str]) -> list[str]:
        """Last names of these linear layers where they name just these (other programs expect such), else paths."""
        names = {path.rpartition(".")[2] for path in paths}
        named = [path for path in self.linears if path.rpartition(".")[2] in names]
        return sorted(names if len(named) == len(paths) else paths)


def text_part(model: Any) -> str:
    """Path in a ``PreTrainedModel`` of the transformer that reads text, without head.

    It is the whole base model, or where ``text_config`` describes that part of it apart, the part made of it.
    """
    text = model.config.get_text_config()
    if text is model.config and (model.base_model is not model or model.get_output_embeddings() is None):
        return base_path(model)
    parts = ((name, part) for name, part in model.named_modules() if isinstance(part, PreTrainedModel) and name)
    fits = (name for name, part in parts if type(part.config) is type(text) and part.get_output_embeddings() is None)
    return str(next(fits))


def base_path(model: Any) -> str:
    """Path of the whole base model, without head, in a ``PreTrainedModel``; empty where it is that itself."""
    return "" if model.base_model is model else str(model.base_model_prefix)


def joined(*names: str) -> str:
    """A path of its parts, of which some may be empty."""
    return ".".join(name for name in names if name)


def describe(model: nn.Module, backbone: str) -> Architecture:
    """Find the parts of ``model``'s submodule ``backbone`` (a ``PreTrainedModel`` without head)."""
    module: Any = model.get_submodule(backbone)
    config = module.config
    embedding = next(name for name, part in module.named_modules() if part is module.get_input_embeddings())
    lists = _block_lists(module, getattr(config, "num_hidden_layers", None))
    blocks = lists[0] if len(lists) == 1 else None
    bypassed, apart = bypassed_linears(module), _of_other_kinds(module)
    linears = [name for name, part in module.named_modules() if is_linear(part) and not name.startswith(apart)]
    return Architecture(
        backbone=backbone,
        embedding=joined(backbone, embedding),
        blocks=()
        if blocks is None
        else tuple(joined(backbone, blocks, name) for name, _ in module.get_submodule(blocks).named_children()),
        norm=None if blocks is None else _norm_above(module, backbone, blocks),
        linears=tuple(joined(backbone, name) for name in linears if name not in bypassed),
        bypassed=tuple(joined(backbone, name) for name in linears if name in bypassed),
        stacked=tuple(
            joined(backbone, name)
            for name, weight in module.named_parameters()
            if _is_stack(weight) and not name.startswith(apart)
        ),
        hidden_size=config.hidden_size,
        embedding_size=module.get_input_embeddings().weight.shape[1],
        vocab_size=module.get_input_embeddings().weight.shape[0],
        why_no_blocks=None if blocks is not None else _why_no_blocks(type(module).__name__, lists),
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


def is_linear(part: nn.Module) -> bool:
    """Whether a module is a linear layer and no more: a family's own class may compute something else (a router's)."""
    if type(part) in LINEAR_TYPES:
        return True
    return isinstance(part, LINEAR_TYPES) and _computes_a_product(type(part), part)


_known_to_compute: dict[type, bool] = {}


def _computes_a_product(kind: type, part: nn.Module) -> bool:
    """Of a layer's class, tried on a copy with a small weight."""
    if kind not in _known_to_compute:
        small, x = copy.copy(part), torch.rand(1, 3)
        small._parameters = {"weight": nn.Parameter(torch.rand(2, 3)), "bias": nn.Parameter(torch.rand(2))}
        try:
            found = small(x)
        except FAILURES:
            found = None
        expected = nn.functional.linear(x, small.weight, small.bias)  # type: ignore[arg-type]
        _known_to_compute[kind] = isinstance(found, Tensor) and bool(torch.allclose(found, expected))
    return _known_to_compute[kind]


def bypassed_linears(module: nn.Module) -> set[str]:
    """Paths of the linear layers whose weight the code of a module around them names, as Mamba's does for kernels that
    take weights: what is put in their place would not be called, or would lack what is read."""
    kinds: dict[str, Any] = {path: type(part) for path, part in module.named_modules()}
    return {path for path, part in module.named_modules() if is_linear(part) and _is_bypassed(path, kinds)}


def _is_bypassed(path: str, kinds: Mapping[str, Any]) -> bool:
    parent, _, name = path.rpartition(".")
    if _names_weight(kinds[parent], "self", name):
        return True
    names = parent.split(".") if parent else []
    around = (".".join(names[:depth]) for depth in range(len(names)))
    return any(_names_weight(kinds[one], names[-1], name) for one in around)


@cache
def _names_weight(kind: Any, owner: str, name: str) -> bool:
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):  # made at run time, or of PyTorch itself
        return False
    return re.search(rf"\b{re.escape(owner)}\.{re.escape(name)}\.weight\b", source) is not None


def _is_stack(weight: Tensor) -> bool:
    """Convolutions over time have three dimensions too, of which one is as short as their window."""
    return weight.dim() == 3 and min(weight.shape[1:]) > _LONGEST_WINDOW


def _of_other_kinds(module: Any) -> tuple[str, ...]:
    """Beginnings of the paths inside models of another configuration, such as one that reads images beside the text."""
    parts = ((name, part) for name, part in module.named_modules() if name and isinstance(part, PreTrainedModel))
    return tuple(f"{name}." for name, part in parts if type(part.config) is not type(module.config))


def _norm_above(module: Any, backbone: str, blocks: str) -> str | None:
    """Path of the first module defined after the blocks, beside them, whose weights are vectors of the hidden size."""
    parent, _, name = blocks.rpartition(".")
    children = dict(module.get_submodule(parent).named_children())
    after = list(children)[list(children).index(name) + 1 :]
    for child in after:
        shapes = {tuple(parameter.shape) for parameter in children[child].parameters()}
        if shapes == {(module.config.hidden_size,)}:
            return joined(backbone, parent, child)
    return None


def _block_lists(module: Any, count: int | None) -> list[str]:
    """Paths of the outermost ``ModuleList``s of ``count`` modules; a single one holds the transformer blocks."""
    apart = _of_other_kinds(module)
    lists = [
        str(name)
        for name, part in module.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) == count and not name.startswith(apart)
    ]
    return [name for name in lists if not any(name.startswith(other + ".") for other in lists)]


def _why_no_blocks(name: str, lists: list[str]) -> str:
    if not lists:
        return f"the blocks of {name} are not modules of their own (some families share one among all)."
    return f"the blocks of {name} lie in parts, in {', '.join(lists)}."
