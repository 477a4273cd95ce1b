"""What other people call their columns: found, named where not read, or refused with the template that reads them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from capotune import api
from capotune.cli import data_report
from capotune.cli.messages import in_flags
from capotune.data.classes import CLASSES, class_names
from capotune.data.columns import find_column, given_column, plain_name
from capotune.data.generation import load_samples, looks_like_generation
from capotune.data.readers import read_table
from capotune.data.samples import Conversation, Document, Pair, Sample
from capotune.errors import CapotuneError, DataError, SettingError
from capotune.settings import TrainSettings, build

Rows = list[dict[str, Any]]


def rows(number: int = 12, **columns: Callable[[int], Any]) -> Rows:
    """Rows whose values are made of their position."""
    return [{name.replace("__", " "): make(at) for name, make in columns.items()} for at in range(number)]


def said(start: str) -> Callable[[int], str]:
    return lambda at: f"{start} {at}"


def one_of(*values: Any) -> Callable[[int], Any]:
    return lambda at: values[at % len(values)]


def read(data: Any, **options: Any) -> list[Sample]:
    assert options or looks_like_generation(data)
    return load_samples(data, test_fraction=0, **options).train.samples


def error_of(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(CapotuneError) as caught:
        call(*arguments, **options)
    return str(caught.value)


def refusal(data: Any) -> str:
    """What is said of data, by whichever task takes it."""

    def read(data: Any) -> object:
        return (load_samples if looks_like_generation(data) else CLASSES.load)(data)

    return error_of(read, data)


def asked(question: str, answer: str, system: str | None = None) -> Conversation:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation((*([{"role": "system", "content": system}] if system else []), *turns))


# Text to write: columns that are found


@pytest.mark.parametrize(
    ("row", "sample"),
    [
        ({"context": "c", "question": "q", "answer": "a"}, asked("c\n\nq", "a")),
        ({"question": "q", "answer": "a", "passage": "p"}, asked("p\n\nq", "a")),
        ({"Document": "d", "Question": "q", "Answer": "a"}, asked("d\n\nq", "a")),
        ({"context": None, "question": "q", "answer": "a"}, asked("q", "a")),
        ({"context": "c", "question": "q", "answers": {"text": ["a", "b"]}}, asked("c\n\nq", "a")),
        ({"question": "q", "answers": ["", "b", "c"]}, asked("q", "b")),
        ({"query": "q", "response": "r"}, asked("q", "r")),
        ({"input": "i", "output": "o"}, asked("i", "o")),
        ({"id": 1, "system_prompt": "s", "question": "q", "response": "r"}, asked("q", "r", "s")),
        ({"instruction": "i", "context": "c", "response": "r"}, asked("i\n\nc", "r")),
        ({"instruction": "i", "input": "n", "context": "c", "output": "o"}, asked("i\n\nn\n\nc", "o")),
        ({"prompt": "p", "answer": "a"}, Pair("p", "a")),
        ({"prompt": "p", "output": "o"}, Pair("p", "o")),
        ({"\ufeffQuestion ": "q", " ANSWER": "a"}, asked("q", "a")),
        ({"id": 7, "url": "u", "title": "t", "text": "story"}, Document("story")),
    ],
)  # fmt: skip
def test_columns_of_text_to_write_are_found(row: dict[str, Any], sample: Sample) -> None:
    assert read([row, row]) == [sample, sample]


def test_messages_beside_a_context_are_read_and_the_context_is_named() -> None:
    turns = {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}
    found = load_samples([{**turns, "context": "c"}] * 3, test_fraction=0).train
    assert found.unused == ("context",)
    assert isinstance(found.samples[0], Conversation)


def test_input_beside_labels_stays_text_to_classify() -> None:
    data = rows(input=said("what a day"), output=one_of("good", "bad"))
    assert not looks_like_generation(data)
    assert class_names(CLASSES.load(data).train.labels) == ["bad", "good"]


def test_one_of_several_answers_is_said() -> None:
    data = rows(question=said("q"), answers=lambda at: {"text": [f"a {at}", "b"], "answer_start": [0, 1]})
    described = load_samples(data).train.described
    assert described == "question, answers (of several answers the first)"
    data[3]["answers"] = {"text": [], "answer_start": []}
    assert "row 3: answers holds no text" in error_of(load_samples, data)
    data[3]["answers"] = "{'text': ['a'], 'answer_start': [0]}"
    assert "row 3: answers is an object written as text" in error_of(load_samples, data)


# Text to write: columns for which a template is suggested


@pytest.mark.parametrize(
    ("data", "first"),
    [
        (rows(source=said("das ist"), target=said("that is")), Pair("das ist 0\n", "that is 0")),
        (rows(src=said("das ist"), tgt=said("that is")), Pair("das ist 0\n", "that is 0")),
        (rows(article=said("long"), summary=said("short"), id=int), Pair("long 0\n\nSummary:\n", "short 0")),
        (rows(document=said("long"), summary=said("short")), Pair("long 0\n\nSummary:\n", "short 0")),
        (rows(text=said("long"), summary=said("short")), Pair("long 0\n\nSummary:\n", "short 0")),
        (rows(dialogue=said("long"), summary=said("short")), Pair("long 0\n\nSummary:\n", "short 0")),
        (rows(Article=said("long"), Highlights=said("short")), Pair("long 0\n\nSummary:\n", "short 0")),
        (rows(en=said("hi"), fr=said("salut")), Pair("Translate from en to fr: hi 0\n", "salut 0")),
        (
            rows(id=int, translation=lambda at: {"en": f"hi {at}", "fr": f"salut {at}"}),
            Pair("Translate from en to fr: hi 0\n", "salut 0"),
        ),
        (rows(mr=said("name"), human_reference=said("It is")), Pair("name 0\n", "It is 0")),
        (rows(English=said("hi"), French=said("salut")), Pair("Translate from English to French: hi 0\n", "salut 0")),
        (rows(docstring=said("add a"), code=said("def f")), Pair("add a 0\n", "def f 0")),
        (
            rows(question=said("q"), A=said("a"), B=said("b"), C=said("c"), answer=one_of("A", "B")),
            Pair("q 0\n\na 0\n\nb 0\n\nc 0\n", "A"),
        ),
        (rows(prompt=said("p"), chosen=said("c"), rejected=said("r")), Pair("p 0\n", "c 0")),
        (rows(prompt=said("p"), completion=said("c"), context=said("x")), Pair("x 0\n\np 0\n", "c 0")),
        (rows(text=said("t"), label=said("all different labels")), Pair("t 0\n", "all different labels 0")),
    ],
)
def test_the_suggested_template_reads_the_columns(data: Rows, first: Pair, tmp_path: Path) -> None:
    """The message as the command line shows it, pasted back into ``capo data``."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data), "utf-8")
    with pytest.raises(DataError) as caught:
        (load_samples if looks_like_generation(str(path)) else CLASSES.load)(str(path))
    found = re.search(r"--prompt-template .+? --completion-column \"[^\"]+\"", in_flags(caught.value))
    assert found, caught.value
    _, template, _, completion = shlex.split(found[0])
    assert read(str(path), prompt_template=template, completion_column=completion)[0] == first


def test_a_template_may_ask_for_what_stands_in_objects() -> None:
    data = [{"pair": {"en": "hi", "fr": "salut"}}, {"pair": {"en": "no"}}]
    message = error_of(read, data, prompt_template="{pair.en}", completion_column="pair.fr")
    assert "row 1: no 'pair.fr', which the first row has" in message
    assert "no column 'pair'" in error_of(read, data, prompt_template="{pair}", completion_column="pair.fr")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (rows(chosen=lambda _: [{"role": "user"}], rejected=lambda _: []), "rename 'chosen' to 'messages'"),
        (
            rows(stuff=said("a b"), toxic=one_of(0, 1), rude=one_of(0, 0, 1)),
            "'toxic', 'rude' hold 0 or 1 each: rows may have several labels or none",
        ),
        (rows(stuff=said("a b"), yes=one_of(True, False), no=one_of(False, True)), "['yes', 'no']].idxmax(axis=1)"),
        (rows(text=said("a b"), yes=one_of(1, 0), no=one_of(0, 1)), "['yes', 'no']].idxmax(axis=1)"),
        (rows(dialog=one_of([{"role": "user"}])), "holds conversations, and no column a label. To learn to write"),
        ([{}, {}], "its first row is empty"),
        (rows(text=said("a b"), labels=one_of(["a", "b"], ["a"])), "label (labels) is a list; give `task=multi-label`"),
        (rows(text=said("a b"), label=one_of({"a": 1})), "label (label) is an object, neither text nor a number"),
        (rows(text=said("a b"), label=one_of("a;b", "a", "b")), "several labels for one text, such as 'a;b'"),
        (rows(text=said("a b"), label=one_of("a, b", "b", "a")), "several labels for one text, such as 'a, b'"),
        (rows(text=said("a b"), label=one_of("['a']", "['b']")), "several labels for one text, such as \"['a']\""),
        (rows(text=said("a b"), score__1=said("x"), label=lambda at: at / 7), "holds numbers, 12 different ones: "),
        (rows(100, text=said("a b"), label=lambda at: (at % 30) / 4), "holds numbers, 30 different ones: "),
        (rows(text=said("a b"), label=str), "12 different values in 12 rows"),
        (rows(40, text=said("a b"), label=lambda at: at * 17 % 39), "holds numbers, 39 different ones: "),
        (rows(anchor=said("a b"), positive=said("c d"), negative=said("e f")), "not clear which column holds the tex"),
        (rows(premise=said("one a"), hypothesis=said("two b")), "not clear which column holds the label"),
        (rows(tokens=lambda at: f"['a', 'b{at}']", ner_tags=lambda _: "['O', 'B-X']"), "holds lists written as text"),
        (rows(prompt=said("p"), completion=said("c"), label=one_of(True, False)), "an answer and whether it is good"),
        (rows(question=said("q"), choices=one_of(["a", "b"]), answer=one_of(0, 1)), "columns 'choices' part of the"),
    ],
)  # fmt: skip
def test_data_of_other_kinds_is_refused_in_words(data: Rows, expected: str) -> None:
    assert expected in refusal(data)


@pytest.mark.parametrize(
    "labels",
    [
        ("Korea, North", "Korea, South", "Korea"),
        ("Paris; France", "Lyon"),
        ("0.5", "1.0", "1.5", "2.0"),
        ("1.0", "2.0"),
        ("cash withdrawal not recognised yet", "card payment not recognised yet"),
    ],
)
def test_labels_that_only_look_like_others_are_read(labels: tuple[str, ...]) -> None:
    assert class_names(CLASSES.load(rows(40, text=said("a b"), label=one_of(*labels))).train.labels) == sorted(labels)


# Labels: columns


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("Headline", " Category "), ("Headline", " Category ")),
        (("Review Text", "Rating"), ("Review Text", "Rating")),
        (("Unnamed: 0", "idx", "SENTENCE", "LABEL"), ("SENTENCE", "LABEL")),
        (("title", "body", "class"), ("body", "class")),
        (("comment-text", "Stars"), ("comment-text", "Stars")),
        (("\ufefftext", "y"), ("\ufefftext", "y")),
        (("content", "intent"), ("content", "intent")),
        (("product_title", "review_body", "star_rating"), ("review_body", "star_rating")),
        (("headline", "sentiment", "date"), ("headline", "sentiment")),
        (("title", "Review Text", "label"), ("Review Text", "label")),
    ],
)
def test_usual_names_of_text_and_label(names: tuple[str, ...], expected: tuple[str, str]) -> None:
    data = [{name: f"{name} {at % 3}" if name == expected[1] else f"{name} {at}" for name in names} for at in range(12)]
    found = CLASSES.read(data)
    assert (found.text_column, found.label_column) == expected
    assert found.unused == tuple(name for name in names if name not in expected)


def test_a_name_is_compared_without_what_nobody_sees() -> None:
    assert plain_name("\ufeff Review\u200b-Text ") == "review_text"
    assert find_column(["Text", "text"], ("text",)) == "text"
    assert given_column(read_table([{"Review Text": "a"}]), "review_text", "`text_column`") == "Review Text"


def shown(data: Any, model: Path, **settings: Any) -> str:
    found = api.inspect(data=data, model=str(model), **settings)
    console = Console(width=300, color_system=None)
    with console.capture() as capture:
        console.print(data_report.draw(api.describe_data(found["task"], found["report"])))
    return capture.get()


def test_columns_that_are_not_read_are_named_for_every_task(bert: Path, llama_writer: Path) -> None:
    labelled = rows(
        text=said("the order"), label=one_of("a", "b"), title=said("t"), id=int, split=one_of("train", "dev", "test")
    )
    assert "Not used  the columns 'title', 'id'\n" in re.sub(" +\n", "\n", shown(labelled, bert))
    pairs = rows(prompt=said("the order"), completion=said("is"), note=said("n"))
    assert "Not used     the column 'note'" in shown(pairs, llama_writer)
    tagged = rows(tokens=lambda at: ["my", str(at)], tags=one_of(["O", "B-X"]), pos_tags=one_of([1, 2]))
    assert "Not used   the column 'pos_tags'" in shown(tagged, bert)
    assert "Not used" not in shown(rows(text=said("the order"), label=one_of("a", "b")), bert)


# Labels: one label in several spellings


@pytest.mark.parametrize(
    ("written", "names", "respelled"),
    [
        (("1", "1.0", "0"), ["0", "1"], {"1.0": "1"}),
        ((1, "1.0", 0.0), ["0", "1"], {"1.0": "1"}),
        (("True", "true", False), ["false", "true"], {"True": "true"}),
        (("1.0", "1", "0.0"), ["0", "1"], {"1.0": "1", "0.0": "0"}),
        (("1.0", "0.0"), ["0.0", "1.0"], {}),
        ((" spam", "spam ", "ham"), ["ham", "spam"], {}),
        (("caf\u00e9", "cafe\u0301", "bar"), ["bar", "caf\u00e9"], {}),
    ],
)  # fmt: skip
def test_one_label_in_several_spellings(written: tuple[Any, ...], names: list[str], respelled: dict[str, str]) -> None:
    data = CLASSES.load(rows(24, text=said("a b"), label=one_of(*written)))
    assert class_names(data.train.labels) == names
    assert data.respelled == respelled


def test_a_test_file_may_spell_labels_in_another_way() -> None:
    train = rows(text=said("a b"), label=one_of(1, 0))
    test = [{"text": "c", "label": "1.0"}, {"text": "d", "label": "0"}]
    data = CLASSES.load(train, test=test)
    assert data.test.labels == ["1", "0"]
    from_csv = [{"text": f"{at} a", "label": f"{at % 2}.0"} for at in range(8)]
    assert class_names(CLASSES.load(from_csv, test=test).train.labels) == ["0", "1"]


def test_evaluate_knows_a_label_in_another_spelling(bert: Path, tmp_path: Path) -> None:
    data = rows(16, text=one_of("the order was late", "my lamp is broken"), label=one_of("1.0", "0.0"))
    for at, row in enumerate(data):
        row["text"] += f" {at}"
    api.train("feature-extraction", data=data, model=str(bert), out=tmp_path / "run")
    scored = [
        api.evaluate(tmp_path / "run" / "adapter", data=[{**row, "label": spelled(row["label"])} for row in data])
        for spelled in (str, float, lambda label: int(float(label)))
    ]
    assert scored[0] == scored[1] == scored[2]
    message = error_of(api.evaluate, tmp_path / "run" / "adapter", data=[{"text": "a", "label": "2"}])
    assert "the label '2' is not one the adapter knows" in message


def test_labels_that_look_alike_or_missing_or_alone_are_said(bert: Path) -> None:
    data = rows(24, text=said("the order"), label=one_of("Spam", "spam", "\uff33pam", "N/A"))
    data.append({"text": "lamp", "label": "other"})
    text = shown(data, bert, test_fraction=0)
    assert "'Spam' and 'spam' and '\uff33pam' count as different labels" in text
    assert "6 in train: a label such as 'nan' or 'N/A', which may say that there is none" in text
    assert "1 label with one training row each: 'other'" in text
    text = shown(rows(24, text=said("the order"), label=one_of("1", "1.0", "0")), bert)
    assert "read as one label: '1.0' as '1'" in text


# Messages


def test_no_message_shows_a_long_value_whole() -> None:
    long = "word " * 5000
    many = [{"text": long, "label": long + str(at)} for at in range(1000)]
    messages = [
        error_of(CLASSES.load, many),
        error_of(CLASSES.load, [{"text": "a", "label": "b"}, *([{"text": "", "label": many}] * 10)]),
        error_of(CLASSES.load, rows(text=said("a b"), label=one_of("a", "b")), test=many),
        error_of(CLASSES.load, [{**row, "split": long} for row in many]),
        error_of(load_samples, [{"messages": [{"role": long, "content": long}]}]),
        error_of(load_samples, [{"messages": many}]),
        error_of(load_samples, [{long: "a", "b": long}]),
        error_of(CLASSES.load, [{long: "a", "b": long}], text_column=long + "x"),
        error_of(build, TrainSettings, {"data": "a.csv", "test_fraction": many}),
        error_of(build, TrainSettings, {"data": "a.csv", "epochs": [many]}),
        error_of(build, TrainSettings, {"data": many}),
        error_of(build, TrainSettings, {"data": "a.csv", long: 1}),
        str(SettingError("is wrong.", setting="data", given=many)),
    ]
    assert [len(message) for message in messages if len(message) > 1500] == []


# Anything at all


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
NAMES = st.sampled_from(
    [*("text", "label", "question", "answer", "answers", "context", "prompt", "completion", "messages", "chosen"),
     *("rejected", "input", "output", "instruction", "source", "target", "tokens", "tags", "translation", "system")]
) | st.text(max_size=12)  # fmt: skip
ROWS = st.lists(st.dictionaries(NAMES, VALUES, max_size=4), max_size=5)


def refusals(data: Any) -> list[str]:
    """What is said of data that one of the readers refuses."""
    found = []
    for call in (looks_like_generation, load_samples, CLASSES.load):
        try:
            call(data)
        except (DataError, SettingError) as error:
            found.append(str(error))
    return found


@settings(max_examples=80)
@given(ROWS)
def test_any_rows_are_read_or_refused_with_their_place(data: Rows) -> None:
    for message in refusals(data):
        assert len(message) < 1500
        assert "data in memory (" in message or "row " in message


@settings(max_examples=30)
@given(ROWS, st.sampled_from(["jsonl", "csv"]))
def test_rows_in_a_file_are_read_or_refused_with_their_place(
    tmp_path_factory: pytest.TempPathFactory, data: Rows, kind: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any.{kind}"
    if kind == "csv":
        pandas.DataFrame(data).to_csv(path, index=False)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in data), "utf-8")
    for message in refusals(str(path)):
        assert len(message) < 1500 + 8 * len(str(path))
        assert str(path) in message
