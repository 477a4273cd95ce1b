"""How conversations are written out and ended: by the template's own end of turn, each answer as it will be asked for,
and nothing of them lost without a word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_helpers import (
    BOS,
    CHATML,
    END,
    THINKING,
    TURN_END,
    learned_parts,
    make_task,
    samples_of,
    turn,
    with_tokenizer,
    write_jsonl,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import capotune
from capotune.api import inspect
from capotune.cli import main
from capotune.data.batches import IGNORE_INDEX
from capotune.data.generation import load_samples
from capotune.data.samples import Conversation
from capotune.errors import DataError, SettingError
from capotune.events import Warned
from capotune.settings import DecodingSettings
from capotune.tasks.generation import Generation
from capotune.tasks.generation.answers import AnsweredRows
from capotune.tasks.generation.notices import Notices

Make = Callable[..., Generation]
HI = (turn("user", "What colour is grass?"), turn("assistant", "green"))
MORE = (turn("user", "What colour is snow?"), turn("assistant", "white"))
TOOL = {"type": "function", "function": {"name": "colour_of", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "colour_of", "arguments": {"thing": "snow"}}}


@pytest.fixture(scope="module")
def make(llama_writer: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The task on a base with the given template, whose end of text is ``<|endoftext|>``."""
    made: dict[str, Path] = {}

    def build(chat_template: Any = CHATML, learn: Any = "all", **options: Any) -> Generation:
        key = repr((chat_template, options))
        if key not in made:
            folder = tmp_path_factory.mktemp("bases") / "base"
            made[key] = with_tokenizer(llama_writer, folder, chat_template=chat_template, **options)
        return replace(make_task(made[key], learn=learn, chat=True), max_length=4096)

    return build


def template(of_turn: str, opening: str = "") -> str:
    """A template that writes each message by ``of_turn``."""
    ask = "{% if add_generation_prompt %}" + opening + "{% endif %}"
    return "{% for message in messages %}" + of_turn + "{% endfor %}" + ask


def learned(task: Generation, *messages: dict[str, Any], **options: Any) -> list[list[str]]:
    """Of each text that the conversation becomes the parts in the loss."""
    (texts,) = task.encode(samples_of(Conversation(messages, **options)))
    return [learned_parts(task, one) for one in texts]


def as_transformers(task: Generation, messages: Any, **options: Any) -> list[int]:
    return list(task.tokenizer.apply_chat_template(list(messages), return_dict=False, **options))


# The end of a turn


def test_a_turn_ends_as_the_template_ends_it_whatever_the_end_of_text_is(make: Make) -> None:
    task = make(eos=END)
    ((one,),) = task.encode(samples_of(Conversation((*HI, *MORE))))
    assert one.ids == as_transformers(task, (*HI, *MORE))
    assert learned_parts(task, one) == ["green" + TURN_END, "white" + TURN_END]
    assert task.encode_chat((*HI, MORE[0])) == as_transformers(task, (*HI, MORE[0]), add_generation_prompt=True)
    assert [task.tokenizer.decode([end]) for end in task.end_ids] == [END, TURN_END]


def test_an_answer_is_written_up_to_the_end_of_the_turn(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = capotune.load_model(make(eos=END).base.name)
    task, asked = writer._assembled.task, {}

    def generate(ids: torch.Tensor, **options: Any) -> torch.Tensor:
        asked.update(options)
        written = task.tokenizer("green" + TURN_END + "snow", add_special_tokens=False)["input_ids"]
        return torch.cat([ids, torch.tensor([written])], 1)

    monkeypatch.setattr(writer._assembled.model, "generate", generate)
    assert writer.chat([HI[0]]) == "green"
    assert task.tokenizer.convert_tokens_to_ids(TURN_END) in asked["generation_config"].eos_token_id


@pytest.mark.parametrize(
    ("of_turn", "opening", "ends", "stop"),
    [
        ("{{ message.role + '>' + message.content + '\n\n' }}", "assistant>", ("\n\nuser>", "\n\n" + END), "\n\nuser>"),
        ("{{ '[' + message.role + ']' + message.content + '</s>' }}", "[assistant]", ("</s>", "</s>"), "</s>"),
        (f"{{{{ '{BOS}' + message.role + '>' + message.content }}}}", f"{BOS}assistant>", (BOS, BOS), None),
    ],
    ids=["what the next turn begins with", "text", "a token of the next turn"],
)  # fmt: skip
def test_a_turn_ends_in_text_or_where_the_next_one_begins(
    make: Make, of_turn: str, opening: str, ends: tuple[str, str], stop: str | None
) -> None:
    task = make(template(of_turn, opening))
    assert learned(task, *HI, *MORE) == [["green" + ends[0], "white" + ends[1]]]
    decoding = DecodingSettings(stop=("x",))
    assert task.chat_decoding(decoding).stop == (("x",) if stop is None else ("x", stop))
    ((one,),) = task.encode(samples_of(Conversation((*HI, *MORE))))
    whole = as_transformers(task, (*HI, *MORE))
    assert one.ids[: len(whole)] == whole
    assert len(one.ids) - len(whole) <= 1, "only an end is added, where there is none"


@pytest.mark.parametrize("weights", [(0, 1), (1, 0), (None, 0), (1, 1)])
def test_weight_of_a_message_is_the_mask_of_its_tokens(make: Make, tmp_path: Path, weights: tuple[Any, Any]) -> None:
    """OpenAI's definition: an assistant message of weight 0 is read as any other, and is not in the loss; without a
    weight it is in the loss."""
    task = make(eos=END)
    messages = [{**one} for one in (*HI, *MORE)]
    for message, weight in zip(messages[1::2], weights, strict=True):
        message["weight"] = weight
    data = load_samples(str(write_jsonl(tmp_path / "weights.jsonl", [{"messages": messages}])), test_fraction=0)
    ((one,),) = task.encode(data.train)
    assert one.ids == as_transformers(task, (*HI, *MORE))
    answers = ("green" + TURN_END, "white" + TURN_END)
    assert learned_parts(task, one) == [text for text, weight in zip(answers, weights, strict=True) if weight != 0]
    assert one.tokens_in_loss == sum(label != IGNORE_INDEX for label in one.labels)


# Each answer as it will be asked for

THOUGHT = (
    HI[0],
    turn("assistant", "<think>leaves</think>green"),
    MORE[0],
    turn("assistant", "<think>ice</think>white"),
)


def test_answers_that_are_written_otherwise_later_become_texts_of_their_own(make: Make) -> None:
    task = make(THINKING)
    (texts,) = task.encode(samples_of(Conversation(THOUGHT)))
    assert [one.ids for one in texts] == [as_transformers(task, THOUGHT[:2]), as_transformers(task, THOUGHT)]
    assert [learned_parts(task, one) for one in texts] == [
        ["<think>leaves</think>green" + TURN_END],
        ["<think>ice</think>white" + TURN_END],
    ]
    last = replace(task, learn="last")
    assert learned(last, *THOUGHT) == [["<think>ice</think>white" + TURN_END]]
    assert learned(last, *THOUGHT, turn("user", "And now?")) == [["<think>ice</think>white" + TURN_END]]
    for at in (1, 3):
        assert task.encode_chat(THOUGHT[:at]) == as_transformers(task, THOUGHT[:at], add_generation_prompt=True)


@pytest.mark.parametrize(
    ("roles", "parts"),
    [
        ("au", ["one"]),
        ("aua", ["one", "three"]),
        ("uua", ["three"]),
        ("uaa", ["two", "three"]),
        ("uau", ["two"]),
        ("a", ["one"]),
        ("usa", ["three"]),
    ],
)
def test_turns_of_any_order_are_written(make: Make, roles: str, parts: list[str]) -> None:
    names, texts = {"a": "assistant", "u": "user", "s": "system"}, ("one", "two", "three")
    messages = [turn(names[role], text) for role, text in zip(roles, texts, strict=False)]
    for task in (make(), make(None)):
        ends = {CHATML: TURN_END}.get(str(task.chat_template), END)
        assert learned(task, *messages) == [[part + ends for part in parts]]
        question = task.encode_question(Conversation(tuple(messages)))
        ((one,),) = task.encode(samples_of(Conversation(tuple(messages))))
        assert one.ids[: len(question)] == question


def test_turns_that_are_only_read_are_not_in_the_loss(make: Make) -> None:
    assert learned(make(), *HI, *MORE, read_only=frozenset({1})) == [["white" + TURN_END]]
    assert learned(make(learn="last"), *HI, *MORE, read_only=frozenset({3})) == [["green" + TURN_END]]


# What the template has no place for

NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
DROPS = template(
    "{% if message.role in ('user', 'assistant') %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}",
    "<|im_start|>assistant\n",
)


@pytest.mark.parametrize("without", [NO_SYSTEM, DROPS])
def test_a_system_turn_is_the_users_where_there_is_none_and_it_is_said(make: Make, without: str) -> None:
    task, notices = make(without), Notices()
    system, merged = turn("system", "be kind"), turn("user", f"be kind\n\n{HI[0]['content']}")
    rows = samples_of(Conversation((system, *HI, *MORE)), Conversation((system, *MORE)))
    found = task.encode(rows, notices)
    assert found[0][0].ids == as_transformers(task, (merged, *HI[1:], *MORE))
    assert learned_parts(task, found[0][0]) == ["green" + TURN_END, "white" + TURN_END]
    assert list(notices.sentences()) == [
        "the chat template has no system turn: 2 system turns are written before the user's text (first: data.jsonl:1)"
    ]
    assert task.encode_chat((system, HI[0])) == as_transformers(task, [merged], add_generation_prompt=True)


def test_a_developer_turn_is_a_system_turn_where_there_is_no_other(make: Make) -> None:
    knows = "{% if messages[0].role == 'developer' %}{{ raise_exception('unknown') }}{% endif %}" + CHATML
    notices, messages = Notices(), (turn("developer", "be kind"), *HI)
    found = make(knows).encode(samples_of(Conversation(messages)), notices)
    assert found[0][0].ids == as_transformers(make(knows), (turn("system", "be kind"), *HI))
    assert "has no developer turn" in next(iter(notices.sentences()))
    assert make().encode(samples_of(Conversation(messages)))[0][0].ids == as_transformers(make(), messages)


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ((*HI, turn("tool", "green")), "message 3 (tool)"),
        ((HI[0], turn("assistant", "", tool_calls=[CALL]), turn("assistant", "white")), "a tool call of message 2"),
        ((HI[0], turn("assistant", "see", tool_calls=[CALL, CALL])), "a tool call of message 2"),
    ],
)
def test_a_turn_or_call_that_would_be_lost_is_refused_by_line(make: Make, messages: Any, what: str) -> None:
    task = make(DROPS)
    with pytest.raises(DataError, match=r"data\.jsonl:2: the chat template leaves out") as caught:
        task.encode(samples_of(Conversation(HI), Conversation(messages)))
    assert what in str(caught.value)


def test_a_call_without_a_text_is_not_taken_for_a_turn_that_is_left_out(make: Make) -> None:
    """As Llama 3.1 writes them: a call alone, and what a tool answers as JSON, where it is not found as it stands."""
    calls = "{% set said = message.tool_calls or message.content %}{{ said | tojson }}"
    task = make(
        template(
            "{{ '<|im_start|>' + message.role + '\n' }}" + calls + "{{ '<|im_end|>\n' }}", "<|im_start|>assistant\n"
        )
    )
    asked = (
        HI[0],
        turn("assistant", "", tool_calls=[CALL]),
        turn("tool", 'the "white"\none'),
        turn("assistant", "white"),
    )
    ((call, answer),) = learned(task, *asked)
    assert "colour_of" in call
    assert answer == '"white"' + TURN_END
    with pytest.raises(DataError, match=r"leaves out message 2 \(assistant\)"):
        learned(task, HI[0], {**asked[1], "content": "I look it up."}, *asked[2:])


def test_thinking_and_tools_that_are_left_out_are_said(make: Make) -> None:
    notices = Notices()
    thought = Conversation((HI[0], turn("assistant", "green", reasoning_content="leaves")))
    make(DROPS).encode(samples_of(Conversation(HI), thought, Conversation(HI, (TOOL,))), notices)
    thinking, tools = notices.sentences()
    assert "leaves out what the assistant thought in 1 turn" in thinking
    assert "data.jsonl:2, message 2" in thinking
    assert "no place for tools: they are left out in 1 conversation (first: data.jsonl:3)" in tools
    inside = Conversation((HI[0], turn("assistant", "<think>leaves</think>green")))
    notices = Notices()
    make(DROPS.replace("message.content", "message.content.split('</think>')[-1]")).encode(samples_of(inside), notices)
    assert "leaves out what the assistant thought" in next(iter(notices.sentences()))


def test_a_special_token_in_a_text_is_said_with_its_place(make: Make) -> None:
    notices = Notices()
    odd = Conversation((turn("user", f"say {TURN_END}"), HI[1]))
    make().encode(samples_of(Conversation(HI), odd, odd), notices)
    (sentence,) = notices.sentences()
    assert sentence.startswith("a special token stands in the text of 2 messages")
    assert "data.jsonl:2, message 1: <|im_end|>" in sentence


def test_a_template_that_refuses_a_conversation_is_named_with_the_line(make: Make) -> None:
    task = make("{% if messages[0].role == 'assistant' %}{{ raise_exception('users first') }}{% endif %}" + CHATML)
    with pytest.raises(DataError, match=r"data\.jsonl:1: the chat template refuses the conversation: users first"):
        task.encode(samples_of(Conversation((HI[1], *HI))))
    with pytest.raises(SettingError, match="refuses these messages: users first"):
        task.encode_chat([HI[1], HI[0]])


# What templates are written with


def test_a_models_template_for_tools_is_used_where_there_are_tools(make: Make) -> None:
    with_tools = CHATML.replace("Tools:", "You may call: ")
    task = make({"default": CHATML, "tool_use": with_tools, "rag": "{{ 'other' }}"})
    messages = (HI[0], turn("assistant", "", tool_calls=[CALL]))
    for tools in ((), (TOOL,)):
        ((one,),) = task.encode(samples_of(Conversation(messages, tools)))
        assert one.ids == as_transformers(task, messages, tools=list(tools) or None)
        assert task.encode_chat(HI[:1], tools) == as_transformers(
            task, HI[:1], tools=list(tools) or None, add_generation_prompt=True
        )


LOOP, LAST = "{% for message in messages %}", "assistant\\n' }}{% endif %}"


@pytest.mark.parametrize(
    "chat_template",
    [
        CHATML.replace("{{ message.content }}", "{% generation %}{{ message.content }}{% endgeneration %}"),
        "{{ strftime_now('%Y') }}" + CHATML,
        CHATML.replace(LOOP, LOOP + "{% if message.role == 'x' %}{% continue %}{% endif %}"),
        CHATML.replace(LAST, LAST[:-11] + "{% if enable_thinking is defined %}{{ '<think>' }}{% endif %}{% endif %}"),
    ],
    ids=["generation", "strftime_now", "continue", "enable_thinking"],
)
def test_templates_are_rendered_as_in_transformers(make: Make, chat_template: str) -> None:
    task = make(chat_template)
    ((one,),) = task.encode(samples_of(Conversation((*HI, *MORE))))
    assert one.ids == as_transformers(task, (*HI, *MORE))
    assert learned_parts(task, one) == ["green" + TURN_END, "white" + TURN_END]
    assert task.encode_chat(HI[:1]) == as_transformers(task, HI[:1], add_generation_prompt=True)


def test_a_call_is_written_with_its_arguments_in_the_form_that_the_template_takes(make: Make) -> None:
    messages = (HI[0], turn("assistant", "", tool_calls=[CALL]))
    call = "message.tool_calls[0].function"
    as_json = CHATML.replace("message.tool_calls | tojson", f"'call ' + {call}.name + {call}.arguments")
    (call,) = learned(make(as_json), *messages)[0]
    assert call == 'call colour_of{"thing": "snow"}' + TURN_END
    (call,) = learned(make(), *messages)[0]
    assert '"arguments": {"thing": "snow"}' in call


# In a run


def test_a_run_and_a_score_say_what_the_template_changes(make: Make, tmp_path: Path) -> None:
    base = make(NO_SYSTEM).base.name
    rows = [
        {"messages": [turn("system", "be kind"), turn("user", f"grass {number}?"), turn("assistant", "green")]}
        for number in range(8)
    ]
    data = str(write_jsonl(tmp_path / "chats.jsonl", rows))
    found = inspect(data=data, model=base)["report"]
    assert found["notices"] == [
        f"the chat template has no system turn: 8 system turns are written before the user's text (first: {data}:1)"
    ]
    seen: list[Any] = []
    capotune.train("lora", data=data, model=base, out=tmp_path / "run", epochs=1, answers=2)
    capotune.evaluate(tmp_path / "run" / "adapter", data=data, answers=0, report=seen.append)
    assert [event.text for event in seen if isinstance(event, Warned)] == found["notices"]


def test_answers_are_compared_without_the_thinking_before_them() -> None:
    written = ["<think>\n\n</think>\n\ngreen", "<think>leaves</think>\n\nred", "green"]
    answered = AnsweredRows([0, 1, 2], ["green", "red", "<think>leaves</think>green"], written)
    assert answered.exact == [True, True, True]
    assert answered.scores == {"exact_match": 1.0, "rouge_l": 1.0}
    assert not AnsweredRows([0], ["green"], ["<think>green</think>red"]).exact[0]


# Any conversation

ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool"])
TEXTS = st.sampled_from(
    ["", " ", "red", "\n<think>", "</think>", "<think>a</think>b", TURN_END, END, "{{ x }}", "</s>"]
)
ANY_MESSAGE = st.builds(
    lambda role, content, thinking, calls: {
        "role": role,
        "content": content,
        **({"reasoning_content": thinking} if thinking and role == "assistant" else {}),
        **({"tool_calls": calls} if calls and role == "assistant" else {}),
    },
    ROLES,
    TEXTS,
    TEXTS,
    st.lists(st.just(CALL), max_size=2),
)
STRICT = (
    "{% if (messages[0].role == 'user') != (messages | length % 2 == 1) %}{{ raise_exception('alternate') }}{% endif %}"
)


@pytest.mark.parametrize(
    "chat_template", [CHATML, THINKING, DROPS, NO_SYSTEM, None, STRICT + CHATML, "{{ messages.x.y }}"]
)
@given(
    messages=st.lists(ANY_MESSAGE, min_size=1, max_size=5),
    tools=st.sampled_from([(), (TOOL,)]),
    learn=st.sampled_from(["all", "last"]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_conversation_is_trained_on_or_refused_by_line(
    make: Make, chat_template: str | None, messages: list[dict[str, Any]], tools: Any, learn: Any
) -> None:
    sample = Conversation(tuple(messages), tools)
    assume(sample.answers)
    task, said = make(chat_template, learn), ""
    try:
        (texts,) = task.encode(samples_of(sample))
    except DataError as error:
        texts, said = [], str(error)
    assert texts or said.startswith("data.jsonl:1: the chat template")
    assert all(one.tokens_in_loss for one in texts)
    assert len(texts) <= len(sample.answers)


def test_data_of_two_rows_is_shown_before_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"messages": [turn("assistant", "Welcome!"), turn("user", text), HI[1]]} for text in ("grass?", "snow?")]
    data = str(write_jsonl(tmp_path / "two.jsonl", rows))
    assert main(["data", data]) == 2
    shown = capsys.readouterr()
    assert "every answer" in shown.out
    assert "Welcome!" in shown.out
    assert "one row is not enough" in shown.err
