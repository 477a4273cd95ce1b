"""Settings from flags and YAML files, and messages that name settings as flags."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import tyro

from capotune.errors import SettingError
from capotune.memory_table import MemoryTable
from capotune.settings import Settings, build, read_yaml

Json = Annotated[bool, tyro.conf.arg(name="json")]

_RULES = tyro.constructors.ConstructorRegistry()


@_RULES.primitive_rule
def _path_alone(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """A setting that may hold rows in memory takes a path or a hub id on the command line."""
    if not _mentions(info.type, MemoryTable):
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="STR",
        instance_from_str=lambda given: given[0],
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [str(value)],
    )


def _mentions(annotation: Any, wanted: type) -> bool:
    return annotation is wanted or any(_mentions(part, wanted) for part in get_args(annotation))


_IN_BACKTICKS = re.compile(r"`(?P<name>[a-z]\w*)(?:=(?P<value>[^`]*))?`")


def in_flags(message: str) -> str:
    """A message in which settings stand as flags: ``--max-length 5`` for `` `max_length=5` ``."""
    known = set(_setting_names(Settings))

    def flag(match: re.Match[str]) -> str:
        if match["name"] not in known:
            return match[0]
        name = f"--{match['name'].replace('_', '-')}"
        return name if match["value"] is None else f"{name} {match['value']}"

    return _IN_BACKTICKS.sub(flag, message)


def _setting_names(cls: type[Settings]) -> Iterator[str]:
    yield from cls.model_fields
    for inheritor in cls.__subclasses__():
        yield from _setting_names(inheritor)


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
        return tyro.cli(cls, args=flags, prog=program, registry=_RULES)
    required = {name: "" for name, field in cls.model_fields.items() if field.is_required() and name not in values}
    checked = build(cls, {**required, **values}, where=f"--config {config}")
    default = checked.model_copy(update=dict.fromkeys(required, tyro.MISSING))
    return tyro.cli(cls, args=flags, prog=program, default=default, registry=_RULES)


def parse_repeating(cls: type[Any], flags: list[str], program: str) -> Any:
    """As ``parse``; a flag that takes several values takes one at a time and is given again for the next.

    Otherwise it would swallow the texts that come after it on the command line.
    """
    cls = type(program, (cls,), {"__doc__": cls.__doc__})
    return tyro.cli(cls, args=flags, prog=program, config=(tyro.conf.UseAppendAction,))
