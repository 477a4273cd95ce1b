"""Text that a model is to write: find the format it is kept in, check every row, and set rows aside for the test.

The columns of the first record decide on the format, and every other row must have it. As with labelled text, a row
that cannot be used is an error which names the line; nothing is dropped or filled in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from capotune.data.formats import (
    Conversation,
    Document,
    Format,
    Pair,
    Sample,
    convert,
    described,
    find_format,
    known_layout,
    template_layout,
)
from capotune.data.labelled import (
    find_column,
    has_label_column,
    hold_out,
    normalised,
    read_parts,
    refuse_same_source,
    rows_of_part,
)
from capotune.data.records import is_plain_text, read_records, read_text
from capotune.errors import DataError, SettingError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "Conversation",
    "Document",
    "Format",
    "GenerationData",
    "Pair",
    "Sample",
    "Samples",
    "answer_of",
    "asked",
    "load_samples",
    "looks_like_generation",
    "question_of",
    "read_samples_to_score",
]

END_OF_DOCUMENT: Final = "<|endoftext|>"  # parts the documents of a plain text file
START: Final = 200  # characters of a document that stand for it where a question is shown


@dataclass(frozen=True)
class Samples:
    """Rows of one source; ``samples[i]`` starts on line ``lines[i]`` of ``source``.

    ``format`` is how they were read, ``columns`` are those that were read (none in a plain text file).
    """

    samples: list[Sample]
    lines: list[int]
    source: str
    format: Format
    columns: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Samples:
        """The rows at ``indices``, in that order."""
        return Samples(
            [self.samples[index] for index in indices],
            [self.lines[index] for index in indices],
            self.source,
            self.format,
            self.columns,
        )

    @property
    def described(self) -> str:
        """The format and the columns in words, to be said out loud."""
        if self.format == "prompt-completion" and any(isinstance(sample, Conversation) for sample in self.samples[:1]):
            return f"{described(self.format, self.columns)} (messages)"
        return described(self.format, self.columns) if self.columns else "plain text"


@dataclass(frozen=True)
class GenerationData:
    """What to train on and what to test on. ``test_from`` says in words where the test rows are from."""

    train: Samples
    test: Samples
    test_from: str = "given"


def looks_like_generation(source: str, prompt_template: str | None = None) -> bool:
    """Whether ``source`` is text to write rather than text to classify, by the columns of its first record.

    Rows with a ``text`` and a label are text to classify, and so is a question with a column ``label`` beside its
    answer. Of a large file only the start is read, unless it has a ``text`` and other columns of unknown meaning.

    Raises:
        DataError: the source cannot be read.
    """
    if prompt_template is not None or is_plain_text(source):
        return True
    records = read_records(source, limit=1)
    columns = list(records.rows[0])
    known = find_format(columns)
    if known is None or known.format in ("messages", "conversations"):
        return known is not None
    if known.format != "text":
        return find_column(columns, ("label", "labels")) is None
    if has_label_column(records):
        return False
    return len(columns) == 1 or not has_label_column(read_records(source))


def load_samples(
    data: str,
    *,
    test: str | None = None,
    prompt_template: str | None = None,
    completion_column: str | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> GenerationData:
    """Read text to learn to write, and text to test on.

    The test rows are those of ``test``; without it those that a column ``split`` marks as test (``validation`` counts
    as train); without that column a part of ``data``, held out by seed so that equal questions stay together. A single
    document is not split here: its test rows are none, and ``test_from`` says that they are the end of the text.

    Args:
        data: a file or hub dataset, as ``read_records`` takes it, or a plain text file. Plain text is one document, or
            several with ``<|endoftext|>`` between them.
        test: a second one, to test on; read to the same kind of sample.
        prompt_template: a prompt with columns in braces, such as ``"Question: {question}"``, for records of no known
            format. ``{{`` and ``}}`` stand for braces, and a typed ``\\n`` for a line break.
        completion_column: the column to learn to write after it, found by its name when not given.
        test_fraction: the part to hold out when the data has no test rows; 0 holds none out.
        seed: decides which rows are held out; the same seed and data give the same rows.

    Raises:
        DataError: a source cannot be read, its format is not known, a row does not fit, ``test`` is the same file as
            ``data`` or is read to something else, or no row can be held out.
        SettingError: the template is broken, a setting does not fit the data, or ``test_fraction`` is out of range.
    """
    if test is not None:
        refuse_same_source(data, test)
    rows, parts = _read(data, prompt_template, completion_column)
    if test is not None:
        completion = rows.columns[-1] if prompt_template is not None else None
        test_rows, test_parts = _read(test, prompt_template, completion)
        _refuse_other_format(rows, test_rows)
        return GenerationData(_part(rows, parts, "train"), _part(test_rows, test_parts, "test"), test)
    if "test" in parts:
        return GenerationData(_part(rows, parts, "train"), _part(rows, parts, "test"), "the column 'split'")
    if test_fraction == 0:
        return GenerationData(rows, rows.take([]), "none asked for")
    if len(rows) == 1 and isinstance(rows.samples[0], Document):
        return GenerationData(rows, rows.take([]), "the end of the text")
    return _split_by_seed(rows, test_fraction, seed)


def read_samples_to_score(
    source: str, *, prompt_template: str | None = None, completion_column: str | None = None
) -> Samples:
    """Rows to score a trained adapter on: those that a column ``split`` marks as test, else all of them.

    Raises:
        DataError, SettingError: as ``load_samples``.
    """
    rows, parts = _read(source, prompt_template, completion_column)
    return _part(rows, parts, "test") if "test" in parts else rows


# What was asked, and what was answered


def question_of(sample: Sample) -> str:
    """What the model is asked, to be shown: the last user turn before the answer, the prompt, or how a text starts."""
    if isinstance(sample, Conversation):
        return _user_turns(sample)[-1] if _user_turns(sample) else ""
    return sample.prompt if isinstance(sample, Pair) else sample.text[:START]


def asked(sample: Sample) -> str:
    """All that the model is asked, to compare rows: every user turn before the answer, the prompt, or the whole text.

    In a long conversation the last turn alone ("and then?") would make rows equal that have nothing in common.
    """
    if isinstance(sample, Conversation):
        return "\n".join(_user_turns(sample) or [message["content"] for message in sample.messages])
    return sample.prompt if isinstance(sample, Pair) else sample.text


def answer_of(sample: Sample) -> str | None:
    """The answer to compare with: the assistant's turn at the end, or the completion. None where there is none."""
    if isinstance(sample, Conversation):
        last = sample.messages[-1]
        return last["content"] if last["role"] == "assistant" and last["content"].strip() else None
    return sample.completion if isinstance(sample, Pair) else None


def _user_turns(conversation: Conversation) -> list[str]:
    """What the user said before the assistant's last turn."""
    roles = [message["role"] for message in conversation.messages]
    end = len(roles) - roles[::-1].index("assistant")
    return [message["content"] for message in conversation.messages[:end] if message["role"] == "user"]


# One source


def _read(source: str, prompt_template: str | None, completion_column: str | None) -> tuple[Samples, list[str]]:
    """The rows, and for each one ``train`` or ``test`` as the column ``split`` says (empty without that column)."""
    if completion_column is not None and prompt_template is None:
        raise SettingError(
            f"--completion-column {completion_column!r} belongs to a --prompt-template, and none is given. Give one, "
            'such as --prompt-template "{question}" with a column in the braces.'
        )
    if is_plain_text(source):
        if prompt_template is not None:
            raise SettingError(f"{source}: is plain text without columns. Leave --prompt-template out.")
        return _read_documents(source), []
    records = read_records(source)
    if prompt_template is None:
        layout = known_layout(records)
    else:
        layout = template_layout(records, prompt_template, completion_column)
    samples = Samples(convert(records, layout), records.lines, source, layout.format, tuple(layout.columns.values()))
    split = next((name for name in records.columns if name.lower() == "split" and name not in samples.columns), None)
    return samples, read_parts(records, split) if split is not None else []


def _read_documents(source: str) -> Samples:
    """A plain text file as one document, or as those that ``<|endoftext|>`` parts, without the empty ones."""
    text = read_text(source)
    if END_OF_DOCUMENT not in text:
        return Samples([Document(text)], [1], source, "text", ())
    documents: list[Sample] = []
    lines: list[int] = []
    line = 1
    for part in text.split(END_OF_DOCUMENT):
        if part.strip():
            documents.append(Document(part.strip("\n")))
            lines.append(line + len(part) - len(part.lstrip("\n")))
        line += part.count("\n")
    if not documents:
        raise DataError(f"{source}: holds {END_OF_DOCUMENT} and no text. Give a file with text.")
    return Samples(documents, lines, source, "text", ())


# Train and test


def _part(rows: Samples, parts: Sequence[str], wanted: str) -> Samples:
    return rows.take(rows_of_part(rows.source, parts, wanted)) if parts else rows


def _refuse_other_format(train: Samples, test: Samples) -> None:
    if type(train.samples[0]) is not type(test.samples[0]):
        raise DataError(
            f"{test.source}: the test rows are read as {test.described}, and the training rows of {train.source} as "
            f"{train.described}. Give both in one format."
        )


def _split_by_seed(rows: Samples, fraction: float, seed: int) -> GenerationData:
    groups = [normalised(asked(sample)) for sample in rows.samples]
    if len(set(groups)) == 1:
        raise DataError(
            f"{rows.source}: nothing can be held out, as there is one question only. Add rows with others, or give a "
            "file to test on (--test)."
        )
    train, test = hold_out([0] * len(rows), fraction, seed, groups)
    return GenerationData(rows.take(train), rows.take(test), f"{fraction:.0%} of the rows, seed {seed}")
