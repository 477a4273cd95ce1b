"""What the page shows of a tagger."""

from __future__ import annotations

from typing import Any

from capotune.sections import Fact, Part, Quotes, TableSection
from capotune.tasks.token_classification.page import page_sections
from capotune.tasks.token_classification.spans import count


def prediction(words: str, tags: str, predicted: str) -> dict[str, Any]:
    true, own = tags.split(), predicted.split()
    counts = count(true, own)
    return {
        "words": words.split(), "tags": true, "predicted": own, "tp": counts.tp, "fp": counts.fp, "fn": counts.fn,
        "line": 1,
    }  # fmt: skip


ROWS = [
    prediction("it rains", "O O", "O O"),
    prediction("Anna Lee saw Bo in Rome", "B-PER I-PER O B-PER O B-LOC", "B-PER I-PER O O O B-PER"),
    prediction("Paris Rome", "B-LOC B-LOC", "B-LOC B-LOC"),
    prediction("to Ulm", "O O", "O B-LOC"),
]


def test_table_counts_every_type() -> None:
    table, _ = page_sections("lora", ROWS)
    assert isinstance(table, TableSection)
    assert table.columns == [
        "type",
        "in test rows",
        "found",
        "missed",
        "wrongly predicted",
        "precision",
        "recall",
        "F1",
    ]
    assert table.rows == [
        ["LOC", "3", "2", "1", "1", "0.67", "0.67", "0.67"],
        ["PER", "2", "1", "1", "1", "0.50", "0.50", "0.50"],
        ["all", "5", "3", "2", "2", "0.60", "0.60", "0.60"],
    ]


def test_sentences_with_most_mistakes_come_first_and_say_them() -> None:
    _, quotes = page_sections("lora", ROWS)
    assert isinstance(quotes, Quotes)
    first, second = quotes.quotes
    assert first.parts == [
        Part("Anna Lee", "PER"), Part(" "), Part("saw"), Part(" "), Part("Bo", "PER"), Part(" "), Part("in"), Part(" "),
        Part("Rome", "LOC"),
    ]  # fmt: skip
    assert first.facts == [
        Fact("missed", "Bo (PER)"),
        Fact("missed", "Rome (LOC)"),
        Fact("predicted", "Rome (PER)", True),
    ]
    assert (second.parts, second.facts) == ([Part("to Ulm")], [Fact("predicted", "Ulm (LOC)", True)])


def test_nothing_wrong_shows_no_sentence() -> None:
    table, quotes = page_sections("lora", [ROWS[0], ROWS[2]])
    assert isinstance(quotes, Quotes)
    assert isinstance(table, TableSection)
    assert quotes.quotes == []
    assert table.rows == [["LOC", "2", "2", "0", "0", "1.00", "1.00", "1.00"]]
