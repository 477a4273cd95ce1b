"""Several adapters on one base in memory: switched in place, or each row of a batch with its own.

The base is loaded once; heads stand on it side by side. An adapter's modules are made once, when it is added, and put
in or taken out by reference, so that to switch takes no copy of any weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from capotune.adapters.assemble import Assembled, with_head
from capotune.adapters.store import StoredAdapter, check_base, put_on
from capotune.errors import AdapterError, ModelError, SettingError
from capotune.events import Reporter, ignore
from capotune.methods import make
from capotune.methods.base import Untouched
from capotune.methods.lora.method import LoraLinear
from capotune.models.architecture import swap
from capotune.models.prefix import prefix_places
from capotune.settings import nearest
from capotune.tasks.facade import Facade
from capotune.tasks.generation.task import Generation
from capotune.tasks.loading import report_notices, task_class, task_on

_Place = tuple[dict[str, Any], str]
"""A table of a module's modules, parameters or other parts, and a name in it."""


@dataclass(frozen=True)
class _Added:
    """An adapter that can be put in."""

    assembled: Assembled
    facade: Facade
    parts: list[tuple[_Place, Any, Any]]
    """Where it changes the base, with what stands there with the adapter and without. PyTorch's own way to set a module
    takes 30 microseconds, which makes 30 ms a switch in a model of 200 layers."""


class Adapters:
    """Named adapters on one frozen base, which the object owns: nobody else may change its modules.

    Batches are padded: (rows, tokens). One thread at a time.
    """

    def __init__(self, assembled: Assembled, name: str | None = None) -> None:
        """``assembled``: a base, with an adapter on it that is known by ``name`` and in use, or a language model
        alone."""
        self._loaded, self._first = assembled.loaded, assembled
        self._known: dict[str, _Added] = {}
        self._in_use: str | None = None
        if name is not None:
            self._note(name, assembled)
            self.use(name)

    @property
    def names(self) -> tuple[str, ...]:
        """In the order in which they were added."""
        return tuple(self._known)

    @property
    def in_use(self) -> str | None:
        """The adapter that the base computes with; None: the base alone."""
        return self._in_use

    @property
    def model(self) -> Any:
        """The PyTorch module with the adapter in use inside; the base as it was loaded where there is none."""
        return self._loaded if self._in_use is None else self._known[self._in_use].assembled.model

    @cached_property
    def _alone(self) -> Facade:
        if self._first.task.has_head:
            raise SettingError(
                "a base alone gives no labels.", setting="name", allowed=", ".join(self._known) or "none"
            )
        task = Generation.of_model(self._first.base).with_model(self._loaded)
        return task.facade(replace(self._first, task=task, method=Untouched(self._first.method.quantization)))

    def add(self, name: str, stored: StoredAdapter, report: Reporter = ignore) -> None:
        """Read an adapter in under ``name``; the one in use stays in use.

        Raises ``SettingError`` for a name that is taken, ``AdapterError`` for an adapter of another base, another
        quantization, or a task that puts its head on the base in another way; the base is then as it was.
        """
        if name in self._known:
            raise SettingError("there is an adapter of that name.", setting="name", given=name, advice="Remove it.")
        first = self._first
        kind = task_class(stored)
        if kind.has_head != first.task.has_head:
            raise AdapterError(
                f"this adapter {kind.gives}, and those that are loaded do not.",
                where=str(stored.folder),
                advice=f'Use it apart: capo {kind.command} {stored.folder} "your text"',
            )
        check_base(stored, first.base, report)
        task, method = task_on(stored, first.base), make(stored.settings)
        if method.quantization != first.method.quantization:
            held = first.method.quantization or "full precision"
            raise AdapterError(
                f"this adapter was trained over {method.quantization or 'full precision'}, and the base is loaded in "
                f"{held}.",
                where=str(stored.folder),
                advice=f"Load it apart: capo {kind.command} {stored.folder}",
            )
        if not (task.shares_base and first.task.shares_base):
            raise AdapterError(
                "PEFT wrote it for a classifier of Transformers' own, whose head is a part of the base.",
                where=str(stored.folder),
                advice="Load it apart, with `capotune.load`.",
            )
        before = self._in_use
        self._put_in(None)
        frozen = _parts(self._loaded)
        try:
            assembled = with_head(task, self._loaded, method)
            put_on(stored, assembled)
            report_notices(stored, assembled, report)
            self._note(name, assembled)
        finally:
            if name not in self._known:  # it was refused, maybe when half of it was in place
                for (table, key), part in frozen:
                    table[key] = part
            self._put_in(before)

    def use(self, name: str | None) -> Any:
        """Switch to an adapter in place, and give what ``capotune.load`` gives; None: the base alone.

        Raises ``SettingError`` for an unknown name, and where the base alone answers nothing.
        """
        chosen = self._alone if name is None else self._get(name).facade
        self._put_in(name)
        return chosen

    def _put_in(self, name: str | None) -> None:
        if name == self._in_use:
            return
        if self._in_use is not None:
            for (table, key), _, frozen in self._known[self._in_use].parts:
                table[key] = frozen
        self._in_use = name
        for (table, key), own, _ in () if name is None else self._known[name].parts:
            table[key] = own

    def _note(self, name: str, assembled: Assembled) -> None:
        """What an attached adapter changed in the base, which is then as it was."""
        with_it = _parts(self._loaded)
        assembled.method.detach()
        without = {(id(table), key): part for (table, key), part in _parts(self._loaded)}
        changed = [
            ((table, key), own, without[id(table), key])
            for (table, key), own in with_it
            if without.get((id(table), key), own) is not own
        ]
        self._known[name] = _Added(assembled, assembled.task.facade(assembled), changed)

    def remove(self, name: str) -> None:
        """Take an adapter off and forget it. ``SettingError`` for an unknown name."""
        self._get(name)
        if name == self._in_use:
            self._put_in(None)
        del self._known[name]

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[Any]:
        """Inside, the model reads batches of ``len(names)`` rows, each with the adapter of its name (None: the base).

        Gives the model; for labels one that takes ``input_ids`` and ``attention_mask`` and returns each row's logits,
        as each has labels of its own. Raises ``SettingError`` for an unknown name, and for a method that changes more
        than linear layers: it reads other tokens than the rows beside it, or has other blocks.
        """
        deltas = {name: self._deltas(name) for name in names if name is not None}
        model = self._rows_model(names)
        whole = self._first.model
        before = self._in_use
        self._put_in(None)
        layers: dict[str, dict[str, LoraLinear]] = {}
        for name, own in deltas.items():
            for path, layer in own.items():
                layers.setdefault(path, {})[name] = layer
        frozen = {path: whole.get_submodule(path) for path in layers}
        try:
            for path, by_name in layers.items():
                swap(whole, path, _RowsLinear(frozen[path], by_name, names))
            yield model
        finally:
            for path, layer in frozen.items():
                swap(whole, path, layer)
            self._put_in(before)

    def _rows_model(self, names: Sequence[str | None]) -> Any:
        if not self._first.task.has_head:
            return self._loaded
        if None in names or not self._first.task.shares_base:
            raise SettingError("every row needs an adapter with a head of ours: a base alone gives no labels.")
        return _RowsHeads([self._known[name].assembled.model for name in names if name is not None])

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


class _RowsHeads(nn.Module):
    """A base whose states of each row the head of the row's own adapter reads. The heads of such adapters read the last
    states alone."""

    def __init__(self, models: Sequence[Any]) -> None:
        super().__init__()
        self.models = list(models)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Right-padded ids and mask (rows, tokens), of pairs of texts the types that the base reads too → logits of
        each row, (labels,) or (tokens, labels)."""
        typed = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        states = self.models[0].states(input_ids=input_ids, attention_mask=attention_mask, **typed)
        rows = zip(self.models, torch.split(states, 1), torch.split(attention_mask, 1), strict=True)
        return [model.logits_of(state, mask)[0] for model, state, mask in rows]


def _parts(loaded: nn.Module) -> list[tuple[_Place, Any]]:
    """What stands at each place of a base: its modules, its parameters, and what a prefix sets."""
    tables = [table for module in loaded.modules() for table in (module._modules, module._parameters)]
    places = [(table, key) for table in tables for key in table] + prefix_places(loaded)
    return [((table, key), table.get(key)) for table, key in places]
