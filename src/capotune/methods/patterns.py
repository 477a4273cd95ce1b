"""Regular expressions in other people's adapters: Python's matcher may take for ever on some."""

from __future__ import annotations

import re
from functools import lru_cache

from capotune.errors import AdapterError, quoted

_LONGEST, _MOST_STEPS = 200, 300_000
"""Of a pattern in PEFT's tables, which is tried on paths that its author chose."""
_LONGEST_TARGET, _MOST_TARGET_STEPS = 10_000, 30_000_000
"""Of a pattern of target layers, which is tried on the base's own paths."""
_FACTORS = {"*": 30, "+": 30, "{": 30, "?": 2}
"""Ways in which a repeat can end."""
_ATOM = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\(\?:")
"""What counts as one character: an escape, a set; and a group that is not remembered begins as any other."""


@lru_cache(maxsize=2048)
def path_pattern(name: str, pattern: str) -> re.Pattern[str]:
    """A pattern of PEFT's table ``name`` as PEFT matches it: the end of a path. ``AdapterError`` for one that is not
    tried, or not valid."""
    if _is_slow(pattern, _LONGEST, _MOST_STEPS):
        raise AdapterError(f"the {name} {quoted(pattern)} is no pattern that is tried here: it may take for ever.")
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(f"the {name} {quoted(pattern)} is not a valid pattern ({error}).") from None


@lru_cache(maxsize=2048)
def is_slow_target(pattern: str) -> bool:
    """Whether a pattern of target layers may take for ever, and is not tried."""
    return _is_slow(pattern, _LONGEST_TARGET, _MOST_TARGET_STEPS)


def _is_slow(pattern: str, longest: int, most_steps: int) -> bool:
    """Whether it is long, repeats a group, has an alternative of nothing, or may take many steps."""
    bare = _ATOM.sub(lambda found: "(" if found[0] == "(?:" else "x", pattern)
    return len(pattern) > longest or bool(re.search(r"\)[*+{]|\(\||\|[|)]", bare)) or _steps(bare) > most_steps


def _steps(bare: str) -> int:
    """An estimate of how often the matcher tries. The alternatives of groups multiply, and so do repeats; what stands
    beside each other outside of groups is tried one after the other."""
    total, branch, groups = 0, 1, list[int]()
    for sign in bare:
        branch *= _FACTORS.get(sign, 1)
        if sign == "(":
            groups.append(1)
        elif sign == ")" and groups:
            branch *= groups.pop()
        elif sign == "|" and groups:
            groups[-1] += 1
        elif sign == "|":
            total, branch = total + branch, 1
    return total + branch
