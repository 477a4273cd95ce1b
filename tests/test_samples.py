"""Every format is read to the same samples, what does not fit is named with its line, and the test rows are right."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import SHARED, needs_shared

from capotune.data.generation import load_samples, looks_like_generation, read_samples_to_score
from capotune.data.readers import read_table
from capotune.data.samples import (
    Conversation,
    Document,
    Pair,
    Samples,
    answer_of,
    asked,
    question_of,
)
from capotune.data.split import normalised
from capotune.errors import CapotuneError, DataError, SettingError

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows as JSON lines, or text as it is, and return the path."""

    def write(name: str, *rows: dict[str, Any] | str) -> str:
        path = tmp_path / name
        path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), "utf-8")
        return str(path)

    return write


def error_of(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(CapotuneError) as caught:
        call(*arguments, **options)
    return str(caught.value)


def read(source: str, **options: Any) -> Samples:
    return load_samples(source, test_fraction=0, **options).train


def turn(role: Any, content: Any, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


def chat(*contents: str, system: str | None = None) -> Conversation:
    """User and assistant by turns."""
    turns = [turn(("user", "assistant")[number % 2], content) for number, content in enumerate(contents)]
    return Conversation((*([turn("system", system)] if system else []), *turns))


CALL = {"type": "function", "function": {"name": "rate", "arguments": {"of": "euro"}}}
TOOL = {"type": "function", "function": {"name": "rate", "description": "A rate.", "parameters": {}}}


# Formats


@pytest.mark.parametrize(
    ("row", "sample", "described"),
    [
        (
            {"messages": [turn("system", "be kind"), turn("user", "hi"), turn("assistant", "hello")]},
            chat("hi", "hello", system="be kind"),
            "messages (column 'messages')",
        ),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "system": "kind"},
            chat("hi", "hello", system="kind"),
            "conversations (columns 'conversations', 'system')",
        ),
        (
            {"conversations": [turn("user", "hi"), turn("assistant", "hello")]},
            chat("hi", "hello"),
            "conversations (column 'conversations')",
        ),
        ({"prompt": "hi ", "completion": " hello"}, Pair("hi ", " hello"), "prompt, completion"),
        ({"response": "hello", "prompt": "hi"}, Pair("hi", "hello"), "prompt, response"),
        (
            {"prompt": [turn("user", "hi")], "completion": [turn("assistant", "hello")]},
            chat("hi", "hello"),
            "prompt, completion (messages)",
        ),
        (
            {"instruction": "add", "input": "1 and 2", "output": "3"},
            chat("add\n\n1 and 2", "3"),
            "instruction, input, output",
        ),
        ({"instruction": "go", "input": " ", "output": "ok"}, chat("go", "ok"), "instruction, input, output"),
        (
            {"system": "be kind", "instruction": "go", "response": "ok"},
            chat("go", "ok", system="be kind"),
            "instruction, response, system",
        ),
        ({"Question": "1+2", "Answer": 3, "id": 7}, chat("1+2", "3"), "Question, Answer"),
        ({"text": " a story\n"}, Document(" a story\n"), "text (column 'text')"),
    ],
)
def test_formats_are_found_by_their_columns(write: Write, row: dict[str, Any], sample: object, described: str) -> None:
    samples = read(write("a.jsonl", row, row))
    assert samples.samples == [sample, sample]
    assert list(samples.lines) == [1, 2]
    assert samples.described == described
    assert samples.take([]).described.startswith(described.partition(" (messages)")[0])
    assert looks_like_generation(str(samples.source))


def test_messages_win_over_a_column_prompt(write: Write) -> None:
    row = {"prompt": "hi", "completion": "bye", "messages": [turn("user", "hi"), turn("assistant", "hello")]}
    assert read(write("a.jsonl", row)).samples == [chat("hi", "hello")]


def test_a_message_keeps_its_further_keys_and_loses_those_that_hold_null(write: Write) -> None:
    messages = [
        turn("user", "what is a euro worth?", name="ann", refusal=None),
        turn("assistant", None, tool_calls=[CALL]),
        turn("tool", "", tool_call_id="1"),
        turn("assistant", [{"type": "text", "text": "A do"}, {"type": "text", "text": "llar."}]),
    ]
    (sample,) = read(write("a.jsonl", {"messages": messages, "tools": [TOOL]})).samples
    assert sample == Conversation(
        (
            turn("user", "what is a euro worth?", name="ann"),
            turn("assistant", "", tool_calls=[CALL]),
            turn("tool", "", tool_call_id="1"),
            turn("assistant", "A dollar."),
        ),
        (TOOL,),
    )


def test_roles_of_sharegpt(write: Write) -> None:
    roles = ["system", "human", "function_call", "observation", "gpt", "user", "assistant", "tool"]
    entries = [{"from": role, "value": f"text {number}", "weight": 1} for number, role in enumerate(roles)]
    (sample,) = read(write("a.jsonl", {"conversations": entries, "tools": json.dumps([TOOL])})).samples
    assert isinstance(sample, Conversation)
    expected = ["system", "user", "assistant", "tool", "assistant", "user", "assistant", "tool"]
    assert [message["role"] for message in sample.messages] == expected
    assert sample.messages[3] == {"role": "tool", "content": "text 3"}
    assert sample.tools == (TOOL,)


def test_a_column_system_and_a_system_turn_are_one_or_an_error(write: Write) -> None:
    entries = [turn("system", "be kind"), turn("user", "hi"), turn("assistant", "hello")]
    source = write("a.jsonl", {"conversations": entries, "system": "be kind"})
    assert read(source).samples == [chat("hi", "hello", system="be kind")]
    source = write("b.jsonl", {"conversations": entries, "system": "be rude"})
    assert f"{source}:1: message 1 and the column system are two system prompts" in error_of(read, source)


def test_columns_that_only_some_rows_have_may_be_absent(write: Write) -> None:
    source = write(
        "a.jsonl", {"instruction": "go", "output": "ok"}, {"instruction": "add", "input": "1, 2", "output": "3"}
    )
    assert read(source).samples == [chat("go", "ok"), chat("add\n\n1, 2", "3")]


def test_messages_of_a_csv_file_are_json(write: Write) -> None:
    rows = [[turn("user", 'say, "hi"\nnow'), turn("assistant", str(number))] for number in range(2)]
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerows([["messages", "tools"], *([json.dumps(messages, indent=1), ""] for messages in rows)])
    samples = read(write("a.csv", buffer.getvalue()))
    assert samples.samples == [chat('say, "hi"\nnow', str(number)) for number in range(2)]
    assert samples.lines[0] == 2
    source = write("b.csv", "messages\n\"[{'role': 'user'}]\"\nhello\n")
    message = error_of(read, source)
    assert f"{source}:2: messages is not JSON (Expecting property name" in message
    assert f"{source}:3: messages is text, not a list of messages" in message


def test_parquet_fills_in_no_nulls(tmp_path: Path) -> None:
    """Arrow gives every message the keys of all others, and every call the arguments of all others."""
    import pyarrow
    import pyarrow.parquet

    other = {"type": "function", "function": {"name": "day", "arguments": {"in": "May"}}}
    messages = [
        turn("user", "hi"),
        turn("assistant", None, tool_calls=[CALL]),
        turn("assistant", "", tool_calls=[other]),
    ]
    path = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}]), path)
    expected = Conversation(
        (turn("user", "hi"), turn("assistant", "", tool_calls=[CALL]), turn("assistant", "", tool_calls=[other]))
    )
    assert read(path).samples == [expected]
    assert looks_like_generation(path)


def test_a_null_that_was_written_in_json_stays_in_a_call(write: Write) -> None:
    call = {"function": {"name": "day", "arguments": {"in": None}}}
    source = write("a.jsonl", {"messages": [turn("user", "hi"), turn("assistant", None, tool_calls=[call])]})
    (sample,) = read(source).samples
    assert isinstance(sample, Conversation)
    assert sample.messages[1]["tool_calls"] == [{"type": "function", **call}]


# Plain text


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.log", "a"])
def test_a_text_file_is_one_document(write: Write, name: str) -> None:
    source = write(name, '\n# Title\r\n\r\ntext é, "quotes" and {braces}\n')
    samples = read(source)
    assert samples.samples == [Document('\n# Title\n\ntext é, "quotes" and {braces}\n')]
    assert (list(samples.lines), samples.columns, samples.described) == ([1], (), "plain text")
    assert looks_like_generation(source)


def test_a_marker_parts_the_documents_of_a_text_file(write: Write) -> None:
    source = write("a.txt", "one\nmore\n<|endoftext|>\n\ntwo\n<|endoftext|>\n  \n<|endoftext|>three<|endoftext|>\n")
    samples = read(source)
    assert samples.samples == [Document("one\nmore"), Document("two"), Document("three")]
    assert list(samples.lines) == [1, 5, 8]


def test_text_files_that_cannot_be_used(write: Write, tmp_path: Path) -> None:
    assert "is empty. Give a file with text" in error_of(read, write("a.txt", " \n"))
    assert "holds <|endoftext|> and no text" in error_of(read, write("b.txt", "\n<|endoftext|>\n"))
    assert "is not a text file. Unpack it first" in error_of(read, write("a.txt.gz", "x"))
    assert "Save its text as a .txt file" in error_of(read, write("a.pdf", "x"))
    (tmp_path / "c.txt").write_bytes("café".encode("latin-1"))
    assert "c.txt:1: the byte 0xe9 is not UTF-8" in error_of(read, str(tmp_path / "c.txt"))
    (tmp_path / "d.bin").write_bytes(b"\x01\n\0")
    assert "d.bin:2: a zero byte" in error_of(read, str(tmp_path / "d.bin"))
    assert "is plain text without columns" in error_of(read, write("e.txt", "x"), prompt_template="{a}")


def test_a_text_file_that_is_missing_is_not_looked_up_on_the_hub(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    message = error_of(looks_like_generation, "data/input.txt")
    assert "no such file, and no such folder: data" in message
    assert "also a text file" in message


# Templates


def test_a_template_takes_columns_and_leaves_braces(write: Write) -> None:
    source = write("a.csv", "city,Country,note,answer\nRome,Italy,,1\nOslo,Norway,cold,2\n")
    samples = read(source, prompt_template=r"{{{city}}} in {country}:\n{note}\nWhere? }}")
    expected = [Pair("{Rome} in Italy:\n\nWhere? }", "1"), Pair("{Oslo} in Norway:\ncold\nWhere? }", "2")]
    assert samples.samples == expected
    assert samples.columns == ("city", "Country", "note", "answer")
    assert samples.described == "a prompt of 'city', 'Country', 'note', completion in 'answer'"
    assert looks_like_generation(source, prompt_template="{city}")


def test_values_are_put_in_as_they_are(write: Write) -> None:
    source = write("a.jsonl", {"a": "{b}\\n", "b": 2.0, "label": True})
    assert read(source, prompt_template="{a}|{b}|{a}").samples == [Pair("{b}\\n|2|{b}\\n", "true")]


def test_the_completion_is_found_by_name_or_given(write: Write) -> None:
    source = write("a.csv", "q,answer,label,Reply\none,two,three,four\n")
    assert read(source, prompt_template="{q}").samples == [Pair("one", "two")]
    assert read(source, prompt_template="{q} {answer}").samples == [Pair("one two", "three")]
    assert read(source, prompt_template="{q}", completion_column="reply").samples == [Pair("one", "four")]
    assert read(source, prompt_template="{q}{answer}{label}").samples == [Pair("onetwothree", "four")]


@pytest.mark.parametrize(
    ("template", "completion", "expected"),
    [
        (
            "{citi}",
            None,
            "no column 'citi', which `prompt_template` names. Did you mean 'city'? The columns are 'city'",
        ),
        ("{city}", "no", "no column 'no', which `completion_column` names"),
        ("{city}", "City", "'city' stands in the prompt already. Give `completion_column` with another"),
        ("{city}", None, "which column is to be written after the prompt? It is not found by its name"),
        ("where?", None, "`prompt_template='where?'`: holds no column. Put one in braces: {question}"),
        ("{{city}}", None, "holds no column"),
        ("in {city", None, "the { at character 4 names no column. Allowed: {column}, with {{ and }} for braces"),
        ("city}", None, "the } at character 5 names no column"),
        ("{city} { }", None, "the { } at character 8 names no column"),
        (None, "land", "`completion_column=land`: belongs to a `prompt_template`, and none is given"),
    ],
)
def test_templates_that_cannot_be_used(
    write: Write, template: str | None, completion: str | None, expected: str
) -> None:
    source = write("a.csv", "city,land\nRome,Italy\n")
    message = error_of(read, source, prompt_template=template, completion_column=completion)
    assert expected in message


def test_rows_that_do_not_fill_a_template_are_named(write: Write) -> None:
    rows = [{"a": "x", "b": "y"}, {"a": "", "b": "y"}, {"a": "x", "b": None}, {"a": ["x"], "b": "y"}, {"b": "y"}]
    source = write("a.jsonl", *rows)
    message = error_of(read, source, prompt_template="{a}:", completion_column="b")
    assert "4 of 5 rows cannot be used as a prompt of 'a', completion in 'b'" in message
    assert f"{source}:2: empty a\n" in message
    assert f"{source}:3: empty b\n" in message
    assert f"{source}:4: a is a list, not text\n" in message
    assert f"{source}:5: no 'a', which the first row has; only 'b'\n" in message


# Rows that cannot be used

HI = [turn("user", "hi"), turn("assistant", "hello")]


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "messages is an empty list"),
        (None, "messages is missing, not a list of messages"),
        ({"role": "user"}, "messages is an object, not a list"),
        ("hello", "messages is text, not a list"),
        (["hi"], "message 1 is text, not an object with role and content"),
        ([{"value": "hi"}], "message 1 has no 'role', only 'value'"),
        ([turn("usr", "hi"), *HI], "message 1 has the unknown role 'usr'. Did you mean 'user'? Allowed: system, dev"),
        ([turn("critic", "hi"), *HI], "message 1 has the unknown role 'critic'. Allowed: system, developer, user, hum"),
        ([*HI, turn(None, "hi")], "message 3 has the unknown role None. Allowed"),
        ([turn("user", "hi")], "no assistant turn to train on, only 'user'"),
        ([turn("user", " \n"), HI[1]], "message 1 (user) is empty"),
        ([HI[0], turn("assistant", "")], "message 2 (assistant) is empty"),
        ([HI[0], turn("assistant", "", tool_calls=[])], "message 2 (assistant) is empty"),
        ([HI[0], {"role": "assistant"}], "message 2 has no content"),
        ([turn("system", None), *HI], "message 1 has no content"),
        ([turn("user", 3), HI[1]], "message 1: its content is a number, not text"),
        ([turn("user", [{"type": "image_url"}]), HI[1]], "message 1 holds a part of type 'image_url'; only text"),
        ([turn("user", [3]), HI[1]], "message 1 holds a part of type a number; only text"),
        ([turn("user", [{"type": "text"}]), HI[1]], "message 1 has a part without text"),
        ([HI[0], turn("assistant", None, tool_calls="[]")], "message 2 has no content"),
        ([HI[0], turn("assistant", None, tool_calls="{}")], "message 2 has no content"),
        ([HI[0], turn("assistant", None, tool_calls=["f"])], "message 2: tool_calls is a list, not a list of objects"),
    ],
)
def test_messages_that_cannot_be_used(write: Write, messages: Any, why: str) -> None:
    source = write("a.jsonl", {"messages": HI}, {"messages": messages}, {"messages": HI})
    message = error_of(read, source)
    assert f"1 row cannot be used as messages (column 'messages'):\n  {source}:2: {why}" in message
    assert message.endswith("Correct or delete these rows.")


@pytest.mark.parametrize(
    ("good", "bad", "why"),
    [
        ({"prompt": "hi", "completion": "ho"}, {"prompt": "", "completion": "ho"}, "empty prompt"),
        ({"prompt": "hi", "completion": "ho"}, {"prompt": "hi", "completion": " "}, "empty completion"),
        ({"prompt": "hi", "completion": "ho"}, {"prompt": HI, "completion": "ho"}, "prompt is a list, not text"),
        ({"prompt": "hi", "completion": "ho"}, {"text": "hi"}, "no 'prompt', 'completion', which the first row has"),
        (
            {"prompt": HI[:1], "completion": HI[1:]},
            {"prompt": "hi", "completion": HI[1:]},
            "prompt is text, not a list of messages",
        ),
        (
            {"prompt": HI[:1], "completion": HI[1:]},
            {"prompt": HI, "completion": HI[:1]},
            "no assistant turn to train on in completion",
        ),
        (
            {"prompt": HI[:1], "completion": HI[1:]},
            {"prompt": HI, "completion": [turn("critic", "hi")]},
            "completion message 1 has the unknown role 'critic'",
        ),
        ({"instruction": "a", "output": "b"}, {"instruction": "", "output": "b"}, "empty instruction"),
        ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}, "empty output"),
        ({"question": "a", "answer": "b"}, {"question": "a", "answer": None}, "empty answer"),
        ({"question": "a", "answer": "b"}, {"question": {}, "answer": "b"}, "question is an object, not text"),
        ({"text": "a"}, {"text": "\n"}, "empty text"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"conversations": [{"from": "humman", "value": "a"}]},
            "message 1 has the unknown role 'humman'. Did you mean 'human'?",
        ),
        ({"messages": HI}, {"messages": HI, "tools": "{}"}, "tools is an object, not a list of objects"),
        ({"messages": HI}, {"messages": HI, "tools": "[nothing"}, "tools is not JSON (Expecting value, column 2)"),
    ],
)
def test_other_rows_that_cannot_be_used(write: Write, good: dict[str, Any], bad: dict[str, Any], why: str) -> None:
    source = write("a.jsonl", good, good, bad)
    assert f"\n  {source}:3: {why}" in error_of(read, source)


def test_many_bad_rows_put_the_format_in_doubt(write: Write) -> None:
    message = error_of(read, write("a.jsonl", {"text": "a"}, {"text": ""}, {"text": 1}, {"text": []}))
    assert "2 of 4 rows cannot be used as text (column 'text')" in message
    assert "prompt_template" not in message
    message = error_of(read, write("a.jsonl", {"text": "a"}, {"text": ""}, {"text": []}))
    assert "Or give a `prompt_template`" in message


def test_bad_rows_of_one_line_are_all_counted(write: Write) -> None:
    source = write("a.json", json.dumps([{"text": "a"}, {"text": ""}, {"text": ""}, {"text": "b"}]))
    assert "2 of 4 rows cannot be used" in error_of(read, source)


def test_unknown_columns_are_listed_with_the_formats_and_the_way_out(write: Write) -> None:
    source = write("a.jsonl", {"split": "train", "promt": "a", "reply": "b"})
    message = error_of(load_samples, source)
    assert "The first one has the columns 'split', 'promt', 'reply'. Did you mean 'prompt'?" in message
    for known in ("messages", "conversations", "prompt and completion", "instruction", "question and answer", "text"):
        assert known in message
    assert '`prompt_template="{promt}"`' in message
    assert "`completion_column`" in message
    assert not looks_like_generation(source)


# Generation or classification


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("text", True),
        ("text,split", True),
        ("text,label", False),
        ("label,text", False),
        ("Text,Category", False),
        ("text,kind", False),
        ("text,id", True),
        ("message,intent", False),
        ("sentence", False),
        ("prompt,completion", True),
        ("prompt,target", False),
        ("question,answer", True),
        ("question,label", False),
        ("question,answer,label", False),
        ("question,answer,category", True),
        ("instruction,output", True),
        ("messages,label", True),
    ],
)
def test_generation_or_classification(write: Write, header: str, expected: bool) -> None:
    values = {"kind": "ab", "split": ["train", "train"]}
    rows = [
        ",".join(str(values[name][number % 2]) if name in values else f"{name} {number}" for name in header.split(","))
        for number in range(8)
    ]
    source = write("a.csv", "\n".join([header, *rows]) + "\n")
    assert looks_like_generation(source) is expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_the_first_rows_are_those_of_the_whole_file(write: Write, tmp_path: Path, name: str) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": f"row {number} " + "x" * 3000, "label": str(number)} for number in range(1000)]
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    elif name.endswith("csv"):
        write(name, "text,label\n", *(f'"{row["text"]}",{row["label"]}\n' for row in rows))
    else:
        write(name, *([json.dumps(rows, indent=1)] if name.endswith("json") else rows))
    whole = read_table(tmp_path / name)
    assert whole.rows == rows
    for limit in (1, 7, 500, 2000):
        first = read_table(tmp_path / name, limit=limit)
        assert first.rows == rows[:limit]
        assert first.lines == whole.lines[: len(first.rows)]
        assert first.columns == ["text", "label"]


def test_of_a_large_file_only_the_start_is_read(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    question = {"question": "x" * 1000, "answer": "y"}
    source = write("a.jsonl", *[question] * 2000)
    labelled = write("e.csv", "text,label\n" + "a,b\n" * 300_000)
    long_first = write("b.jsonl", {"question": "x" * 2**21, "answer": "y"}, question)
    one_line = write("c.json", json.dumps([question] * 2000))
    broken = write("d.csv", "question,answer\n" + "a,b\n" * 300_000 + '"never closed,')

    assert looks_like_generation(long_first)  # a first row longer than what is read at first
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda _: pytest.fail("the file is read whole"))
        assert looks_like_generation(source)
        assert looks_like_generation(one_line)
        assert looks_like_generation(broken)
        assert not looks_like_generation(labelled)
    assert "is never closed" in error_of(load_samples, broken)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_what_cannot_be_read_is_an_error_and_not_a_guess(write: Write, name: str) -> None:
    with pytest.raises(DataError, match="is empty"):
        looks_like_generation(write(name, ""))
    with pytest.raises(DataError, match="no such file"):
        looks_like_generation(write("b.csv", "text\nx\n") + "." + name)


def test_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = {"messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}]}
    rows = {"messages": [[turn("user", str(number)), turn("assistant", "yes")] for number in range(4)]}
    part = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(train=part, test=part))
    data = load_samples("chats/kind")
    assert data.train.samples == [chat(str(number), "yes") for number in range(4)]
    assert list(data.test.lines) == [5, 6, 7, 8]
    assert looks_like_generation("chats/kind")


# Where the test rows are from


def questions(number: int, **others: Any) -> list[dict[str, Any]]:
    return [{"question": f"what is {at}?", "answer": str(at), **others} for at in range(number)]


def test_test_rows_of_a_second_file(write: Write) -> None:
    data, other = write("a.jsonl", *questions(3)), write("b.csv", "instruction,output\ngo,ok\n")
    samples = load_samples(data, test=other)
    assert (len(samples.train), samples.test.samples, samples.test_from) == (3, [chat("go", "ok")], other)
    story = write("c.txt", "once upon a time")
    message = error_of(load_samples, data, test=story)
    assert (
        f"{story}: the test rows are read as plain text, and the training rows of {data} as question, answ" in message
    )
    assert "is given as test data" in error_of(load_samples, data, test=data)


def test_the_template_holds_for_the_second_file_too(write: Write) -> None:
    data = write("a.csv", "a,label,target\n1,2,3\n")
    other = write("b.csv", "A,answer,label\n4,5,6\n")
    assert load_samples(data, test=other, prompt_template="{a}", completion_column="label").test.samples == [
        Pair("4", "6")
    ]
    assert "no column 'target', which `completion_column`" in error_of(
        load_samples, data, test=other, prompt_template="{a}"
    )


def test_test_rows_by_the_column_split(write: Write) -> None:
    parts = ["train", "Test", "validation", "test"]
    rows = [{**row, "Split": part} for row, part in zip(questions(4), parts, strict=True)]
    data = load_samples(write("a.jsonl", *rows))
    assert (list(data.train.lines), list(data.test.lines), data.test_from) == ([1, 3], [2, 4], "the column 'split'")
    assert read_samples_to_score(str(data.train.source)) == data.test
    assert "'split' is not clear" in error_of(load_samples, write("b.jsonl", *questions(2, split="some")))
    assert "marks no row as train" in error_of(load_samples, write("c.jsonl", *questions(2, split="test")))


def test_rows_to_score_are_all_rows_where_none_is_marked(write: Write) -> None:
    source = write("a.jsonl", *questions(4))
    assert len(read_samples_to_score(source)) == 4
    assert read_samples_to_score(source, prompt_template="Q {question}").samples[1] == Pair("Q what is 1?", "1")


def test_the_seed_decides_which_rows_are_held_out(write: Write) -> None:
    source = write("a.jsonl", *questions(20))
    data = load_samples(source, seed=3)
    assert (len(data.train), len(data.test)) == (16, 4)
    assert sorted([*data.train.lines, *data.test.lines]) == list(range(1, 21))
    assert data.test_from == "20% of the rows, seed 3"
    assert load_samples(source, seed=3) == data
    assert len({tuple(load_samples(source, seed=seed).test.lines) for seed in range(10)}) > 3
    assert len(load_samples(source, test_fraction=0).test) == 0
    with pytest.raises(SettingError, match="Allowed: more than 0 and less than 1"):
        load_samples(source, test_fraction=1.5)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=40), st.integers(0, 100))
def test_equal_questions_stay_together(tmp_path_factory: pytest.TempPathFactory, numbers: list[int], seed: int) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    asked_for = [
        {"question": f"{'What ' if at % 2 else 'what  '}{number}", "answer": "x"} for at, number in enumerate(numbers)
    ]
    path.write_text("\n".join(map(json.dumps, asked_for)), "utf-8")
    if len(set(numbers)) == 1:
        assert "nothing can be held out, as there is one question only" in error_of(load_samples, str(path))
        return
    data = load_samples(str(path), seed=seed, test_fraction=0.4)
    sides = [{normalised(question_of(sample)) for sample in rows.samples} for rows in (data.train, data.test)]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]


def test_one_document_is_not_split_here_and_several_are_held_out(write: Write) -> None:
    one = load_samples(write("a.txt", "once upon a time\n" * 100))
    assert (len(one.train), len(one.test), one.test_from) == (1, 0, "the end of the text")
    assert load_samples(write("b.jsonl", {"text": "once"})).test_from == "the end of the text"
    several = load_samples(write("c.txt", "<|endoftext|>".join(f"story {number}" for number in range(10))))
    assert (len(several.train), len(several.test)) == (8, 2)
    assert "one question only" in error_of(load_samples, write("d.jsonl", *questions(1)))


# Questions and answers


def test_questions_and_answers() -> None:
    long = chat("hi", "hello", "and then?", "the end", system="be kind")
    assert (question_of(long), asked(long), answer_of(long)) == ("and then?", "hi\nand then?", "the end")
    open_end = chat("hi", "hello", "and then?")
    assert (question_of(open_end), asked(open_end), answer_of(open_end)) == ("hi", "hi", None)
    silent = Conversation((turn("assistant", "welcome"), turn("assistant", "", tool_calls=[CALL])))
    assert (question_of(silent), asked(silent), answer_of(silent)) == ("", "welcome\n", None)
    assert (question_of(Pair("a", "b")), asked(Pair("a", "b")), answer_of(Pair("a", "b"))) == ("a", "a", "b")
    story = Document("once " * 1000)
    assert (len(question_of(story)), asked(story), answer_of(story)) == (200, story.text, None)


# Real data


@needs_shared
def test_gsm8k() -> None:
    folder = SHARED / "data" / "gsm8k"
    assert looks_like_generation(str(folder / "train.jsonl"))
    data = load_samples(str(folder / "train.jsonl"), test=str(folder / "test.jsonl"))
    assert (len(data.train), len(data.test)) == (7_470, 1_319)
    assert data.train.described == "question, answer"
    assert question_of(data.train.samples[0]).startswith("Natalia sold clips to 48 of her friends")
    assert str(answer_of(data.train.samples[0])).endswith("#### 72")
    held = load_samples(str(folder / "train.jsonl"))
    assert len(held.test) == pytest.approx(0.2 * 7_470, abs=1)


@needs_shared
@pytest.mark.parametrize(
    ("name", "train", "test", "described"),
    [
        ("wikisql/train.jsonl", 799, 201, "text (column 'text')"),
        ("tinyshakespeare/input.txt", 1, 0, "plain text"),
        ("tinystories/tinystories_sample.txt", 1_854, 463, "plain text"),
    ],
)
def test_real_texts(name: str, train: int, test: int, described: str) -> None:
    source = str(SHARED / "data" / name)
    data = load_samples(source)
    assert looks_like_generation(source)
    assert (len(data.train), len(data.test), data.train.described) == (train, test, described)
    on_disk = Path(source).read_text("utf-8").split("\n")
    for sample, line in zip(data.train.samples[::100], data.train.lines[::100], strict=True):
        assert isinstance(sample, Document)
        start = sample.text.split("\n")[0]
        assert start in (json.loads(on_disk[line - 1])["text"] if name.endswith("jsonl") else on_disk[line - 1])


@needs_shared
def test_banking77_is_text_to_classify() -> None:
    assert not looks_like_generation(str(SHARED / "data" / "banking77" / "train.csv"))
