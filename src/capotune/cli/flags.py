"""Settings from flags and YAML files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import tyro
from pydantic import BaseModel

from capotune.cli.messages import in_flags
from capotune.cli.refusals import as_one_line
from capotune.errors import SettingError
from capotune.memory_table import MemoryTable
from capotune.settings import BaseSettings, build, read_yaml

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


def take_config(rest: list[str]) -> tuple[list[str], Path | None]:
    """The arguments without ``--config FILE``, and that file."""
    for at, argument in enumerate(rest):
        name, equals, value = argument.partition("=")
        if name == "--config":
            if not equals and at + 1 == len(rest):
                raise SettingError("needs a YAML file.", setting="config")
            path = value if equals else rest[at + 1]
            return rest[:at] + rest[at + (1 if equals else 2) :], Path(path)
    return rest, None


def given_by(flags: list[str], config: Path | None) -> dict[str, str]:
    """Where settings came from, ``flag`` or ``file``, by their names; those of a method in a comparison with a dot."""
    from_file = dict.fromkeys(_names(read_yaml(config)), "file") if config else {}
    names = [re.sub(r"(^|\.)no-", r"\1", token[2:].partition("=")[0]) for token in flags if token.startswith("--")]
    return from_file | {name.replace("-", "_"): "flag" for name in names}


def _names(values: dict[str, Any], before: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield before + name
        if isinstance(value, dict):
            yield from _names(value, f"{before}{name}.")


def without_out(rest: list[str]) -> list[str]:
    """The arguments without ``--out FOLDER``: a record does not know where it is."""
    kept: list[str] = []
    for at, argument in enumerate(rest):
        if argument != "--out" and not argument.startswith("--out=") and (at == 0 or rest[at - 1] != "--out"):
            kept.append(argument)
    return kept


def base_of(settings: BaseSettings) -> dict[str, Any]:
    """The settings of an adapter's base alone."""
    return {name: getattr(settings, name) for name in BaseSettings.model_fields}


def parse(cls: type[Any], flags: list[str], program: str, config: Path | None = None) -> Any:
    """Settings of ``cls`` from the flags, which win over the YAML file ``config``; ``SettingError`` for a mistake."""
    values = read_yaml(config) if config else {}
    flags = list(_spelt_out(flags, set(_undecided_switches(cls))))
    cls = _named(cls, program)
    if not values:
        with as_one_line(cls, flags, program):
            return tyro.cli(cls, args=flags, prog=program, registry=_RULES)
    required = {name: "" for name, field in cls.model_fields.items() if field.is_required() and name not in values}
    checked = build(cls, {**required, **values}, where=f"`config={config}`")
    default = checked.model_copy(update=dict.fromkeys(required, tyro.MISSING))
    with as_one_line(cls, flags, program):
        return tyro.cli(cls, args=flags, prog=program, default=default, registry=_RULES)


def _undecided_switches(cls: type[BaseModel], before: str = "--") -> Iterator[str]:
    """The flags of settings that are yes, no, or left to the program."""
    for name, field in cls.model_fields.items():
        flag = before + name.replace("_", "-")
        if field.annotation == bool | None:
            yield flag
        elif isinstance(field.default, BaseModel):
            yield from _undecided_switches(type(field.default), f"{flag}.")


def _spelt_out(flags: list[str], switches: set[str]) -> Iterator[str]:
    """``--deep`` as ``--deep True``, ``--no-deep`` as ``--deep False``: tyro reads such switches by a value alone."""
    for at, flag in enumerate(flags):
        before, dashes, last = flag.rpartition("no-")
        if flag in switches and flags[at + 1 : at + 2] not in (["True"], ["False"], ["None"]):
            yield from (flag, "True")
        elif dashes and before + last in switches:
            yield from (before + last, "False")
        else:
            yield flag


def parse_repeating(cls: type[Any], flags: list[str], program: str) -> Any:
    """As ``parse``; a flag that takes several values takes one at a time and is given again for the next.

    Otherwise it would swallow the texts that come after it on the command line.
    """
    with as_one_line(cls, flags, program):
        return tyro.cli(_named(cls, program), args=flags, prog=program, config=(tyro.conf.UseAppendAction,))


def _named(cls: type[Any], program: str) -> type[Any]:
    """The class under the program's name, which tyro's messages show; its own errors name flags."""

    def init(self: Any, **values: Any) -> None:
        try:
            cls.__init__(self, **values)
        except SettingError as error:
            raise SettingError(in_flags(error)) from None

    return type(program, (cls,), {"__doc__": cls.__doc__, "__init__": init})
