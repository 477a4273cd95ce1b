"""How a checkpoint's tensors become a model's weights: by Transformers' own table of names and conversions.

Many are stored under another name than their module's (``LayerNorm.gamma``, a text part under ``language_model``), and
a few are stored in parts: a mixture's experts one by one, where the model computes with one tensor of them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


@dataclass
class Parts:
    """Stored tensors that become one or more of a model's weights together."""

    target: str
    """The first of these weights."""
    converter: Any
    """Transformers' ``WeightConverter``."""
    patterns: dict[str, str] = field(default_factory=dict)
    """Of each stored tensor, by its name, which of the converter's patterns it matches."""

    def converted(self, model: Any, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The model's weights by name. Raises what Transformers raises where the parts do not fit together."""
        converter = deepcopy(self.converter)
        for key in sorted(self.patterns, key=dot_natural_key):  # expert 2 before 10
            converter.add_tensor(self.target, key, self.patterns[key], lambda key=key: read(key))
        made: dict[str, Any] = converter.convert(self.target, model=model, config=model.config)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}


class StoredNames:
    """What each of a checkpoint's tensors is in ``model``, which may be empty."""

    def __init__(self, model: Any, keys: Iterable[str]) -> None:
        transforms = get_model_conversion_mapping(model)
        self._renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        self._converters = [one for one in transforms if isinstance(one, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._weights = model.state_dict()
        self.whole: dict[str, str] = {}
        """The weight's name, of each tensor that is stored as the model has it."""
        self.parts: dict[str, Parts] = {}
        """What each other tensor is a part of."""
        groups: dict[str, Parts] = {}
        for key in sorted(keys, key=dot_natural_key):  # the order that Transformers' table is made for
            name, pattern = self._target(key)
            if name not in self._weights:
                continue
            if pattern is None:
                self.whole[key] = name
            else:
                made_by = next(one for one in self._converters if pattern in one.source_patterns)
                group = self.parts[key] = groups.setdefault(name, Parts(name, made_by))
                group.patterns[key] = pattern

    def _target(self, key: str) -> tuple[str, str | None]:
        """The weight's name, and the pattern of a converter where one makes it; a name that is the model's own stays,
        as in Transformers."""
        name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self._weights)
        if name in self._weights:
            return name, pattern
        own, _ = rename_source_key(key, [], [], self._prefix, self._weights)
        return own, None
