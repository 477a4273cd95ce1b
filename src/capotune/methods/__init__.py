"""The four techniques, one folder each, and their registry: what is trained inside a frozen model.

Their settings load without PyTorch; their code is imported when it is first asked for.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pydantic

from capotune.errors import SettingError
from capotune.settings import CompareSettings, TrainingSettings, nearest

if TYPE_CHECKING:
    from capotune.methods.base import Method

__all__ = ["compare_settings", "extra_modules", "get", "make", "names", "register", "settings_class"]

_BUILT_IN = {
    "feature-extraction": "feature_extraction",
    "lora": "lora",
    "qlora": "qlora",
    "prompt-tuning": "prompt_tuning",
}
_READ_ONLY = {"peft": "peft"}
"""Methods whose adapters are used and not trained here; no command offers them."""
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
    _check(name)
    return _registered[name] if name in _registered else _built_in(name)


def settings_class(name: str) -> type[TrainingSettings]:
    """The settings of a method; those of a built-in one are loaded without its code. Raises as ``get``."""
    _check(name)
    return _registered[name].Settings if name in _registered else _built_in_settings(name)


def _check(name: str) -> None:
    if name not in names() and name not in _READ_ONLY:
        raise SettingError(f"unknown method '{name}'.{nearest(name, names())}", allowed=", ".join(names()))


@cache
def _built_in(name: str) -> type[Method]:
    found = vars(import_module(f"capotune.methods.{_folder(name)}.method")).values()
    wanted = _built_in_settings(name)
    method: type[Method] = next(one for one in found if getattr(one, "Settings", None) is wanted)
    return method


@cache
def _built_in_settings(name: str) -> type[TrainingSettings]:
    found = vars(import_module(f"capotune.methods.{_folder(name)}.settings")).values()
    settings: type[TrainingSettings] = next(one for one in found if getattr(one, "method", None) == name)
    return settings


def _folder(name: str) -> str:
    return _BUILT_IN.get(name) or _READ_ONLY[name]


def make(settings: TrainingSettings) -> Method:
    """The method that the settings are of, not attached yet."""
    return get(settings.method)(settings)


def compare_settings() -> type[CompareSettings]:
    """The settings of ``compare``, with one field of settings for each known method, named as in Python."""
    fields: dict[str, Any] = {}
    for name in names():
        settings = settings_class(name)
        fields[name.replace("-", "_")] = (settings, pydantic.Field(settings(), description=f"Settings of {name}."))
    made: type[CompareSettings] = pydantic.create_model("CompareSettings", __base__=CompareSettings, **fields)
    made.__doc__ = CompareSettings.__doc__
    return made
