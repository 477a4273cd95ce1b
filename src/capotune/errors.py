"""Every error a user can cause. One tree, readable in a minute.

A message says four things: which setting or file (and line), what was given, what is allowed, what to do next.
The command line prints the message alone and exits with code 2; from Python they are ordinary ``ValueError``s.
"""

__all__ = [
    "AdapterError",
    "CapotuneError",
    "DataError",
    "MissingLibraryError",
    "ModelError",
    "OutputError",
    "SettingError",
]


class CapotuneError(ValueError):
    """Something the user gave cannot be used; the message says what, why, and what to do next."""


class SettingError(CapotuneError):
    """A setting is unknown, out of range, or does not fit the model or the data."""


class DataError(CapotuneError):
    """A data file cannot be read or its content cannot be trained on; names file and line."""


class ModelError(CapotuneError):
    """A base model cannot be found, is incomplete, or has a shape that is not supported."""


class AdapterError(CapotuneError):
    """An adapter folder is incomplete, damaged, or belongs to another base or task."""


class OutputError(CapotuneError):
    """A result cannot be written: the folder exists, is not writable, or the disk is full."""


class MissingLibraryError(CapotuneError):
    """An optional library is needed; the message names the pip command that installs it."""
