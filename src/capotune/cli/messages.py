"""An error in the command line's words: a setting in backticks becomes its flag."""

from __future__ import annotations

import re
from collections.abc import Iterator

from capotune.cli.terminal import harmless
from capotune.errors import CapotuneError
from capotune.settings import Settings

_NAMED = re.compile(r"`([a-z][a-z_0-9.]*)(?:=([^`]*))?`")

_OTHER_FLAGS = {"loader": "for"}
"""Flags that are no names in Python."""


def in_flags(error: CapotuneError) -> str:
    """The whole message: `max_length=5` becomes ``--max-length 5``, `cache=False` ``--no-cache``.

    Backticks around anything that is not the name of a setting stay.
    """
    known = set(_field_names(Settings))
    return harmless(_NAMED.sub(lambda found: _flag(found, known), str(error)))


def _flag(found: re.Match[str], known: set[str]) -> str:
    name, value = found[1], found[2]
    if name == "resume":
        return "capo resume"
    if name.rpartition(".")[2] not in known and name != "config":
        return found[0]
    flag = _OTHER_FLAGS.get(name, name.replace("_", "-"))
    if value == "False":
        return f"--no-{flag}"
    return f"--{flag}" if value in (None, "True") else f"--{flag} {value}"


def _field_names(cls: type[Settings]) -> Iterator[str]:
    """Of the class and of every settings class made from it."""
    yield from cls.model_fields
    for one in cls.__subclasses__():
        yield from _field_names(one)
