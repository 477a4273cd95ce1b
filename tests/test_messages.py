"""Messages of conversations as people write them: roles, parts, thinking, calls, and flags on what is trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capotune.data.generation import load_samples
from capotune.data.samples import Conversation, Samples, answer_of
from capotune.errors import DataError, SettingError


def read(folder: Path, *rows: dict[str, Any]) -> Samples:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_samples(str(path), test_fraction=0).train


def read_one(folder: Path, messages: list[Any], key: str = "messages") -> Conversation:
    (sample,) = read(folder, {key: messages}).samples
    assert isinstance(sample, Conversation)
    return sample


def refusal(folder: Path, messages: list[Any]) -> str:
    """The message for a second row, with its line."""
    good = {"messages": [turn("user", "hi"), turn("assistant", "hello")]}
    with pytest.raises(DataError) as caught:
        read(folder, good, {"messages": messages})
    return str(caught.value)


def turn(role: str, content: Any, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


ASKED = turn("user", "hi")


@pytest.mark.parametrize(
    ("names", "role"),
    [
        (("system", "System"), "system"),
        (("developer",), "developer"),
        (("user", "human", "prompter", "USER", "Human "), "user"),
        (("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "ASSISTANT"), "assistant"),
        (("tool", "function", "observation", "ipython", "tool_response"), "tool"),
    ],
)
def test_roles_have_one_name_whoever_wrote_them(tmp_path: Path, names: tuple[str, ...], role: str) -> None:
    for name in names:
        for key in ("messages", "conversations"):
            for one in (turn(name, "a text"), {"from": name, "value": "a text"}):
                sample = read_one(tmp_path, [one, ASKED, turn("assistant", "hello")], key)
                assert sample.messages[0] == turn(role, "a text")


@pytest.mark.parametrize("roles", ["aua", "uua", "uaa", "uau", "a", "aa", "usa", "utta"])
def test_turns_come_in_any_order(tmp_path: Path, roles: str) -> None:
    names = {"a": "assistant", "u": "user", "s": "system", "t": "tool"}
    sample = read_one(tmp_path, [turn(names[role], f"text {at}") for at, role in enumerate(roles)])
    assert [message["role"][0] for message in sample.messages] == list(roles)
    assert sample.answers == [at for at, role in enumerate(roles) if role == "a"]


def test_parts_of_text_are_joined_and_thinking_has_one_name(tmp_path: Path) -> None:
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "so"}]}, {"type": "text", "text": "hel"}, "lo"]
    expected = turn("assistant", "hello", reasoning_content="so")
    for answer in (
        turn("assistant", parts),
        turn("assistant", [{"type": "output_text", "text": "hello"}], thinking="so"),
        turn("assistant", "hello", reasoning="so"),
        turn("assistant", "hello", reasoning_content="so", thinking=None),
    ):
        assert read_one(tmp_path, [ASKED, answer]).messages[1] == expected
    inside = turn("assistant", "<think>so</think>hello")
    assert read_one(tmp_path, [ASKED, inside]).messages[1] == inside
    silent = turn("assistant", None, reasoning_content="so")
    assert read_one(tmp_path, [ASKED, silent]).messages[1] == turn("assistant", "", reasoning_content="so")


@pytest.mark.parametrize("kind", ["image_url", "image", "input_audio", "video", "file", "tool_result"])
def test_what_is_not_text_is_refused_by_line(tmp_path: Path, kind: str) -> None:
    message = refusal(
        tmp_path, [turn("user", [{"type": "text", "text": "see"}, {"type": kind}]), turn("assistant", "a")]
    )
    assert f"rows.jsonl:2: message 1 holds a part of type '{kind}'; only text is read" in message


CALL = {"id": "call00001", "type": "function", "function": {"name": "rate", "arguments": {"of": "euro", "day": None}}}


def test_calls_have_one_form_with_arguments_as_an_object(tmp_path: Path) -> None:
    function = CALL["function"]
    as_json = {"name": "rate", "arguments": json.dumps({"of": "euro", "day": None})}
    for answer in (
        turn("assistant", None, tool_calls=[CALL]),
        turn("assistant", "", tool_calls=[{**CALL, "function": as_json}]),
        turn("assistant", None, tool_calls=json.dumps([CALL])),
        {"role": "assistant", "tool_calls": [{"id": "call00001", **as_json}]},
        turn("assistant", None, tool_calls=[{"id": "call00001", "name": "rate", "parameters": function["arguments"]}]),
    ):
        assert read_one(tmp_path, [ASKED, answer]).messages[1] == turn("assistant", "", tool_calls=[CALL])
    bare = {key: value for key, value in CALL.items() if key != "id"}
    for answer in (
        turn("assistant", None, function_call=as_json),
        {"from": "function_call", "value": json.dumps(function)},
        {"from": "tool_call", "value": json.dumps([as_json])},
    ):
        assert read_one(tmp_path, [ASKED, answer]).messages[1] == turn("assistant", "", tool_calls=[bare])
    assert read_one(tmp_path, [ASKED, turn("function_call", "rate(euro)")]).messages[1] == turn(
        "assistant", "rate(euro)"
    )
    empty = turn("assistant", None, tool_calls=[{"function": {"name": "now", "arguments": ""}}])
    assert read_one(tmp_path, [ASKED, empty]).messages[1]["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    ("call", "why"),
    [
        ({"function": {"name": "rate", "arguments": "{of"}}, "tool call 1: arguments is not JSON (Expecting property"),
        ({"function": {"name": "rate", "arguments": "[1]"}}, "tool call 1: arguments is a list, not an object"),
        ({"function": {"arguments": {}}}, "tool call 1 has no function with a name"),
        ({"function": "rate"}, "tool call 1 has no function with a name"),
    ],
)
def test_calls_that_cannot_be_used_are_refused_by_line(tmp_path: Path, call: dict[str, Any], why: str) -> None:
    assert f"rows.jsonl:2: message 2, {why}" in refusal(tmp_path, [ASKED, turn("assistant", None, tool_calls=[call])])


@pytest.mark.parametrize(
    ("flag", "kept"),
    [
        ({"weight": 0}, False),
        ({"weight": 1.0}, True),
        ({"train": False}, False),
        ({"training": True}, True),
        ({"train_on_turn": False}, False),
        ({"trainable": False}, False),
        ({"loss": False}, False),
        ({"loss_mask": 0}, False),
        ({"masked": True}, False),
        ({"masked": False, "weight": 1}, True),
        ({"weight": None}, True),
        ({}, True),
    ],
)
def test_flags_say_which_answers_are_trained_on(tmp_path: Path, flag: dict[str, Any], kept: bool) -> None:
    messages = [ASKED, turn("assistant", "one", **flag), turn("user", "more", weight=0), turn("assistant", "two")]
    sample = read_one(tmp_path, messages)
    assert sample.answers == ([1, 3] if kept else [3])
    assert sample.messages[1] == turn("assistant", "one"), "no template reads the flag"
    last = read_one(tmp_path, [ASKED, turn("assistant", "one"), ASKED, turn("assistant", "two", **flag)])
    assert answer_of(last) == ("two" if kept else None)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"weight": 0, "train": True}, "message 2: weight 0, train True contradict each other"),
        ({"weight": 0.5}, "message 2: weight is 0.5. Allowed: 1 or true (trained on), 0 or false (not)"),
        ({"loss": "no"}, "message 2: loss is 'no'. Allowed: 1 or true"),
        ({"mask": True}, "message 2: 'mask' does not say whether"),
        ({"weight": 0}, "no assistant turn to train on: every one is marked not to be trained on"),
    ],
)
def test_flags_that_cannot_be_followed_are_refused_by_line(tmp_path: Path, flags: dict[str, Any], why: str) -> None:
    assert f"rows.jsonl:2: {why}" in refusal(tmp_path, [ASKED, turn("assistant", "one", **flags)])


def test_a_column_system_stands_before_the_messages(tmp_path: Path) -> None:
    for key in ("messages", "conversations"):
        (sample,) = read(tmp_path, {"system": "be kind", key: [ASKED, turn("assistant", "hello")]}).samples
        assert isinstance(sample, Conversation)
        assert sample.messages[0] == turn("system", "be kind")


def test_only_the_completion_of_a_prompt_of_messages_is_trained_on(tmp_path: Path) -> None:
    row = {"prompt": [ASKED, turn("assistant", "one"), ASKED], "completion": [turn("assistant", "two")]}
    (sample,) = read(tmp_path, row).samples
    assert isinstance(sample, Conversation)
    assert sample.answers == [3]


# Whatever a row holds

TEXTS = st.sampled_from(["", " ", "hi", "<think>a</think>b", "[]", "{}", '{"name": "f"}', "[{}]", "0"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["type", "text", "name", "function", "arguments", "thinking"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)
KEYS = [
    "role",
    "from",
    "content",
    "value",
    "tool_calls",
    "function_call",
    "thinking",
    "weight",
    "train",
    "mask",
    "name",
]
ROLES = st.sampled_from(["user", "assistant", "gpt", "human", "tool", "system", "function_call", "Model", "x"])
NAMED = st.fixed_dictionaries({"role": ROLES, "content": VALUES})
MESSAGE = st.one_of(
    NAMED,
    st.fixed_dictionaries({"from": ROLES, "value": TEXTS}, optional={"weight": VALUES}),
    st.fixed_dictionaries({"role": ROLES, "content": TEXTS}, optional=dict.fromkeys(KEYS[4:], VALUES)),
    st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, VALUES)),
)
ROW = st.one_of(
    st.fixed_dictionaries({"messages": st.lists(NAMED, min_size=1, max_size=3)}),
    st.fixed_dictionaries({"messages": st.lists(MESSAGE | VALUES, max_size=4) | VALUES}, optional={"tools": VALUES}),
    st.fixed_dictionaries(
        {"conversations": st.lists(MESSAGE, max_size=4) | VALUES}, optional={"tools": VALUES, "system": VALUES}
    ),
    st.fixed_dictionaries({"prompt": st.lists(MESSAGE, max_size=2) | VALUES, "completion": VALUES}),
    st.fixed_dictionaries({"instruction": VALUES, "output": VALUES}, optional={"input": VALUES, "system": VALUES}),
    st.fixed_dictionaries({"question": VALUES, "answer": VALUES}),
    st.fixed_dictionaries({"text": VALUES}),
    st.dictionaries(st.sampled_from(["messages", "text", "prompt", "a", ""]), VALUES, max_size=3),
)


@given(rows=st.lists(ROW, min_size=1, max_size=2))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_row_is_a_sample_or_one_message_with_its_line(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    try:
        samples = read(folder, *rows).samples
    except (DataError, SettingError) as error:
        samples, said = [], str(error)
    else:
        said = "rows.jsonl"
    assert "rows.jsonl" in said
    for sample in samples:
        if isinstance(sample, Conversation):
            assert sample.answers
            assert all(isinstance(message["content"], str) for message in sample.messages)
