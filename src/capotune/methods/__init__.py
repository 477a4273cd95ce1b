"""The four techniques, one file each, and their registry: what is trained inside a frozen model.

The built-in ones are imported when they are first asked for.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import pydantic

from capotune.errors import SettingError
from capotune.methods.base import Method, Start, Untouched
from capotune.settings import CompareSettings, TrainingSettings, nearest

__all__ = ["Method", "Start", "Untouched", "compare_settings", "extra_modules", "get", "make", "names", "register"]

_BUILT_IN = {
    "feature-extraction": "feature_extraction",
    "lora": "lora",
    "qlora": "qlora",
    "prompt-tuning": "prompt_tuning",
}
_registered: dict[str, type[Method]] = {}


def register(method: type[Method]) -> type[Method]:
    """Make a method known by its ``Settings.method``, in every command; a class decorator."""
    _registered[method.Settings.method] = method
    return method


def extra_modules() -> list[str]:
    """Modules that registered a method of their own; a new process imports them to know it too."""
    return sorted({method.__module__ for method in _registered.values()})


def names() -> tuple[str, ...]:
    """Every method's name, the built-in ones first."""
    return tuple(dict.fromkeys((*_BUILT_IN, *_registered)))


def get(name: str) -> type[Method]:
    """The method of that name; an unknown one is a ``SettingError`` with the nearest."""
    if name in _registered:
        return _registered[name]
    if name not in _BUILT_IN:
        raise SettingError(f"unknown method '{name}'.{nearest(name, names())}", allowed=", ".join(names()))
    return _built_in(name)


@cache
def _built_in(name: str) -> type[Method]:
    module = import_module(f"capotune.methods.{_BUILT_IN[name]}")
    found = [one for one in vars(module).values() if isinstance(one, type) and issubclass(one, Method)]
    return next(one for one in found if getattr(getattr(one, "Settings", None), "method", None) == name)


def make(settings: TrainingSettings) -> Method:
    """The method that the settings are of, not attached yet."""
    return get(settings.method)(settings)


def compare_settings() -> type[CompareSettings]:
    """The settings of ``compare``, with one field of settings for each known method, named as in Python."""
    fields: dict[str, Any] = {}
    for name in names():
        settings = get(name).Settings
        fields[name.replace("-", "_")] = (settings, pydantic.Field(settings(), description=f"Settings of {name}."))
    made: type[CompareSettings] = pydantic.create_model("CompareSettings", __base__=CompareSettings, **fields)
    made.__doc__ = CompareSettings.__doc__
    return made
