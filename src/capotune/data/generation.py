"""Read text that a model is to write: find its format, check every row, and set rows aside for the test.

The columns of the first row decide on the format, and every other row must have it. As with labelled text, a row that
cannot be used is an error which names it; nothing is dropped or filled in here.
"""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256

import numpy as np

from capotune.data.columns import find_column, part_of_each_row, unused_columns
from capotune.data.documents import read_documents
from capotune.data.formats import find_format, known_layout
from capotune.data.formats.layout import convert
from capotune.data.formats.template import template_layout, with_inner_columns
from capotune.data.label_columns import has_label_column
from capotune.data.numbers import looks_like_numbers
from capotune.data.readers import as_source, is_plain_text, read_table
from capotune.data.row_store import RowStore
from capotune.data.samples import GenerationData, Samples
from capotune.data.several_labels import looks_like_several
from capotune.data.split import hold_out, refuse_same_source, rows_to_score, split_as_marked
from capotune.errors import DataError, SettingError

__all__ = ["load_samples", "looks_like_generation", "read_samples_to_score"]


def looks_like_generation(source: object, prompt_template: str | None = None) -> bool:
    """Whether ``source`` is text to write rather than text to classify, by the columns of its first row.

    Rows with a ``text`` and a label, several labels or a number are text to predict these of, and so are an input with
    a label for output, and a question with a column ``label`` beside its answer. Of a large
    file only the start is read, unless it has a ``text`` and other columns of unknown meaning.

    Raises:
        DataError: the source cannot be read, or each row has a 1 in one of some columns beside its ``text``.
    """
    if prompt_template is not None or is_plain_text(source):
        return True
    table = read_table(source, limit=1)
    columns = list(table.rows[0])
    known = find_format(columns)
    if known is None or known.format in ("messages", "conversations"):
        return known is not None
    if known.format == "question-answer" and find_column(columns, ("question", "query")) is None:
        return not has_label_column(read_table(source, place=RowStore))  # the output beside an input may be a label
    if known.format != "text":
        return find_column(columns, ("label", "labels")) is None
    if has_label_column(table) or (len(columns) > 1 and has_label_column(table := read_table(source, place=RowStore))):
        return False
    return not (looks_like_several(table, None, ()) or looks_like_numbers(table, None, ()))


def load_samples(
    data: object,
    *,
    test: object = None,
    prompt_template: str | None = None,
    completion_column: str | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> GenerationData:
    """Read text to train a model to write, and text to test on.

    The test rows are those of ``test``; without it those that a column ``split`` marks as test (``validation`` counts
    as train); without that column a part of ``data``, held out by seed so that equal questions stay together. A single
    document is not split here: its test rows are none, and ``test_from`` says that they are the end of the text.

    Args:
        data: a file, a hub dataset or rows in memory, as ``read_table`` takes it, or a plain text file. Plain text is
            one document, or several with ``<|endoftext|>`` between them.
        test: a second one, to test on; read to the same kind of sample.
        prompt_template: a prompt with columns in braces, such as ``"Question: {question}"``, for rows of no known
            format. ``{{`` and ``}}`` stand for braces, and a typed ``\\n`` for a line break.
        completion_column: the column to write after it, found by its name when not given.
        test_fraction: the part to hold out when the data has no test rows; 0 holds none out.
        seed: decides which rows are held out; the same seed and data give the same rows.

    Raises:
        DataError: a source cannot be read, its format is not known, a row does not fit, ``test`` is the same file as
            ``data`` or is read to something else, or no row can be held out.
        SettingError: the template is broken, a setting does not fit the data, or ``test_fraction`` is out of range.
    """
    data, test = as_source(data), None if test is None else as_source(test, "test")
    if test is not None:
        refuse_same_source(data, test)
    rows, parts = _read(data, prompt_template, completion_column)
    second = None
    if test is not None:
        second = _read(test, prompt_template, rows.columns[-1] if prompt_template is not None else None)
        _refuse_other_format(rows, second[0])
    if marked := split_as_marked(rows, parts, second):
        return GenerationData(*marked)
    if test_fraction == 0:
        return GenerationData(rows, rows.take([]), "none asked for")
    if rows.is_one_text:
        return GenerationData(rows, rows.take([]), "the end of the text")
    return _split_by_seed(rows, test_fraction, seed)


def read_samples_to_score(
    source: object, *, prompt_template: str | None = None, completion_column: str | None = None
) -> Samples:
    """Rows to score a trained adapter on: those that a column ``split`` marks as test, else all of them.

    Raises:
        DataError, SettingError: as ``load_samples``.
    """
    return rows_to_score(*_read(source, prompt_template, completion_column))


# One source


def _read(source: object, prompt_template: str | None, completion_column: str | None) -> tuple[Samples, list[str]]:
    """The rows, and for each one ``train`` or ``test`` as the column ``split`` says (empty without that column)."""
    if completion_column is not None and prompt_template is None:
        raise SettingError(
            "belongs to a `prompt_template`, and none is given.",
            setting="completion_column",
            given=completion_column,
            advice='Give one, such as `prompt_template="{question}"` with a column in the braces.',
        )
    if is_plain_text(source):
        if prompt_template is not None:
            raise SettingError(
                "is plain text without columns.", where=str(source), advice="Leave `prompt_template` out."
            )
        return read_documents(str(source)), []
    table = read_table(source, place=RowStore)
    content = table.rows.sha256 if isinstance(table.rows, RowStore) else ""
    if prompt_template is None:
        layout = known_layout(table)
    else:
        table = with_inner_columns(table)
        layout = template_layout(table, prompt_template, completion_column)
    columns = tuple(layout.columns.values())
    samples, facts = convert(table, layout)
    unused = unused_columns(table, columns)
    rows = Samples(samples, table.lines, table.source, layout.format, columns, unused, layout.note, facts)
    if content:
        read_as = [content, layout.format, layout.columns, table.nulls_are_absent, prompt_template]
        rows = replace(rows, content=sha256(json.dumps(read_as).encode()).hexdigest())
    return rows, part_of_each_row(table, columns)


# Train and test


def _refuse_other_format(train: Samples, test: Samples) -> None:
    if type(train.samples[0]) is not type(test.samples[0]):
        raise DataError(
            f"the test rows are read as {test.described}, and the training rows of {train.source} as "
            f"{train.described}.",
            where=str(test.source),
            advice="Give both in one format.",
        )


def _split_by_seed(rows: Samples, fraction: float, seed: int) -> GenerationData:
    groups = rows.facts["question"]
    if (groups == groups[0]).all():
        raise DataError(
            "nothing can be held out, as there is one question only.",
            where=str(rows.source),
            advice="Add rows with others, or give rows to test on (`test`).",
        )
    train, test = hold_out(np.zeros(len(rows), dtype=np.int64), fraction, seed, groups)
    return GenerationData(rows.take(train), rows.take(test), f"{fraction:.0%} of the rows, seed {seed}")
