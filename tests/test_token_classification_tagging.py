"""Words of a string, and predicted tags as entities in the text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capotune.tasks.token_classification.tagging import FoundEntity, Words
from capotune.tasks.token_classification.words import word_spans


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It isn't 3.5%", ["It", "isn", "'", "t", "3", ".", "5", "%"]),
        ("  Anna\tlives\nin   Paris. ", ["Anna", "lives", "in", "Paris", "."]),
        ("T-cell (CD4+)", ["T", "-", "cell", "(", "CD4", "+", ")"]),
        ("snake_case", ["snake_case"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),  # vowel signs are marks, not letters
        ("नम\u200dस्ते", ["नम\u200dस्ते"]),  # a joiner inside a word
        ("e\u0301te\u0301", ["e\u0301te\u0301"]),
        ("a\x01b", ["a", "b"]),
        ("🙂🙂 ok…", ["🙂", "🙂", "ok", "…"]),
        ("", []),
        (" \n ", []),
    ],
)
def test_words_of_a_string(text: str, words: list[str]) -> None:
    assert [text[start:end] for start, end in word_spans(text)] == words
    assert Words.of(text).words == words


@given(st.text())
def test_words_stand_in_order_and_hold_every_visible_character(text: str) -> None:
    spans = word_spans(text)
    edges = [edge for span in spans for edge in span]
    assert edges == sorted(edges)
    assert all(start < end for start, end in spans)
    inside = {at for start, end in spans for at in range(start, end)}
    assert not [text[at] for at in range(len(text)) if at not in inside and text[at].isalnum()]


@given(st.lists(st.text(min_size=1)))
def test_words_given_as_a_list_are_found_again_in_their_text(words: list[str]) -> None:
    made = Words.of(words)
    assert made.text == " ".join(words)
    assert made.words == words


def test_tags_become_entities_with_their_place_and_mean_probability() -> None:
    tagging = Words.of("Anna Lee lives in New York.").tagged(
        ["B-PER", "I-PER", "O", "O", "I-LOC", "I-LOC", "O"], [0.9, 0.7, 1.0, 1.0, 0.5, 1.0, 0.8]
    )
    assert tagging.entities == [
        FoundEntity("PER", "Anna Lee", 0, 8, pytest.approx(0.8)),
        FoundEntity("LOC", "New York", 18, 26, pytest.approx(0.75)),
    ]
    assert tagging.tags == ["B-PER", "I-PER", "O", "O", "B-LOC", "I-LOC", "O"]


def test_an_entity_of_a_list_stands_in_the_joined_words() -> None:
    tagging = Words.of(["the", "left  atrium", "."]).tagged(["O", "B-Organ", "O"], [1.0, 0.5, None], cut=1)
    assert tagging.text == "the left  atrium ."
    assert [(one.text, one.start, one.end) for one in tagging.entities] == [("left  atrium", 4, 16)]
    assert tagging.probabilities == [1.0, 0.5, None]
    assert tagging.cut == 1
