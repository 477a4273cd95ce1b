"""What is wrong with the flags, as one error: which flag, what was given, what is allowed.

tyro, which reads the flags, draws a box. It tells what it found to a hook before; the hook is no stable part of tyro,
and where it is missing the box stays.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise, takewhile
from typing import Annotated, Any, get_args

import tyro
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from capotune.errors import SettingError
from capotune.settings import TrainingSettings, nearest

__all__ = ["as_one_line"]

_PLACED: Any = get_args(tyro.conf.Positional[int])[1]
"""Marks what stands on the command line without a flag."""
_KINDS = {"integer": "whole numbers", "number": "numbers", "path": "a path"}
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
"""Words for what JSON schema says of a number."""
_GONE = {"--resume": " `capo resume DIR` goes on with what was stopped."}
"""Flags that there were, and what to do instead."""


def as_one_line(cls: type[BaseModel], flags: Sequence[str], program: str) -> AbstractContextManager[None]:
    """Inside, tyro raises ``SettingError`` for ``flags`` that it cannot read as settings of ``cls``.

    Itself raises it for a list's flag with nothing behind it, which tyro takes for an empty list.
    """
    try:
        from tyro import _errors as found
    except ImportError:
        return nullcontext()
    advice = f"`{program} --help` lists the settings."
    _refuse_lists_without_values(cls, flags)

    def refuse(event: found.ParseErrorEvent) -> None:
        tokens = getattr(event, "tokens", None) or getattr(event, "unrecognized_tokens", None)
        if tokens:
            raise _unknown(cls, tokens, program, advice)
        if isinstance(event, found.MissingArgs):
            raise _missing(event.missing_arguments[0].arg, advice)
        if isinstance(event, found.InvalidChoice):
            raise _not_allowed(cls, event.argument, event.value)
        if isinstance(event, found.BadValue):
            raise _not_allowed(cls, event.argument, "")
        if isinstance(event, found.InstantiationFailure):
            if event.argument is None:  # the settings' own check, which says all
                inside = getattr(sys.exc_info()[1], "arg", None)  # of settings inside these, by their name
                raise SettingError(_put_inside(event.message, inside) if inside else event.message, advice=advice)
            raise _not_allowed(cls, event.argument, _given(flags, event.argument))

    return found.on_parse_error(refuse)


def _put_inside(message: str, name: str) -> str:
    """A message about settings that stand inside others by that ``name``: its `rank` is their `lora.rank`."""
    return re.sub(r"`(?=[a-z][a-z_0-9.]*[=`])", f"`{name.replace('-', '_')}.", message)


def _known_flags(cls: type[BaseModel], before: str = "--") -> Iterator[tuple[str, FieldInfo]]:
    """Every flag of the settings, those of settings inside them with a dot: ``--lora.rank``."""
    for name, field in cls.model_fields.items():
        flag = before + name.replace("_", "-")
        if isinstance(field.default, TrainingSettings):
            yield from _known_flags(type(field.default), f"{flag}.")
        else:
            yield flag, field


def _as_written(cls: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Each flag by its setting's name, and as it is written on the command line: in capitals without one."""
    for flag, field in _known_flags(cls):
        named = next((one.name for one in field.metadata if getattr(one, "name", None)), flag[2:])
        yield flag, named.upper() if _PLACED in field.metadata else f"--{named}"


def _refuse_lists_without_values(cls: type[BaseModel], flags: Sequence[str]) -> None:
    known = dict(_known_flags(cls))
    for token, behind in pairwise([*flags, "--"]):
        field = known.get(token.replace("_", "-"))
        if field is None or field.default or not behind.startswith("--"):  # with a default they check it themselves
            continue
        schema = _schema(field)
        if _not_none(schema).get("type") == "array":
            raise SettingError(f"{token} needs a value.", allowed=_in_words(schema))


def _unknown(cls: type[BaseModel], tokens: Sequence[str], program: str, advice: str) -> SettingError:
    flag = next((one for one in tokens if one.startswith("-")), None)
    if flag is None:
        return SettingError(f"{program} takes no '{' '.join(tokens)}'.", advice=advice)
    flag, known = flag.partition("=")[0], dict(_as_written(cls))
    last = flag.rpartition(".")[2].lstrip("-")
    same = [written for one, written in known.items() if one.rpartition(".")[2].lstrip("-") == last]
    near = _GONE.get(flag) or nearest(flag, [written for written in known.values() if written.startswith("--")])
    hint = f" Did you mean {' or '.join(map(repr, same))}?" if same else near
    return SettingError(f"{program} has no {flag}.{hint}", advice=advice)


def _missing(argument: Any, advice: str) -> SettingError:
    """A setting that is required, and its help."""
    given = argument.field.helptext
    text = " ".join(str(given() if callable(given) else given).split())
    return SettingError(f"{_shown(argument)} is required: {text}", advice=advice)


def _not_allowed(cls: type[BaseModel], argument: Any, given: str) -> SettingError:
    if not given:
        return SettingError(f"{_shown(argument)} needs a value.", allowed=_allowed(cls, argument))
    return SettingError("not allowed.", where=f"{_shown(argument)} {given}", allowed=_allowed(cls, argument))


def _shown(argument: Any) -> str:
    """A flag as it is written; of what stands without a flag the name in capitals."""
    name = argument.lowered.name_or_flags[-1]
    return str(name).upper() if argument.is_positional() else str(argument.lowered.name_or_flags[0])


def _flag_of(argument: Any) -> str:
    """As ``_known_flags`` names tyro's argument, one that stands without a flag too."""
    return "--" + str(argument.get_output_key()).lstrip("-").replace("_", "-")


def _given(flags: Sequence[str], argument: Any) -> str:
    """What stands behind the argument's flag."""
    for at, token in enumerate(flags):
        name, equals, value = token.partition("=")
        if name.replace("_", "-") in argument.lowered.name_or_flags:
            behind = takewhile(lambda one: not one.startswith("--"), flags[at + 1 :])
            return value if equals else " ".join(behind)
    return ""


def _allowed(cls: type[BaseModel], argument: Any) -> str:
    """What a setting may be, in words, from its JSON schema."""
    return _in_words(_schema(dict(_known_flags(cls))[_flag_of(argument)]))


def _schema(field: FieldInfo) -> dict[str, Any]:
    annotated: Any = Annotated[field.annotation, field]
    return TypeAdapter(annotated).json_schema()


def _not_none(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a schema that also allows None the other part; else the schema."""
    return next((one for one in schema.get("anyOf", ()) if one.get("type") != "null"), schema)


def _in_words(schema: Mapping[str, Any]) -> str:
    """The values that a JSON schema allows: ``whole numbers, at least 1``."""
    schema = _not_none(schema)
    if choices := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return ", ".join(map(str, choices))
    if "prefixItems" in schema:
        return " and ".join(map(_in_words, schema["prefixItems"]))
    if schema.get("type") == "array":
        return f"{_in_words(schema['items'])}, one or more"
    bounds = [f"{words} {schema[name]:g}" for name, words in _BOUNDS.items() if name in schema]
    return ", ".join([_KINDS.get(schema.get("format", schema.get("type", "")), "a text"), *bounds])
