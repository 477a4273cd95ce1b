"""Every error a user can cause. One tree, readable in a minute.

    CapotuneError(ValueError)
    ├── SettingError         a setting is unknown, out of range, or does not fit the model or the data
    ├── DataError            data cannot be read, or its content cannot be trained on
    ├── ModelError           a base model cannot be found, is incomplete, or has an unsupported shape
    ├── AdapterError         an adapter is incomplete, damaged, or belongs to another base or task
    ├── HubError             the hub cannot be reached, does not have it, or refuses
    ├── OutputError          a result cannot be written
    ├── OutOfMemoryError     the machine's memory does not suffice
    └── MissingLibraryError  an optional library is needed

An error carries what was wrong in parts, and each face renders them in its own words. Below the faces a setting is
named in backticks, as Python names it: `max_length`, or `max_length=5` with its value. The command line shows these as
flags (``--max-length 5``), a web page as fields.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

__all__ = [
    "SHOWN",
    "AdapterError",
    "CapotuneError",
    "DataError",
    "HubError",
    "MissingLibraryError",
    "ModelError",
    "OutOfMemoryError",
    "OutputError",
    "SettingError",
    "cut",
    "needs_extra",
    "quoted",
    "without_secrets",
]

_PASSWORD = re.compile(r"(\w+:/{1,2}[^\s/@:]*:)[^\s/@]+@")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
SHOWN = 200
"""Characters that a message shows of a value at most."""


class CapotuneError(ValueError):
    """Something the user gave cannot be used. ``str(error)`` is the whole message:

        WHERE: `SETTING=GIVEN`: PROBLEM Allowed: ALLOWED. ADVICE

    Args:
        problem: one sentence or more that say what cannot be used and why; the only part that is always there.
        setting: the setting that was given or is missing, by its name in Python (``max_length``).
        given: the value it had; left out of the message when None.
        allowed: what it may be.
        where: the file, ``file:line``, or text that the problem is in.
        advice: what to do next, in whole sentences.
    """

    def __init__(
        self,
        problem: str,
        *,
        setting: str | None = None,
        given: object = None,
        allowed: str | None = None,
        where: str | None = None,
        advice: str | None = None,
    ) -> None:
        self.problem, self.setting, self.given = problem, setting, given
        self.allowed, self.where, self.advice = allowed, where, advice
        super().__init__(problem)

    def __str__(self) -> str:
        given = "" if self.given is None else f"={cut(str(self.given), SHOWN)}"
        named = None if self.setting is None else f"`{self.setting}{given}`"
        front = "".join(f"{part}: " for part in (self.where, named) if part)
        allowed = f"Allowed: {self.allowed.rstrip('.')}." if self.allowed else ""
        parted = "\n" if "\n" in self.problem else " "  # a problem may list the rows that have it
        whole = parted.join(part for part in (front + self.problem, allowed, self.advice) if part)
        return without_secrets(whole)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.parts())

    def parts(self) -> dict[str, Any]:
        """The arguments that make this error again."""
        return {name: getattr(self, name) for name in ("problem", "setting", "given", "allowed", "where", "advice")}


def cut(text: str, limit: int) -> str:
    """The text, or its start and an ellipsis where it is longer than ``limit`` characters."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def quoted(value: object, limit: int = 60) -> str:
    """A value as Python writes it, of which a message never shows more than about ``limit`` characters."""
    return repr(cut(value, limit)) if isinstance(value, str) else cut(repr(value), limit)


Plain = TypeVar("Plain")
"""A text, or plain values with texts in them."""


def without_secrets(value: Plain) -> Plain:
    """A text without the password of an address (``https://user:***@host``) and without tokens of the hub, or the
    dictionaries and lists that JSON knows with such texts."""
    found: Any = value
    if isinstance(found, str):
        found = _TOKEN.sub("hf_***", _PASSWORD.sub(r"\1***@", found))
    elif isinstance(found, dict):
        found = {without_secrets(name): without_secrets(one) for name, one in found.items()}
    elif isinstance(found, list | tuple):
        found = [without_secrets(one) for one in found]
    return cast("Plain", found)


def _rebuild(cls: type[CapotuneError], parts: dict[str, Any]) -> CapotuneError:
    return cls(parts.pop("problem"), **parts)


class SettingError(CapotuneError):
    """A setting is unknown, out of range, or does not fit the model or the data."""


class DataError(CapotuneError):
    """A data file cannot be read or its content cannot be trained on; names file and line."""


class ModelError(CapotuneError):
    """A base model cannot be found, is incomplete, or has a shape that is not supported."""


class AdapterError(CapotuneError):
    """An adapter folder is incomplete, damaged, or belongs to another base or task."""


class HubError(CapotuneError):
    """The hub cannot be reached, does not have what was asked for, or refuses."""


class OutputError(CapotuneError):
    """A result cannot be written: the folder exists, is not writable, or the disk is full."""


class OutOfMemoryError(CapotuneError):
    """The machine's memory does not suffice; says what to lower."""


class MissingLibraryError(CapotuneError):
    """An optional library is needed; the message names the pip command that installs it."""


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Around the import of an optional library: ``MissingLibraryError`` names the extra of capotune that brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingLibraryError(
            f"the Python library {error.name} is needed for this and is not installed.",
            advice=f"Run: pip install 'capotune[{extra}]'",
        ) from None
