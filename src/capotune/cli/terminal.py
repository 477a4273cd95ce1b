"""What reaches the terminal is text. Files, labels and models may hold sequences that would steer it: colour a lie, set
the clipboard, link elsewhere, turn the order of letters round. They are spelled out instead, and rich's markup is off.
"""

from __future__ import annotations

import re
import sys

STEERING = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]|\r(?!\n)")
"""Control characters but tabs and line ends, and what changes the direction of the letters that follow."""


def harmless(text: str) -> str:
    """The text with what would steer a terminal spelled out: ``\\x1b[31m``."""
    return STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


def for_output(text: str) -> str:
    """The text for standard output: as it is for a file or a pipe, harmless for a terminal."""
    return harmless(text) if sys.stdout.isatty() else text
