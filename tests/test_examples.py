"""The example data sets are what their cards say: enough messages, a fixed test split, no near-duplicates."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

EXAMPLES = Path(__file__).parents[1] / "examples"
TICKETS = EXAMPLES / "support_tickets.csv"
MESSAGES = EXAMPLES / "shop_messages.jsonl"
WANTS = {
    "delivery": {"tracking", "new address"},
    "returns": {"refund", "replacement", "exchange"},
    "billing": {"refund", "invoice"},
    "product": {"advice"},
    "orders": {"cancel"},
}
MOST_SHARED_5_GRAMS = 0.4
MOST_SHARED_WORDS = 0.55


def normalized(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def words(text: str) -> set[str]:
    return set(normalized(text).split()) or {text}


def char_5_grams(text: str) -> set[str]:
    plain = normalized(text) or text
    return {plain[start : start + 5] for start in range(max(1, len(plain) - 4))}


def alike(texts: Sequence[str], parts: Callable[[str], Iterable[str]], limit: float) -> list[tuple[float, str, str]]:
    """All pairs of texts whose sets of ``parts`` have a Jaccard similarity of ``limit`` or more."""
    number: dict[str, int] = {}
    columns = [[number.setdefault(part, len(number)) for part in parts(text)] for text in texts]
    sizes = np.array([len(row) for row in columns])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    flat = np.concatenate([np.array(row) for row in columns])
    has = sparse.csr_array((np.ones(len(flat), dtype=np.int32), flat, starts), shape=(len(texts), len(number)))
    shared = (has @ has.T).toarray()
    similarity = shared / (sizes[:, None] + sizes[None, :] - shared)
    firsts, seconds = np.nonzero(np.triu(similarity >= limit, k=1))
    return [(float(similarity[i, j]), texts[i], texts[j]) for i, j in zip(firsts, seconds, strict=True)]


def near_duplicates(texts: Sequence[str]) -> list[tuple[float, str, str]]:
    return alike(texts, char_5_grams, MOST_SHARED_5_GRAMS) + alike(texts, words, MOST_SHARED_WORDS)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with TICKETS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


@pytest.fixture(scope="module")
def texts(rows: list[dict[str, str]]) -> list[str]:
    return [row["text"] for row in rows]


def test_size_columns_and_labels(rows: list[dict[str, str]]) -> None:
    assert len(rows) >= 1200
    assert all(list(row) == ["text", "label", "split"] for row in rows)
    assert len({row["label"] for row in rows}) == 20


def test_test_split_is_fixed_and_balanced(rows: list[dict[str, str]]) -> None:
    assert {row["split"] for row in rows} == {"train", "test"}
    in_test = Counter(row["label"] for row in rows if row["split"] == "test")
    assert in_test.total() == 300
    assert set(in_test.values()) == {15}
    assert set(in_test) == {row["label"] for row in rows if row["split"] == "train"}


def test_texts_are_clean(rows: list[dict[str, str]]) -> None:
    fields = [value for row in rows for value in row.values()]
    assert [field for field in fields if not field or field != field.strip()] == []


def test_no_text_in_both_splits(rows: list[dict[str, str]]) -> None:
    train, test = ({normalized(row["text"]) for row in rows if row["split"] == split} for split in ("train", "test"))
    assert train & test == set()


def test_no_near_duplicates(texts: list[str]) -> None:
    assert near_duplicates(texts) == []


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (0, lambda text: text),
        (1, lambda text: text.upper() + "!!"),
        (2, lambda text: f"Hello, {text} Thanks a lot"),
        (3, lambda text: " ".join(reversed(text.split()))),
    ],
    ids=["the same", "shouted", "wrapped in politeness", "words in another order"],
)
def test_the_checker_finds_a_planted_near_duplicate(
    number: int, change: Callable[[str], str], texts: list[str]
) -> None:
    original = [text for text in texts if len(text.split()) > 12][number]
    planted = change(original)
    found = {(first, second) for _, first, second in near_duplicates([*texts, planted])}
    assert found == {(original, planted)}


def test_the_checker_passes_another_message_on_the_same_matter() -> None:
    assert (
        near_duplicates(["Where is my kettle? It was due on Monday.", "The kettle still isn't here, a week late."])
        == []
    )


def test_openings_are_diverse(texts: list[str]) -> None:
    openings = Counter(tuple(normalized(text).split()[:2]) for text in texts)
    assert [opening for opening, count in openings.items() if count > len(texts) / 100] == []


# ---------------------------------------------------------------------------------------------------------------------
# shop_messages.jsonl


@pytest.fixture(scope="module")
def tickets() -> list[tuple[str, dict[str, Any], str]]:
    """Of each row the customer's message, the ticket, and the split."""
    found = []
    for line in MESSAGES.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
        _, message, ticket = (turn["content"] for turn in row["messages"])
        found.append((message, json.loads(ticket), row["split"]))
    return found


def test_tickets_have_the_fields_and_values_of_the_card(tickets: list[tuple[str, dict[str, Any], str]]) -> None:
    for message, ticket, _ in tickets:
        assert list(ticket) == ["team", "wants", "item", "order", "urgent"]
        assert ticket["wants"] in WANTS[ticket["team"]], message
        assert isinstance(ticket["urgent"], bool)
        assert ticket["order"] is None or (ticket["order"].isdigit() and ticket["order"] in message)


def test_every_answer_of_a_test_ticket_occurs_in_training(tickets: list[tuple[str, dict[str, Any], str]]) -> None:
    counts = Counter(split for *_, split in tickets)
    assert counts == {"train": 96, "test": 24}
    seen = {
        part: {(one["team"], one["wants"]) for _, one, split in tickets if split == part} for part in ("train", "test")
    }
    assert seen["test"] == seen["train"] == {(team, wants) for team, of_team in WANTS.items() for wants in of_team}


def test_shop_messages_hold_no_near_duplicates(tickets: list[tuple[str, dict[str, Any], str]]) -> None:
    assert near_duplicates([message for message, *_ in tickets]) == []
