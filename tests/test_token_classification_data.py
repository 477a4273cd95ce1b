"""Tagged sentences: where they are found, what is refused, how they are split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from capotune.errors import DataError
from capotune.tasks.token_classification.data import (
    TaggedData,
    TaggedRows,
    is_tagged,
    load_tagged,
    rarest_types,
    read_to_score,
    read_words,
)

WORDS = [["Anna", "Lee", "lives"], ["in", "Paris"], ["it", "rains"], ["Bo", "sleeps"], ["to", "Rome"]]
TAGS = [["B-PER", "I-PER", "O"], ["O", "B-LOC"], ["O", "O"], ["B-PER", "O"], ["O", "B-LOC"]]


def rows(words_name: str = "tokens", tags_name: str = "tags", **more: list[Any]) -> list[dict[str, Any]]:
    columns = {words_name: WORDS, tags_name: TAGS, **more}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def jsonl(folder: Path, values: list[dict[str, Any]], name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return str(path)


def conll(folder: Path, name: str = "data.conll", words: Any = WORDS, tags: Any = TAGS) -> str:
    path = folder / name
    pairs = (zip(*pair, strict=True) for pair in zip(words, tags, strict=True))
    sentences = ("".join(f"{word}\t{tag}\n" for word, tag in pair) for pair in pairs)
    path.write_text("\n".join(sentences), encoding="utf-8")
    return str(path)


def contents(found: TaggedRows) -> tuple[list[list[str]], list[list[str]]]:
    return found.words, found.tags


@pytest.mark.parametrize("names", [("tokens", "tags"), ("words", "ner_tags"), ("Tokens", "labels"), ("word", "NER")])
def test_columns_are_found_by_name(names: tuple[str, str], tmp_path: Path) -> None:
    path = jsonl(tmp_path, rows(*names, id=list("abcde")))
    assert is_tagged(path)
    found = read_to_score(path)
    assert contents(found) == (WORDS, TAGS)
    assert found.lines == [1, 2, 3, 4, 5]
    assert found.described == f"words in {names[0]!r}, tags in {names[1]!r}, IOB2"


def test_columns_with_other_names_are_given(tmp_path: Path) -> None:
    path = jsonl(tmp_path, rows("satz", "marken"))
    assert not is_tagged(path)
    assert contents(read_to_score(path, word_column="satz", tag_column="Marken")) == (WORDS, TAGS)
    with pytest.raises(DataError, match=r"not clear which column holds lists of words.*Give `text_column`"):
        read_to_score(path)


@pytest.mark.parametrize("name", ["data.conll", "data.bio", "train.txt", "AnEM.train", "data"])
def test_conll_text_is_found_by_ending_or_content(name: str, tmp_path: Path) -> None:
    path = conll(tmp_path, name)
    assert is_tagged(path)
    found = read_to_score(path)
    assert contents(found) == (WORDS, TAGS)
    assert found.lines == [1, 5, 8, 11, 14]
    assert found.described == "CoNLL text, IOB2"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("story.txt", "It was a dark night.\nNothing stirred.\n"),
        ("labels.jsonl", '{"text": "a", "label": "b"}\n'),
        ("labels.csv", "text,label\na,b\n"),
        ("tags.jsonl", '{"tokens": "a b", "tags": "O O"}\n'),
        ("multi.jsonl", '{"text": "a b", "labels": ["x", "y"]}\n'),
        ("chats.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n'),
    ],
)
def test_other_data_is_not_taken_for_tagged_words(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert not is_tagged(str(tmp_path / name))


def test_tags_of_every_scheme_become_iob2(tmp_path: Path) -> None:
    iobes = [["B-PER", "E-PER", "O"], ["O", "S-LOC"], ["O", "O"], ["S-PER", "O"], ["O", "S-LOC"]]
    iob1 = [["I-PER", "I-PER", "O"], ["O", "I-LOC"], ["O", "O"], ["I-PER", "O"], ["O", "I-LOC"]]
    for name, tags in (("IOBES", iobes), ("IOB1", iob1)):
        found = read_to_score(conll(tmp_path, tags=tags))
        assert (found.tags, found.scheme) == (TAGS, name)


def test_class_indices_are_named_where_names_are_known(tmp_path: Path) -> None:
    import datasets

    names = ["O", "B-PER", "I-PER", "B-LOC"]
    feature = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(datasets.ClassLabel(names=names))}
    )
    values = {"tokens": WORDS, "ner_tags": [[names.index(tag) for tag in of_row] for of_row in TAGS]}
    dataset = datasets.Dataset.from_dict(values, features=feature)
    dataset.to_parquet(str(tmp_path / "data.parquet"))
    assert contents(read_to_score(str(tmp_path / "data.parquet"))) == (WORDS, TAGS)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "data.jsonl:2: 2 words and 1 tags"),
        ({"tokens": [], "tags": []}, "data.jsonl:2: no words"),
        ({"tokens": ["a", ""], "tags": ["O", "O"]}, "data.jsonl:2: an empty word"),
        ({"tokens": ["a", None], "tags": ["O", "O"]}, "data.jsonl:2: among the words is missing"),
        ({"tokens": ["a"], "tags": [3]}, "data.jsonl:2: the tag 3 is a number without a name"),
        ({"tokens": ["a"], "tags": [["O"]]}, "data.jsonl:2: among the tags is a list"),
        ({"tokens": ["a"], "tags": ["PER"]}, "data.jsonl:2: 'PER' is no tag; allowed are O, and B-"),
        ({"tokens": "a", "tags": ["O"]}, "data.jsonl:2: a list of words is needed, found text"),
        ({"tokens": ["a"]}, "data.jsonl:2: a list of tags is needed, found missing"),
    ],
)
def test_rows_that_cannot_be_used_are_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path, [rows()[0], row, rows()[1]])
    with pytest.raises(DataError) as caught:
        read_to_score(path)
    assert message in str(caught.value)
    assert "1 row cannot be used" in str(caught.value)


# Train and test


def load(folder: Path, values: list[dict[str, Any]], **settings: Any) -> TaggedData:
    return load_tagged(jsonl(folder, values), **settings)


def test_column_split_marks_the_test_rows(tmp_path: Path) -> None:
    found = load(tmp_path, rows(split=["train", "train", "validation", "test", "test"]))
    assert (found.train.words, found.test.words) == (WORDS[:3], WORDS[3:])
    assert (found.test.lines, found.test_from) == ([4, 5], "the column 'split'")
    assert found.types == ["LOC", "PER"]


def test_a_second_source_is_tested_on(tmp_path: Path) -> None:
    found = load_tagged(jsonl(tmp_path, rows()), test=conll(tmp_path, words=WORDS[:2], tags=TAGS[:2]))
    assert (found.train.words, found.test.words) == (WORDS, WORDS[:2])
    with pytest.raises(DataError, match="would mean nothing"):
        load_tagged(jsonl(tmp_path, rows()), test=jsonl(tmp_path, rows()))


def test_held_out_sentences_leave_every_type_in_train(tmp_path: Path) -> None:
    """Types of different rarity that stand together, and sentences that are equal but for case."""
    words = [[f"w{at}", "x", "y"] for at in range(40)] + [["Same", "x"], ["same", "X"]]
    tags = [["B-A", "B-B" if at % 5 == 0 else "O", "B-C" if at % 20 == 0 else "O"] for at in range(40)]
    values = [
        {"tokens": own, "tags": of_row} for own, of_row in zip(words, [*tags, ["O", "O"], ["O", "O"]], strict=True)
    ]
    splits = set()
    for seed in range(12):
        found = load(tmp_path, values, seed=seed, test_fraction=0.3)
        assert sorted(found.train.lines + found.test.lines) == list(range(1, 43))
        assert set(found.test.type_counts) <= set(found.types) == {"A", "B", "C"}
        assert (41 in found.train.lines) == (42 in found.train.lines)
        assert 8 <= len(found.test) <= 14
        again = load(tmp_path, values, seed=seed, test_fraction=0.3)
        assert again.test.lines == found.test.lines
        splits.add(tuple(found.test.lines))
    assert len(splits) > 6


def test_row_that_alone_holds_a_type_is_trained_on_whatever_else_is_in_it(tmp_path: Path) -> None:
    """It counts as a row of its rarest type, of which others are there to train on."""
    tags = [["B-A", "O", "O"]] * 20 + [["B-T", "O", "O"]] * 3 + [["B-T", *["B-U"] * 6]]
    values = [{"tokens": [f"{at}.{word}" for word in range(len(own))], "tags": own} for at, own in enumerate(tags)]
    tested = set()
    for seed in range(8):
        found = load(tmp_path, values, seed=seed, test_fraction=0.3)
        assert 24 in found.train.lines
        tested.update(found.test.lines)
    assert tested & {21, 22, 23}


def test_rarest_type_decides_what_a_row_counts_as(tmp_path: Path) -> None:
    found = read_to_score(jsonl(tmp_path, [*rows(), {"tokens": ["a", "b"], "tags": ["B-LOC", "B-ORG"]}]))
    assert rarest_types(found) == [2, 3, 0, 2, 3, 1]


@pytest.mark.parametrize(
    ("words", "tags", "message"),
    [
        (WORDS[:1], TAGS[:1], "holds one sentence of 3 words, so none can be held out"),
        (WORDS, [["O"] * len(of_row) for of_row in TAGS], "every word of the 4 training rows has the tag O"),
        (WORDS[:2], TAGS[:2], "nothing can be held out"),
    ],
)
def test_data_that_cannot_be_trained_on(words: Any, tags: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_tagged(conll(tmp_path, words=words, tags=tags))


def test_type_in_test_rows_alone_is_named_with_its_line(tmp_path: Path) -> None:
    test = conll(tmp_path, "test.conll", [*WORDS, ["Ada", "sees"]], [*TAGS, ["B-PERS", "O"]])
    with pytest.raises(DataError) as caught:
        load_tagged(conll(tmp_path), test=test)
    assert f"{test}:17: PERS" in str(caught.value)
    assert "Did you mean 'PER'?" in str(caught.value)


def test_a_tag_that_only_test_rows_have_is_no_fault_of_a_known_type(tmp_path: Path) -> None:
    test = conll(tmp_path, "test.conll", [["New", "York"]], [["B-LOC", "I-LOC"]])
    assert load_tagged(conll(tmp_path), test=test).test.tags == [["B-LOC", "I-LOC"]]


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        is_tagged(str(tmp_path / "nothing.conll"))


def test_words_to_predict_need_no_tags(tmp_path: Path) -> None:
    values = [{"id": 1, "tokens": of_row} for of_row in WORDS]
    assert read_words(jsonl(tmp_path, values)) == WORDS
    assert read_words(conll(tmp_path)) == WORDS
    assert read_words(jsonl(tmp_path, [{"satz": of_row} for of_row in WORDS]), "satz") == WORDS
    assert read_words(jsonl(tmp_path, [{"text": "in Paris"}])) is None
    (tmp_path / "lines.txt").write_text("in Paris\nin Rome\n", encoding="utf-8")
    assert read_words(str(tmp_path / "lines.txt")) is None
    with pytest.raises(DataError, match=r"data\.jsonl:2: no words"):
        read_words(jsonl(tmp_path, [{"tokens": ["a"]}, {"tokens": []}]))
