"""The lines of a text, read one after the other: of a large file only the one at hand is in memory."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TextIO

__all__ = ["LONGEST", "TOO_LONG", "Lines", "NoTextError"]

ANY = ""
"""Every sort of line ending ends a line (\\n, \\r\\n, \\r), and stays as it is."""
LINE_FEED = "\n"
"""A line feed alone does."""
LONGEST = 4 * 2**20
"""Characters of one text in a table, or of its row in JSON: a text is tokenised whole, two seconds a million."""
TOO_LONG = f"more than {LONGEST:,} characters; divide such a text into rows"


class NoTextError(ValueError):
    """A zero byte stands in the text."""


class Lines:
    """The lines of a text or of a file in UTF-8, from any one on; ``ending``: ``ANY`` or ``LINE_FEED``.

    Raises ``OSError`` and ``UnicodeDecodeError`` where the file cannot be read, and ``NoTextError``.
    """

    def __init__(self, open_text: Callable[[], TextIO], size: int) -> None:
        self._open = open_text
        self.size = size
        """Bytes or characters of all, at least."""

    @classmethod
    def of_text(cls, text: str, ending: str) -> Lines:
        """Those of a text."""
        return cls(lambda: io.StringIO(text, newline=ending), len(text))

    @classmethod
    def of_file(cls, path: Path, ending: str) -> Lines:
        """Those of a file."""
        return cls(lambda: path.open(encoding="utf-8-sig", newline=ending), path.stat().st_size)

    def since(self, start: int) -> Iterator[str]:
        """The lines from number ``start`` on, counted from 0."""
        with self._open() as file:
            for line in islice(file, start, None):
                if "\0" in line:
                    raise NoTextError
                yield line

    def at(self, number: int) -> str:
        """One line."""
        return next(self.since(number), "")
