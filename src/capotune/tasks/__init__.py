"""Tasks, one folder each, and their registry: what is predicted, and everything about it from data to words.

The built-in ones are imported when they are first asked for.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

from capotune.errors import SettingError
from capotune.settings import DataSettings, nearest
from capotune.tasks.base import Task

__all__ = ["Task", "extra_modules", "get", "names", "recognise", "register"]

_BUILT_IN = {
    "classification": "classification",
    "ordinal": "ordinal",
    "regression": "regression",
    "multi-label": "multi_label",
    "generation": "generation",
    "token-classification": "token_classification",
}
"""Folder of each, by name, in the order in which they are asked to recognise data, the last first."""
_registered: dict[str, type[Task]] = {}


def register(task: type[Task]) -> type[Task]:
    """Make a task known by its ``name``, in every command; a class decorator. It is asked before the built-in ones."""
    _registered[task.name] = task
    return task


def extra_modules() -> list[str]:
    """Modules that registered a task of their own; a new process imports them to know it too."""
    return sorted({task.__module__ for task in _registered.values()})


def names() -> tuple[str, ...]:
    """Every task's name, the built-in ones first."""
    return tuple(dict.fromkeys((*_BUILT_IN, *_registered)))


def get(name: str) -> type[Task]:
    """The task of that name; an unknown one is a ``SettingError`` with the nearest."""
    if name in _registered:
        return _registered[name]
    if name not in _BUILT_IN:
        raise SettingError(
            f"no such task.{nearest(name, names())}", setting="task", given=name, allowed=", ".join(("auto", *names()))
        )
    return _built_in(name)


def recognise(settings: DataSettings) -> type[Task]:
    """The task that the settings name, or the one that the data is for.

    Tasks are asked from the last registered to the first; classification, the first, takes what no other does.
    """
    if settings.task != "auto":
        return get(settings.task)
    first, *others = names()
    return next((get(name) for name in reversed(others) if get(name).recognises(settings)), get(first))


@cache
def _built_in(name: str) -> type[Task]:
    module = import_module(f"capotune.tasks.{_BUILT_IN[name]}")
    task: type[Task] = module.TASK
    return task
