"""Adapters that earlier code wrote load, and answer as they did then. ``fixtures/make_old_adapters.py`` made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import capotune

FIXTURES = Path(__file__).parent / "fixtures"
ADAPTERS = FIXTURES / "adapters"
EXPECTED: dict[str, dict[str, Any]] = json.loads((ADAPTERS / "expected.json").read_text(encoding="utf-8"))
CLASSIFIERS = [name for name, expected in EXPECTED.items() if "probabilities" in expected]
GENERATORS = [name for name, expected in EXPECTED.items() if "answers" in expected]


def base(name: str) -> str:
    """Where the adapter's base is: an embedded model, or beside the adapters and not where it was trained."""
    model = EXPECTED[name]["model"]
    return str(FIXTURES / Path(model).name) if "/" in model else model


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_old_classifier_gives_the_same_probabilities(name: str) -> None:
    expected = EXPECTED[name]
    classifier = capotune.load(ADAPTERS / name, model=base(name))
    assert isinstance(classifier, capotune.Classifier)
    assert list(classifier.labels) == expected["labels"]
    found = classifier.predict_proba(expected["texts"])
    np.testing.assert_allclose(found, expected["probabilities"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", GENERATORS)
def test_old_generator_writes_the_same_text(name: str) -> None:
    expected = EXPECTED[name]
    generator = capotune.load(ADAPTERS / name, model=base(name))
    assert isinstance(generator, capotune.Generator)
    assert generator.chats == ("chats" in expected)
    if generator.chats:
        answers = [generator.chat(messages, max_tokens=12) for messages in expected["chats"]]
    else:
        answers = generator.generate(expected["prompts"], max_tokens=12)
    assert answers == expected["answers"]


@pytest.mark.parametrize("name", [*CLASSIFIERS, *GENERATORS])
def test_old_adapter_has_the_same_loss(name: str) -> None:
    data = "tickets.csv" if name in CLASSIFIERS else "chats.jsonl" if "chats" in EXPECTED[name] else "expressions.jsonl"
    scores = capotune.evaluate(ADAPTERS / name, data=str(ADAPTERS / data), model=base(name), answers=0)
    assert scores["loss"] == pytest.approx(EXPECTED[name]["loss"], rel=1e-5)
