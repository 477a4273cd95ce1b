"""Several adapters on one language model in memory: switched in place, or each row of a batch with its own.

The base is loaded once. An adapter's modules are made once, when it is added, and put in or taken out by reference, so
that to switch takes no copy of any weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from capotune.adapters.assemble import Assembled
from capotune.adapters.store import StoredAdapter, check_base, put_on
from capotune.errors import AdapterError, ModelError, SettingError
from capotune.events import Reporter, ignore
from capotune.methods import make
from capotune.methods.lora.method import LoraLinear
from capotune.models.architecture import swap
from capotune.settings import nearest
from capotune.tasks.loading import task_class, task_on


@dataclass(frozen=True)
class _Added:
    """An adapter that can be put in."""

    assembled: Assembled
    slots: list[tuple[dict[str, Any], str, Any, Any]]
    """Where it changes the model: a module's table of modules or of parameters, the name in it, what stands there with
    the adapter and without. PyTorch's own way to set a module takes 30 microseconds, which makes 30 ms a switch in a
    model of 200 layers."""


class Adapters:
    """Named adapters on one frozen language model, which the object owns: nobody else may change its modules.

    Batches are padded: (rows, tokens). One thread at a time.
    """

    def __init__(self, base: Assembled) -> None:
        """``base``: a language model without an adapter."""
        self._base = base
        self._known: dict[str, _Added] = {}
        self._in_use: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """In the order in which they were added."""
        return tuple(self._known)

    @property
    def in_use(self) -> str | None:
        """The adapter that the model computes with; None: the base alone."""
        return self._in_use

    @property
    def model(self) -> Any:
        """Transformers' language model, with the adapter in use inside."""
        return self._base.model

    def add(self, name: str, stored: StoredAdapter, report: Reporter = ignore) -> None:
        """Read an adapter in under ``name``; the one in use stays in use.

        Raises ``SettingError`` for a name that is taken, ``AdapterError`` for an adapter of another base, another
        quantization, or a task with a head of its own.
        """
        if name in self._known:
            raise SettingError("there is an adapter of that name.", setting="name", given=name, advice="Remove it.")
        task = task_class(stored)
        if task.has_head:
            raise AdapterError(
                f"this adapter {task.gives}: it brings a head of its own, and a model has one.",
                where=str(stored.folder),
                advice="Load it apart, with `capotune.load`.",
            )
        if getattr(stored.settings, "deep", False):
            raise AdapterError(
                "a deep prompt changes how the base's attention is called, so it is used alone, not one of several.",
                where=str(stored.folder),
                advice="Load it apart, with `capotune.load`.",
            )
        check_base(stored, self._base.base, report)
        method = make(stored.settings)
        if method.quantization != self._base.method.quantization:
            held = self._base.method.quantization or "full precision"
            raise AdapterError(
                f"this adapter was trained over {method.quantization or 'full precision'}, and the base is loaded in "
                f"{held}.",
                where=str(stored.folder),
            )
        before = self._in_use
        self.use(None)
        restored = task_on(stored, self._base.base).with_model(self.model)
        added = replace(self._base, task=restored, method=method)
        frozen = {(id(table), key): part for table, key, part in _parts(self.model)}
        put_on(stored, added)
        changed = [
            (table, key, part, frozen[id(table), key])
            for table, key, part in _parts(self.model)
            if frozen.get((id(table), key), part) is not part
        ]
        method.detach()
        self._known[name] = _Added(added, changed)
        self.use(before)

    def use(self, name: str | None) -> Assembled:
        """Switch to an adapter in place; None: the base alone. ``SettingError`` for an unknown name."""
        chosen = None if name is None else self._get(name)
        if name != self._in_use:
            if self._in_use is not None:
                for table, key, _, frozen in self._known[self._in_use].slots:
                    table[key] = frozen
            for table, key, own, _ in chosen.slots if chosen else ():
                table[key] = own
            self._in_use = name
        return chosen.assembled if chosen else self._base

    def remove(self, name: str) -> None:
        """Take an adapter off and forget it. ``SettingError`` for an unknown name."""
        self._get(name)
        if name == self._in_use:
            self.use(None)
        del self._known[name]

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[Any]:
        """Inside, the model reads batches of ``len(names)`` rows, each with the adapter of its name (None: the base).

        Gives the model. Raises ``SettingError`` for an unknown name, and for a method that changes more than linear
        layers: it reads other tokens than the rows beside it, or has other blocks.
        """
        deltas = {name: self._deltas(name) for name in names if name is not None}
        before = self._in_use
        self.use(None)
        layers: dict[str, dict[str, LoraLinear]] = {}
        for name, own in deltas.items():
            for path, layer in own.items():
                layers.setdefault(path, {})[name] = layer
        frozen = {path: self.model.get_submodule(path) for path in layers}
        try:
            for path, by_name in layers.items():
                swap(self.model, path, _RowsLinear(frozen[path], by_name, names))
            yield self.model
        finally:
            for path, layer in frozen.items():
                swap(self.model, path, layer)
            self.use(before)

    def _get(self, name: str) -> _Added:
        if name not in self._known:
            known = ", ".join(self._known) or "none"
            raise SettingError(
                f"no adapter of that name.{nearest(name, self._known)}", setting="name", given=name, allowed=known
            )
        return self._known[name]

    def _deltas(self, name: str) -> dict[str, LoraLinear]:
        method = self._get(name).assembled.method
        layers = method.adapted_layers()
        if layers is None:
            raise SettingError(
                f"'{name}' was made by {method.name} and changes more than linear layers, so rows with it cannot stand "
                "in one batch with others.",
                advice="Switch to it with `use`, and give its rows apart.",
            )
        return layers


class _RowsLinear(nn.Module):
    """A frozen linear layer beside which each row of a batch has the LoRA delta of its own adapter, or none."""

    def __init__(self, base_layer: nn.Module, layers: dict[str, LoraLinear], names: Sequence[str | None]) -> None:
        super().__init__()
        self.base_layer, self.count = base_layer, len(names)
        self.layers = [
            (layer, torch.tensor([row for row, own in enumerate(names) if own == name], device=layer.device))
            for name, layer in layers.items()
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (rows, …, in), or without rows (rows·tokens, in) → (…, out)."""
        if x.dim() == 2 and len(x) != self.count and len(x) % self.count == 0:
            return self(x.view(self.count, -1, x.shape[1])).flatten(0, 1)  # type: ignore[no-any-return]
        if len(x) != self.count:
            raise ModelError(
                f"the adapters of {self.count} rows are named, and a linear layer reads a batch of {len(x)}.",
                advice="Give as many rows; a model that mixes the tokens of rows takes one adapter at a time.",
            )
        y: torch.Tensor = self.base_layer(x)
        for layer, rows in self.layers:
            own = x[rows]
            if layer.lora_magnitude_vector is not None:
                y[rows] = layer(own)
            else:
                delta = (own @ layer.lora_A.to(x.dtype).t()) @ layer.lora_B.to(x.dtype).t()
                y.index_add_(0, rows, delta.to(y.dtype), alpha=layer.scale)
        return y


def _parts(model: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """Every module and parameter, after the table of the module around it that holds it, and its name there."""
    tables = [table for module in model.modules() for table in (module._modules, module._parameters)]
    return [(table, key, part) for table in tables for key, part in table.items()]
