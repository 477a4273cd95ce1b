"""Sentences whose words have a tag each: found, read, checked, and set aside for the test.

They come as CoNLL text (``conll``), or as rows with a list of words and a list of tags. Whatever scheme the tags are
written in, they are read into IOB2. A row that cannot be used is an error that names it; nothing is dropped.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from capotune.data.columns import find_column, given_column, part_of_each_row, unused_columns
from capotune.data.readers import is_plain_text, read_table, read_text
from capotune.data.readers.text import decode, read_bytes
from capotune.data.split import hold_out, refuse_same_source, rows_to_score, split_as_marked
from capotune.data.table import Origin, Table
from capotune.data.wording import bad_rows, did_you_mean, kind_of, shorten
from capotune.errors import DataError
from capotune.tasks.token_classification.conll import ENDINGS, looks_like_conll, parse_conll
from capotune.tasks.token_classification.spans import OUTSIDE, as_iob2, entities, is_tag, scheme

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WORD_COLUMNS: Final = ("tokens", "words", "token", "word")
TAG_COLUMNS: Final = ("tags", "ner_tags", "labels", "ner", "tag", "label")
"""In order of preference: of two columns with a known name the one that stands first here is taken."""

_HEAD: Final = 2**16  # bytes of a text that show what it is
_CONLL = "CoNLL text"


@dataclass(frozen=True)
class TaggedRows:
    """Sentences of one source; ``tags[i][j]`` belongs to ``words[i][j]``, and sentence i begins on ``lines[i]``."""

    words: list[list[str]]
    tags: list[list[str]]
    """In IOB2."""
    lines: Sequence[int]
    source: Origin
    scheme: str
    """What the tags were written in."""
    word_column: str | None = None
    tag_column: str | None = None
    """None: CoNLL text, which has no names."""
    unused: tuple[str, ...] = ()
    """Columns that are not read."""

    def __len__(self) -> int:
        return len(self.words)

    @property
    def described(self) -> str:
        """Where words and tags are from, in words."""
        where = f"words in {self.word_column!r}, tags in {self.tag_column!r}" if self.word_column else _CONLL
        return f"{where}, {self.scheme}"

    @property
    def type_counts(self) -> Counter[str]:
        """Entities of each type."""
        return Counter(entity.type for tags in self.tags for entity in entities(tags))

    def where(self, row: int) -> str:
        """Where a row stands, as messages name it."""
        return self.source.at(self.lines[row])

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> TaggedRows:
        """The rows at ``indices``, in that order."""
        return replace(
            self,
            words=[self.words[index] for index in indices],
            tags=[self.tags[index] for index in indices],
            lines=[self.lines[index] for index in indices],
        )


@dataclass(frozen=True)
class TaggedData:
    """What to train on and what to test on. ``test_from`` says in words where the test rows are from."""

    train: TaggedRows
    test: TaggedRows
    test_from: str

    @property
    def types(self) -> list[str]:
        """Types of the training rows' entities, by letter."""
        return sorted(self.train.type_counts)


def is_tagged(source: Any) -> bool:
    """Whether ``source`` is CoNLL text, or rows of which a known column holds lists of words and one lists of tags.

    Raises ``DataError`` when it cannot be read.
    """
    if _is_conll(source):
        return True
    if isinstance(source, str | os.PathLike) and is_plain_text(source):
        return False
    table = read_table(source, limit=1)
    return _list_column(table, WORD_COLUMNS) is not None and _list_column(table, TAG_COLUMNS) is not None


def load_tagged(
    data: Any,
    *,
    test: Any = None,
    word_column: str | None = None,
    tag_column: str | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> TaggedData:
    """Read tagged sentences to train on and to test on.

    The test rows are those of ``test``; without it those that a column ``split`` marks as test (``validation`` counts
    as train); without that column a part of ``data``, drawn so that every type keeps a row to train on and equal
    sentences stay together.

    Args:
        data: CoNLL text, or rows as ``read_table`` takes them.
        test: a second source, to test on.
        word_column, tag_column: the columns that hold lists of words and of tags; found by their names when left out.
        test_fraction: the part to hold out when the data has no test rows; 0 holds none out.
        seed: the same seed and data give the same rows.

    Raises:
        DataError: a source cannot be read, a row has no words, another number of tags, or something else than tags; no
            training row has an entity; a type is in the test rows alone; or no row can be held out.
    """
    if test is not None:
        refuse_same_source(data, test)
    rows, parts = _read(data, word_column, tag_column)
    second = None if test is None else _read(test, word_column, tag_column)
    if marked := split_as_marked(rows, parts, second):
        split = TaggedData(*marked)
    elif test_fraction == 0:
        split = TaggedData(rows, rows.take([]), "none asked for")
    else:
        split = _split_by_seed(rows, test_fraction, seed)
    if not split.types:
        raise DataError(
            f"every word of the {len(split.train):,} training rows has the tag {OUTSIDE}; no entity is marked.",
            where=str(rows.source),
            advice="Add rows with entities, or choose another `label_column`.",
        )
    check_types(split.test, split.types)
    return split


def read_to_score(source: Any, *, word_column: str | None = None, tag_column: str | None = None) -> TaggedRows:
    """Rows to score on: those that a column ``split`` marks as test, else all. Raises as ``load_tagged``."""
    return rows_to_score(*_read(source, word_column, tag_column))


def read_words(source: str, word_column: str | None = None) -> list[list[str]] | None:
    """The words of every sentence, with or without tags beside them; None where the source holds no lists of words."""
    if _is_conll(source):
        return [one.words for one in parse_conll(read_text(source), source)]
    if is_plain_text(source) or not Path(source).expanduser().exists():
        return None
    table = read_table(source)
    column = given_column(table, word_column, "`text_column`") if word_column else _list_column(table, WORD_COLUMNS)
    words = [row.get(column) for row in table.rows] if column else []
    if not any(isinstance(of_row, list) for of_row in words):
        return None
    bad = {
        line: problem for line, of_row in zip(table.lines, words, strict=True) if (problem := _problem_of_words(of_row))
    }
    if bad:
        raise bad_rows(table.source, "rows without a list of words", bad, "Fill these in or delete the rows.")
    return [of_row for of_row in words if isinstance(of_row, list)]


def check_types(rows: TaggedRows, known: Sequence[str]) -> None:
    """Raise a ``DataError`` for rows with an entity of a type that is not ``known`` from training."""
    unknown = {
        line: ", ".join(strange)
        for line, tags in zip(rows.lines, rows.tags, strict=True)
        if (strange := sorted({entity.type for entity in entities(tags)} - set(known)))
    }
    if unknown:
        names = sorted(set(rows.type_counts) - set(known))
        advice = f"{did_you_mean(names[0], known)}Known are {shorten(known)}. Correct these rows, or train on such too."
        raise bad_rows(
            rows.source, f"rows have entities of a type that no training row has: {shorten(names)}", unknown, advice
        )


def sentence_groups(rows: TaggedRows) -> list[tuple[str, ...]]:
    """What equal sentences have in common: their words without regard to case."""
    return [tuple(word.casefold() for word in words) for words in rows.words]


def rarest_types(rows: TaggedRows) -> list[int]:
    """For each row a number for the rarest type in it, 0 where it has no entity: what rows are held out by."""
    by_rarity = [kind for kind, _ in sorted(rows.type_counts.items(), key=lambda item: (item[1], item[0]))]
    number = {kind: at for at, kind in enumerate(by_rarity, start=1)}
    return [min((number[entity.type] for entity in entities(tags)), default=0) for tags in rows.tags]


# Reading


def _read(source: Any, word_column: str | None, tag_column: str | None) -> tuple[TaggedRows, list[str]]:
    """The rows, and for each one ``train`` or ``test`` as the column ``split`` says (empty without that column)."""
    if _is_conll(source):
        found = parse_conll(read_text(source), os.fspath(source))
        parts = [one.words for one in found], [one.tags for one in found], [one.line for one in found]
        return _in_iob2(*parts, Origin(os.fspath(source))), []
    table = read_table(source)
    word_column, tag_column = _columns(table, word_column, tag_column)
    words: list[Any] = [row.get(word_column) for row in table.rows]
    tags: list[Any] = [row.get(tag_column) for row in table.rows]
    _check_rows(table, words, tags)
    rows = _in_iob2(words, tags, table.lines, table.source)
    read = word_column, tag_column
    rows = replace(rows, word_column=word_column, tag_column=tag_column, unused=unused_columns(table, read))
    return rows, part_of_each_row(table, read)


def _in_iob2(words: list[list[str]], tags: list[list[str]], lines: Sequence[int], source: Origin) -> TaggedRows:
    return TaggedRows(words, [as_iob2(of_row) for of_row in tags], lines, source, scheme(tags))


def _is_conll(source: Any) -> bool:
    """By the ending of a file's name, or the first lines of one whose ending says nothing."""
    if not isinstance(source, str | os.PathLike):
        return False
    path = Path(source).expanduser()
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises on a name that is too long
        return False
    if path.suffix.lower() in ENDINGS:
        return True
    if not is_plain_text(source):
        return False
    head = decode(read_bytes(path, str(source), _HEAD), path, str(source))
    return looks_like_conll(head.replace("\r\n", "\n").replace("\r", "\n"))


def _columns(table: Table, words: str | None, tags: str | None) -> tuple[str, str]:
    """The columns that are given, in whatever case, or have a known name and hold lists."""
    word_column = given_column(table, words, "`text_column`") if words else _list_column(table, WORD_COLUMNS)
    tag_column = given_column(table, tags, "`label_column`") if tags else _list_column(table, TAG_COLUMNS)
    if word_column is None or tag_column is None:
        missing = "words" if word_column is None else "tags"
        raise DataError(
            f"it is not clear which column holds lists of {missing}. The columns are {shorten(table.columns)}.",
            where=str(table.source),
            advice="Give `text_column` and `label_column`, such as tokens and tags.",
        )
    return word_column, tag_column


def _list_column(table: Table, names: Sequence[str]) -> str | None:
    """The first of ``names`` that is a column whose first value is a list."""
    lists = [column for column in table.columns if isinstance(table.rows[0].get(column), list)]
    return find_column(lists, names)


# Checking


def _check_rows(table: Table, words: Sequence[Any], tags: Sequence[Any]) -> None:
    bad = {
        line: problem
        for line, of_row, own in zip(table.lines, words, tags, strict=True)
        if (problem := _problem(of_row, own))
    }
    if bad:
        rows = "1 row" if len(bad) == 1 else f"{len(bad):,} of {len(words):,} rows"
        advice = 'A row holds as many tags as words, such as {"tokens": ["in", "Paris"], "tags": ["O", "B-LOC"]}.'
        raise bad_rows(table.source, f"{rows} cannot be used", bad, advice)


def _problem(words: Any, tags: Any) -> str | None:
    if problem := _problem_of_words(words):
        return problem
    if not isinstance(tags, list):
        return f"a list of tags is needed, found {kind_of(tags)}"
    if len(words) != len(tags):
        return f"{len(words)} words and {len(tags)} tags"
    strange = next((tag for tag in tags if not isinstance(tag, str) or not is_tag(tag)), OUTSIDE)
    if isinstance(strange, int):
        return f"the tag {strange} is a number without a name"
    if not isinstance(strange, str):
        return f"among the tags is {kind_of(strange)}"
    if strange == OUTSIDE:
        return None
    return f"{shorten([strange])} is no tag; allowed are O, and B-, I-, E- or S- with a type"


def _problem_of_words(words: Any) -> str | None:
    if not isinstance(words, list):
        return f"a list of words is needed, found {kind_of(words)}"
    if not words:
        return "no words"
    if "" in words:
        return "an empty word"
    strange = [word for word in words if not isinstance(word, str)]
    return f"among the words is {kind_of(strange[0])}" if strange else None


# Train and test


def _split_by_seed(rows: TaggedRows, fraction: float, seed: int) -> TaggedData:
    if len(rows) == 1:
        raise DataError(
            f"holds one sentence of {len(rows.words[0]):,} words, so none can be held out to test on.",
            where=str(rows.source),
            advice="Part sentences by blank lines, add some, or give rows to test on (`test`).",
        )
    try:
        train, test = hold_out(rarest_types(rows), fraction, seed, sentence_groups(rows))
    except DataError as error:
        advice = f"{error.advice} Or give rows to test on (`test`)."
        raise DataError(error.problem, where=str(rows.source), advice=advice) from error
    train_rows, test_rows = _without_lonely_types(rows, train.tolist(), test.tolist())
    where = f"{fraction:.0%} of the sentences, seed {seed}"
    return TaggedData(rows.take(train_rows), rows.take(test_rows), where)


def _without_lonely_types(rows: TaggedRows, train: list[int], test: list[int]) -> tuple[list[int], list[int]]:
    """Train and test rows, with those moved to train whose types stand in no other training row."""
    known = {entity.type for row in train for entity in entities(rows.tags[row])}
    tested = []
    for row in test:
        own = {entity.type for entity in entities(rows.tags[row])}
        if own <= known:
            tested.append(row)
        else:
            train.append(row)
            known |= own
    return sorted(train), tested
