"""CoNLL text: what is read of it, and what each fault is called, by file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
from shared import SHARED, needs_shared

from capotune.data.readers import read_text
from capotune.errors import DataError
from capotune.tasks.token_classification.conll import Sentence, looks_like_conll, parse_conll

FOUR_COLUMNS = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

-DOCSTART- -X- -X- O
Peter NNP B-NP B-PER
"""


def test_first_column_is_the_word_and_last_the_tag() -> None:
    expected = [Sentence(["EU", "rejects"], ["B-ORG", "O"], 3), Sentence(["Peter"], ["B-PER"], 7)]
    assert parse_conll(FOUR_COLUMNS, "x.conll") == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\tO\nb\tO\n\n\n \nc\tO", [["a", "b"], ["c"]]),  # several blank lines, no line feed at the end
        ("New York\tB-LOC\nis\tO\n", [["New York", "is"]]),  # a word with a space, where tabs part the columns
        ("a  O\nb     O\n", [["a", "b"]]),  # aligned by spaces
        ("\u00a0 O\n\u200bx O\n\u2028 O\n", [["\u00a0", "\u200bx", "\u2028"]]),  # only spaces and tabs part columns
        ("# sent_id = 1\na O\n# text = a b\nb O\n", [["a", "b"]]),  # comments end no sentence
        ("#\tO\ntag\tO\n", [["#", "tag"]]),  # the word, not a comment
        ("# O\n#1 B-X\n", [["#", "#1"]]),
        ("-DOCSTART- O\na O\n-DOCSTART-\nb O\n", [["a"], ["b"]]),
    ],
)
def test_words_and_sentences(text: str, words: list[list[str]]) -> None:
    assert [sentence.words for sentence in parse_conll(text, "x.conll")] == words


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_line_ends_and_encodings(end: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "x.conll"
    path.write_bytes("Zürich\tB-LOC\n\nist\tO\n".replace("\n", end).encode(encoding))
    found = parse_conll(read_text(path), str(path))
    assert found == [Sentence(["Zürich"], ["B-LOC"], 1), Sentence(["ist"], ["O"], 3)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a O\nb\n", "x.conll:2: a word without a tag: «b»"),
        ("a\tO\n\tO\n", "x.conll:2: a tag without a word: « O»"),
        ("a X O\n\n# c\nb O\n", "x.conll:4: 2 columns, where the first line has 3: «b O»"),
        ("a O\nb PER\n", "x.conll:2: the last column, 'PER', is no tag: «b PER»"),
        ("a O\nb X-PER\n", "x.conll:2: the last column, 'X-PER', is no tag"),
        ("a\tO\t\n", "x.conll:1: the last column, '', is no tag"),
        ("a NN\nb VB\nc NN\nd VB\ne NN\nf VB\n", "5 lines or more cannot be read as a word and its tag"),
        ("-DOCSTART- O\n\n# nothing\n", "x.conll: holds no words."),
    ],
)
def test_faults_are_named_by_file_and_line(text: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_conll(text, "x.conll")
    assert message in str(caught.value)
    assert "B-LOC" in str(caught.value)  # what a line should look like


def test_a_message_about_the_first_faults_does_not_grow_with_their_number() -> None:
    with pytest.raises(DataError) as caught:
        parse_conll("word\n" * 10_000, "x.conll")
    assert str(caught.value).count("x.conll:") == 6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (FOUR_COLUMNS, True),
        ("a O\nb B-X\n", True),
        ("It was a dark night.\nNothing stirred.\n", False),
        ("Plan B\nPlan I\n", False),
        ("", False),
        ("# a\n\n", False),
        ("a O\n" * 600 + "b\n", True),  # the head decides; the fault is named when all is read
        ("one\ntwo\n", False),
    ],
)
def test_what_looks_like_conll(text: str, expected: bool) -> None:
    assert looks_like_conll(text) == expected


@needs_shared
def test_real_file_is_read_whole() -> None:
    path = SHARED / "data" / "anem" / "train.conll"
    found = parse_conll(read_text(path), str(path))
    assert len(found) == 2815
    assert sum(len(sentence.words) for sentence in found) == 71_697
    lines = path.read_text(encoding="utf-8").split("\n")
    for sentence in (found[0], found[1000], found[-1]):
        shown = lines[sentence.line - 1 :][: len(sentence.words)]
        assert [line.split("\t")[0] for line in shown] == sentence.words
        assert [line.split("\t")[3] for line in shown] == sentence.tags
