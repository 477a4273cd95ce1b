"""Plain text files: one document, or several with ``<|endoftext|>`` between them, of any length."""

from __future__ import annotations

import codecs
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import numpy as np

from capotune.data.byte_store import ByteStore
from capotune.data.readers import read_text_parts
from capotune.data.samples import Document, Sample, Samples
from capotune.data.table import Origin
from capotune.data.view import View
from capotune.errors import DataError

__all__ = ["read_documents"]

END_OF_DOCUMENT: Final = "<|endoftext|>"  # separates the documents of a plain text file
PART: Final = 2**18
"""Bytes of a long text that are looked at together, and up to which a text is not long."""
_LOOKED_AT: Final = 64


class LongDocument(Document):
    """A text that is read part by part."""

    def __init__(self, store: ByteStore, start: int, end: int) -> None:
        object.__setattr__(self, "_place", (store, start, end))

    @property
    def parts(self) -> Iterable[str]:
        """The text, part by part."""
        store, start, end = self._place  # type: ignore[attr-defined]
        places = range(start, end, PART)
        return codecs.iterdecode((store.read(at, min(at + PART, end)) for at in places), "utf-8")

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.parts)


def read_documents(source: str) -> Samples:
    """A plain text file as one document, or as those between ``<|endoftext|>``, without the empty ones.

    Raises:
        DataError: the file cannot be read, is no text, or has none.
    """
    store, line = ByteStore(), 1
    starts, lines, filled = array("q", [0]), array("q", [1]), bytearray([False])
    for piece in _divided(read_text_parts(source)):
        if piece is None:
            starts.append(store.size)
            lines.append(line)
            filled.append(False)
        else:
            store.append(piece.encode())
            line += piece.count("\n")
            filled[-1] |= bool(piece.strip())
    starts.append(store.size)
    if len(filled) == 1:
        return _samples(store, [(0, store.size, 1)], source)
    places = zip(starts[:-1], starts[1:], lines, filled, strict=True)
    found = [_without_line_ends(store, start, end, at) for start, end, at, is_filled in places if is_filled]
    if not found:
        raise DataError(f"holds {END_OF_DOCUMENT} and no text.", where=source, advice="Give a file with text.")
    return _samples(store, found, source)


def _divided(parts: Iterable[str]) -> Iterator[str | None]:
    """The same text in other parts, and None for each mark between documents."""
    held = ""
    for part in parts:
        *ended, rest = (held + part).split(END_OF_DOCUMENT)
        for text in ended:
            yield text
            yield None
        sure = max(0, len(rest) - len(END_OF_DOCUMENT) + 1)  # what follows may be the start of a mark
        held = rest[sure:]
        yield rest[:sure]
    yield held


def _without_line_ends(store: ByteStore, start: int, end: int, line: int) -> tuple[int, int, int]:
    """Where a text starts, ends, and on which line it starts without the line feeds around it, of which it is not
    made alone."""
    while head := len(text := store.read(start, min(start + _LOOKED_AT, end))) - len(text.lstrip(b"\n")):
        start, line = start + head, line + head
    while tail := len(text := store.read(max(start, end - _LOOKED_AT), end)) - len(text.rstrip(b"\n")):
        end -= tail
    return start, end, line


def _samples(store: ByteStore, places: Sequence[tuple[int, int, int]], source: str) -> Samples:
    """``places``: where each document starts and ends, and its line."""
    at = np.array(places, dtype=np.int64)

    def make(row: int) -> Sample:
        start, end, _ = at[row].tolist()
        return Document(store.read(start, end).decode()) if end - start <= PART else LongDocument(store, start, end)

    return Samples(View(len(at), make), array("q", at[:, 2].tolist()), Origin(source), "text", (), content=store.sha256)
