"""Regular expressions in other people's adapters: Python's matcher may take for ever on some."""

from __future__ import annotations

import re

from capotune.errors import AdapterError, quoted

_LONGEST, _MOST_REPEATS, _MOST_GROUPS = 200, 3, 4
_ATOM = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\(\?:")
"""What counts as one character: an escape, a set; and a group that is not remembered begins as any other."""
_REPEAT = re.compile(r"[*+{?]")


def check_pattern(name: str, pattern: str) -> None:
    """``AdapterError`` for a pattern that is not tried: one with a repeated group, or with many repeats, whose time
    grows with that power of a path's length, or with many groups, whose alternatives multiply."""
    bare = _ATOM.sub(lambda found: "(" if found[0] == "(?:" else "x", pattern)
    many = len(_REPEAT.findall(bare)) > _MOST_REPEATS or bare.count("(") > _MOST_GROUPS
    if len(pattern) > _LONGEST or many or re.search(r"\)[*+{]", bare):
        raise AdapterError(f"the {name} {quoted(pattern)} is no pattern that is tried here: it may take for ever.")
