"""A number of steps or a length of time, as one setting: ``500``, ``30s``, ``10min``, ``2h``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from capotune.errors import SettingError

__all__ = ["Interval", "IntervalText", "interval"]

_SECONDS = {"s": 1, "min": 60, "h": 3600}
_TEXT = re.compile(rf"\s*(\d{{1,9}})\s*({'|'.join(_SECONDS)})?\s*", re.ASCII)


@dataclass(frozen=True)
class Interval:
    """After how much the next is due: so many steps, or so many seconds; the other one is infinite."""

    steps: float = math.inf
    seconds: float = math.inf


def interval(text: str) -> Interval:
    """What the value of `save_every` says. ``SettingError`` for another text, and for none at all (``0``)."""
    found = _TEXT.fullmatch(text)
    if found is None or int(found[1]) == 0:
        raise SettingError(
            "is no number of steps and no time.", setting="save_every", given=text, allowed="500, 30s, 10min, 2h"
        )
    count, unit = int(found[1]), found[2]
    return Interval(seconds=float(count * _SECONDS[unit])) if unit else Interval(steps=float(count))


def _checked(text: str) -> str:
    interval(text)
    return text


IntervalText = Annotated[
    str, BeforeValidator(lambda value: str(value) if type(value) is int else value), AfterValidator(_checked)
]
"""A setting that holds such a text; from Python and YAML also an integer."""
