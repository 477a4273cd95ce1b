"""Stock templates of many families: the tokens are those of ``apply_chat_template``, the loss is on each answer and the
end of its turn and on nothing else, and what a template does not write is refused or said."""

from __future__ import annotations

import json
from copy import deepcopy
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from chat_template_cases import (
    CONVERSATIONS,
    END,
    ENDS,
    encoded,
    encoder_for,
    stock_encoder,
    table,
    templates,
    tokenizer_for,
)

from capotune.data.batches import IGNORE_INDEX
from capotune.errors import DataError
from capotune.settings import DecodingSettings

FOLDER = templates()
ROOT = Path(__file__).parents[1]
PARTS = ("idefics3", "smolvlm", "llava_next")
"""Templates that take a content as a list of parts."""

pytestmark = pytest.mark.skipif(FOLDER is None, reason="TRL, whose chat templates these are, is not installed")


def messages_of(name: str, kind: str) -> list[dict[str, Any]]:
    """The messages in the form that a template is documented to take."""
    taken = deepcopy(list(CONVERSATIONS[kind].messages))
    if name == "gemma":
        for system, user in pairwise(taken):
            if system["role"] == "system":
                user["content"] = f"{system['content']}\n\n{user['content']}"
        taken = [one for one in taken if one["role"] != "system"]
    for one in taken:
        if name == "deepseekv3":
            for call in one.get("tool_calls", ()):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        if name in PARTS:
            one["content"] = [{"type": "text", "text": one["content"]}]
    return taken


def written(name: str, kind: str, end: int, **options: Any) -> list[int]:
    """What Transformers makes of the first messages of a conversation."""
    tools = list(CONVERSATIONS[kind].tools) or None
    tokenizer = stock_encoder(name, FOLDER).tokenizer
    return list(tokenizer.apply_chat_template(messages_of(name, kind)[:end], tools=tools, return_dict=False, **options))


def answers(name: str, kind: str) -> list[tuple[int, list[int], int, int]]:
    """For each answer its position, the tokens of the conversation up to it, where the assistant begins to write, and
    where the turn ends. Before a first turn nothing asks; it is left out."""
    ends = stock_encoder(name, FOLDER).tokenizer.convert_tokens_to_ids(list(ENDS[name]))
    found = []
    for at, one in enumerate(messages_of(name, kind)):
        if one["role"] == "assistant" and at > 0:
            ids, asked = written(name, kind, at + 1), written(name, kind, at, add_generation_prompt=True)
            pairs = enumerate(zip(ids, asked, strict=False))
            start = next((place for place, both in pairs if len(set(both)) > 1), len(asked))
            closing = [place for place in range(start, len(ids)) if ids[place] in ends]
            found.append((at, ids, start, closing[-1] + 1 if closing else len(ids) + 1))
    return found


@pytest.mark.parametrize("name", ENDS)
def test_each_answer_and_its_end_are_in_the_loss_once_as_they_are_asked_for(name: str) -> None:
    for kind in CONVERSATIONS:
        found = encoded(name, FOLDER, kind)
        if isinstance(found, DataError):
            assert str(found).startswith("data.jsonl:1: the chat template")
            continue
        texts = found[0]
        in_loss = [{at for at, label in enumerate(one.labels) if label != IGNORE_INDEX} for one in texts]
        for _, ids, start, stop in answers(name, kind):
            shared = min(stop, len(ids))
            holding = [at for at, one in enumerate(texts) if one.ids[:shared] == ids[:shared] and start in in_loss[at]]
            assert len(holding) == 1, kind
            assert set(range(start, stop)) <= in_loss[holding[0]], kind
            in_loss[holding[0]] -= set(range(start, stop))
        left = [texts[at].ids[place] for at, places in enumerate(in_loss) for place in sorted(places)]
        rest = stock_encoder(name, FOLDER).tokenizer.decode(left)
        assert ("Welcome!" in rest and len(rest) < 60) if kind == "assistant first" else not rest, kind


@pytest.mark.parametrize("name", ENDS)
def test_tokens_are_those_of_apply_chat_template(name: str) -> None:
    encoder = stock_encoder(name, FOLDER)
    for kind, sample in CONVERSATIONS.items():
        found = encoded(name, FOLDER, kind)
        if isinstance(found, DataError):
            continue
        messages = messages_of(name, kind)
        last = max(at for at, one in enumerate(messages) if one["role"] == "assistant")
        possible = [written(name, kind, len(messages)), *(ids for _, ids, *_ in answers(name, kind))]
        if kind == "assistant first":
            possible.append(written(name, kind, 1))
        for one in found[0]:
            added = name == "glm4moe" and kind != "user last"  # turns end with the next one's token
            assert (one.ids[:-1] if added else one.ids) in possible, kind
        asked = written(name, kind, last, add_generation_prompt=True)
        assert encoder.encode_question(sample) == asked, kind


@pytest.mark.parametrize("name", [name for name in ENDS if FOLDER and (FOLDER / f"{name}_training.jinja").is_file()])
def test_the_loss_is_where_templates_mark_what_the_assistant_writes(name: str) -> None:
    """Against the masks of TRL's own variants, where these write the same: from the words that ask for the answer on,
    which some mark too, to the end of the turn, after which some mark white space. One marks a call without the token
    that ends the turn."""
    tokenizer, compared = stock_encoder(name, FOLDER).tokenizer, 0
    marked = (FOLDER / f"{name}_training.jinja").read_text(encoding="utf-8")
    for kind, sample in CONVERSATIONS.items():
        if isinstance(encoded(name, FOLDER, kind), DataError):
            continue
        for at, ids, start, stop in answers(name, kind):
            found = tokenizer.apply_chat_template(
                messages_of(name, kind)[: at + 1],
                tools=list(sample.tools) or None,
                chat_template=marked,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            if list(found["input_ids"])[: len(ids)] == ids and (name, kind) != ("diffusion_gemma", "tools"):
                mask = found["assistant_masks"]
                assert all(mask[start : min(stop, len(ids))]), kind
                behind = tokenizer.decode([ids[place] for place in range(stop, len(ids)) if mask[place]])
                assert not behind.replace(END, "").strip(), kind
                compared += 1
    assert compared


def test_the_table_in_the_docs_is_what_becomes_of_each_kind() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = next(line.partition(";")[0].strip() for line in pins if line.startswith("trl=="))
    if metadata.version("trl") != pinned.partition("==")[2]:
        pytest.skip(f"the table is that of {pinned}")
    docs = (ROOT / "docs" / "conversations.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in table(FOLDER) if line not in docs] == [], "run: python tests/chat_template_cases.py"


@pytest.mark.parametrize("name", ENDS)
def test_markers_that_a_tokenizer_lacks_are_text_and_end_turns_all_the_same(name: str) -> None:
    assert FOLDER is not None
    encoder = encoder_for(tokenizer_for(name, FOLDER, own=False))
    end = encoder._template.turn_end
    assert end.token is None or end.token == END
    assert str(end.token or end.stop).endswith(ENDS[name])  # Command R7B writes <|END_RESPONSE|> before it
    stops = encoder.chat_decoding(DecodingSettings()).stop
    assert all(stop.endswith(ENDS[name]) for stop in stops)
    if name == "gptoss":  # a turn with a call ends otherwise than one without
        assert stops == ("<|return|>", "<|call|>")
