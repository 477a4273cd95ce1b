"""Templates with markers of their own around thinking: an answer is given with ``<think>`` and read back from it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from chat_template_cases import CONVERSATIONS, ENDS, encoder_for, samples_of, templates, tokenizer_for, turn

from capotune.data.batches import IGNORE_INDEX
from capotune.evaluation.generate import _Cut
from capotune.settings import DecodingSettings
from capotune.tasks.generation.encoding import TextEncoder

FOLDER = templates()
pytestmark = pytest.mark.skipif(FOLDER is None, reason="TRL, whose chat templates these are, is not installed")

MARKED = ("gptoss", "gemma4_v5", "diffusion_gemma", "muse_glimmer")
SHOWN = "<think>\nonce more\n</think>\n\nyes, again"


def encoder(name: str, *, own: bool = True) -> TextEncoder:
    assert FOLDER is not None
    return encoder_for(tokenizer_for(name, FOLDER, own=own))


def last_answer(one: TextEncoder, kind: str) -> tuple[list[int], list[int]]:
    """The tokens before the last answer of a kind of conversation, and those that train it."""
    (texts,) = one.encode(samples_of(CONVERSATIONS[kind]))
    text = texts[-1]
    stop = max(at for at, label in enumerate(text.labels) if label != IGNORE_INDEX) + 1
    start = max(at for at in range(stop) if text.labels[at] == IGNORE_INDEX) + 1
    return list(text.ids[:start]), list(text.ids[start:stop])


def test_templates_with_other_markers_than_think_are_found() -> None:
    assert {name for name in ENDS if encoder(name)._template.thinking} == set(MARKED)


@pytest.mark.parametrize("own", [True, False], ids=["special tokens", "plain text"])
@pytest.mark.parametrize("name", MARKED)
def test_an_answer_is_given_with_think_and_grows_as_it_is_written(name: str, own: bool) -> None:
    one = encoder(name, own=own)
    before, ids = last_answer(one, "thinking")
    ends = [one.tokenizer.convert_tokens_to_ids(end) for end in ENDS[name]] if own else []
    cut = _Cut(one, before, one.chat_decoding(DecodingSettings()).stop)
    ids = ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]
    assert cut.text(ids) == SHOWN
    begun = [cut.ready(ids[:size]) for size in range(len(ids) + 1)]
    assert all(later.startswith(earlier) for earlier, later in pairwise(begun))
    before, ids = last_answer(one, "several")
    ids = ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]
    assert _Cut(one, before, cut.stop).text(ids) == "yes, again"


@pytest.mark.parametrize("name", MARKED)
def test_what_was_given_is_asked_on_from_as_thinking_apart(name: str) -> None:
    one = encoder(name)
    question: tuple[dict[str, Any], ...] = (turn("user", "again?"),)
    asked = [
        one.encode_chat([*question, answer, turn("user", "sure?")])
        for answer in (
            turn("assistant", SHOWN),
            turn("assistant", "yes, again", reasoning_content="once more"),
        )
    ]
    assert asked[0] == asked[1]
    assert "<think>" not in one.decode(asked[0], special_tokens=True)


def test_an_answer_without_markers_is_text_as_before() -> None:
    one = encoder("gptoss")
    ids = one.tokenizer.encode("plain <|message|> text", add_special_tokens=False)
    assert one.decode_after(one.encode_chat([turn("user", "hi")]), ids) == "plain  text"
