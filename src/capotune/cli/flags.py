"""Settings from flags and YAML files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro

from capotune.errors import SettingError
from capotune.settings import build, read_yaml

Json = Annotated[bool, tyro.conf.arg(name="json")]


def take_config(rest: list[str]) -> tuple[list[str], Path | None]:
    """The arguments without ``--config FILE``, and that file."""
    for at, argument in enumerate(rest):
        name, equals, value = argument.partition("=")
        if name == "--config":
            if not equals and at + 1 == len(rest):
                raise SettingError("--config needs a YAML file.")
            path = value if equals else rest[at + 1]
            return rest[:at] + rest[at + (1 if equals else 2) :], Path(path)
    return rest, None


def parse(cls: type[Any], flags: list[str], program: str, config: Path | None = None) -> Any:
    """Settings of ``cls`` from the flags, which win over the YAML file ``config``; on a mistake ``SystemExit(2)``."""
    values = read_yaml(config) if config else {}
    cls = type(program, (cls,), {"__doc__": cls.__doc__})  # tyro's messages show the class's name
    if not values:
        return tyro.cli(cls, args=flags, prog=program)
    required = {name: "" for name, field in cls.model_fields.items() if field.is_required() and name not in values}
    checked = build(cls, {**required, **values}, where=f"--config {config}")
    default = checked.model_copy(update=dict.fromkeys(required, tyro.MISSING))
    return tyro.cli(cls, args=flags, prog=program, default=default)


def parse_repeating(cls: type[Any], flags: list[str], program: str) -> Any:
    """As ``parse``; a flag that takes several values takes one at a time and is given again for the next.

    Otherwise it would swallow the texts that come after it on the command line.
    """
    cls = type(program, (cls,), {"__doc__": cls.__doc__})
    return tyro.cli(cls, args=flags, prog=program, config=(tyro.conf.UseAppendAction,))
