"""CoNLL text: a word and its tag on each line, sentences parted by blank lines.

    -DOCSTART- -X- O            a new document; no word
    # comment
    EU       NNP  B-ORG         columns parted by tabs or, in lines without one, by spaces
    rejects  VBZ  O             the first is the word, the last the tag; those between are not used

The form of CoNLL-2003 (Tjong Kim Sang and De Meulder 2003) and its many relatives.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from capotune.data.table import Origin
from capotune.data.wording import SHOWN, bad_rows, count, excerpt, shorten
from capotune.errors import DataError
from capotune.tasks.token_classification.spans import OUTSIDE, is_tag

ENDINGS: Final = (".conll", ".iob", ".iob2", ".bio", ".bioes")
"""Of files that are always read as CoNLL text."""

_DOCUMENT: Final = "-DOCSTART-"
_SPACES: Final = re.compile(" +")
_LOOKED_AT: Final = 500  # lines that decide what a text is
_ADVICE: Final = (
    "Each line holds a word and, parted by a tab or spaces, its tag, such as 'Paris<TAB>B-LOC'; blank lines part "
    "sentences. Tags are O, or B-, I-, E-, S- with a type."
)


@dataclass(frozen=True)
class Sentence:
    """Words with a tag each; ``line`` is where the first one stands, counted from 1."""

    words: list[str]
    tags: list[str]
    line: int


def parse_conll(text: str, source: str) -> list[Sentence]:
    """Every sentence of ``text``, whose lines end in a line feed. ``source`` names it in messages.

    Raises:
        DataError: no line holds a word, or lines have no tag, no word, an unknown tag, or another number of columns
            than the first; names the lines.
    """
    sentences: list[Sentence] = []
    bad: dict[int, str] = {}
    columns, going_on = 0, False
    for line, fields in _lines(text):
        if fields is None:
            going_on = False
            continue
        columns = columns or len(fields)
        if problem := _problem(fields, columns):
            bad[line] = f"{problem}: {excerpt(' '.join(fields))}"
            if len(bad) == SHOWN:
                break
        if not going_on:
            sentences.append(Sentence([], [], line))
            going_on = True
        sentences[-1].words.append(fields[0])
        sentences[-1].tags.append(fields[-1])
    if bad:
        lines = f"{len(bad)} lines or more" if len(bad) == SHOWN else count(len(bad), "line")
        raise bad_rows(Origin(source), f"{lines} cannot be read as a word and its tag", bad, _ADVICE)
    if not sentences:
        raise DataError("holds no words.", where=source, advice=_ADVICE)
    return sentences


def looks_like_conll(text: str) -> bool:
    """Whether the first lines of a text are words with tags, all with the same number of columns, some other than the
    letters B, I, E and so on alone, which also end ordinary lines."""
    fields = [found for _, found in _lines("\n".join(text.split("\n", _LOOKED_AT)[:_LOOKED_AT])) if found is not None]
    sure = any(found[-1] == OUTSIDE or "-" in found[-1] for found in fields)
    return sure and not any(_problem(found, len(fields[0])) for found in fields)


def _lines(text: str) -> Iterator[tuple[int, list[str] | None]]:
    """Number and columns of each line that is no comment; None for what parts sentences."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.startswith(_DOCUMENT):
            yield number, None
        else:
            fields = line.split("\t") if "\t" in line else _SPACES.split(line.strip(" "))
            if not _is_comment(fields):
                yield number, [field.strip(" ") for field in fields]


def _is_comment(fields: list[str]) -> bool:
    """``# sent_id = 1`` and the like; the word '#' itself has a tag in its line's last column."""
    return fields[0].startswith("#") and not (len(fields) > 1 and is_tag(fields[-1].strip(" ")))


def _problem(fields: list[str], columns: int) -> str | None:
    if len(fields) == 1:
        return "a word without a tag"
    if not fields[0]:
        return "a tag without a word"
    if len(fields) != columns:
        return f"{len(fields)} columns, where the first line has {columns}"
    if not is_tag(fields[-1]):
        return f"the last column, {shorten([fields[-1]])}, is no tag"
    return None
