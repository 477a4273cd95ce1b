"""What is trained on, asked, scored and shown has the tokenizer's own tokens of the whole text, for every tokenizer.

The reference is the tokenizer: its ids of the rendered text, and its offsets. Where its offsets leave spaces out, they
are those of the same tokenizer that leaves none out.
"""

from __future__ import annotations

from functools import cache, partial
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from generation_helpers import encode, samples_of, turn
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from shared import SHARED
from tokenizer_cases import CASES, CHATS, INST, TEMPLATE
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from capotune.data.batches import IGNORE_INDEX
from capotune.data.inspect.samples import _spans
from capotune.data.samples import Conversation, Document, Pair
from capotune.evaluation.generate import _Cut
from capotune.tasks.generation.chat_template import PLAIN_TEMPLATE
from capotune.tasks.generation.encoding import TextEncoder
from capotune.tasks.generation.facade import _without_start

CHECKS = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
every_tokenizer = pytest.mark.parametrize("name", CASES)


@cache
def tokenizer(name: str) -> Any:
    return CASES[name]()


@cache
def reference(name: str) -> Any:
    """The same tokenizer, with the spaces of each token in its offsets."""
    own = tokenizer(name)
    if not own.is_fast:
        return own
    stored = own.backend_tokenizer.to_str().replace('"trim_offsets":true', '"trim_offsets":false')
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(stored))


def encoder(name: str, template: str | None = TEMPLATE, max_length: int = 4096, learn: Any = "all") -> TextEncoder:
    own = tokenizer(name)
    base: Any = SimpleNamespace(tokenizer=own, check_tokens=lambda *_: None)
    ends = [own.eos_token_id if own.eos_token_id is not None else own.sep_token_id]
    ends += [own.convert_tokens_to_ids("<|end|>")] if "<|end|>" in own.get_vocab() else []
    return TextEncoder(base, max_length, tuple(ends), template, "a test", learn)


def own_ids(name: str, text: str) -> list[int]:
    """All ids that the tokenizer gives a text, those it adds included."""
    return list(tokenizer(name)(text, verbose=False)["input_ids"])


def in_loss(name: str, text: str, start: int, end: int, special: bool) -> list[bool]:
    """For each token whether it holds a character from ``start`` up to ``end``, by the tokenizer's own offsets."""
    found = reference(name)(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    return [first < end and after > start for first, after in found["offset_mapping"]]


PIECES = ["a", "red", " ", "  ", "\n", "\n\n", ":", ".", "it is", " late", "é", "日本", "😀", "ﬁ", "é", "\t"]
TEXT = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join)
WORDS = TEXT.filter(lambda text: text.strip() != "")


# Prompts with completions, and plain text


@every_tokenizer
@given(prompt=TEXT, completion=TEXT)
@example(prompt="Say red:", completion="red it is")
@example(prompt="Say red: ", completion="red it is")
@example(prompt="Say red:\n", completion="\nred  it is ")
@example(prompt="Say red: \n\n", completion="  red")
@CHECKS
def test_pair_has_the_ids_of_the_joined_text_and_the_completion_in_the_loss(
    name: str, prompt: str, completion: str
) -> None:
    task = encoder(name)
    (one,) = encode(task, Pair(prompt, completion))
    ids, text = own_ids(name, prompt + completion), prompt + completion
    ended = bool(ids) and ids[-1] in task.end_ids
    assert one.ids == ids + ([] if ended else [task.end_ids[0]])
    if not tokenizer(name).is_fast:
        return
    front = task._added[0]
    bare = in_loss(name, text, len(prompt), len(text), special=False)
    wanted = [False] * len(front) + bare + [True] * (len(one.ids) - len(front) - len(bare))
    assert [label != IGNORE_INDEX for label in one.labels[1:]] == wanted[1:]
    assert all(label in (IGNORE_INDEX, token) for label, token in zip(one.labels, one.ids, strict=True))


@every_tokenizer
@given(prompt=TEXT, completion=TEXT)
@example(prompt="Say red:", completion=" red")
@CHECKS
def test_question_of_a_pair_has_the_ids_of_its_prompt(name: str, prompt: str, completion: str) -> None:
    task = encoder(name)
    question = task.encode_question(Pair(prompt, completion))
    behind = len(task._added[1])
    assert question == task.encode_prompt(prompt) == own_ids(name, prompt)[: len(own_ids(name, prompt)) - behind]


@every_tokenizer
@given(text=TEXT, length=st.integers(2, 9))
@CHECKS
def test_windows_cut_the_ids_of_the_whole_text(name: str, text: str, length: int) -> None:
    windows = encode(encoder(name, max_length=length), Document(text))
    ids = own_ids(name, text)
    together = [token for window in windows for token in window.ids]
    assert together in (ids, [*ids, encoder(name).end_ids[0]])
    assert together[-1] in encoder(name).end_ids
    assert all(window.labels == [IGNORE_INDEX, *window.ids[1:]] for window in windows)
    question = encoder(name).encode_question(Document(text))
    assert question == ids[: len(question)]


# Conversations


@pytest.mark.parametrize(("name", "template"), CHATS, ids=[f"{name}{at}" for at, (name, _) in enumerate(CHATS)])
@given(texts=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
@example(texts=[("red", "\n late"), (" red ", "it is")])
@CHECKS
def test_conversation_has_the_ids_that_apply_chat_template_gives(
    name: str, template: str, texts: list[tuple[str, str]]
) -> None:
    task, own = encoder(name, template), tokenizer(name)
    messages = [one for asks, answers in texts for one in (turn("user", asks), turn("assistant", answers))]
    (one,) = encode(task, Conversation(tuple(messages)))
    chat = {"chat_template": template}
    assert one.ids == own.apply_chat_template(messages, **chat)["input_ids"]
    asked = own.apply_chat_template(messages[:-1], add_generation_prompt=True, **chat)["input_ids"]
    assert task.encode_chat(messages[:-1]) == task.encode_question(Conversation(tuple(messages))) == asked
    if own.is_fast:
        text, wanted = own.apply_chat_template(messages, tokenize=False, **chat), [False] * len(one.ids)
        for at in range(1, len(messages), 2):
            start = len(own.apply_chat_template(messages[:at], tokenize=False, add_generation_prompt=True, **chat))
            turns = own.apply_chat_template(messages[: at + 1], tokenize=False, **chat)
            end = len(turns.rstrip("\n"))
            wanted = [a or b for a, b in zip(wanted, in_loss(name, text, start, end, special=False), strict=True)]
        assert [label != IGNORE_INDEX for label in one.labels[1:]] == wanted[1:]


@every_tokenizer
def test_plain_form_has_the_ids_of_its_text_after_the_tokens_that_start_one(name: str) -> None:
    task = encoder(name, PLAIN_TEMPLATE)
    messages = [turn("user", "What colour?"), turn("assistant", " green "), turn("user", "red"), turn("assistant", "b")]
    (one,) = encode(task, Conversation(tuple(messages)))
    text = tokenizer(name).apply_chat_template(messages, chat_template=PLAIN_TEMPLATE, tokenize=False)
    assert one.ids == own_ids(name, text)[: len(own_ids(name, text)) - len(task._added[1])]
    assert task.end_ids[0] in one.labels


# Many at a time


@every_tokenizer
def test_many_texts_are_one_call_of_the_tokenizer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task, samples = encoder(name), samples_of(*[Pair(f"Say {at}:", " red") for at in range(20)])
    alone = [encode(task, sample) for sample in samples.samples]
    kind, calls = type(tokenizer(name)), []
    original = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda *given, **named: calls.append(1) or original(*given, **named))
    assert task.encode(samples) == alone
    assert len(calls) == (1 if tokenizer(name).is_fast else 2)


# What is written


@every_tokenizer
@given(prompt=TEXT, written=st.lists(st.integers(0, 10**6), min_size=1, max_size=12))
@CHECKS
def test_streamed_text_is_the_decoded_text_of_all_ids(name: str, prompt: str, written: list[int]) -> None:
    task, own = encoder(name), tokenizer(name)
    ids = [token % len(own) for token in written]
    ids = [token for token in ids if token not in task.end_ids]
    cut, shown = _Cut(task, task.encode_prompt(prompt), ()), ""
    for at in range(len(ids) + 1):
        ready = cut.ready(ids[:at])
        assert ready.startswith(shown), "what was shown is taken back"
        shown = ready
    assert cut.text(ids).startswith(shown)
    whole = own.decode(
        [*task.encode_prompt(prompt), *ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert whole.endswith(cut.text(ids))


@every_tokenizer
@given(prompt=TEXT, completion=TEXT, start=st.integers(0, 20), size=st.integers(1, 6))
@example(prompt="Say red:", completion=" red it is", start=1, size=4)
@CHECKS
def test_answer_ends_right_before_a_stop_text_wherever_its_tokens_are_cut(
    name: str, prompt: str, completion: str, start: int, size: int
) -> None:
    task = encoder(name)
    question, ids = task.encode_prompt(prompt), own_ids(name, prompt + completion)
    answer = ids[len(question) :]
    text = _Cut(task, question, ()).text(answer)
    stop = text[start % max(len(text), 1) :][:size]
    if not stop:
        return
    cut, shown = _Cut(task, question, (stop,)), ""
    assert cut.text(answer) == text[: text.index(stop)]
    assert cut.stopped(answer)
    for at in range(len(answer) + 1):
        shown = cut.ready(answer[:at]) or shown
        assert text[: text.index(stop)].startswith(shown)


@every_tokenizer
@given(prompt=TEXT, completion=TEXT)
@example(prompt="Say red:", completion=" red it is")
@example(prompt="Say red:", completion="red it is")
@CHECKS
def test_a_completion_that_is_written_reads_as_it_stands(name: str, prompt: str, completion: str) -> None:
    """Where no token straddles the border and the tokenizer gives texts back, prompt and answer are the whole text."""
    task, own = encoder(name), tokenizer(name)
    (one,) = encode(task, Pair(prompt, completion))
    question = task.encode_prompt(prompt)
    front = len(task._added[0])
    whole = own.decode(own_ids(name, prompt + completion), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if one.straddles or one.ids[: len(question)] != question or whole != prompt + completion or len(question) == front:
        return
    assert _Cut(task, question, ()).text(one.ids[len(question) :]) == completion


@pytest.mark.parametrize(("template", "lead"), [(TEMPLATE, ""), (INST, " "), (PLAIN_TEMPLATE, "")])
def test_white_space_that_a_template_puts_before_answers_is_found(template: str, lead: str) -> None:
    assert encoder("byte-level", template).chat_lead == lead
    assert encoder("byte-level", None).chat_lead == ""


@given(pieces=st.lists(st.sampled_from([" ", "a", "\n", " a"]), max_size=5), start=st.sampled_from(["", " ", " \n"]))
@CHECKS
def test_white_space_before_an_answer_is_left_out_of_its_stream(pieces: list[str], start: str) -> None:
    shown = list(_without_start((piece for piece in pieces), start))
    assert "".join(shown) == "".join(pieces).removeprefix(start)
    assert all(shown)


# What is shown of the data


@every_tokenizer
@given(prompt=TEXT, completion=TEXT, length=st.integers(2, 30))
@example(prompt="Say 😀", completion="日本", length=30)
@CHECKS
def test_picture_of_the_loss_shows_the_decoded_text(name: str, prompt: str, completion: str, length: int) -> None:
    task = encoder(name, max_length=length)
    (one,) = encode(task, Pair(prompt, completion))
    text_of = partial(task.decode, special_tokens=True)
    spans = _spans(one, text_of)
    if "\ufffd" not in text_of(one.ids):  # cut inside a character, which spoils those before it
        assert "".join(span.text for span in spans) == text_of(one.ids)
    assert [span.in_loss for span in spans] == [in_loss for in_loss, _ in groupby(map(int.__eq__, one.ids, one.labels))]


# The table in the docs

DOCS = Path(__file__).parents[1] / "docs" / "tokens.md"
BORDERS = {
    "nothing": ("", ""),
    "the completion's space": ("", " "),
    "the prompt's space": (" ", ""),
    "the prompt's ↵": ("\n", ""),
    "the prompt's ↵↵": ("\n\n", ""),
}


def table_row(name: str) -> str:
    """A tokenizer's row: the tokens of a pair, and whether pairs are asked with the tokens they are trained on."""
    task = encoder(name)
    (one,) = encode(task, Pair("Say red:", " red it"))
    tokens = tokenizer(name).convert_ids_to_tokens(one.ids)
    first = next(at for at, label in enumerate(one.labels) if label != IGNORE_INDEX)
    shown = " ".join([*tokens[:first], "⟦" + tokens[first], *tokens[first + 1 :]]).replace("|", "\\|") + "⟧"
    same = []
    for behind, before in BORDERS.values():
        pair = Pair("Say red:" + behind, before + "red")
        question = task.encode_question(pair)
        same.append("yes" if encode(task, pair)[0].ids[: len(question)] == question else "no")
    return " | ".join([f"| {name}", f"`{shown}`", *same]) + " |"


def test_docs_hold_the_table_of_tokenizers() -> None:
    head = ["tokenizer", "tokens", *BORDERS]
    rows = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |", *map(table_row, CASES)]
    text = DOCS.read_text(encoding="utf-8")
    stored = text.partition("_whole_text.py -->\n")[2].partition("\n<!-- end -->")[0].splitlines()
    if not SHARED.is_dir():
        stored = [row for row in stored if "stories260K" not in row]
    assert stored == rows
